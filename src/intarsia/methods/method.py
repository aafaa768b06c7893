"""`Patch`, `Policy`, `Method`: a method is a template of patches plus what else its paper prescribes.

A `Method` is pure data (it is written into module files).  The literature's names are factories in `rows.py` and its
neighbours, registered in `METHODS`; each is a few lines that fill in a `Method`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from intarsia._codec import register
from intarsia._registry import Registry
from intarsia.errors import SpecError, listing, nearest
from intarsia.methods.legality import check
from intarsia.patches import (
    Add,
    Biaffine,
    FormSpec,
    Head,
    KeptMask,
    LanguageModelHead,
    MultiMaskLabels,
    OpSpec,
    Ticket,
    TopMask,
)

PortName = Literal["out", "in", "weight", "mem", "seq", "logits"]
HeadSpec = Head | LanguageModelHead | MultiMaskLabels | Biaffine


@register("patch")
@dataclass(frozen=True, slots=True)
class Patch:
    """At the sites `at` (of `port`), the value of `form` enters by `op`.

    Attributes:
        name: unique within the method; part of the names tensors are stored under.
        at: site pattern, see `intarsia.sites.address.matches`.
        port: which kind of site.
        layers: layers per stack, e.g. `"-3:"`; None for all.
        tag: group of parameters for the policy's learning rates (`head`, `norm`, ...); empty for the default group.
        optional: a model without these sites is no error (e.g. layer norms without a bias).
    """

    name: str
    at: str
    form: FormSpec
    op: OpSpec = field(default_factory=Add)
    port: PortName = "out"
    layers: str | None = None
    tag: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        check(self.name, self.form, self.op, self.port)


@register("group")
@dataclass(frozen=True, slots=True)
class Group:
    """Learning-rate factor and weight decay for some of the parameters.

    Attributes:
        tag: of the patches it concerns; `tag:in` or `tag:out` (with an empty tag `:in`, `:out`) for one side of their
            factors only, `tag:gate` for gates, see `side`.
        rate: multiplies the learning rate of the main group.
        decay: weight decay, None for that of the main group.
    """

    tag: str
    rate: float = 1.0
    decay: float | None = None


States = Mapping[Any, dict[str, Any]]


def side(name: str, dimensions: int) -> str:
    """The side of a factor that a tensor is on, by its name: `in` (what reads), `gate`, `out` (what writes, every other vector), or none."""
    words = name.split("/")[-1].split(".")
    if words[-1] in ("alpha", "alpha_group"):
        return "gate"
    if "down" in words and dimensions > 1:
        return "in"
    return "out" if "up" in words or dimensions < 2 else ""


@runtime_checkable
class Penalty(Protocol):
    """A term of the loss that a method contributes: a frozen, registered dataclass."""

    def loss(self, parts: Sequence[nn.Module]) -> Tensor | None:
        """The term, already weighted, for the forms of a module and its tied parts; None if none of them concerns it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a training whose learning-rate schedule begins anew.

    Attributes:
        begin: optimiser steps before it.
        skip: steps of its schedule that are left out: it goes on from there.
        rate: multiplies the learning rates of all but the head.
    """

    begin: int
    skip: int = 0
    rate: float = 1.0


@runtime_checkable
class RoutePenalty(Protocol):
    """A term of the loss about the weights that a router gave in the forward: a frozen, registered dataclass."""

    def routed(self, notes: Sequence[Any]) -> Tensor | None:
        """The term, already weighted, for all notes (`site`, `owner`, `weights` [..., n], `members`) of one forward."""


@runtime_checkable
class StepRule(Protocol):
    """What a method does to its tensors between optimiser steps: a frozen, registered dataclass."""

    def after_step(self, step: int, total: int, parts: Mapping[str, nn.Module], memory: dict[str, Tensor], states: States) -> None:
        """Called after every optimiser step, before gradients are cleared.

        Args:
            step: of `total`, counted from 1.
            parts: the module's forms by `<site>/<patch>`, in model order.
            memory: what the rule remembers; kept with the checkpoint.
            states: the optimiser's state of every parameter, to be changed in place.

        Three more methods are used where a rule has them: `begin(step, parts, memory)` before the first forward of a step,
        `settled(total) -> int`, the step before which no evaluation is taken for the best one, and `stages(total) -> [Stage]`,
        where the learning-rate schedule begins anew.
        """


@runtime_checkable
class GradientRule(Protocol):
    """What a method does to gradients before the optimiser and its moments see them: a frozen, registered dataclass."""

    def before_step(self, step: int, seed: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change the gradients of a module's parameters in place.

        Args:
            step: counted from 1; what is drawn follows from `seed` and `step` alone.
            parameters: by their names in the module's file.
        """


@runtime_checkable
class Phase(Protocol):
    """What happens before a module's own training: a frozen, registered dataclass of `program.py`."""

    def chooses(self) -> str:
        """What the choice goes by, in a few words."""


@register("policy")
@dataclass(frozen=True, slots=True)
class Policy:
    """What a paper prescribes besides the patches.

    Attributes:
        learning_rate: default of the method's main group (AdamW).
        decay: weight decay of the main group; 0 for methods that must not be pulled to zero, such as (IA)^3.
        groups: overrides per tag.
        flatten: export reparametrised tensors to plain ones when training ends.
        penalties: terms added to the task's loss, see `Host.penalty`.
        steps: what is done between optimiser steps.
        gradients: what is done to gradients, after clipping.
        program: phases before the training proper that choose what it trains, see `program.py`.
        drop_layers: at every training step the lowest n ~ U{0 ... drop_layers} layers run without modules, i.e. with
            `drop_layers=n` in the call's context (AdapterDrop); see `dropped_layers`.
    """

    learning_rate: float = 5e-4
    decay: float = 0.0
    groups: tuple[Group, ...] = ()
    flatten: bool = False
    penalties: tuple[Penalty | RoutePenalty, ...] = ()
    steps: tuple[StepRule, ...] = ()
    gradients: tuple[GradientRule, ...] = ()
    program: tuple[Phase, ...] = ()
    drop_layers: int = 0


def dropped_layers(policy: Policy, seed: int, step: int) -> dict[str, int]:
    """What a training step adds to the call's context; the same for a seed and a step, so that a resumed run repeats it."""
    if not policy.drop_layers:
        return {}
    return {"drop_layers": Random(f"{seed}:{step}").randint(0, policy.drop_layers)}


@register("method")
@dataclass(frozen=True, slots=True)
class Method:
    """A named template of patches.

    Attributes:
        name: the literature's name.
        source: paper (arXiv id) the row follows.
        settings: the arguments the row was built with, for display and for `transfer`.
    """

    name: str
    patches: tuple[Patch, ...] = ()
    policy: Policy = field(default_factory=Policy)
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [p.name for p in self.patches]
        if len(set(names)) != len(names):
            raise SpecError(f"method {self.name!r} has two patches of the same name: {names}")
        for name in names:
            if not name.isidentifier():
                raise SpecError(f"patch name {name!r} of method {self.name!r} must be an identifier")

    @property
    def head(self) -> HeadSpec | None:
        """The head among the patches, if any."""
        return next((p.form for p in self.patches if isinstance(p.form, HeadSpec)), None)

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the patches whose value stands for the base's weight: which weights count, not what is added to them."""
        return tuple(p.name for p in self.patches if isinstance(p.form, Ticket) or isinstance(getattr(p.form, "factor", None), TopMask | KeptMask))

    def with_head(self, head: HeadSpec) -> Method:
        """The same method with new outputs; their parameters have the tag `head`."""
        if self.head is not None:
            raise SpecError(f"method {self.name!r} already has a head: {self.head}")
        return replace(self, patches=(*self.patches, head_patch(head)))

    def without_head(self) -> Method:
        """The method without its head."""
        return replace(self, patches=tuple(p for p in self.patches if p.port != "logits"))


def head_patch(head: HeadSpec) -> Patch:
    """The patch that puts a head on the model's final hidden states."""
    from intarsia.patches import Replace

    return Patch("head", "logits", head, Replace(), port="logits", tag="head")


def union(name: str, *methods: Method, policy: Policy | None = None, source: str = "") -> Method:
    """The patches of several methods as one; where patch names collide the later ones are numbered."""
    patches: list[Patch] = []
    taken: set[str] = set()
    for method in methods:
        for patch in method.patches:
            unique, number = patch.name, 1
            while unique in taken:
                number += 1
                unique = f"{patch.name}_{number}"
            taken.add(unique)
            patches.append(replace(patch, name=unique))
    return Method(name, tuple(patches), policy or methods[0].policy, source or "; ".join(m.source for m in methods))


@dataclass(frozen=True, slots=True)
class Row:
    """A registered method: its factory and what the method table says of it."""

    name: str
    factory: Callable[..., Method]
    summary: str
    equation: str
    source: str

    @property
    def defaults(self) -> dict[str, Any]:
        """Names and default values of the factory's arguments."""
        return {k: p.default for k, p in inspect.signature(self.factory).parameters.items()}

    def build(self, **settings: Any) -> Method:
        """The method with some arguments set; an unknown argument is refused with a suggestion."""
        for key in settings:
            if key not in self.defaults:
                raise SpecError(
                    f"method {self.name!r} has no setting {key!r}{nearest(key, self.defaults)} "
                    f"known: {listing(self.defaults, 20) or 'none'}"
                )
        method = self.factory(**settings)
        return replace(method, source=method.source or self.source, settings={**self.defaults, **settings})


METHODS: Registry[Row] = Registry("method")


def row(name: str, *, equation: str, source: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a factory as the method `name`; its docstring's first line is the summary."""

    def add(factory: Callable[..., Method]) -> Callable[..., Method]:
        summary = (inspect.getdoc(factory) or "").split("\n", 1)[0]
        METHODS.add(name, Row(name, factory, summary, equation, source))
        return factory

    return add


def build(name: str, **settings: Any) -> Method:
    """The method of the literature with this name, e.g. `build("lora", rank=4)`."""
    return METHODS[name].build(**settings)
