"""AdapterHub's prefixes, ReFT, invertible adapters and hypercomplex layers: their tensors as ours.

| theirs | ours |
|---|---|
| `control_trans` [P * 2 L H d]; behind a network `wte`, `control_trans.0` (tanh), `.2` | `Attend`; its network, with the last map cut by layer |
| x sum_i kron(R_i, W_left_i W_right_i) (Compacter) | `Kron` of the transposes, since x stands on the left there |
| `invertible_adapters`, F and G of a NICE coupling | `Coupling` |
| h + R^T (W h + b - R h) at the first and last tokens | `SubspaceEdit`; an orthogonal R is made once from torch's parametrisation |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.errors import ModuleError, listing, nearest
from intarsia.patches import Add, Attend, Concat, Coupling, Gated, Kron, SubspaceEdit, Tokens
from intarsia.sites.address import Site, SiteMap
from intarsia.store.convert.paths import Paths
from intarsia.store.convert.pieces import Piece

ACTIVATIONS: Mapping[str | None, str] = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_new", "tanh": "tanh",
                                         "leakyrelu": "leakyrelu", None: "identity"}  # fmt: skip
#: their name of each of ours
THEIRS: Mapping[str, str | None] = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "silu"}
#: sets of prefixes by our attention memories
PREFIX_SETS: Mapping[str, tuple[str, ...]] = {"self_prefix": ("#.attn.mem", "decoder.#.attn.mem"), "encoder_prefix": ("encoder.#.attn.mem",),
                                              "cross_prefix": ("decoder.#.xattn.mem",)}  # fmt: skip
Slots = Sequence[tuple[re.Pattern[str], str]]
#: where edits hang, by what stands in front of `.reft_layer.refts.NAME.`: our block
_BLOCKS: Slots = tuple((re.compile(rf"(?:\w+\.)?{pattern}"), site) for pattern, site in (
    (r"encoder\.layer\.(\d+)", "{}"), (r"(?:h|layers)\.(\d+)", "{}"), (r"(encoder|decoder)\.(?:block|layers)\.(\d+)", "{}.{}"),
))  # fmt: skip
#: where a prompt stands
COMBINE: Mapping[str, str] = {"prefix": "start", "prefix_after_bos": "after_first"}
#: halves, maps and leaves of an invertible adapter: their name below the adapter, and our key
COUPLING: Mapping[str, str] = {f"{theirs}.{number}.{leaf}": f"tied/coupling.{half}.{side}{'_bias' if leaf == 'bias' else ''}"
                               for theirs, half in (("F", "first"), ("G", "second")) for number, side in ((0, "down"), (2, "up")) for leaf in ("weight", "bias")}  # fmt: skip
_NETWORK = ("wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias")
_STORED_DIREFT = "the file does not say whether R h is subtracted (DiReFT does not): read as adapters itself reads it, with the subtraction (subtract=False for a DiReFT)"


@dataclass
class Reading:
    """A file while it is being read.

    Attributes:
        tied: tensors that all sites share, by our key.
        subtract: what the user says of edits, see `read_adapterhub`.
    """

    name: str
    paths: Paths
    sites: SiteMap
    tensors: dict[str, Tensor]
    pieces: list[Piece] = field(default_factory=list)
    tied: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    carried: int = 0
    subtract: bool | None = None

    def take(self, key: str) -> Tensor:
        """A tensor, taken from the file's."""
        self.carried += 1
        return self.tensors.pop(key)

    def find(self, path: str) -> str:
        """The key of a tensor by its path in the model, whichever of the two has a leading word more."""
        for key in self.tensors:
            if key == path or key.endswith(f".{path}") or path.endswith(f".{key}"):
                return key
        raise ModuleError(f"{path} is missing")

    def groups(self, marker: str) -> dict[str, set[str]]:
        """Keys with `.<marker>.<name>.` in them: what stands before it, and the leaves behind it."""
        cut = f".{marker}.{self.name}."
        found: dict[str, set[str]] = {}
        for key in self.tensors:
            before, middle, leaf = key.partition(cut)
            if middle:
                found.setdefault(before, set()).add(leaf)
        return found


def prefixes(reading: Reading, config: Mapping[str, Any]) -> None:
    """All prefixes of a file, plain or behind a network."""
    if config["use_gating"] and not config["shared_gating"]:
        raise ModuleError("a prefix with two gates, one for keys and one for values, is not read")
    length = int(config["prefix_length"])
    copies = [key for key in reading.tensors if ".prefix_tuning.pool." in key]
    originals = {key.partition("prefix_tuning.")[2]: key for key in reading.tensors if key not in copies}
    for key in copies:
        original = originals.get(key.partition(".prefix_tuning.pool.")[2])
        if original is None or not torch.equal(reading.tensors[original], reading.tensors[key]):
            raise ModuleError(f"{key} is not the copy of the model's prefix that it should be")
        reading.take(key)
    for which in PREFIX_SETS:
        mark = f"prefix_tunings.{reading.name}.{which}."
        keys = {key.partition(mark)[2]: key for key in reading.tensors if mark in key}
        if not keys:
            continue
        memories = memories_of(reading.sites, which)
        if not memories:
            raise ModuleError(f"{mark}*: {reading.sites.model} has no attention for it")
        shifts = numbered(reading.sites, memories[0])
        tensors = {leaf: reading.take(key) for leaf, key in keys.items()}
        if set(tensors) == {"control_trans"}:
            _flat(reading, tensors["control_trans"], memories, Attend(length, None, float(config["dropout"]), shifts=shifts), mark, config)
        elif set(tensors) == set(_NETWORK):
            _network(reading, tensors, memories, Attend(length, len(tensors["control_trans.0.weight"]), float(config["dropout"]), shifts=shifts), mark, config)
        else:
            raise ModuleError(f"{mark}*: expected control_trans or {listing(_NETWORK, 5)}, found {listing(sorted(tensors), 5)}")


def _prefix(reading: Reading, site: Site, form: Attend, found: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """One layer's prefix, under its gate if there is one."""
    if not config["use_gating"]:
        reading.pieces.append(Piece(site.name, "prefix", form, Concat(), "mem", found))
        return
    lead = f"{site.path}.prefix_tuning.prefix_gates.{reading.name}."
    gate = {"gate": reading.take(reading.find(f"{lead}weight"))[0], "gate_bias": reading.take(reading.find(f"{lead}bias"))}
    inner = {f"inner.{leaf}": tensor for leaf, tensor in found.items()}
    reading.pieces.append(Piece(site.name, "prefix", Gated(form, "reads", masked=False), Concat(), "mem", {**inner, **gate}))
    reading.notes["gates are means over all tokens that a layer is given, padding included, as adapters takes them"] = None


def _flat(reading: Reading, flat: Tensor, memories: Sequence[Site], form: Attend, mark: str, config: Mapping[str, Any]) -> None:
    """[P * 2 * layers * heads * size]: positions first, then key and value of layer 0, of layer 1 ..."""
    length = form.length
    heads, size = memories[0].heads  # type: ignore[misc]
    wanted = length * 2 * len(memories) * heads * size
    if flat.numel() != wanted:
        raise ModuleError(f"{mark}control_trans has {flat.numel()} numbers; {length} positions of {len(memories)} layers need {wanted}")
    blocks = flat.view(length, 2 * len(memories), heads, size).permute(1, 2, 0, 3)
    for index, site in enumerate(memories):
        found = {"keys": blocks[2 * index].clone(), "values": blocks[2 * index + 1].clone()}
        _prefix(reading, site, form, found, config)


def _network(
    reading: Reading, tensors: Mapping[str, Tensor], memories: Sequence[Site], form: Attend, mark: str, config: Mapping[str, Any]
) -> None:
    """The rows of the last map belong to the layers in order: 2 * heads * size each."""
    if config["non_linearity"] != "tanh":
        raise ModuleError(f"{mark}*: a prefix behind {config['non_linearity']!r}; only tanh is read")
    embedding, inner, inner_bias, last, last_bias = (tensors[name] for name in _NETWORK)
    length, (heads, size) = form.length, memories[0].heads  # type: ignore[misc]
    each, mid = 2 * heads * size, inner.shape[0]
    if len(embedding) != length or tuple(last.shape) != (each * len(memories), mid):
        raise ModuleError(f"{mark}*: {tuple(embedding.shape)} and {tuple(last.shape)} are not {length} positions of {len(memories)} layers")
    lead = shared_network(memories[0])
    reading.tied |= {f"{lead}.embedding": embedding, f"{lead}.weight": inner, f"{lead}.bias": inner_bias}
    for index, site in enumerate(memories):
        rows = slice(index * each, (index + 1) * each)
        _prefix(reading, site, form, {"weight": last[rows].clone(), "bias": last_bias[rows].clone()}, config)


def memories_of(sites: SiteMap, which: str) -> list[Site]:
    """The attention memories of one set of prefixes, in the order of its layers."""
    return [site for pattern in PREFIX_SETS[which] for site in sites.values() if site.port == "mem" and _like(site.name, pattern)]


def numbered(sites: SiteMap, memory: Site) -> bool:
    """Whether a prefix there moves the text's positions: where they are relative (T5), adapters numbers keys from the start of the prefix and
    queries from that of the text."""
    return bool(memory.stack) and not memory.name.endswith(".xattn.mem") and f"{memory.stack}.embed.position" not in sites


def shared_network(memory: Site) -> str:
    """Our key of the network behind which the prefixes of a set stand."""
    return "tied/" + ".".join(word for word in ("prefix", memory.stack, memory.name.split(".")[-2]) if word)


def _like(name: str, pattern: str) -> bool:
    """Whether a whole name has the form of a pattern in which # is a number."""
    words, wanted = name.split("."), pattern.split(".")
    return len(words) == len(wanted) and all(w == p or (p == "#" and w.isdecimal()) for w, p in zip(words, wanted))


def invertible(reading: Reading, config: Mapping[str, Any]) -> None:
    """The coupling at the embeddings of a language adapter; two stacks share what the encoder's has (adapters puts it there only)."""
    if config["inv_adapter"] != "nice":
        raise ModuleError(f"inv_adapter={config['inv_adapter']!r} is not read; 'nice' is (adapters' 'glow' gives a list where its models need a tensor: no model ran with it)")
    mark = f"invertible_adapters.{reading.name}."
    keys = {key.partition(mark)[2]: key for key in reading.tensors if mark in key}
    if not keys:
        reading.notes["it has no invertible adapter, though its configuration names one (a task adapter on top of a language's)"] = None
        return
    if set(keys) != set(COUPLING):
        raise ModuleError(f"{mark}*: expected {listing(COUPLING, 8)}, found {listing(sorted(keys), 8)}")
    reading.tied |= {ours: reading.take(keys[theirs]) for theirs, ours in COUPLING.items()}
    site = reading.sites["encoder.stem" if "encoder.stem" in reading.sites else "stem"]
    if site.features != sum(len(reading.tied[f"tied/coupling.{half}.up_bias"]) for half in ("first", "second")):
        raise ModuleError(f"{mark}*: made for other embeddings than those of {site.features} features that {reading.sites.model} has")
    form = Coupling(float(config["inv_adapter_reduction_factor"]), activation(config["non_linearity"]))
    reading.pieces.append(Piece(site.name, "invertible", form, Add(), "in" if site.port == "in" else "out", {}))


def activation(theirs: object) -> str:
    """Our name of a non-linearity."""
    theirs = theirs.lower() if isinstance(theirs, str) else theirs
    if theirs not in ACTIVATIONS:
        raise ModuleError(f"non_linearity={theirs!r} is not read{nearest(str(theirs), [a for a in ACTIVATIONS if a])}")
    return ACTIVATIONS[theirs]  # type: ignore[index]


def prompts(reading: Reading, config: Mapping[str, Any]) -> None:
    """The prompt of a file, which stands behind the norm of the embeddings and has no positions."""
    mark = f"prompt_tunings.{reading.name}.prompt_embedding.weight"
    keys = [key for key in reading.tensors if key.endswith(mark)]
    if len(keys) != 1 or tuple(reading.tensors[keys[0]].shape[:1]) != (int(config["prompt_length"]),):
        raise ModuleError(f"{mark}: expected one prompt of {config['prompt_length']} embeddings, found {listing(keys) or 'none'}")
    if config["combine"] not in COMBINE:
        raise ModuleError(f"combine={config['combine']!r} is not read; {listing(COMBINE)} are")
    site = reading.sites.get("seq")
    if site is None or "embed.norm" not in reading.sites:
        raise ModuleError(f"adapters puts a prompt behind the norm of the embeddings, and {reading.sites.model} has none")
    form = Tokens(int(config["prompt_length"]), COMBINE[config["combine"]], init="uniform", behind=True)  # type: ignore[arg-type]
    reading.pieces.append(Piece(site.name, "prompt", form, Concat(), "seq", {"embeddings": reading.take(keys[0])}))
    reading.notes["outputs are those of the text's tokens; adapters returns the prompt's in front of them"] = None


def hypercomplex(reading: Reading, config: Mapping[str, Any], lead: str, first: str) -> tuple[Kron, dict[str, Tensor]]:
    """The Kronecker factors of one adapter; a shared rule goes to the module's root."""
    shared, low = bool(config["shared_phm_rule"]), bool(config["factorized_phm_W"])
    n = int(config["phm_dim"])
    ours: dict[str, Tensor] = {}
    for theirs, side in ((first, "down"), ("adapter_up", "up")):
        ours[f"{side}_bias"] = reading.take(f"{lead}{theirs}.b")
        if low:
            ours[f"{side}.up"] = reading.take(f"{lead}{theirs}.W_right").transpose(1, 2).contiguous()
            ours[f"{side}.down"] = reading.take(f"{lead}{theirs}.W_left").transpose(1, 2).contiguous()
        else:
            ours[f"{side}.up"] = reading.take(f"{lead}{theirs}.W").transpose(1, 2).contiguous()
        if not shared:
            ours[f"{side}.rule.left"] = reading.take(f"{lead}{theirs}.phm_rule").transpose(1, 2).contiguous()
    key = f"tied/kron.{n}.left"
    if shared and key not in reading.tied:
        rules = [name for name in reading.tensors if name.endswith(f"shared_parameters.{reading.name}.phm_rule")]
        if len(rules) != 1:
            raise ModuleError(f"{lead}*: the file has {len(rules)} shared phm_rule, one is needed (adapters drops it for models without a head class)")
        reading.tied[key] = reading.take(rules[0]).transpose(1, 2).contiguous()
    return Kron(n, int(config["phm_rank"]) if low else None, shared), ours


def refts(reading: Reading, config: Mapping[str, Any]) -> None:
    """All edits of a file."""
    first, last, tied = int(config["prefix_positions"]), int(config["suffix_positions"]), bool(config["tied_weights"])
    if config["non_linearity"] is not None or not config["output_reft"]:
        raise ModuleError(f"reft with non_linearity={config['non_linearity']!r}, output_reft={config['output_reft']!r} is not read")
    form = SubspaceEdit(int(config["r"]), first, last, tied=tied, subtract=reading.subtract is not False, orthonormal=bool(config["orthogonality"]), dropout=float(config["dropout"]))
    for slot in reading.groups("reft_layer.refts"):
        site, lead = site_at(reading, _BLOCKS, slot, "reft_layer"), f"{slot}.reft_layer.refts.{reading.name}.units."
        units = {"edit": 0} if tied else {"first": 0, "last": 1}
        ours: dict[str, Tensor] = {}
        for name, number in units.items():
            found = {
                f"units.{name}.source": reading.take(f"{lead}{number}.learned_source.weight"),
                f"units.{name}.bias": reading.take(f"{lead}{number}.learned_source.bias"),
                f"units.{name}.projection": _projection(reading, f"{lead}{number}.projection", form.orthonormal),
            }
            if name in form.names():
                ours |= found
            else:
                reading.notes["an edit of no position (prefix_positions or suffix_positions is 0) is dropped"] = None
        reading.pieces.append(Piece(site.name, "edit", form, Add(), "out", ours))
    if any(site.stack == "decoder" for site in reading.sites.values()):
        reading.notes["adapters edits the first tokens of the decoder's text; here only those of its prompt, so outputs differ behind the start token"] = None
    if not form.orthonormal and reading.subtract is None:
        reading.notes[_STORED_DIREFT] = None


def _projection(reading: Reading, lead: str, orthogonal: bool) -> Tensor:
    """R [r, d]."""
    if not orthogonal:
        return reading.take(f"{lead}.weight")
    state = {name: reading.take(f"{lead}.{name}") for name in ("parametrizations.weight.original", "parametrizations.weight.0.base")}
    rank, width = state["parametrizations.weight.original"].shape
    with torch.random.fork_rng(devices=[]):  # the start that the layer draws is thrown away
        made: nn.Module = torch.nn.utils.parametrizations.orthogonal(nn.Linear(width, rank, bias=False))
    made.load_state_dict(state)
    weight = made.weight
    assert isinstance(weight, Tensor)
    return weight.detach().clone()


def site_at(reading: Reading, slots: Slots, slot: str, what: str) -> Site:
    """The site that stands in a table for a key's front part."""
    for pattern, site in slots:
        found = pattern.fullmatch(slot)
        if found:
            name = site.format(*found.groups())
            if name not in reading.sites:
                raise ModuleError(f"{slot} would be {name}, which {reading.sites.model} lacks; is this the model it was trained on?")
            return reading.sites[name]
    raise ModuleError(f"{slot}.{what}: nothing is known by this path")
