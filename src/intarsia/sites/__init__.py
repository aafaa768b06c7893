"""Where a tensor lives: names for places in a transformer, and how they are found in a model.

    sites = resolve(model)                      every place, by an architecture-independent name
    sites.select("attn.{q,v}", layers="-3:")    a printable, countable choice of them
    fingerprint(model, tokenizer)               which base this is
    verify(model)                               the known row against what arithmetic on a forward pass finds
"""

from intarsia.sites.address import LayerKind, Port, Selection, Site, SiteMap, View, layer_indices, matches
from intarsia.sites.anatomy import Anatomy, Fused, Stack
from intarsia.sites.fingerprint import Fingerprint, fingerprint
from intarsia.sites.infer import infer
from intarsia.sites.resolve import anatomy_of, resolve
from intarsia.sites.verify import Disagreement, verify

__all__ = [
    "Anatomy",
    "Disagreement",
    "Fingerprint",
    "Fused",
    "LayerKind",
    "Port",
    "Selection",
    "Site",
    "SiteMap",
    "Stack",
    "View",
    "anatomy_of",
    "fingerprint",
    "infer",
    "layer_indices",
    "matches",
    "resolve",
    "verify",
]
