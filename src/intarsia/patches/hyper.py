"""`Hyper`: a factor generated from an embedding of the task (HyperFormer, Mahabadi et al. 2021, arXiv 2106.04489).

    vec(W_task) = G z + c              condition=("task",): one generator per tensor, as HyperFormer
    I = LN(MLP([z; layer; site]))      with `layer` and `site`: generators shared by the layers and sites of a stack,
    vec(W_task) = G I + c              as HyperFormer++

Any form that takes a factor can be generated: adapters with their biases and norms, vectors, LoRA.  The call names the
task: `host.using("m", task="rte")`, or one per row; with a single task nothing needs to be named.  `fixed(context)` is the
plain tensor of one task.  What is not here: which tasks are trained together, that is a matter of batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import CompositionError, SpecError, listing, nearest
from intarsia.patches.delta import Seen, same_dtype
from intarsia.patches.factors import Applied, Dense, Factor, FactorSpec
from intarsia.patches.init import INITS, normal
from intarsia.patches.place import Place

KEY = "task"
"""The key of the call's context."""
EPSILON = 1e-5


class Table(nn.Module):
    """Embeddings: [n, t]."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value


class Condition(nn.Module):
    """[k, sum of parts] -> [k, t]: two layers and a norm over the embeddings of task, layer and site."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, value)

    first: nn.Parameter
    first_bias: nn.Parameter
    second: nn.Parameter
    second_bias: nn.Parameter
    norm: nn.Parameter
    norm_bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.linear(x, self.first, self.first_bias))
        x = F.linear(x, self.second, self.second_bias)
        return F.layer_norm(x, x.shape[-1:], self.norm, self.norm_bias, EPSILON)


class Generator(nn.Module):
    """[k, t] -> [k, n]: n = number of entries of the generated tensor."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Generated:
    """The tensors of the tasks of one pass: [k, *shape], and which one each row has (None: all the first)."""

    __slots__ = ("index", "value")

    def __init__(self, value: Tensor, index: Tensor | None) -> None:
        self.value = value
        self.index = index

    def materialise(self) -> Tensor:
        return self.value[0] if self.index is None else self.value[self.index]

    def __call__(self, x: Tensor) -> Tensor:
        x = same_dtype(x, self.value)
        if self.index is None:
            return F.linear(x, self.value[0])
        rows = x.reshape(len(self.index), -1, x.shape[-1])  # some layers flatten [B, T]
        return torch.matmul(rows, self.value[self.index].mT).view(*x.shape[:-1], -1)


class HyperFactor(Factor):
    """A tensor of `shape` for every task."""

    reads_call = True

    def __init__(self, parts: Parts, generator: Generator, shape: tuple[int, ...], tied: bool, spec: Hyper) -> None:
        super().__init__()
        self.__dict__["parts"] = parts
        if tied:
            self.__dict__["generator"] = generator  # belongs to the module's root, see `Place.tied`
        else:
            self.generator = generator
        self.shape = shape
        self.spec = spec

    parts: Parts
    generator: Generator

    def of(self, tasks: list[int]) -> Tensor:
        """The tensors of some tasks, [k, *shape]."""
        return self.generator(self.parts.condition(tasks)).view(len(tasks), *self.shape)

    def given(self, seen: Seen) -> Applied:
        if len(self.spec.tasks) == 1:
            return Generated(self.of([0]), None)
        rows = [self.spec.index(value) for value in seen.per_row(KEY)]
        distinct = sorted(set(rows))
        index = None if len(distinct) == 1 else torch.tensor([distinct.index(r) for r in rows], device=self.generator.bias.device)
        return Generated(self.of(distinct), index)

    def fixed(self, context: Mapping[str, Any]) -> Tensor | None:
        if len(self.spec.tasks) == 1:
            return self.of([0])[0]
        return self.of([self.spec.index(context[KEY])])[0] if KEY in context else None

    def export_for(self, context: Mapping[str, Any]) -> tuple[FactorSpec, dict[str, Tensor]] | None:
        found = self.fixed(context)
        return None if found is None else (Dense(), {"value": found})

    def export(self) -> tuple[FactorSpec, dict[str, Tensor]] | None:
        return self.export_for({})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(same_dtype(x, self.generator.bias), self.materialise())

    def materialise(self) -> Tensor:
        found = self.fixed({})
        if found is None:
            raise CompositionError(
                f"a generated factor has one tensor for each of {len(self.spec.tasks)} tasks ({listing(self.spec.tasks)}); "
                "name one: extract(name, flatten=True, task=...)"
            )
        return found


class Parts:
    """The embeddings a generator reads, tied across the module."""

    __slots__ = ("join", "others", "tasks")

    def __init__(self, tasks: Table, others: list[Table], join: Condition | None) -> None:
        self.tasks = tasks
        self.others = others
        self.join = join

    def condition(self, tasks: list[int]) -> Tensor:
        """[k, t]."""
        z = self.tasks.value[tasks]
        if self.join is None:
            return z
        return self.join(torch.cat([z, *(other.value.expand(len(z), -1) for other in self.others)], 1))


@register("hyper")
@dataclass(frozen=True, slots=True)
class Hyper:
    """A factor generated from the task, and where `condition` says so from layer and site.

    Attributes:
        tasks: names of the tasks, in the order of their embeddings.
        condition: what the generator reads; a generator is shared by the layers, or sites, that it reads.
        width: size of every embedding.
        hidden: size of the hidden layer that joins several embeddings.
        std: start of every map (biases zero; a generated tensor's constant starts as the form prescribes).
    """

    tasks: tuple[str, ...] = (KEY,)
    condition: tuple[Literal["task", "layer", "site"], ...] = ("task",)
    width: int = 64
    hidden: int = 128
    std: float = 0.01

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise SpecError(f"a generated factor needs the names of its tasks, each once, found {self.tasks}")
        if self.condition[:1] != ("task",) or len(set(self.condition)) != len(self.condition):
            raise SpecError(f"condition begins with 'task', then 'layer' and 'site' at most once, found {self.condition}")

    @property
    def generated(self) -> bool:
        return True

    def index(self, task: Any) -> int:
        """Number of a task given by name or number."""
        if isinstance(task, str):
            if task not in self.tasks:
                raise CompositionError(f"unknown task {task!r}{nearest(task, self.tasks)} known: {listing(self.tasks, 20)}")
            return self.tasks.index(task)
        number = int(task)
        if not 0 <= number < len(self.tasks):
            raise CompositionError(f"task {number} does not exist: there are {len(self.tasks)} (0 ... {len(self.tasks) - 1})")
        return number

    def build(self, shape: tuple[int, ...], place: Place, init: str = "zeros") -> HyperFactor:
        fill = normal(self.std)
        tasks = place.tied(("hyper", "tasks"), lambda: Table(place.parameter(len(self.tasks), self.width, fill=normal(1.0))))
        if tasks.value.shape != (len(self.tasks), self.width):
            raise SpecError("generated factors of one module share their task embeddings: tasks and width must be the same")
        where, others, join = self._words(place), [], None
        for word in self.condition[1:]:
            key = ("hyper", place.site.stack, word, where[word])
            others.append(place.tied(key, lambda: Table(place.parameter(1, self.width, fill=normal(1.0)))))
        if others:
            sizes = (self.width * len(self.condition), self.hidden, self.width)

            def joined() -> Condition:
                layers: dict[str, nn.Parameter] = {}
                for name, n, m in (("first", sizes[0], sizes[1]), ("second", sizes[1], sizes[2])):
                    layers |= {name: place.parameter(m, n, fill=fill), f"{name}_bias": place.parameter(m)}
                return Condition({**layers, "norm": place.parameter(sizes[2], fill=1.0), "norm_bias": place.parameter(sizes[2])})

            join = place.tied(("hyper", place.site.stack, "condition"), joined)
        entries = math.prod(shape)

        def generator() -> Generator:
            constant = place.parameter(*shape, fill=INITS[init])
            return Generator(place.parameter(entries, self.width, fill=fill), nn.Parameter(constant.detach().flatten()))

        parts = Parts(tasks, others, join)
        if not others:
            return HyperFactor(parts, generator(), shape, False, self)
        apart = [where[word] for word in ("layer", "site") if word not in self.condition]  # not read, so not shared
        words = ("hyper", place.site.stack, "generator", *apart, place.role, "x".join(map(str, shape)))
        return HyperFactor(parts, place.tied(words, generator), shape, True, self)

    @staticmethod
    def _words(place: Place) -> dict[str, str]:
        """The layer and the kind of a site, as words of keys."""
        words = place.site.name.split(".")
        layer = "none" if place.site.layer is None else str(place.site.layer)
        kind = [w for w in words if w != place.site.stack and not w.isdecimal()]
        return {"layer": layer, "site": "-".join(kind) or "block"}
