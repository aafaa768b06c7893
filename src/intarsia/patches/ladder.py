"""`Ladder`: a small transformer beside the frozen one (ladder side-tuning, Sung, Cho & Bansal 2022, arXiv 2206.06522).

    s = D_0 e(x);   for every kept layer i:   s <- m_i s + (1 - m_i) D_i h_i,  m_i = sigmoid(g_i / T);   s <- block_i(s)
    head input = U LN(s) + b

h_i are the outputs of the base's blocks, seen but never differentiated: no gradient enters the base, so it keeps no
activations.  The side network is of width d / r and reads as the base does: both ways in an encoder, backwards in a
decoder, across where there are two stacks.  What it attends to in a generation grows with the model's own cache.

Its blocks are those of T5 (RMS norms before attention and feed-forward, relative positions, no biases), whatever the base.
The paper starts them by pruning a T5; here they start at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia._codec import register
from intarsia.errors import SpecError
from intarsia.patches.activations import ACTIVATIONS
from intarsia.patches.delta import Form, Seen, back, dropped, same_dtype
from intarsia.patches.init import Fill, kaiming, normal
from intarsia.patches.place import Place

EPSILON = 1e-6


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm with a gain."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def bucket(distance: Tensor, both_ways: bool, buckets: int, limit: int) -> Tensor:
    """T5's bucket of key position - query position: exact when near, logarithmic up to `limit`, one half each way."""
    base = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        base = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(limit / exact) * (buckets - exact)).long()
    return base + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class Attention(nn.Module):
    """q, k, v, o: [n, n]."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], heads: int) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, value)
        self.heads = heads

    q: nn.Parameter
    k: nn.Parameter
    v: nn.Parameter
    o: nn.Parameter

    def split(self, x: Tensor, weight: Tensor) -> Tensor:
        """[R, T, n] -> [R, heads, T, n / heads]."""
        return F.linear(x, weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend from x to keys and values by heads, under an additive mask [R, heads or 1, T, K]."""
        found = F.scaled_dot_product_attention(self.split(x, self.q), keys, values, attn_mask=mask)
        return F.linear(found.transpose(1, 2).flatten(2), self.o)


class Block(nn.Module):
    """Attention, attention across, feed-forward, each behind an RMS norm and beside a skip connection."""

    def __init__(self, own: Attention, across: Attention | None, parameters: Mapping[str, nn.Parameter], activation: str) -> None:
        super().__init__()
        self.own = own
        self.across = across
        for name, value in parameters.items():
            self.register_parameter(name, value)
        self.activation = activation

    norm: nn.Parameter
    across_norm: nn.Parameter
    up_norm: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def forward(self, x: Tensor, mask: Tensor, memory: Memory, states: tuple[Tensor, Tensor] | None, dropout: float) -> Tensor:
        """[R, T, n] -> [R, T, n]; `states` are an encoder's side states [R, S, n] and their mask."""

        def drop(value: Tensor) -> Tensor:
            return dropped(value, dropout, self.training)

        y = rms(x, self.norm)
        keys, values = memory.grown(self.own.split(y, self.own.k), self.own.split(y, self.own.v))
        x = x + drop(self.own(y, keys, values, mask))
        if self.across is not None and states is not None:
            side, side_mask = states
            keys, values = self.across.split(side, self.across.k), self.across.split(side, self.across.v)
            x = x + drop(self.across(rms(x, self.across_norm), keys, values, side_mask))
        inner = ACTIVATIONS[self.activation](F.linear(rms(x, self.up_norm), self.up))
        return x + drop(F.linear(drop(inner), self.down))


class Memory:
    """The keys and values of a block's earlier passes."""

    __slots__ = ("number", "owner", "seen")

    def __init__(self, seen: Seen | None, owner: object, number: int) -> None:
        self.seen = seen
        self.owner = owner
        self.number = number

    def grown(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What came before, and these behind it, by heads [R, heads, K, size]."""
        return (keys, values) if self.seen is None else self.seen.grown(self.owner, self.number, keys, values)


class Rail(nn.Module):
    """One stack's side network: `enter` [n, d] for the stem and every kept layer, gates [L], blocks, final norm."""

    def __init__(
        self,
        enter: Sequence[nn.Parameter],
        enter_bias: Sequence[nn.Parameter],
        blocks: Sequence[Block],
        parameters: Mapping[str, nn.Parameter],
        layers: Sequence[int],
        spec: Ladder,
    ) -> None:
        super().__init__()
        self.enter = nn.ParameterList(enter)
        self.enter_bias = nn.ParameterList(enter_bias)
        self.blocks = nn.ModuleList(blocks)
        for name, value in parameters.items():
            self.register_parameter(name, value)
        self.layers = tuple(layers)
        self.spec = spec

    gates: nn.Parameter
    positions: nn.Parameter
    norm: nn.Parameter

    def rung(self, number: int, tap: Tensor) -> Tensor:
        """A base state in the width of the side network.

        Contiguous: with other strides torch chooses the kernel of later products by whether weights are being trained.
        """
        return F.linear(same_dtype(tap.contiguous(), self.enter[number]), self.enter[number], self.enter_bias[number])

    def mask(self, rank: Tensor, length: int, causal: bool) -> Tensor:
        """Additive mask [R, heads, length, K] of positions with the given rank [R, K] (-1: padding), the last `length` asking."""
        keys, queries = rank[:, None, :], rank[:, -length:, None]
        distance = keys - queries
        bias = self.positions[bucket(distance, not causal, self.spec.buckets, self.spec.distance)]
        hidden = keys < 0
        if causal:
            hidden = hidden | (distance > 0)
        hidden = hidden & ~hidden.all(-1, keepdim=True)  # padding asks too; let it look at anything rather than nothing
        return bias.permute(0, 3, 1, 2).masked_fill(hidden[:, None], torch.finfo(bias.dtype).min)

    def forward(
        self, taps: Sequence[Tensor], mask: Tensor, seen: Seen | None, states: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Side states [R, T, n] from the stem's output and those of all blocks, [R, T, d] each."""
        x = self.rung(0, taps[0])
        shares = torch.sigmoid(self.gates / self.spec.temperature)
        for number, (layer, block) in enumerate(zip(self.layers, self.blocks)):
            x = shares[layer] * x + (1 - shares[layer]) * self.rung(number + 1, taps[layer + 1])
            x = block(x, mask, Memory(seen, self, number), states, self.spec.dropout)
        return rms(x, self.norm)


class LadderForm(Form):
    """The head's input [R, T, d]; `up` [d, n], `up_bias` [d]."""

    reads_call = True
    reads_taps = True

    def __init__(self, rails: Mapping[str, Rail], up: nn.Parameter, up_bias: nn.Parameter, stack: str, causal: bool) -> None:
        super().__init__()
        self.rails = nn.ModuleDict(rails)
        self.up = up
        self.up_bias = up_bias
        self.stack = stack
        self.causal = causal

    def encoded(self, seen: Seen) -> Tensor:
        """The encoder's side states [R, S, n]."""
        rail: Rail = self.rails["encoder"]  # type: ignore[assignment]
        taps = seen.taps("encoder")
        rank = seen.tokens(taps[0].shape[1], "encoder").rank
        found: Tensor = rail(taps, rail.mask(rank, rank.shape[1], causal=False), None, None)
        return found

    def forward(self, h: Tensor, seen: Seen) -> Tensor:
        rail: Rail = self.rails[self.stack or "stack"]  # type: ignore[assignment]
        taps = seen.taps(self.stack)
        length = taps[0].shape[1]
        states = None
        if "encoder" in self.rails and self.stack == "decoder":
            side = seen.kept(self, lambda: self.encoded(seen))
            real = seen.tokens(side.shape[1], "encoder").rank >= 0
            hidden = torch.zeros_like(real, dtype=side.dtype).masked_fill(~real, torch.finfo(side.dtype).min)
            states = side, hidden[:, None, None, :]
        rank = seen.tokens(length, all_passes=True).rank
        out = rail(taps, rail.mask(rank, length, self.causal), seen, states)
        return back(F.linear(out, self.up, self.up_bias), h)


@register("ladder")
@dataclass(frozen=True, slots=True)
class Ladder:
    """A side network of the model's width divided by `reduction`.

    Attributes:
        head_size: width of a head of the side network.
        expansion: width of its feed-forward over its own.
        skip_every: of so many layers the first has no side block (4: 9 of 12 are kept); 0 keeps all.
        temperature: of the gates.
        buckets, distance: relative positions.
    """

    reduction: int = 8
    head_size: int = 8
    expansion: float = 4.0
    skip_every: int = 4
    temperature: float = 0.1
    buckets: int = 32
    distance: int = 128
    dropout: float = 0.0
    activation: str = "relu"

    def __post_init__(self) -> None:
        ACTIVATIONS[self.activation]
        if min(self.reduction, self.head_size, self.buckets // 4) < 1 or self.temperature <= 0 or self.skip_every < 0:
            raise SpecError(f"a side network needs positive sizes, at least 4 buckets and a positive temperature, found {self}")

    def kept(self, layers: int) -> tuple[int, ...]:
        """Layers with a side block."""
        return tuple(i for i in range(layers) if not self.skip_every or i % self.skip_every)

    def build(self, place: Place) -> LadderForm:
        stack = place.site.stack
        if not place.site.name.endswith("head.in"):
            raise SpecError(f"{place.site.name}: a side network gives the input of the head; put it at 'head.in'")
        width = max(1, place.width // self.reduction)
        rails = {stack or "stack": self._rail(place, stack, width, across="encoder" in place.layers and stack == "decoder")}
        if stack == "decoder" and "encoder" in place.layers:
            rails = {"encoder": self._rail(place, "encoder", width, across=False), **rails}
        up = place.parameter(place.site.features, width, fill=kaiming)
        causal = stack == "decoder" or (not stack and not place.bidirectional)
        return LadderForm(rails, up, place.parameter(place.site.features), stack, causal)

    def _rail(self, place: Place, stack: str, width: int, across: bool) -> Rail:
        layers = place.layers[stack]
        kept = self.kept(layers)
        if not kept:
            raise SpecError(f"skip_every={self.skip_every} leaves no side block for {layers} layers; keep all with skip_every=0")
        heads = max(1, width // self.head_size)
        if width % heads:
            raise SpecError(f"{heads} heads do not divide the side network's width {width}; choose another head_size or reduction")
        fill: Fill = normal(1 / math.sqrt(width))
        inner = max(1, int(width * self.expansion))

        def attention() -> Attention:
            return Attention({name: place.parameter(width, width, fill=fill) for name in "qkvo"}, heads)

        def block() -> Block:
            norms = ("norm", "up_norm", "across_norm") if across else ("norm", "up_norm")
            parts = {name: place.parameter(width, fill=1.0) for name in norms}
            parts |= {"up": place.parameter(inner, width, fill=fill), "down": place.parameter(width, inner, fill=normal(1 / math.sqrt(inner)))}
            return Block(attention(), attention() if across else None, parts, self.activation)

        count = len(kept) + 1
        parts = {
            "gates": place.parameter(layers),
            "positions": place.parameter(self.buckets, heads),
            "norm": place.parameter(width, fill=1.0),
        }
        enter = [place.parameter(width, place.width, fill=kaiming) for _ in range(count)]
        return Rail(enter, [place.parameter(width) for _ in range(count)], [block() for _ in kept], parts, kept, self)
