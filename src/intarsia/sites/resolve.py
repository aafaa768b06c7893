"""`resolve`: from a model to its `SiteMap`, by a row of `anatomy` or by inference where no row is known.

No forward pass is made (but see `infer`, which an unknown architecture needs), the model is not changed in any way,
and models on the meta device are welcome.  What is not here: the rows (`anatomy.py`), their proof (`infer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from intarsia.errors import SiteError, nearest
from intarsia.sites import structure
from intarsia.sites.address import Site, SiteMap, View
from intarsia.sites.anatomy import SUBLAYERS, WEIGHT_ONLY, Anatomy, Fused, Stack, bare, optional, row
from intarsia.sites.infer import infer
from intarsia.sites.structure import join, parent

#: Projections a sub-layer reads its input with, in the order in which they are looked for.
FIRST_PROJECTION = {"attn": ("qkv", "q"), "xattn": ("q",), "ffn": ("gate_up", "gate", "up")}

#: Sites every architecture could have; what is absent is explained by these words if nothing more is known.
ABSENT = {
    "attn.q": "its queries have no projection of their own",
    "xattn": "it has no cross-attention",
    "ffn.gate": "its feed-forward has no gate",
    "final.norm": "no norm follows its last block",
    "pooler": "it has no pooler (or was built without one)",
    "head": "it has no output embeddings; parameters of its task head are named head.<path>",
}


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The row that holds for the model, or what inference finds.

    Raises:
        SiteError: there is no row, and inference could not find something; the message says what.
    """
    structure.base_path(model)
    return row(model.config) or infer(model)


def resolve(model: PreTrainedModel, *, anatomy: Anatomy | None = None) -> SiteMap:
    """All sites of a model.

    Args:
        model: any transformers model, with or without a task head, on any device (also meta).
        anatomy: the row to use instead of the one known for `config.model_type`.

    Every parameter of the model gets exactly one `weight` site without a view (`SiteMap.parameters`): `<role>.weight`
    or `.bias` where it has a role, `head.<path>` in a task head outside the base, `other.<path below the base>`
    elsewhere.  `logits` has `features=0` where the model computes none of its own.

    Raises:
        SiteError: a module the anatomy names is not in the model, or an unknown architecture could not be inferred.
    """
    return _Resolver(model, anatomy or anatomy_of(model)).run()


@dataclass(slots=True)
class _Role:
    """Where a role's parameters are to be found: `<name>.weight` at a module path."""

    name: str
    layer: int | None
    stack: str
    lend_at: str | None = None


@dataclass(slots=True)
class _Resolver:
    model: PreTrainedModel
    anatomy: Anatomy
    prefix: str = ""
    sites: dict[str, Site] = field(default_factory=dict)
    roles: dict[str, _Role] = field(default_factory=dict)  # module path -> role that names its parameters
    views: dict[str, dict[str, View]] = field(default_factory=dict)  # module path -> part -> view
    layers: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def run(self) -> SiteMap:
        self.prefix = structure.base_path(self.model)
        stacks = {name: stack for name, stack in self.anatomy.stacks.items() if self._present(name, stack)}
        if not stacks:
            raise SiteError(f"{self._name}: it has none of the stacks {', '.join(self.anatomy.stacks)} of its anatomy")
        if self.anatomy.shared:
            self._role("embed", join(self.prefix, bare(self.anatomy.shared)), None, "")
        for name, stack in stacks.items():
            self._stack(name, stack)
        self._head()
        self._weights()
        for family, reason in ABSENT.items():
            if not any(site.name.split(".")[-len(family.split(".")) :] == family.split(".") for site in self.sites.values()):
                self.missing.setdefault(family, reason)
        return SiteMap(self.sites.values(), model=self._name, layers=self.layers, missing=self.missing)

    # -- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _module(self, path: str) -> nn.Module | None:
        return structure.find(self.model, path)

    def _need(self, path: str, role: str) -> nn.Module:
        module = self._module(path)
        if module is None:
            paths = [known for known, _ in self.model.named_modules() if known]
            raise SiteError(
                f"{self._name}: role {role!r} should be at {path!r}, which is not there{nearest(path, paths)}. "
                f"The anatomy for model_type {getattr(self.model.config, 'model_type', '')!r} does not fit this model; "
                "try resolve(model, anatomy=infer(model)), and see sites.verify(model)"
            )
        return module

    def _add(self, site: Site) -> None:
        self.sites.setdefault(site.name, site)

    def _role(self, name: str, path: str, layer: int | None, stack: str, lend_at: str | None = None) -> None:
        self.roles.setdefault(path, _Role(name, layer, stack, lend_at))

    def _present(self, name: str, stack: Stack) -> bool:
        """Models with one of two stacks exist (T5EncoderModel, BartForCausalLM)."""
        if len(self.anatomy.stacks) == 1 or self._module(join(self.prefix, stack.blocks.split(".")[0])) is not None:
            return True
        self.missing[name] = f"this model was built without its {name}"
        return False

    # -- one stack ---------------------------------------------------------------------------------------------------

    def _blocks(self, stack: Stack) -> list[str]:
        """Paths of the blocks in order; a `*` in the path stands for every child of a list."""
        paths = [self.prefix]
        for word in stack.blocks.split("."):
            if word == "*":
                paths = [join(path, child) for path in paths for child, _ in self._need(path, "blocks").named_children()]
            else:
                paths = [join(path, word) for path in paths]
        lists = [(path, self._need(path, "blocks")) for path in paths]
        found = [join(path, child) for path, blocks in lists for child, _ in blocks.named_children() if child.isdigit()]
        if not found:
            raise SiteError(f"{self._name}: {join(self.prefix, stack.blocks)!r} holds no blocks")
        return found

    def _stack(self, name: str, stack: Stack) -> None:
        blocks = self._blocks(stack)
        width = structure.out_width(self._need(join(blocks[0], bare(stack.roles["attn.o"])), "attn.o")) or 0
        self.layers[name] = len(blocks)
        around = {role: path for role, path in stack.around.items() if self._kept(join(self.prefix, bare(path)), path, role)}
        lend = {join(self.prefix, path): join(self.prefix, reader) for path, reader in stack.lend.items()}
        self._sequence(name, stack, around)
        for role in ("embed", "embed.position", "embed.type", "embed.norm", "embed.project", "embed.relative", "embed.relative.norm"):
            self._around(role, name, around, width, lend)
        stem = join(self.prefix, bare(around["stem"])) if "stem" in around else blocks[0]
        self._add(Site(join(name, "stem"), stem, "out" if "stem" in around else "in", width, stack=name))
        for layer, block in enumerate(blocks):
            _Block(self, name, stack, layer, block, width).run()
        for role in ("final.norm", "final.project", "pooler"):
            self._around(role, name, around, width, lend)

    def _kept(self, full: str, path: str, role: str) -> bool:
        return self._need(full, role) is not None if not optional(path) else self._module(full) is not None

    def _around(self, role: str, name: str, around: Mapping[str, str], width: int, lend: Mapping[str, str]) -> None:
        if role not in around:
            return
        path = join(self.prefix, bare(around[role]))
        fallback = width
        if role == "embed.position" and "embed" in around:  # sinusoids are as wide as what they are added to
            fallback = structure.out_width(self._need(join(self.prefix, bare(around["embed"])), "embed")) or width
        self._role(join(name, role), path, None, name, lend.get(path))
        if role not in WEIGHT_ONLY:
            features = structure.out_width(self._need(path, role)) or fallback
            self._add(Site(join(name, role), path, "out", features, stack=name))

    def _sequence(self, name: str, stack: Stack, around: Mapping[str, str]) -> None:
        """The stack whose sequence of embeddings can be lengthened: the only one, or the first of two."""
        if "seq" in {site.name.rpartition(".")[2] for site in self.sites.values()} or "seq" in self.missing:
            return
        if not stack.tokens:
            self.missing["seq"] = f"its {name} reads frames of sound, not a sequence of embeddings"
            return
        features = structure.out_width(self._need(join(self.prefix, bare(around["embed"])), "embed")) or 0
        path = join(self.prefix, name) if len(self.layers) + len(self.anatomy.stacks) > 2 else self.prefix
        self._add(Site(join(name, "seq"), path, "seq", features, stack=name))

    # -- head and logits ---------------------------------------------------------------------------------------------

    def _head(self) -> None:
        head = structure.output_embeddings(self.model)
        fields = structure.output_fields(self.model)
        features = 0
        if head is not None:
            path = next(path for path, module in self.model.named_modules() if module is head)
            features = structure.out_width(head) or 0
            self._role("head", path, None, "")
            self._add(Site("head", path, "out", features))
        elif fields is not None and "logits" in fields:
            features = int(getattr(self.model.config, "num_labels", 0) or 0)
        self._add(Site("logits", "", "logits", features))

    # -- parameters --------------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        order = {role.name: number for number, role in enumerate(self.roles.values())}
        found = [self._weight(owned) for owned in structure.parameters(self.model)]
        rank = {name: order.get(name.rpartition(".")[0], len(order)) for name in (site.name for site in found)}
        for site in sorted(found, key=lambda site: rank[site.name]):
            if site.name in self.sites:
                other = self.sites[site.name]
                raise SiteError(
                    f"{self._name}: the parameters at {site.path!r} and {other.path!r} would both be called {site.name!r}; "
                    "the anatomy gives one role to two modules"
                )
            self._add(site)
            for word, view in self.views.get(site.path, {}).items():
                name = join(parent(parent(site.name)), word, site.param or "")
                self._add(replace(site, name=name, view=view))
            for path, param in site.owners[1:]:
                if path in self.roles and self.roles[path].name != site.name.rpartition(".")[0]:
                    self.missing[f"{self.roles[path].name}.{param}"] = f"it is tied to {site.name!r}"

    def _weight(self, owned: structure.Owned) -> Site:
        """The weight site of one Parameter; among tied owners the one whose role comes first names it."""
        number = {path: position for position, path in enumerate(self.roles)}
        owners = sorted(owned.owners, key=lambda owner: number.get(owner[0], len(number)))
        path, param = owners[0]
        module = self._need(path, "a parameter")
        role = self.roles.get(path)
        if role is None:
            layer, stack = self._place(path)
            role = _Role(self._plain_name(path), layer, stack)
        if path == join(self.prefix, bare(self.anatomy.shared)) and self.anatomy.shared and len(owners) > 1:
            owners = [*owners[1:], owners[0]]  # never executed: it must not come first
        return Site(
            name=join(role.name, param),
            path=owners[0][0],
            port="weight",
            layer=role.layer,
            stack=role.stack,
            param=owners[0][1],
            shape=tuple(owned.parameter.shape),
            transposed=isinstance(module, Conv1D) and owned.parameter.dim() == 2,
            owners=tuple(owners),
            lend_at=role.lend_at,
        )

    def _plain_name(self, path: str) -> str:
        if self.prefix and path != self.prefix and not path.startswith(self.prefix + "."):
            return join("head", path)
        return join("other", path[len(self.prefix) + 1 :] if self.prefix else path)

    def _place(self, path: str) -> tuple[int | None, str]:
        """Layer and stack of a module without a role."""
        for site in self.sites.values():
            if site.layer is not None and site.name == join(site.stack, str(site.layer)) and path.startswith(site.path + "."):
                return site.layer, site.stack
        for stack in self.layers:
            if stack and path.startswith(join(self.prefix, stack) + "."):
                return None, stack
        return None, ""


@dataclass(slots=True)
class _Block:
    """The sites of one block."""

    to: _Resolver
    stack_name: str
    stack: Stack
    layer: int
    path: str
    width: int

    def run(self) -> None:
        for sublayer in SUBLAYERS:
            if self._has(sublayer):
                self._sublayer(sublayer)
        self._add("", self.path, features=self.width)

    def _has(self, role: str) -> bool:
        path = self.stack.roles.get(role)
        return path is not None and self.to._kept(join(self.path, bare(path)), path, role)

    def _full(self, role: str) -> str:
        return join(self.path, bare(self.stack.roles[role]))

    def _name(self, role: str) -> str:
        return join(self.stack_name, str(self.layer), role)

    def _add(self, role: str, path: str, **more: Any) -> None:
        self.to._add(Site(self._name(role), path, layer=self.layer, stack=self.stack_name, **more))

    def _leaf(self, role: str) -> None:
        """A module with parameters: a role for them and, unless it is one for weights only, its output."""
        if not self._has(role):
            return
        path = self._full(role)
        self.to._role(self._name(role), path, self.layer, self.stack_name)
        if role in self.stack.unsited:
            self.to.missing[role] = self.stack.unsited[role]
        elif role not in WEIGHT_ONLY:
            module = self.to._need(path, role)
            features = structure.out_width(module) or self.width
            self._add(role, path, features=features, reused=role in self.stack.reused)

    def _sublayer(self, name: str) -> None:
        norm_first = self.stack.order in ("pre", "sandwich")
        if norm_first:
            self._leaf(f"{name}.norm")
        if name == "ffn":
            self._feed_forward()
        else:
            self._attention(name)
        self._leaf(f"{name}.out.norm")
        reads = self._reads(name)
        post = self.stack.order == "post"
        self._add(
            name,
            self._full(name),
            features=self.width,
            residual=self._full(f"{name}.norm") if norm_first else reads,
            norm=self._full(f"{name}.norm") if post else None,
            reads=reads,
        )
        if not norm_first:
            self._leaf(f"{name}.norm")

    def _reads(self, name: str) -> str:
        for word in FIRST_PROJECTION[name]:
            if self._has(f"{name}.{word}"):
                return self._full(f"{name}.{word}")
        if self._has("ffn.experts"):
            return parent(self._full("ffn.experts"))
        raise SiteError(
            f"{self.to._name}: the anatomy names no projection that {self._name(name)!r} reads with "
            f"(expected one of {', '.join(FIRST_PROJECTION[name])})"
        )

    def _attention(self, name: str) -> None:
        for fused in ("qkv", "kv"):
            if self._has(f"{name}.{fused}"):
                self._leaf(f"{name}.{fused}")
                self._divide(f"{name}.{fused}", dict(self._attention_parts(name, fused)))
        for word in ("q", "k", "v", "q.norm", "k.norm", "pos_q", "pos_k", "relative"):
            self._leaf(f"{name}.{word}")
        self._memory(name)
        output = self._full(f"{name}.o")
        self._add(f"{name}.heads", output, port="in", features=structure.in_width(self.to._need(output, f"{name}.o")) or self.width)
        self._leaf(f"{name}.o")

    def _heads(self, name: str, keys: int) -> tuple[int, int]:
        """(number of key/value heads, size of one) of an attention whose keys have `keys` features in all."""
        attention = self.to._need(self._core(name), f"{name}.mem")
        size = structure.head_size(attention, self.to.model.config)
        if not size or keys % size:
            raise SiteError(
                f"{self.to._name}: {self._name(name)}: its keys have {keys} features, which heads of size {size} do not divide"
            )
        return keys // size, size

    def _core(self, name: str) -> str:
        """Path of the module that computes the attention: the parent of the queries' projection."""
        return parent(self._reads(name))

    def _attention_parts(self, name: str, fused: str) -> Iterator[tuple[str, int]]:
        """Total features of the parts of a fused attention projection."""
        total = structure.out_width(self.to._need(self._full(f"{name}.{fused}"), f"{name}.{fused}")) or 0
        queries = structure.in_width(self.to._need(self._full(f"{name}.o"), f"{name}.o")) or self.width
        if fused == "qkv":
            yield "q", queries
            total -= queries
        yield "k", total // 2
        yield "v", total // 2

    def _memory(self, name: str) -> None:
        path = self._core(name)
        if not structure.calls_interface(self.to._need(path, f"{name}.mem")):
            kind = type(self.to._need(path, f"{name}.mem")).__name__
            self.to.missing[f"{name}.mem"] = (
                f"its attention ({kind}) does not go through transformers' attention interface, "
                "so nothing can be put before its keys and values; use a method without attention memory"
            )
            return
        keys = self.to.sites.get(self._name(f"{name}.k"))
        if keys is None:
            raise SiteError(f"{self.to._name}: the anatomy names no keys for {self._name(name)!r}")
        heads = self._heads(name, keys.features)
        self._add(f"{name}.mem", path, port="mem", features=heads[1], heads=heads)

    def _feed_forward(self) -> None:
        for word in ("gate_up", "gate", "up"):
            self._leaf(f"ffn.{word}")
        if self._has("ffn.gate_up"):
            total = structure.out_width(self.to._need(self._full("ffn.gate_up"), "ffn.gate_up")) or 0
            self._divide("ffn.gate_up", {"gate": total // 2, "up": total // 2})
        if self._has("ffn.down"):
            down = self._full("ffn.down")
            self._add("ffn.act", down, port="in", features=structure.in_width(self.to._need(down, "ffn.down")) or 0)
            self._leaf("ffn.down")
        for word in ("router", "experts"):
            self._leaf(f"ffn.{word}")
        if self._has("ffn.experts"):
            for word in ("gate", "up", "act", "down"):
                self.to.missing[f"ffn.{word}"] = "its feed-forward is a mixture of experts; use ffn, or ffn.experts (weights)"

    def _divide(self, role: str, widths: Mapping[str, int]) -> None:
        """Sites for the parts of a fused projection."""
        fused: Fused | None = self.stack.fused.get(role)
        path = self._full(role)
        if fused is None:
            for word in widths:
                self.to.missing[f"{parent(role)}.{word}"] = f"how the output of {bare(self.stack.roles[role])!r} divides is not known"
            return
        groups = 1
        if fused.by_head:
            groups = self._heads(parent(role), widths["k"])[0]
        start = 0
        for word in fused.parts:
            view = View(groups, start, widths[word] // groups)
            start += view.width
            self.to.views.setdefault(path, {})[word] = view
            self._add(f"{parent(role)}.{word}", path, features=view.features, view=view)

