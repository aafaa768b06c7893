"""`Module`: a trained change of a base model, as a value.

A module has tensors, a specification (its method), a card and a digest, and lives without any model.  It names the base it
belongs to by fingerprint.  Nothing here changes a module: `rename` and `with_card` return others that share its tensors.

Identity.  `digest` covers what decides the numbers a module gives: tensors, method, base, label names, required modules
and context.  Name, roles and card may be completed later without changing it.

What is not here: files (`file.py`), arithmetic, and putting a module on a model (`host`).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from intarsia._codec import canonical_json, encode, plain
from intarsia.errors import ModuleError, SpecError, listing
from intarsia.modules.card import Card
from intarsia.modules.names import check_name
from intarsia.sites.fingerprint import COMPARED, Fingerprint

if TYPE_CHECKING:
    from intarsia.methods.method import Method, Patch

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
})  # fmt: skip
"""Tensor types a module may hold, by their safetensors names."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]*(/[A-Za-z0-9_][A-Za-z0-9_.:+-]*)+")
_MAX_KEY = 300
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Owned(dict[str, torch.Tensor]):
    """Tensors nobody else will write to: dense, contiguous, on the CPU. `Module` takes them without copying."""


@dataclass(frozen=True, eq=False, repr=False)
class Module:
    """A trained change of a base model.

    Attributes:
        name: what people call it; see `check_name`.
        method: the specification, a registered frozen dataclass.
        tensors: by `"<site>/<patch>.<leaf>"` or `"tied/<tag>.<leaf>"`, in alphabetical order; copies on the CPU,
            never aliases of live parameters. They are read only by convention: writing to one breaks `digest`.
        base: fingerprint of the base model.
        labels: label names by index, for a head.
        roles: what it is about, e.g. `{"language": "swh", "task": "ner"}`.
        requires: digests of modules it was trained on top of.
        card: see `Card`.
        context: plain settings its numbers depend on (tokenisation, text prefix, pooling).

    Raises:
        SpecError: a name, key, role, label, digest or context value is malformed.
        ModuleError: a tensor is of a type or layout a module cannot hold.
    """

    name: str
    method: Method
    tensors: Mapping[str, torch.Tensor]
    base: Fingerprint
    labels: tuple[str, ...] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    card: Card = field(default_factory=Card)
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "name", check_name(self.name))
        held = self.tensors if isinstance(self.tensors, Owned) else Owned((k, _own(k, t)) for k, t in self.tensors.items())
        for key in held:
            check_key(key)
        put(self, "tensors", MappingProxyType(Owned((key, held[key]) for key in sorted(held))))
        put(self, "labels", None if self.labels is None else _check_labels(self.labels))
        put(self, "roles", MappingProxyType(_check_roles(self.roles)))
        put(self, "requires", _check_digests(self.requires))
        put(self, "context", MappingProxyType(plain(dict(self.context), "$.context")))
        if not isinstance(self.base, Fingerprint):
            raise ModuleError(f"the base of a module is a Fingerprint, found {type(self.base).__name__}; take it with fingerprint(model, tokenizer)")
        encode(self.method)  # refuse now what could not be stored later

    @cached_property
    def digest(self) -> str:
        """Identity: SHA-256 in 64 hexadecimal digits, see `identity`."""
        return identity(self, {key: tensor_sha256(tensor) for key, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def n_parameters(self) -> int:
        """Number of floating-point values; indices and masks are not counted."""
        return sum(t.numel() for t in self.tensors.values() if t.is_floating_point())

    def rename(self, name: str) -> Module:
        """The same module under another name; its digest stays."""
        return self._with(name=name)

    def with_card(self, card: Card) -> Module:
        """The same module with another card; its digest stays."""
        return self._with(card=card)

    def part(self, keep: Callable[[Patch], bool]) -> Module:
        """The module with some of its patches, itself if that is all of them; what parts share (`tied/`) stays, labels go with the head."""
        patches = tuple(patch for patch in self.method.patches if keep(patch))
        if len(patches) == len(self.method.patches):
            return self
        method = replace(self.method, patches=patches)
        names = {patch.name for patch in patches}
        tensors = Owned((key, t) for key, t in self.tensors.items() if key.startswith("tied/") or key.split("/", 1)[1].split(".", 1)[0] in names)
        return replace(self, method=method, tensors=tensors, labels=self.labels if method.head is not None else None)

    def _with(self, **changes: Any) -> Module:
        """A copy that shares tensors and digest; only for fields outside the identity."""
        other = replace(self, tensors=Owned(self.tensors), **changes)
        if "digest" in self.__dict__:
            other.__dict__["digest"] = self.digest
        return other

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Module) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy by value: a read-only view of a dictionary can do neither."""
        parts = (self.name, self.method, Owned(self.tensors), self.base, self.labels, dict(self.roles), self.requires)
        return Module, (*parts, self.card, dict(self.context))

    def __repr__(self) -> str:
        method = getattr(self.method, "name", type(self.method).__name__)
        return f"Module({self.name!r}, {method}, {len(self.tensors)} tensors, {self.n_parameters:,} parameters, {self.nbytes:,} bytes, {self.digest[:12]})"


def identity(module: Module, hashes: Mapping[str, str]) -> str:
    """The digest of a module whose tensors have these SHA-256 hashes.

    It is the SHA-256 of the canonical JSON of an object with the members `base` (the compared fields of the fingerprint),
    `context`, `labels`, `method`, `requires` and `tensors`, the last holding `[dtype, shape, sha256 of the little-endian
    bytes]` per tensor.
    """
    base = module.base.to_dict()
    document = {
        "base": {name: base[name] for name in COMPARED if name in base},
        "context": module.context,
        "labels": module.labels,
        "method": encode(module.method),
        "requires": module.requires,
        "tensors": {k: [DTYPE_NAMES[t.dtype], list(t.shape), hashes[k]] for k, t in module.tensors.items()},
    }
    return hashlib.sha256(canonical_json(document)).hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes as they lie in memory."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without copying."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def check_key(key: str) -> None:
    """Refuse a tensor name that is not `<site>/<patch>.<leaf>` in plain ASCII.

    Raises:
        SpecError: says what was found.
    """
    if not isinstance(key, str) or len(key) > _MAX_KEY or not _KEY.fullmatch(key):
        raise SpecError(f"tensor name {ascii(key)[:80]} is not of the form '<site>/<patch>.<leaf>' (ASCII, at most {_MAX_KEY} characters)")


def _own(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A dense, contiguous CPU copy of a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise ModuleError(f"{key!r} is not a tensor but {type(tensor).__name__}")
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor:
        raise ModuleError(f"tensor {key!r} is a {type(tensor).__name__}; gather or dequantise it to a plain tensor first")
    if tensor.layout is not torch.strided or tensor.is_meta:
        where = "on the meta device, without values" if tensor.is_meta else f"of layout {tensor.layout}"
        raise ModuleError(f"tensor {key!r} is {where}; a module holds dense tensors (store a sparse one as indices and values)")
    if tensor.dtype not in DTYPE_NAMES:
        raise ModuleError(f"tensor {key!r} has dtype {tensor.dtype}; a module holds {listing(map(str, DTYPE_NAMES), 20)}")
    return tensor.resolve_neg().cpu().clone(memory_format=torch.contiguous_format)


def _check_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(labels, str):
        raise SpecError(f"labels is a sequence of names, found the string {labels[:80]!r}")
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise SpecError(f"labels[{index}] is {label!r}; label names are strings")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise SpecError(f"label names stand twice: {listing(map(repr, twice))}")
    return tuple(labels)


def _check_roles(roles: Mapping[str, str]) -> dict[str, str]:
    for key, value in roles.items():
        if not (isinstance(key, str) and key and isinstance(value, str)):
            raise SpecError(f"role {key!r}: {value!r} is not a name and a string")
    return dict(roles)


def _check_digests(digests: tuple[str, ...]) -> tuple[str, ...]:
    for digest in digests:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise SpecError(f"requires: {str(digest)[:80]!r} is not a digest (64 lower-case hexadecimal digits)")
    return tuple(digests)
