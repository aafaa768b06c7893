"""From a method and a model's sites to deltas: pure, so that every refusal comes before anything is attached.

    select(at, port, layers) -> sites -> one Delta per site

Each (module seed, site, patch) has its own random stream, so initial values depend neither on order nor on other modules
nor on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intarsia.errors import SiteError, SpecError
from intarsia.host.parts import weight_of
from intarsia.methods import Method, Patch
from intarsia.patches import Delta, Place
from intarsia.patches.matrix import canonical_shape
from intarsia.patches.place import Peer
from intarsia.sites.address import Site, SiteMap


@dataclass
class Built:
    """The deltas of one module, by site in model order, and the parts they share.

    Attributes:
        deltas: (site, its deltas in patch order).
        shared: tied parts by the tag under which their tensors are stored.
    """

    deltas: list[tuple[Site, list[Delta]]]
    shared: dict[str, nn.Module]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor (parameters and stored buffers) by its name in a module file."""
        found: dict[str, Tensor] = {}
        for site, deltas in self.deltas:
            for delta in deltas:
                _collect(delta.form, f"{site.name}/{delta.name}.", found)
        for tag, part in self.shared.items():
            _collect(part, f"tied/{tag}.", found)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable ones among `tensors`."""
        return {k: t for k, t in self.tensors().items() if isinstance(t, nn.Parameter)}

    @property
    def size(self) -> int:
        """Number of trainable values; a tensor that has several names counts once."""
        return sum(p.numel() for p in {id(p): p for p in self.parameters().values()}.values())


def _collect(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> None:
    """Stored tensors of a module tree."""
    for name, value in module.state_dict(keep_vars=True).items():
        found[prefix + name] = value


def seed_of(seed: int, *words: str) -> int:
    """A 63-bit seed from a module's seed and names, the same on every platform."""
    text = "\0".join((str(seed), *words))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def select(sites: SiteMap, patch: Patch) -> Sequence[Site]:
    """The sites of a patch.  A fused parameter that is selected whole is not selected again in parts."""
    try:
        chosen = list(sites.select(patch.at, layers=patch.layers, port=patch.port))
    except SiteError as error:
        if patch.optional:
            return ()
        raise SiteError(f"patch {patch.name!r}: {error}") from None
    if patch.port != "weight":
        return chosen
    whole = {owner for site in chosen if site.view is None for owner in site.owners}
    return [s for s in chosen if s.view is None or not whole.intersection(s.owners)]


def build(
    method: Method,
    sites: SiteMap,
    module_at: Callable[[str], nn.Module],
    *,
    width: int,
    embedding: Callable[[], Tensor | None],
    bidirectional: bool,
    seed: int = 0,
    meta: bool = False,
) -> Built:
    """All deltas of a method.

    Args:
        module_at: module of a path.
        width: hidden size.
        embedding: the word-embedding matrix, asked for only when a form needs it.
        bidirectional: an encoder without a decoder.
        seed: of the initial values.
        meta: build on the meta device, to count.
    """
    shared: dict[Hashable, nn.Module] = {}
    by_site: dict[str, tuple[Site, list[Delta]]] = {}
    for patch in method.patches:
        chosen = select(sites, patch)
        reads = {s.name: width if s.port == "logits" else reads_width(s, module_at(s.path)) for s in chosen}
        peers = tuple(Peer(s, canonical_shape(s) if s.port == "weight" else (s.features, reads[s.name])) for s in chosen)
        for site in chosen:
            module = module_at(site.path)
            place = Place(
                site=site,
                reads=reads[site.name],
                width=width,
                generator=torch.Generator().manual_seed(seed_of(seed, site.name, patch.name)),
                weight=lambda site=site, module=module: weight_of(site, module),  # type: ignore[misc]
                embedding=embedding,
                bidirectional=bidirectional,
                peers=peers,
                shared=shared,
                device=torch.device("meta") if meta else device_of(module),
                layers=sites.layers,
                heads=heads_of(site, sites),
            )
            delta = Delta(patch.name, site, patch.form.build(place), patch.op)
            by_site.setdefault(site.name, (site, []))[1].append(delta)
    tags: dict[str, nn.Module] = {}
    for key, part in shared.items():
        words = [str(w) for w in (key if isinstance(key, tuple) else (key,)) if str(w)]
        tag = ".".join(words)
        if tag in tags:
            raise SpecError(f"two tied parts share the tag {tag!r}")
        tags[tag] = part
    return Built(list(by_site.values()), tags)


def heads_of(site: Site, sites: SiteMap) -> tuple[int, int] | tuple[()]:
    """(number of key/value heads, size of one) of the attention that a site is a part of."""
    words = site.name.split(".")
    at = next((i for i, word in enumerate(words) if word in ("attn", "xattn")), None)
    found = None if at is None else sites.get(".".join((*words[: at + 1], "heads")))
    return () if found is None else found.heads


def reads_width(site: Site, module: nn.Module) -> int:
    """Width of what the touched module is given."""
    if site.port == "out" and isinstance(getattr(module, "in_features", None), int):
        return int(module.in_features)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if site.port == "out" and type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return int(weight.shape[0])
    return site.features


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor lives."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
