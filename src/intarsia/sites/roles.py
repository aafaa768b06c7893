"""The roles in one execution of one block, found by arithmetic.  See `infer.py` for the identities."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from intarsia.errors import SiteError
from intarsia.sites.anatomy import WEIGHT_ONLY, Fused, Order
from intarsia.sites.arithmetic import close, holds_experts, is_norm, merged, part_of, rotated, rows, same
from intarsia.sites.structure import LINEAR, parent
from intarsia.sites.trace import Call, Core

#: Names of projections where no attention interface shows which is which.
PROJECTIONS = {
    **dict.fromkeys(("q", "query", "q_proj", "q_lin", "query_proj"), "q"),
    **dict.fromkeys(("k", "key", "k_proj", "k_lin", "key_proj"), "k"),
    **dict.fromkeys(("v", "value", "v_proj", "v_lin", "value_proj"), "v"),
    **dict.fromkeys(("qkv", "query_key_value", "c_attn", "Wqkv", "qkv_proj"), "qkv"),
}

#: Later than any tick of a trace.
NEVER = 1 << 60


@dataclass(slots=True)
class Attention:
    """One attention of a block: when its result existed, and its projections."""

    time: int
    path: str
    parts: dict[str, Call] = field(default_factory=dict)  # q, k, v, qkv, kv
    fused: Fused | None = None
    core: Core | None = None


class BlockRoles:
    """One execution of one block, in which roles are looked for."""

    def __init__(self, call: Call, inner: Sequence[Call], cores: Sequence[Core]) -> None:
        if call.x is None or call.y is None:
            raise SiteError(f"{call.path}: the block reads or returns no hidden states")
        self.path, self.x, self.y = call.path, call.x, call.y
        self.inner = inner
        self.cores = cores
        self.width = self.x.shape[-1]
        times = Counter(inner_call.path for inner_call in inner)
        self.once = {path for path, count in times.items() if count == 1}
        self.linears = [c for c in inner if isinstance(c.module, LINEAR) and c.y is not None]
        self.norms = [c for c in inner if is_norm(c.module)]
        self.identities = [c for c in inner if isinstance(c.module, nn.Identity)]
        self.used: set[str] = set()
        self.roles: dict[str, str] = {}
        self.fused: dict[str, Fused] = {}
        self.orders: dict[str, Order] = {}
        self.parallel = False
        self.crosses = False

    def fail(self, what: str) -> SiteError:
        return SiteError(
            f"{self.path}: cannot find {what}; give resolve(model, anatomy=...) a row for this architecture"
        )

    def relative(self, call: Call) -> str:
        return call.path[len(self.path) + 1 :]

    def put(self, role: str, call: Call) -> None:
        self.roles[role] = self.relative(call)
        if isinstance(call.module, LINEAR):
            self.used.add(call.path)

    def reused(self) -> set[str]:
        """Roles whose module runs more than once in the block."""
        return {
            role
            for role, path in self.roles.items()
            if role not in WEIGHT_ONLY and f"{self.path}.{path}" not in self.once
        }

    def find(self) -> BlockRoles:
        attentions = self.attentions()
        if not attentions:
            raise self.fail("an attention")
        if len(attentions) > 2:
            raise self.fail(f"a block with one or two attentions: it has {len(attentions)}")
        self.crosses = len(attentions) == 2
        streams = [self.x]
        ends = []
        for word, attention in zip(("attn", "xattn"), attentions, strict=False):
            for part, call in attention.parts.items():
                self.put(f"{word}.{part}", call)
            output = self.output_projection(attention)
            if attention.core is None and "qkv" in attention.parts:
                attention.fused = self.causal_layout(attention.parts["qkv"], output)
            if attention.fused is not None:
                self.fused[f"{word}.{'qkv' if 'qkv' in attention.parts else 'kv'}"] = attention.fused
            self.put(f"{word}.o", output)
            self.extras(word, attention)
            ends.append(output)
            reads = attention.parts.get("q") or attention.parts["qkv"]
            joined = self.join(streams, output.end, self.next_linear(output))
            if joined is None:
                if self.crosses or not self.find_parallel(output, reads):
                    raise self.fail(f"where {word} joins the residual stream")
                return self
            streams = self.place(word, joined, reads)
        self.feed_forward(streams, ends[-1].end)
        return self

    # -- attention ---------------------------------------------------------------------------------------------------

    def attentions(self) -> list[Attention]:
        found = [self.from_core(core, before) for before, core in zip([None, *self.cores], self.cores, strict=False)]
        return found or self.from_names()

    def from_core(self, core: Core, before: Core | None) -> Attention:
        since = -1 if before is None else before.time
        near = [c for c in self.linears if since < c.end < core.time and c.path not in self.used]
        attention = Attention(core.time, core.path, core=core)
        v = next((c for c in near if same(c.y, merged(core.v))), None)
        if v is None:
            self.from_fused(attention, core, near)
        else:
            keys = [c for c in near if c is not v and same(c.x, v.x) and self.fits(c, core.k)]
            queries = [c for c in near if c is not v and rows(c.x) == rows(self.x) and self.fits(c, core.q)]
            q = self.pick(queries, core.q)
            k = self.pick([c for c in keys if c is not q], core.k)
            if q is None or k is None:
                raise self.fail(f"the {'query' if q is None else 'key'} projection of the attention {core.path!r}")
            attention.parts = {"q": q, "k": k, "v": v}
        self.used.update(call.path for call in attention.parts.values())
        return attention

    @staticmethod
    def fits(call: Call, heads: Tensor) -> bool:
        return call.y is not None and call.y.shape[-1] == heads.shape[1] * heads.shape[3]

    @staticmethod
    def pick(calls: Sequence[Call], heads: Tensor) -> Call | None:
        """The call whose output the heads are, up to rotation; where a norm hides that, the first in order."""
        certain = [call for call in calls if call.y is not None and rotated(call.y, heads)]
        return next(iter(certain or calls), None)

    def from_fused(self, attention: Attention, core: Core, near: Sequence[Call]) -> None:
        sizes = {
            "q": core.q.shape[1] * core.q.shape[3],
            "k": core.k.shape[1] * core.k.shape[3],
            "v": core.v.shape[1] * core.v.shape[3],
        }
        for call, words in itertools.product(near, ("qkv", "kv")):
            if call.y is None or call.y.shape[-1] != sum(sizes[word] for word in words):
                continue
            fused = self.layout(call.y, words, {"q": core.q, "k": core.k, "v": core.v}, sizes)
            if fused is None:
                continue
            attention.parts = {words: call}
            attention.fused = fused
            if words == "kv":
                q = self.pick([c for c in near if c is not call and self.fits(c, core.q)], core.q)
                if q is None:
                    raise self.fail(f"the query projection of the attention {core.path!r}")
                attention.parts = {"q": q, "kv": call}
            return
        raise self.fail(f"the value projection of the attention {core.path!r} (no linear's output holds the values)")

    @staticmethod
    def layout(y: Tensor, words: str, heads: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Fused | None:
        """How the parts lie in a fused output: the values must be equal, the others up to rotation if possible."""
        groups = heads["v"].shape[1]
        likely: Fused | None = None
        for by_head, order in itertools.product((False, True), itertools.permutations(words)):
            count = groups if by_head else 1
            starts = dict(
                zip(order, itertools.accumulate([0, *(sizes[word] // count for word in order)]), strict=False)
            )
            parts = {word: part_of(y, count, starts[word], sizes[word] // count) for word in words}
            if not same(parts["v"], merged(heads["v"])):
                continue
            fused = Fused(order, by_head)
            if all(rotated(parts[word], heads[word]) for word in words):
                return fused
            likely = likely or fused
        return likely

    def from_names(self) -> list[Attention]:
        groups: dict[str, Attention] = {}
        for call in self.linears:
            part = PROJECTIONS.get(call.path.rpartition(".")[2])
            if part is not None:
                attention = groups.setdefault(parent(call.path), Attention(call.end, parent(call.path)))
                attention.parts[part] = call
                attention.time = max(attention.time, call.end)
        found = [attention for attention in groups.values() if set(attention.parts) in ({"q", "k", "v"}, {"qkv"})]
        for attention in found:
            attention.parts = dict(sorted(attention.parts.items(), key=lambda entry: "qkv".find(entry[0])))
        self.used.update(call.path for attention in found for call in attention.parts.values())
        return sorted(found, key=lambda attention: attention.time)

    def output_projection(self, attention: Attention) -> Call:
        later = [c for c in self.linears if c.start > attention.time and c.path not in self.used]
        if attention.core is not None and attention.core.out is not None:
            result = attention.core.out.reshape(*attention.core.out.shape[:2], -1)
            for call in later:
                if same(call.x, result):
                    return call
        for call in later:
            if call.y is not None and rows(call.y) == rows(self.x) and call.y.shape[-1] == self.width:
                return call
        raise self.fail(f"the output projection of the attention {attention.path!r}")

    @staticmethod
    def causal_layout(qkv: Call, output: Call) -> Fused | None:
        """How queries, keys and values lie in one projection, where no interface shows them.

        Under a causal mask the first token attends to itself alone, so the result there *is* its values.
        """
        if qkv.y is None or output.x is None or qkv.y.dim() != 3 or output.x.dim() != 3:
            return None
        first, values = qkv.y[:, 0], output.x[:, 0]
        size = values.shape[-1]
        if first.shape[-1] != 3 * size:
            return None
        for groups, order in itertools.product((g for g in range(1, size) if size % g == 0), ("qkv", "qvk", "vqk")):
            width = size // groups
            if same(part_of(first, groups, order.index("v") * width, width), values):
                return Fused(tuple(order), by_head=groups > 1)
        return None

    def extras(self, word: str, attention: Attention) -> None:
        """Norms of queries and keys, and an embedding of relative positions inside the attention."""
        for part in ("q", "k"):
            projected = attention.parts.get(part)
            for norm in self.norms if projected is not None else ():
                if norm.start < attention.time and self.by_heads(norm.x, projected):
                    self.put(f"{word}.{part}.norm", norm)
        for call in self.inner:
            if isinstance(call.module, nn.Embedding) and call.path.startswith(attention.path + "."):
                self.put(f"{word}.relative", call)

    @staticmethod
    def by_heads(x: Tensor | None, projected: Call | None) -> bool:
        """Whether a tensor is the output of a projection, seen as heads or not."""
        if x is None or projected is None or projected.y is None or x.numel() != projected.y.numel():
            return False
        return close(x, projected.y) or (x.dim() == 4 and close(x.transpose(1, 2), projected.y))

    # -- where a sub-layer joins the residual stream -----------------------------------------------------------------

    def next_linear(self, call: Call) -> int:
        """When the next linear that belongs to something else begins."""
        return min((c.start for c in self.linears if c.start > call.end and c.path not in self.used), default=NEVER)

    def candidates(self, first: int, last: int) -> list[Call]:
        """Calls that ended between two ticks with one vector per token, latest first."""
        fitting = [c for c in self.inner if first <= c.end <= last and c.path in self.once and self.on_stream(c.y)]
        return sorted(fitting, key=lambda c: -c.end)

    def on_stream(self, tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.numel() == self.x.numel() and tensor.shape[-1] == self.width

    def plus(self, stream: Tensor, call: Call) -> Tensor:
        assert call.y is not None
        return stream.reshape(self.x.shape) + call.y.reshape(self.x.shape)

    def join(self, streams: Sequence[Tensor], first: int, last: int) -> tuple[Call, Tensor, Tensor] | None:
        """(sub-layer's last call, residual, their sum), if the sum is seen again."""
        for call, stream in itertools.product(self.candidates(first, last), streams):
            total = self.plus(stream, call)
            if same(total, self.y) or any(same(c.x, total) for c in self.inner if c.start > call.end):
                return call, stream, total
        return None

    def place(self, word: str, joined: tuple[Call, Tensor, Tensor], reads: Call) -> list[Tensor]:
        """Write down a sub-layer and its norms; return what the residual stream may be after it."""
        call, stream, total = joined
        self.roles[word] = self.relative(call)
        following = [c for c in self.norms if c.start > call.end and same(c.x, total)]
        before = self.norm_before(stream, reads)
        inside = next((c for c in self.norms if c.end <= call.end and c.start > reads.end and same(c.y, call.y)), None)
        if before is not None and inside is not None:
            self.orders[word] = "sandwich"
            self.put(f"{word}.norm", before)
            self.put(f"{word}.out.norm", inside)
        elif before is not None:
            self.orders[word] = "pre"
            self.put(f"{word}.norm", before)
        elif inside is not None:
            self.orders[word] = "out"
            self.put(f"{word}.norm", inside)
        elif following:
            self.orders[word] = "post"
            self.put(f"{word}.norm", following[0])
        else:
            raise self.fail(f"a norm before, inside or after {word}")
        return [total, *(c.y for c in following if c.y is not None)]

    def norm_before(self, stream: Tensor, reads: Call) -> Call | None:
        fits = [
            c
            for c in (*self.norms, *self.identities)
            if c.end < reads.start and same(c.x, stream) and same(c.y, reads.x)
        ]
        return fits[0] if fits else None

    # -- feed-forward ------------------------------------------------------------------------------------------------

    def feed_forward(self, streams: Sequence[Tensor], since: int) -> None:
        experts = next((c for c in self.inner if holds_experts(c.module)), None)
        if experts is not None:
            self.mixture(streams, experts)
            return
        free = [c for c in self.linears if c.path not in self.used and c.start > since and rows(c.x) == rows(self.x)]
        for down in free:
            if (
                down.y is not None
                and down.y.shape[-1] == self.width
                and (joined := self.join(streams, down.end, NEVER))
            ):
                self.place("ffn", joined, self.wide(down, [c for c in free if c.end < down.start]))
                return
        raise self.fail("the feed-forward (no linear's output joins the residual stream)")

    def mixture(self, streams: Sequence[Tensor], experts: Call) -> None:
        """A feed-forward of experts: their parameters, the router before them, and where the sum joins."""
        joined = self.join(streams, experts.end, NEVER)
        if joined is None:
            raise self.fail(f"where the experts {experts.path!r} join the residual stream")
        self.put("ffn.experts", experts)
        for call in self.inner:
            if (
                parent(call.path) == parent(experts.path)
                and call.end < experts.start
                and list(call.module.parameters())
            ):
                self.put("ffn.router", call)
        self.place("ffn", joined, next((c for c in self.inner if c.path == parent(experts.path)), experts))

    def wide(self, down: Call, before: Sequence[Call]) -> Call:
        """Name the projections into the wide space of the feed-forward; return the first of them."""
        inner = [c for c in before if c.x is not None and c.x.shape[-1] == self.width]
        if not 1 <= len(inner) <= 2 or down.x is None:
            raise self.fail(f"the projections that lead to {down.path!r}: {len(inner)} linears come into question")
        self.put("ffn.down", down)
        gated = [
            c.x for c in self.inner if c.end < down.start and not isinstance(c.module, LINEAR) and not same(c.x, c.y)
        ]
        if len(inner) == 2:
            gate = next((c for c in inner if any(same(x, c.y) for x in gated)), inner[0])
            self.put("ffn.gate", gate)
            self.put("ffn.up", inner[1] if gate is inner[0] else inner[0])
            return inner[0]
        only = inner[0]
        assert only.y is not None
        size = down.x.shape[-1]
        if only.y.shape[-1] == size:
            self.put("ffn.up", only)
            return only
        if only.y.shape[-1] != 2 * size:
            raise self.fail(f"how {only.path!r} ({only.y.shape[-1]} features) leads to {down.path!r} ({size} features)")
        self.put("ffn.gate_up", only)
        for start, order in ((0, ("gate", "up")), (size, ("up", "gate"))):
            if any(same(x, part_of(only.y, 1, start, size)) for x in gated):
                self.fused["ffn.gate_up"] = Fused(order)
        return only

    def find_parallel(self, output: Call, reads: Call) -> bool:
        """Whether `input + attention + feed-forward == output`; if so, write both down."""
        free = [c for c in self.linears if c.path not in self.used and rows(c.x) == rows(self.x)]
        attended = self.plus(self.x, output)
        for down in free:
            for call in (
                self.candidates(down.end, NEVER) if down.y is not None and down.y.shape[-1] == self.width else ()
            ):
                if not same(self.plus(attended, call), self.y):
                    continue
                attention = next(c for c in self.candidates(output.end, NEVER) if same(c.y, output.y))
                first = self.wide(down, [c for c in free if c.end < down.start])
                self.parallel = True
                for word, last, projection in (("attn", attention, reads), ("ffn", call, first)):
                    before = self.norm_before(self.x, projection)
                    if before is None:
                        raise self.fail(f"a norm before {word}")
                    self.roles[word] = self.relative(last)
                    self.orders[word] = "pre"
                    self.put(f"{word}.norm", before)
                return True
        return False
