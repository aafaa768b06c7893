"""How modules combine: expressions, their text form and the arithmetic of site values."""

from intarsia.compose.algebra import BLOCKS, LOGITS, TENSORS, Algebra
from intarsia.compose.expr import At, Expr, Mix, Ref, Seq, average, expr, fuse, names, phi
from intarsia.compose.text import parse, show

__all__ = ["BLOCKS", "LOGITS", "TENSORS", "Algebra", "At", "Expr", "Mix", "Ref", "Seq", "average", "expr", "fuse", "names", "parse", "phi", "show"]
