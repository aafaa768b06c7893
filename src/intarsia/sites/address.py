"""Names for places in a transformer: `Site`, the pattern language and `SiteMap`.

A site is one tensor of the forward pass (or one parameter), named by role and never by a model's own attribute path.
Names are dotted words:

    embed  embed.position  embed.type  embed.norm  stem  final.norm  pooler  head     one per model (or per stack)
    head.in                what heads read: the last norm, or the output of the last block
    3                      output of block 3 (the residual stream after it)
    3.attn 3.xattn 3.ffn   what the sub-layer adds to the residual stream, before it is added
    3.attn.q .k .v .o      the projections (outputs); .heads = input of `o`; .norm = its layer norm
    3.attn.mem             keys and values attended to
    3.ffn.gate .up .down   the feed-forward linears (outputs); .act = input of `down`; .norm = its layer norm
    encoder.3.attn.q       models with two stacks put the stack's name in front
    3.attn.q.weight        a parameter (port `weight`); also `.bias`

What is not here: which path a role has in which model (`anatomy.py`), and finding it (`resolve.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

from intarsia.errors import SiteError, SpecError, listing, nearest

Port = Literal["out", "in", "weight", "mem", "seq", "logits"]
LayerKind = Literal["self", "cross", "ffn"]


@dataclass(frozen=True, slots=True)
class View:
    """A part of the last dimension of a fused projection's output.

    The output is seen as `groups` equal groups; in each, `width` features from `start` belong to the role.
    GPT-2's `c_attn` is one group of q|k|v; GPT-NeoX's is one group per head.
    For a parameter the same part is taken of the output dimension of the weight, or of the bias.
    """

    groups: int
    start: int
    width: int

    @property
    def features(self) -> int:
        """Number of features the view covers."""
        return self.groups * self.width


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor of the forward pass, or one parameter.

    Attributes:
        name: architecture-independent name, the one modules are stored under.
        path: module path in this model (`""` for the root).
        port: how the site is reached: `out`/`in` (activation after/before a module), `weight` (parameter),
            `mem` (keys and values of an attention), `seq` (the token sequence of a stack), `logits` (model output).
        features: size of the last dimension at this site (for `weight`: unused, see `shape`).
        layer: index of the block within its stack, None outside blocks.
        stack: `""`, `"encoder"` or `"decoder"`.
        view: the part of a fused projection, None if the module is the role.
        residual: path of the module whose input is the sub-layer's skip connection (sub-layer outputs only).
        norm: path of the module that normalises `h + residual` (post-LN sub-layer outputs only).
        reads: path of the first projection of the sub-layer, whose input is what the sub-layer reads (outputs of
            sub-layers, `heads` and `mem`).
        param: name of the parameter within the module (`weight` port only).
        shape: shape of the parameter as the module stores it (`weight` port only).
        transposed: the parameter is stored (in, out), as GPT-2's Conv1D does.
        owners: every `(module path, parameter name)` that holds the same Parameter object (tied weights), the first
            being `(path, param)`.
        lend_at: path of the module during whose forward the parameter is read, when that is not the owner itself.
        heads: (number of key/value heads, size of one head) for `mem` and `heads` sites; empty otherwise.
        reused: the module also runs on something else than the batch's tokens in the same block (DeBERTa-v3 projects
            its table of relative positions, batch size 1, with the same q and k).
        rowless: what comes out there has no batch dimension (tables of relative positions), so the rows of one batch
            cannot differ there.
    """

    name: str
    path: str
    port: Port = "out"
    features: int = 0
    layer: int | None = None
    stack: str = ""
    view: View | None = None
    residual: str | None = None
    norm: str | None = None
    reads: str | None = None
    param: str | None = None
    shape: tuple[int, ...] = ()
    transposed: bool = False
    owners: tuple[tuple[str, str], ...] = ()
    lend_at: str | None = None
    heads: tuple[int, int] | tuple[()] = ()
    reused: bool = False
    rowless: bool = False


def expand_braces(pattern: str) -> list[str]:
    """`"attn.{q,v}"` -> `["attn.q", "attn.v"]`; nested braces are expanded from the left."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        if "{" in pattern or "}" in pattern:
            raise SpecError(f"pattern {pattern!r} has an unbalanced brace")
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [p for part in found.group(1).split(",") for p in expand_braces(head + part.strip() + tail)]


def _segments_match(pattern: Sequence[str], name: Sequence[str]) -> bool:
    """Match dotted words; `*` is one word, `#` one number, `**` any number of words."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_segments_match(pattern[1:], name[i:]) for i in range(len(name) + 1))
    if not name:
        return False
    return _word_fits(pattern[0], name[0]) and _segments_match(pattern[1:], name[1:])


def _word_fits(pattern: str, word: str) -> bool:
    return pattern in ("*", word) or (pattern == "#" and word.isdecimal())


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> tuple[tuple[str, ...], ...]:
    """The dotted words of all alternatives of a pattern; a method asks every site of a model with the same few patterns."""
    return tuple(tuple(p.strip().split(".")) for q in split_top(pattern) for p in expand_braces(q))


def _ends_with(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern covers the end of a name."""
    if "**" in pattern:
        return _segments_match(["**", *pattern], name)
    return len(pattern) <= len(name) and all(map(_word_fits, pattern, name[len(name) - len(pattern) :]))


def matches(pattern: str, name: str) -> bool:
    """Whether a site pattern covers a site name.

    A pattern is matched against the *end* of the name, word by word: `attn.q` covers `3.attn.q` and
    `encoder.3.attn.q`, never `3.xattn.q`.  `*` stands for one word, `#` for a number (so `#` alone covers the outputs of
    all blocks), `**` for any number of words, `{a,b}` for alternatives; a comma at top level separates patterns.
    """
    words = name.split(".")
    return any(_ends_with(words, alternative) for alternative in _parsed(pattern))


def split_top(pattern: str) -> list[str]:
    """The patterns that commas outside braces separate."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(pattern):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, pattern[start:]] if p.strip()]


class Selection(Sequence[Site]):
    """Sites chosen by a pattern: a value one can print, count and assert."""

    def __init__(self, sites: Iterable[Site], pattern: str = "", model: str = "") -> None:
        self._sites = tuple(sites)
        self.pattern = pattern
        self.model = model

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Selection: ...
    def __getitem__(self, index: int | slice) -> Site | Selection:
        if isinstance(index, slice):
            return Selection(self._sites[index], self.pattern, self.model)
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"Selection({self.pattern!r}: {len(self)} sites: {listing(s.name for s in self._sites)})"

    def expect(self, count: int) -> Selection:
        """Return self if it holds `count` sites; raise SiteError otherwise."""
        if len(self) != count:
            raise SiteError(f"pattern {self.pattern!r} was expected to select {count} sites of {self.model}, it selects {len(self)}")
        return self


def layer_indices(spec: str | None, count: int) -> frozenset[int] | None:
    """Indices named by a layer specification, or None for all.

    `"3"`, `"0,2,5"`, `"-3:"` (last three), `"6:12"`; negative numbers count from the end, as in Python.
    """
    if spec is None or spec == "":
        return None
    chosen: set[int] = set()
    for part in spec.split(","):
        try:
            if ":" in part:
                low, high = (int(x) if x.strip() else None for x in part.split(":"))
                chosen.update(range(count)[slice(low, high)])
            else:
                index = int(part)
                if not -count <= index < count:
                    raise SiteError(f"layer {index} does not exist: the stack has {count} layers (0 ... {count - 1})")
                chosen.add(index % count)
        except ValueError:
            raise SpecError(f"layers={spec!r} is not a list of numbers and ranges such as '0,2', '-3:' or '6:12'") from None
    return frozenset(chosen)


class SiteMap(Mapping[str, Site]):
    """All sites of one model, by name.

    Attributes:
        model: class name of the model, for messages.
        layers: number of blocks per stack (`{"": 12}` or `{"encoder": 6, "decoder": 6}`).
        missing: reason per site family that this model lacks, e.g. `{"attn.mem": "its attention bypasses ..."}`.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        *,
        model: str = "model",
        layers: Mapping[str, int] | None = None,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self.model = model
        self.layers = dict(layers or {})
        self.missing = dict(missing or {})

    def __getitem__(self, name: str) -> Site:
        try:
            return self._sites[name]
        except KeyError:
            raise SiteError(f"{self.model} has no site {name!r}{nearest(name, self._sites)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def get(self, name: str, default: Any = None) -> Any:
        """The site, or `default` where there is none (`Mapping.get` would let the SiteError through)."""
        return self._sites.get(name, default)

    def select(self, pattern: str, *, layers: str | None = None, port: Port | None = None) -> Selection:
        """Sites whose name a pattern covers, in model order.

        Args:
            pattern: see `matches`.
            layers: see `layer_indices`; applied per stack; sites outside blocks are then left out.
            port: keep only sites of this port.

        Raises:
            SiteError: nothing was selected; the message says why if the model lacks the port.
        """
        chosen = {stack: layer_indices(layers, count) for stack, count in self.layers.items()}
        hits = [
            site
            for site in self._sites.values()
            if (port is None or site.port == port)
            and matches(pattern, site.name)
            and (layers is None or (site.layer is not None and site.layer in (chosen.get(site.stack) or ())))
        ]
        if not hits:
            for family, reason in self.missing.items():
                if any(matches(p, f"0.{family}") or matches(p, family) for p in split_top(pattern)):
                    raise SiteError(f"{self.model} has no {family!r} sites: {reason}")
            plain = [n for n in self._sites if port is None or self._sites[n].port == port]
            tails = {".".join(w for w in n.split(".") if not w.isdigit()) for n in plain}
            raise SiteError(
                f"{pattern!r}{f' with layers={layers!r}' if layers else ''} selects none of the {len(plain)} "
                f"{port + ' ' if port else ''}sites of {self.model}{nearest(pattern, tails)} "
                f"(list them with: intarsia inspect MODEL --sites)"
            )
        return Selection(hits, pattern, self.model)

    def parameters(self) -> Selection:
        """The weight sites that cover every Parameter object of the model exactly once (fused ones as a whole)."""
        whole = [site for site in self._sites.values() if site.port == "weight" and site.view is None]
        return Selection(whole, "every parameter", self.model)
