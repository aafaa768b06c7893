"""What is changed at a site: forms, ops, factors, initial values."""

from intarsia.patches.affine import Affine
from intarsia.patches.attend import Attend
from intarsia.patches.bottleneck import Bottleneck
from intarsia.patches.const import Const
from intarsia.patches.delta import Delta, Form, FormSpec, Linear, OpSpec, Seen, WhyNot
from intarsia.patches.factors import Dense, Factor, FactorSpec, LowRank
from intarsia.patches.heads import Head, LanguageModelHead
from intarsia.patches.kron import Kron, KronPair
from intarsia.patches.matrix import Matrix
from intarsia.patches.ops import Add, Concat, Mul, Replace
from intarsia.patches.place import Place
from intarsia.patches.tokens import Tokens

__all__ = [
    "Add",
    "Affine",
    "Attend",
    "Bottleneck",
    "Concat",
    "Const",
    "Delta",
    "Dense",
    "Factor",
    "FactorSpec",
    "Form",
    "FormSpec",
    "Head",
    "Kron",
    "KronPair",
    "LanguageModelHead",
    "Linear",
    "LowRank",
    "Matrix",
    "Mul",
    "OpSpec",
    "Place",
    "Replace",
    "Seen",
    "Tokens",
    "WhyNot",
]
