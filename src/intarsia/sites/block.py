"""The sites of one block: from the words of a `Stack` to `Site`s, in the order in which the block runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.address import Site, View
from intarsia.sites.anatomy import SUBLAYERS, WEIGHT_ONLY, Stack, bare, optional
from intarsia.sites.draft import Draft, Role
from intarsia.sites.structure import join, parent

#: Projections a sub-layer reads its input with, in the order in which they are looked for.
FIRST_PROJECTION = {"attn": ("qkv", "q", "v"), "xattn": ("q",), "ffn": ("gate_up", "gate", "up")}


class Block:
    """Adds the sites of one block to a draft.

    Args:
        path: of the block, from the root of the model.
        width: size of the residual stream.
    """

    def __init__(self, draft: Draft, stack_name: str, stack: Stack, layer: int, path: str, width: int) -> None:
        self.draft, self.stack_name, self.stack = draft, stack_name, stack
        self.layer, self.path, self.width = layer, path, width

    def add_sites(self) -> None:
        for sublayer in SUBLAYERS:
            if self.has(sublayer):
                self.sublayer(sublayer)
        self.add("", self.path, features=self.width)
        self.draft.blocks[self.path] = (self.layer, self.stack_name)

    # -- words -------------------------------------------------------------------------------------------------------

    def has(self, role: str) -> bool:
        """Whether the block has the role; a role that is not marked optional must be there."""
        path = self.stack.roles.get(role)
        if path is None:
            return False
        full = join(self.path, bare(path))
        return self.draft.find(full) is not None if optional(path) else bool(self.draft.need(full, role))

    def full(self, role: str) -> str:
        return join(self.path, bare(self.stack.roles[role]))

    def name(self, role: str) -> str:
        return join(self.stack_name, str(self.layer), role)

    def add(self, role: str, path: str, **more: Any) -> None:
        self.draft.add(Site(self.name(role), path, layer=self.layer, stack=self.stack_name, **more))

    def leaf(self, role: str) -> None:
        """A module with parameters: a role for them and, unless it is one for weights only, its output."""
        if not self.has(role):
            return
        path = self.full(role)
        self.draft.role(path, Role(self.name(role), self.layer, self.stack_name))
        if role in self.stack.unsited:
            self.draft.missing[role] = self.stack.unsited[role]
        elif role not in WEIGHT_ONLY:
            features = self.draft.features(path, role, self.width)
            self.add(role, path, features=features, reused=role in self.stack.reused)

    # -- sub-layers --------------------------------------------------------------------------------------------------

    def sublayer(self, name: str) -> None:
        norm_first = self.stack.order in ("pre", "sandwich")
        if norm_first:
            self.leaf(f"{name}.norm")
        if name == "ffn":
            self.feed_forward()
        else:
            self.attention(name)
        self.leaf(f"{name}.out.norm")
        reads = self.reads(name)
        self.add(
            name,
            self.full(name),
            features=self.width,
            residual=self.full(f"{name}.norm") if norm_first else reads,
            norm=self.full(f"{name}.norm") if self.stack.order == "post" else None,
            reads=reads,
        )
        if not norm_first:
            self.leaf(f"{name}.norm")

    def reads(self, name: str) -> str:
        """Path of the module whose input is what the sub-layer reads, and nothing else."""
        for word in FIRST_PROJECTION[name]:
            if f"{name}.{word}" not in self.stack.reused and self.has(f"{name}.{word}"):
                return self.full(f"{name}.{word}")
        if name == "ffn" and self.has("ffn.experts"):
            return parent(self.full("ffn.experts"))
        raise SiteError(
            f"{self.draft.name}: the anatomy names no projection that {self.name(name)!r} reads with "
            f"(expected one of {', '.join(FIRST_PROJECTION[name])})"
        )

    def input_width(self, role: str) -> int:
        return structure.in_width(self.draft.need(self.full(role), role)) or self.width

    def attention(self, name: str) -> None:
        for fused in ("qkv", "kv"):
            if self.has(f"{name}.{fused}"):
                self.leaf(f"{name}.{fused}")
                self.divide(f"{name}.{fused}", self.attention_parts(name, fused))
        for word in ("q", "k", "v", "q.norm", "k.norm", "pos_q", "pos_k", "relative"):
            self.leaf(f"{name}.{word}")
        self.memory(name)
        width = self.input_width(f"{name}.o")
        self.add(f"{name}.heads", self.full(f"{name}.o"), port="in", features=width, reads=self.reads(name), heads=self.divided(name))
        self.leaf(f"{name}.o")

    def attention_parts(self, name: str, fused: str) -> dict[str, int]:
        """Features of the parts of a fused projection: queries as many as the input of `o`, keys and values the rest."""
        rest = self.draft.features(self.full(f"{name}.{fused}"), f"{name}.{fused}", self.width)
        queries = {}
        if fused == "qkv":
            queries = {"q": self.input_width(f"{name}.o")}
            rest -= queries["q"]
        return {**queries, "k": rest // 2, "v": rest // 2}

    def heads(self, name: str, keys: int) -> tuple[int, int]:
        """(number of key/value heads, size of one) of an attention whose keys have `keys` features in all."""
        attention = self.draft.need(parent(self.reads(name)), f"{name}.mem")
        size = structure.head_size(attention, self.draft.model.config)
        if not size or keys % size:
            raise SiteError(
                f"{self.draft.name}: {self.name(name)}: its keys have {keys} features, "
                f"which heads of size {size} do not divide"
            )
        return keys // size, size

    def divided(self, name: str) -> tuple[int, int] | tuple[()]:
        """The same where it is known, without asking for it."""
        keys = self.draft.sites.get(self.name(f"{name}.k"))
        size = structure.head_size(self.draft.need(parent(self.reads(name)), name), self.draft.model.config)
        return (keys.features // size, size) if keys is not None and size and keys.features % size == 0 else ()

    def memory(self, name: str) -> None:
        """Keys and values can be reached where the module that owns the queries' projection calls the interface."""
        path = parent(self.reads(name))
        attention = self.draft.need(path, f"{name}.mem")
        if not structure.calls_interface(attention):
            self.draft.missing[f"{name}.mem"] = (
                f"its attention ({type(attention).__name__}) does not go through transformers' attention interface, "
                "so nothing can be put before its keys and values; use a method without attention memory"
            )
            return
        keys = self.draft.sites.get(self.name(f"{name}.k"))
        if keys is None:
            raise SiteError(f"{self.draft.name}: the anatomy does not say where the keys of {self.name(name)!r} are")
        heads = self.heads(name, keys.features)
        self.add(f"{name}.mem", path, port="mem", features=heads[1], heads=heads, reads=self.reads(name))

    def feed_forward(self) -> None:
        for word in ("gate_up", "gate", "up"):
            self.leaf(f"ffn.{word}")
        if self.has("ffn.gate_up"):
            half = self.draft.features(self.full("ffn.gate_up"), "ffn.gate_up", 0) // 2
            self.divide("ffn.gate_up", {"gate": half, "up": half})
        if self.has("ffn.down"):
            self.add("ffn.act", self.full("ffn.down"), port="in", features=self.input_width("ffn.down"))
            self.leaf("ffn.down")
        for word in ("router", "experts"):
            self.leaf(f"ffn.{word}")
        if self.has("ffn.experts"):
            reason = "its feed-forward is a mixture of experts; use ffn, or the weights of ffn.experts"
            self.draft.missing.update({f"ffn.{word}": reason for word in ("gate", "up", "act", "down")})

    def divide(self, role: str, widths: Mapping[str, int]) -> None:
        """Sites for the parts of a fused projection."""
        fused = self.stack.fused.get(role)
        sublayer, path = parent(role), self.full(role)
        if fused is None:
            reason = f"how the output of {bare(self.stack.roles[role])!r} divides is not known; use {role}"
            self.draft.missing.update({f"{sublayer}.{word}": reason for word in widths})
            return
        groups = self.heads(sublayer, widths["k"])[0] if fused.by_head else 1
        start, parts = 0, []
        for word in fused.parts:
            view = View(groups, start, widths[word] // groups)
            start += view.width
            parts.append((word, view))
            self.add(f"{sublayer}.{word}", path, features=view.features, view=view)
        self.draft.divide(path, parts)
