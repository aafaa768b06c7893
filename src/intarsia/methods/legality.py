"""Which forms may stand at which kind of site and enter by which op: the table that a patch is checked against when it is made.

What is not here: whether a model has such a site and whether sizes fit (found when a method is laid into a model), and what
expressions over modules may do (`intarsia.compose.legality`).  A router goes with `Weigh` and with nothing else.  Vocabularies
and forms or ops of somebody else are not in the table; of these only the op's place is checked.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from intarsia.errors import SpecError
from intarsia.patches import (
    Add,
    Affine,
    Attend,
    Biaffine,
    Bottleneck,
    Butterfly,
    Cayley,
    Concat,
    Const,
    Coupling,
    Diag,
    Gain,
    Gated,
    Head,
    Householder,
    Ladder,
    LanguageModelHead,
    Matrix,
    Mul,
    MultiMaskLabels,
    Pairs,
    Renorm,
    Replace,
    Rot,
    Router,
    Scaled,
    Set,
    SubspaceEdit,
    Ticket,
    Tokens,
    Weigh,
)

Names = Collection[type]
ACTIVATIONS = ("out", "in")
TURNING = (Cayley, Butterfly, Householder, Pairs, Diag)
"""Factors that start as the identity, or may: a layer can be mapped by them."""

OPS: dict[str, tuple[Names, str]] = {
    "out": ((Add, Mul, Gain, Rot, Set), "an activation is added to, multiplied, mapped or replaced"),
    "in": ((Add, Mul, Gain, Rot, Set), "an activation is added to, multiplied, mapped or replaced"),
    "weight": ((Add, Mul, Gain, Rot), "a parameter is added to, multiplied or mapped"),
    "mem": ((Concat,), "a memory of keys and values gets more of them"),
    "seq": ((Concat,), "a sequence gets more tokens"),
    "logits": ((Replace,), "a head answers in place of another"),
}
"""Port -> ops, and why no others."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table.

    Attributes:
        gives: what the form's value is, as a sentence's end.
        ports: kinds of sites where it has one.
        ops: how it may enter.
        undone: the host applies its inverse, which would not be that of a form around it.
    """

    gives: str
    ports: Collection[str]
    ops: Names
    undone: bool = False


_HEADS = Entry("logits", ("logits",), (Replace,))
FORMS: dict[type, Entry] = {
    Const: Entry("one vector for all positions", ACTIVATIONS, (Add, Mul, Gain)),
    Affine: Entry("a linear map of what it reads", ACTIVATIONS, (Add, Mul, Gain, Set)),
    Bottleneck: Entry("a function of what it reads", ACTIVATIONS, (Add, Mul, Gain, Set)),
    SubspaceEdit: Entry("the change of a part of the stream", ACTIVATIONS, (Add,)),
    Coupling: Entry("the change of one half given the other", ACTIVATIONS, (Add,), undone=True),
    Renorm: Entry("the change of a linear layer's output", ("out",), (Add,)),
    Ladder: Entry("a hidden state", ("out",), (Set,)),
    Matrix: Entry("a tensor of the parameter's shape", ("weight",), (Add, Mul, Gain)),
    Ticket: Entry("what is left of the parameter", ("weight",), (Rot,)),
    Attend: Entry("keys and values", ("mem",), (Concat,)),
    Tokens: Entry("embeddings of tokens", ("seq",), (Concat,)),
    Head: _HEADS,
    LanguageModelHead: _HEADS,
    MultiMaskLabels: _HEADS,
    Biaffine: _HEADS,
}
_MAPS = Entry("a linear map of what is there", ("out", "in", "weight"), (Add, Mul, Gain, Rot, Set))
"""`Affine` that reads what it changes."""


def entry(form: Any) -> Entry | None:
    """The row of a form; None for one that is not in the table."""
    if isinstance(form, Affine) and form.read == "self":
        return _MAPS
    if isinstance(form, Gated | Scaled):
        inner = entry(form.form)
        return None if inner is None else _around(form, inner)
    return FORMS.get(type(form))


def _around(form: Gated | Scaled, inner: Entry) -> Entry:
    """The row of a form around one that has a row."""
    if inner.undone:
        return Entry("what could not be undone in front of the output embedding", (), ())
    if isinstance(form, Gated):
        return Entry("a gated value", tuple(p for p in inner.ports if p in ("out", "in", "mem")), (Add, Gain, Concat))
    ops = tuple(op for op in (Add, Gain, Mul) if op in inner.ops)
    return Entry("a scaled value", tuple(p for p in inner.ports if ops and p in ("out", "in", "weight")), ops)


def refusal(form: Any, op: Any, port: str) -> str | None:
    """Why a form may not enter by an op at a port; None where it may."""
    if isinstance(op, Weigh) != isinstance(form, Router):
        return f"{_named(form)} does not go with {_named(op)}: a router gives weights (Weigh), and nothing else does"
    known = {kind for kinds, _ in OPS.values() for kind in kinds}
    found = entry(form)
    allowed, why = OPS[port]
    if found is not None and port not in found.ports:
        return f"{_named(form)} gives {found.gives}, and has none at the port {port!r}; its ports: {_listed(found.ports) or 'none'}"
    if type(op) in known and type(op) not in allowed:
        return f"{_named(op)} does not go with the port {port!r}, where {why}: use {_listed(kind.__name__ for kind in allowed)}"
    if found is None or type(op) not in known or (type(op) in found.ops and not _turns_nothing(form, op)):
        return None
    if isinstance(form, Gated):
        return f"a gate weighs what is added, and a closed one would make zero of what {_named(op)} gives; gate it under Gain (h + h * value) or Add"
    if isinstance(op, Rot) and isinstance(form, Affine):
        return f"{_named(op)} puts a map in the place of what is there, and {_named(form.factor)} starts as no identity; use Cayley, Butterfly, Householder, Pairs or Diag, or Add"
    return f"{_named(form)} gives {found.gives}, which does not enter by {_named(op)}; it enters by {_listed(kind.__name__ for kind in found.ops if kind in allowed)}"


def check(name: str, form: Any, op: Any, port: str) -> None:
    """Refuse a patch that has no meaning.

    Raises:
        SpecError: which part does not go with which, and what does.
    """
    why = refusal(form, op, port)
    if why is not None:
        raise SpecError(f"patch {name!r}: {why}")


def _turns_nothing(form: Any, op: Any) -> bool:
    """Whether a map is put in the place of what is there, of a factor of ours that starts as no identity."""
    if not (isinstance(op, Rot) and isinstance(form, Affine)):
        return False
    return type(form.factor).__module__.startswith("intarsia.") and not isinstance(form.factor, TURNING)


def _named(part: Any) -> str:
    inner = getattr(part, "form", None)
    return f"{type(part).__name__}({_named(inner)})" if inner is not None else type(part).__name__


def _listed(words: Any) -> str:
    return ", ".join(words)
