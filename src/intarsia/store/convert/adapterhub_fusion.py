"""AdapterHub's fusions and composed setups, in both directions.

| theirs | ours |
|---|---|
| `adapter_fusion_config.json`: softmax((Q x + a) . (K d_i + b)) over the adapters' changes d_i, then V | a router module (`methods.fusion`) |
| `adapter_setup.json` with a folder for each adapter and fusion | modules and one expression |
| `Stack`, `Fuse`, `Average`, `BatchSplit` | `a >> b`, `fuse(a, b; router=NAME)`, weighted sums, one expression per row |

Refused by name: fusions of parallel adapters (adapters adds the skip connection once more there), fusions without query or key,
`Parallel` and `Split`, and stacks that mean something else there: of LoRA (one reads what the other added), of several invertible
adapters (the first alone counts), of several prefixes with relative positions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from intarsia.errors import ModuleError, StoreError, listing
from intarsia.methods.fusion import fusion
from intarsia.methods.method import Patch
from intarsia.modules.card import Card
from intarsia.modules.module import Module
from intarsia.patches import Affine, Attend, Attention, Bottleneck, Coupling, Gated, Renorm, Router, Scaled, Weigh
from intarsia.sites.address import Site, SiteMap
from intarsia.sites.fingerprint import Fingerprint
from intarsia.store.convert.adapterhub import TOP, read_adapterhub, site_of
from intarsia.store.convert.adapterhub_kinds import Reading
from intarsia.store.convert.adapterhub_parts import VERSION, Writing
from intarsia.store.convert.adapterhub_write import write_adapterhub
from intarsia.store.convert.adapterhub_write_bottleneck import slot_of
from intarsia.store.convert.detect import FUSION, SETUP, WEIGHTS
from intarsia.store.convert.folder import (
    as_float,
    check_fields,
    json_bytes,
    read_config,
    read_tensors,
    sound,
    tensor_bytes,
    write_folder,
)
from intarsia.store.convert.paths import Paths
from intarsia.store.convert.pieces import Piece, check_alone, together
from intarsia.store.convert.report import Report, beside

_LEAVES = {"query.weight": "scorer.query", "query.bias": "scorer.query_bias", "key.weight": "scorer.key", "key.bias": "scorer.key_bias", "value.weight": "value"}
_CONFIG: Mapping[str, Any] = {"dropout_prob": None, "key": True, "query": True, "query_before_ln": False, "residual_before": False, "temperature": False,
                              "value_before_softmax": True}  # fmt: skip
MAX_ROWS = 100_000
_TRAINING = {"regularization", "value_initialized", "dropout_prob"}


def read_fusion(
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    base: Fingerprint,
    name: str | None = None,
    members: Mapping[str, Module] | None = None,
    allow_pickle: bool = False,
) -> tuple[Module, Report]:
    """Read a fusion folder as a router module.

    Args:
        name: of the module; None for `fusion`.
        members: modules by the names that the file has for them, in which the router looks up what its query reads; None for
            members that read the add-and-norm (Pfeiffer's).
        allow_pickle: where weights are a pickle, open it in a restricted process (with a warning).

    Raises:
        StoreError: a file is missing, or a pickle is not allowed.
        ModuleError: a field or tensor that is not understood.
    """
    with sound(os.fspath(folder)):
        return _read_fusion(Path(folder), sites, base, name or "fusion", members, allow_pickle)


def _read_fusion(
    folder: Path, sites: SiteMap, base: Fingerprint, name: str, members: Mapping[str, Module] | None, allow_pickle: bool
) -> tuple[Module, Report]:
    raw = read_config(folder, FUSION)
    check_fields(raw, TOP | {"adapter_names"}, f"{folder / FUSION}: a fusion")
    config, theirs = raw.get("config"), str(raw.get("name"))
    parts = tuple(raw.get("adapter_names") or theirs.split(","))
    if not isinstance(config, dict):
        raise ModuleError(f"{folder / FUSION}: 'config' is an object, found {str(config)[:40]!r}")
    odd = [key for key, value in _CONFIG.items() if key not in _TRAINING and config.get(key) != value]
    unknown = [key for key in config if key not in {*_CONFIG, *_TRAINING, "value"}]
    if odd or unknown:
        raise ModuleError(f"{folder / FUSION}: {', '.join(f'{key}={config.get(key)!r}' for key in [*odd, *unknown])} is not read; {dict(_CONFIG)} is")
    tensors = {key: as_float(t) for key, t in read_tensors(folder, *WEIGHTS["fusion"], allow_pickle).items()}
    reading = Reading(theirs, Paths(sites), sites, tensors)
    leaves = {leaf: ours for leaf, ours in _LEAVES.items() if config["value"] or leaf != "value.weight"}
    dropout = 0.1 if config.get("dropout_prob") is None else float(config["dropout_prob"])
    for slot, found in reading.groups("adapter_fusion_layer").items():
        site, lead = site_of(reading, slot), f"{slot}.adapter_fusion_layer.{theirs}."
        if found != set(leaves):
            raise ModuleError(f"{lead}: expected the tensors {listing(leaves, 5)}, found {listing(sorted(found), 5)}")
        read = _query(site, parts[-1], members)
        form = Router(parts, Attention("auto" if read == "normed" else read, dropout), bool(config["value"]))  # type: ignore[arg-type]
        reading.pieces.append(Piece(site.name, "router", form, Weigh(), "out", {ours: reading.take(lead + leaf) for leaf, ours in leaves.items()}))
    if reading.tensors or not reading.pieces:
        raise ModuleError(f"{folder}: tensors of no fusion {theirs!r}: {listing(sorted(reading.tensors), 4) or 'it holds none'}")
    if members is None:
        reading.notes[f"its query is taken to read the add-and-norm, as behind Pfeiffer adapters; give members={{{parts[-1]!r}: module}} if they read something else"] = None
    rows = fusion(parts, value=bool(config["value"]), penalty=0.01 if config.get("regularization") else 0.0)
    method, ours = together("fusion", reading.pieces, rows.policy, source="adapters' fusion; Pfeiffer et al. 2021, arXiv 2005.00247")
    card = Card(base=str(raw.get("model_name") or ""), method="fusion", description=f"Read from files of {raw.get('version')}.")
    return Module(name, method, ours, base, card=card), Report(str(folder), "fusion", reading.carried, notes=tuple(reading.notes))


def _query(site: Site, last: str, members: Mapping[str, Module] | None) -> str:
    """What the query reads: what the last member's adapter reads there."""
    if members is None:
        return "normed" if site.residual is not None else "self"
    if last not in members:
        raise ModuleError(f"the fusion's member {last!r} is none of {listing(members)}")
    module = members[last]
    names = {key.partition("/")[2].partition(".")[0] for key in module.tensors if key.partition("/")[0] == site.name}
    for patch in module.method.patches:
        form = _inner(patch.form)
        if patch.name in names and isinstance(form, Bottleneck):
            if form.read in ("residual", "reads"):
                raise ModuleError(f"{site.name}: a fusion of parallel adapters is not read: adapters adds the skip connection to it once more")
            return form.read
    raise ModuleError(f"the fusion has weights at {site.name}, where its member {last!r} has no adapter")


def write_fusion(module: Module, folder: str | os.PathLike[str], *, sites: SiteMap, model_type: str) -> Report:
    """Write a router over named modules as a fusion folder.

    Raises:
        ModuleError: it weighs in a way that adapters' fusion does not.
        StoreError: the folder already holds such files.
    """
    writing = Writing(sites, "", model_type)
    stored: dict[str, Tensor] = {}
    first: Router | None = None
    for patch in module.method.patches:
        form = patch.form
        if not isinstance(form, Router) or not isinstance(form.scorer, Attention) or patch.port != "out" or form.squash != "softmax" or form.scope != "site":
            raise ModuleError(f"patch {patch.name!r} is no attention over members' changes at each site, which adapters' fusion is")
        if form.top is not None or form.hard or form.sampler != "none" or form.temperature != 1.0 or form.scorer.temperature != 1.0:
            raise ModuleError(f"patch {patch.name!r}: adapters' fusion has no top, hard choice, sampler or temperature")
        if first is not None and (form.parts, form.value) != (first.parts, first.value):
            raise ModuleError("adapters' fusion has the same members and one kind of value for all layers")
        first = form
        for key, tensor in _written(writing, module, patch, form).items():
            check_alone(stored, key, key)
            stored[key] = tensor
    if first is None or not stored:
        raise ModuleError(f"{module.name!r} is no router; write_adapterhub writes adapters")
    odd = [part for part in first.parts if not part.replace("_", "").replace("-", "").isalnum()]
    if odd:
        raise ModuleError(f"adapters fuses single adapters, and {listing(odd)} is an expression")
    values = {"value": first.value, "value_initialized": first.value, "regularization": bool(module.method.policy.penalties)}
    document = {"adapter_names": list(first.parts), "config": {**_CONFIG, **values}, "hidden_size": next(iter(stored.values())).shape[-1],
                "model_class": sites.model, "model_name": module.card.base or None, "model_type": model_type, "name": ",".join(first.parts),
                "version": VERSION}  # fmt: skip
    write_folder(folder, {FUSION: json_bytes(document), WEIGHTS["fusion"][0]: tensor_bytes(stored), "README.md": module.card.to_markdown().encode()})
    note = "adapters' fusion reads with its query what its last member reads, and has the model's attention dropout"
    return Report(module.name, "fusion", len(stored), tuple(beside(module, module.labels, "the files have no place for it")), (note,))


def _written(writing: Writing, module: Module, patch: Patch, form: Router) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, tensor in module.tensors.items():
        name, _, rest = key.partition("/")
        if rest.partition(".")[0] == patch.name:
            slot, _ = slot_of(writing.sites[name])
            leaf = {ours: theirs for theirs, ours in _LEAVES.items()}[rest.partition(".")[2]]
            found[f"{slot}.adapter_fusion_layer.{','.join(form.parts)}.{leaf}"] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Setup:
    """A composed setup.

    Attributes:
        modules: adapters and routers by the names that the expression has for them.
        expression: their composition, as text; several of a `BatchSplit`, one for each row.
        reports: one per module.
    """

    modules: Mapping[str, Module]
    expression: str | tuple[str, ...]
    reports: tuple[Report, ...]


def read_setup(
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    base: Fingerprint,
    weights: Mapping[str, Tensor] | None = None,
    config: Any = None,
    allow_pickle: bool = False,
) -> Setup:
    """Read `adapter_setup.json` and the folders of its adapters and fusions.

    Raises:
        StoreError: a file is missing, or a pickle is not allowed.
        ModuleError: a block that has no expression here, or what a part's reader refuses.
    """
    place = Path(folder)
    with sound(os.fspath(folder)):
        raw = read_config(place, SETUP)
        check_fields(raw, ("adapter_setup", "head_setup", "version"), f"{place / SETUP}: a setup")
        node: Any = raw.get("adapter_setup")
        modules: dict[str, Module] = {}
        reports: list[Report] = []
        for name in dict.fromkeys(_leaves(node)):
            if not (place / name).is_dir() or Path(name).name != name:
                raise StoreError(f"{place} has no folder {name!r}, which its {SETUP} names")
            modules[name], report = read_adapterhub(place / name, sites=sites, base=base, name=name, weights=weights, config=config, allow_pickle=allow_pickle)
            reports.append(report)
        routers: dict[str, str] = {}
        for inner in sorted(path.parent for path in place.glob(f"*/{FUSION}")):
            name = next(free for free in ("fusion", *(f"fusion_{i}" for i in range(2, len(modules) + 3))) if free not in modules)
            modules[name], report = read_fusion(inner, sites=sites, base=base, name=name, members=modules, allow_pickle=allow_pickle)
            routers[inner.name] = name
            reports.append(report)
        notes: dict[str, None] = {}
        if raw.get("head_setup") is not None:
            notes[f"its head_setup ({str(raw['head_setup'])[:60]}) is not read: heads are those beside the adapters, which a call chooses by its expression"] = None
        combined = _Combining(modules, routers, str(place / SETUP), notes)
        if node.get("type") == "BatchSplit":
            sizes = [int(size) for size in (node.get("kwargs") or {}).get("batch_sizes") or []]
            if len(sizes) != len(node["children"]) or min(sizes) < 0 or sum(sizes) > MAX_ROWS:
                raise ModuleError(f"{place / SETUP}: {len(node['children'])} parts of a batch and the sizes {sizes[:8]}; one each, at most {MAX_ROWS:,} rows")
            expression: str | tuple[str, ...] = tuple(combined.text(child) for child, size in zip(node["children"], sizes) for _ in range(size))
        else:
            expression = combined.text(node)
        if notes:
            reports.append(Report(str(place), "setup", 0, notes=tuple(notes)))
        return Setup(modules, expression, tuple(reports))


def _leaves(node: Any) -> list[str]:
    if not isinstance(node, dict) or not isinstance(node.get("children"), list):
        raise ModuleError(f"a block of a setup has a type and children, found {str(node)[:60]!r}")
    if node.get("type") == "single":
        return [str(node["children"][0])]
    return [name for child in node["children"] for name in _leaves(child)]


@dataclass(frozen=True, slots=True)
class _Combining:
    """Blocks of a setup as expressions."""

    modules: Mapping[str, Module]
    routers: Mapping[str, str]
    source: str
    notes: dict[str, None]

    def text(self, node: Mapping[str, Any]) -> str:
        kind, children = node.get("type"), node["children"]
        if kind == "single":
            return str(children[0])
        if kind == "Fuse":
            return self._fused(children)
        parts = [self.text(child) for child in children]
        if kind == "Stack":
            self._check_stack([name for child in children for name in _leaves(child)])
            return " >> ".join(part if child.get("type") in ("single", "Fuse") else f"({part})" for part, child in zip(parts, children))
        if kind == "Average":
            shares = (node.get("kwargs") or {}).get("weights") or [1.0 / len(parts)] * len(parts)
            self.notes["adapters divides a weighted average by the number of its members once more (and shrinks the skip connection); here the weights mean what they say"] = None
            return " + ".join(f"{float(weight)!r}*({part})" for weight, part in zip(shares, parts))
        raise ModuleError(
            f"{self.source}: a block of the type {kind!r} is no expression here: rows with modules of their own are said per call, host.using([...]), one expression for each row"
        )

    def _fused(self, children: Sequence[Mapping[str, Any]]) -> str:
        if any(child.get("type") != "single" for child in children):
            raise ModuleError(f"{self.source}: a fusion of compositions is not read; fusions of single adapters are")
        members = [_leaves(child)[0] for child in children]
        if ",".join(members) not in self.routers:
            raise StoreError(f"{self.source}: the fusion {','.join(members)!r} has no folder beside it")
        return f"fuse({', '.join(members)}; router={self.routers[','.join(members)]})"

    def _check_stack(self, names: Sequence[str]) -> None:
        """Refuse what `a >> b` would not mean."""
        for kinds, why in (
            ((Affine, Renorm), "its LoRAs follow on one another (the second reads what the first adds), and here both read the layer's input"),
            ((Coupling,), "it undoes and does the invertible adapter of the first alone, and here each counts"),
            ((Attend,), "its prefixes of relative positions stand in the other order"),
        ):
            forms = [[_inner(patch.form) for patch in self.modules[name].method.patches] for name in names]
            holders = [name for name, own in zip(names, forms) if any(isinstance(form, kinds) and getattr(form, "shifts", True) for form in own)]
            if len(holders) > 1:
                raise ModuleError(f"{self.source}: a stack of {listing(holders)} is not read: {why}")


def _inner(form: Any) -> Any:
    return form.form if isinstance(form, Gated | Scaled) else form


def write_setup(
    modules: Mapping[str, Module],
    router: str,
    folder: str | os.PathLike[str],
    *,
    sites: SiteMap,
    model_type: str,
    weights: Mapping[str, Tensor] | None = None,
    config: Any = None,
) -> tuple[Report, ...]:
    """Write a fusion with its members: a folder for each, and `adapter_setup.json`.

    Args:
        modules: members and router by name.
        router: which of them is the router.

    Raises:
        ModuleError: a member is missing, or what a part's writer refuses.
        StoreError: the folder already holds such files.
    """
    if router not in modules:
        raise ModuleError(f"the router {router!r} is none of the modules given ({listing(modules)})")
    fused = modules[router]
    parts: Sequence[str] = next((patch.form.parts for patch in fused.method.patches if isinstance(patch.form, Router)), ())
    missing = [part for part in parts if part not in modules]
    if missing or not parts:
        raise ModuleError(f"{router!r} fuses {listing(parts) or 'nothing'}, and {listing(missing) or 'no member'} is not among the modules given")
    place = Path(folder)
    reports = [
        write_adapterhub(modules[part], place / part, sites=sites, model_type=model_type, name=part, weights=weights, config=config) for part in parts
    ]
    reports.append(write_fusion(fused, place / ",".join(parts), sites=sites, model_type=model_type))
    node = {"type": "Fuse", "children": [{"type": "single", "children": [part]} for part in parts]}
    write_folder(place, {SETUP: json_bytes({"adapter_setup": node, "head_setup": None, "version": VERSION})})
    return tuple(reports)
