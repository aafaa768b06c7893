"""Structure without names: one traced forward pass of a small twin, and arithmetic identities that only one place fulfils.

* a block is an element of the innermost list whose elements each hold an attention and a feed-forward;
* `v` is the linear whose output *equals* the values the attention was given (or a part of it: a fused projection),
  `o` the linear whose input equals the attention's result;
* `attn` is the last module whose output `h` fulfils `residual + h == input of something later` (or `== the block's
  output`), `ffn` likewise; where neither holds but `input + attn + ffn == output`, the sub-layers are parallel;
* a norm stands before a sub-layer if its input is the residual and its output what the sub-layer reads, after it if its
  input is `residual + h`, inside if its output is `h`.

Where an attention does not go through transformers' interface (DeBERTa-v2, BLOOM, XGLM) a short list of names stands in
for the first step; the rest is arithmetic as well.  `verify` compares a row of `anatomy.py` with what is found here, so
neither can rot alone.  Nothing here touches the user's model: see `twin.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.anatomy import WEIGHT_ONLY, Anatomy, Fused, Order, Stack, bare, row
from intarsia.sites.structure import LINEAR, join, parent
from intarsia.sites.trace import Call, Core, Trace, trace
from intarsia.sites.twin import fitting, twin

#: Names of projections where no attention interface shows which is which.
PROJECTIONS = {
    **dict.fromkeys(("q", "query", "q_proj", "q_lin", "query_proj"), "q"),
    **dict.fromkeys(("k", "key", "k_proj", "k_lin", "key_proj"), "k"),
    **dict.fromkeys(("v", "value", "v_proj", "v_lin", "value_proj"), "v"),
    **dict.fromkeys(("qkv", "query_key_value", "c_attn", "Wqkv", "qkv_proj"), "qkv"),
}

#: Roles of a row that arithmetic cannot find.
BEYOND = frozenset({"embed.relative", "embed.relative.norm", "attn.pos_q", "attn.pos_k"})

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One word on which a row and inference differ.

    Attributes:
        stack: `""`, `encoder` or `decoder`.
        word: the role, or `order`, `parallel`, `blocks`, `fused`, `lend`, `shared`, `executions`.
        row, inferred: what each says, None for nothing.
    """

    stack: str
    word: str
    row: object
    inferred: object


def infer(model: PreTrainedModel, batch: Mapping[str, Tensor] | None = None) -> Anatomy:
    """The anatomy of a model of unknown architecture.

    Args:
        model: never run, hooked or changed; a small twin of it is.
        batch: inputs for the twin's forward pass; made up where the model reads token ids or spectrograms.

    Raises:
        SiteError: the twin could not be built or run, or something could not be found; the message says what and where.
    """
    return _Inference(model, batch).anatomy()


def verify(
    model: PreTrainedModel, anatomy: Anatomy | None = None, batch: Mapping[str, Tensor] | None = None
) -> list[Disagreement]:
    """Compare a row with inference on a small twin of the model; an empty list is the proof that the row holds.

    Args:
        model: never run, hooked or changed.
        anatomy: the row to judge, by default the one known for `config.model_type`.
        batch: see `infer`.

    Raises:
        SiteError: there is no row to judge, or inference failed.
    """
    anatomy = anatomy or row(model.config)
    if anatomy is None:
        raise SiteError(
            f"no row is known for model_type {getattr(model.config, 'model_type', '')!r}; give verify one, or use infer(model)"
        )
    return _compare(anatomy, _Inference(model, batch))


# --------------------------------------------------------------------------------------------------- arithmetic


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest value."""
    return bool((a.reshape(-1) - b.reshape(-1)).abs().max() <= TOLERANCE * max(float(a.abs().max()), 1e-12))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Two tensors hold the same vectors, however their leading dimensions are laid out."""
    return a is not None and b is not None and a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and _close(a, b)


def _rows(tensor: Tensor | None) -> int:
    return -1 if tensor is None else math.prod(tensor.shape[:-1])


def _merged(heads: Tensor) -> Tensor:
    """`[B, H, T, D]` -> `[B, T, H * D]`."""
    return heads.transpose(1, 2).reshape(heads.shape[0], heads.shape[2], -1)


def _part(fused: Tensor, groups: int, start: int, width: int) -> Tensor:
    """The part of a fused projection's output that a `View` describes."""
    return fused.reshape(*fused.shape[:-1], groups, -1)[..., start : start + width].reshape(*fused.shape[:-1], -1)


def _rotated(projected: Tensor, heads: Tensor) -> bool:
    """Whether the heads are the projection up to a rotation and one factor: their lengths are proportional."""
    size = heads.shape[-1]
    if projected.numel() != heads.numel():
        return False
    before = projected.reshape(-1, size).norm(dim=-1)
    after = _merged(heads).reshape(-1, size).norm(dim=-1)
    ratio = after / before.clamp_min(1e-12)
    return bool((ratio - ratio.mean()).abs().max() <= 1e-3 * ratio.mean())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


# ----------------------------------------------------------------------------------------------------- one block


@dataclass(slots=True)
class _Attention:
    """One attention of a block: when its result existed, and its projections."""

    time: int
    path: str
    parts: dict[str, Call] = field(default_factory=dict)  # q, k, v, qkv, kv
    fused: Fused | None = None
    core: Core | None = None


class _Block:
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
        self.norms = [c for c in inner if _is_norm(c.module)]
        self.identities = [c for c in inner if isinstance(c.module, nn.Identity)]
        self.used: set[str] = set()
        self.roles: dict[str, str] = {}
        self.fused: dict[str, Fused] = {}
        self.orders: dict[str, Order] = {}
        self.parallel = False
        self.crosses = False

    def fail(self, what: str) -> SiteError:
        return SiteError(f"{self.path}: cannot find {what}; give resolve(model, anatomy=...) a row for this architecture")

    def relative(self, call: Call) -> str:
        return call.path[len(self.path) + 1 :]

    def put(self, role: str, call: Call) -> None:
        self.roles[role] = self.relative(call)
        if isinstance(call.module, LINEAR):
            self.used.add(call.path)

    def find(self) -> _Block:
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
            if attention.fused is not None:
                self.fused[f"{word}.{'qkv' if 'qkv' in attention.parts else 'kv'}"] = attention.fused
            output = self.output_projection(attention)
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

    def attentions(self) -> list[_Attention]:
        found = [self.from_core(core, before) for before, core in zip([None, *self.cores], self.cores, strict=False)]
        return found or self.from_names()

    def from_core(self, core: Core, before: Core | None) -> _Attention:
        since = -1 if before is None else before.time
        near = [c for c in self.linears if since < c.end < core.time and c.path not in self.used]
        attention = _Attention(core.time, core.path, core=core)
        v = next((c for c in near if _same(c.y, _merged(core.v))), None)
        if v is None:
            self.from_fused(attention, core, near)
        else:
            keys = [c for c in near if c is not v and _same(c.x, v.x) and self.fits(c, core.k)]
            queries = [c for c in near if c is not v and _rows(c.x) == _rows(self.x) and self.fits(c, core.q)]
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
        certain = [call for call in calls if call.y is not None and _rotated(call.y, heads)]
        return next(iter(certain or calls), None)

    def from_fused(self, attention: _Attention, core: Core, near: Sequence[Call]) -> None:
        sizes = {"q": core.q.shape[1] * core.q.shape[3], "k": core.k.shape[1] * core.k.shape[3], "v": core.v.shape[1] * core.v.shape[3]}
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
        """How the parts lie in a fused output: the values must be equal, the others equal up to rotation if possible."""
        groups = heads["v"].shape[1]
        likely: Fused | None = None
        for by_head, order in itertools.product((False, True), itertools.permutations(words)):
            count = groups if by_head else 1
            starts = dict(zip(order, itertools.accumulate([0, *(sizes[word] // count for word in order)]), strict=False))
            parts = {word: _part(y, count, starts[word], sizes[word] // count) for word in words}
            if not _same(parts["v"], _merged(heads["v"])):
                continue
            fused = Fused(order, by_head)
            if all(_rotated(parts[word], heads[word]) for word in words):
                return fused
            likely = likely or fused
        return likely

    def from_names(self) -> list[_Attention]:
        groups: dict[str, _Attention] = {}
        for call in self.linears:
            part = PROJECTIONS.get(call.path.rpartition(".")[2])
            if part is not None:
                attention = groups.setdefault(parent(call.path), _Attention(call.end, parent(call.path)))
                attention.parts[part] = call
                attention.time = max(attention.time, call.end)
        found = [attention for attention in groups.values() if set(attention.parts) in ({"q", "k", "v"}, {"qkv"})]
        for attention in found:
            attention.parts = dict(sorted(attention.parts.items(), key=lambda entry: "qkv".find(entry[0])))
        self.used.update(call.path for attention in found for call in attention.parts.values())
        return sorted(found, key=lambda attention: attention.time)

    def output_projection(self, attention: _Attention) -> Call:
        later = [c for c in self.linears if c.start > attention.time and c.path not in self.used]
        if attention.core is not None and attention.core.out is not None:
            result = attention.core.out.reshape(*attention.core.out.shape[:2], -1)
            for call in later:
                if _same(call.x, result):
                    return call
        for call in later:
            if call.y is not None and _rows(call.y) == _rows(self.x) and call.y.shape[-1] == self.width:
                return call
        raise self.fail(f"the output projection of the attention {attention.path!r}")

    def extras(self, word: str, attention: _Attention) -> None:
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
        return _close(x, projected.y) or (x.dim() == 4 and _close(x.transpose(1, 2), projected.y))

    # -- where a sub-layer joins the residual stream -----------------------------------------------------------------

    def next_linear(self, call: Call) -> int:
        """When the next linear that belongs to something else begins."""
        return min((c.start for c in self.linears if c.start > call.end and c.path not in self.used), default=1 << 60)

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
            if _same(total, self.y) or any(_same(c.x, total) for c in self.inner if c.start > call.end):
                return call, stream, total
        return None

    def place(self, word: str, joined: tuple[Call, Tensor, Tensor], reads: Call) -> list[Tensor]:
        """Write down a sub-layer and its norms; return what the residual stream may be after it."""
        call, stream, total = joined
        self.roles[word] = self.relative(call)
        following = [c for c in self.norms if c.start > call.end and _same(c.x, total)]
        before = self.norm_before(stream, reads)
        inside = next((c for c in self.norms if c.end <= call.end and c.start > reads.end and _same(c.y, call.y)), None)
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
        fits = [c for c in (*self.norms, *self.identities) if c.end < reads.start and _same(c.x, stream) and _same(c.y, reads.x)]
        return fits[0] if fits else None

    # -- feed-forward ------------------------------------------------------------------------------------------------

    def feed_forward(self, streams: Sequence[Tensor], since: int) -> None:
        free = [c for c in self.linears if c.path not in self.used and c.start > since and _rows(c.x) == _rows(self.x)]
        for down in free:
            if down.y is not None and down.y.shape[-1] == self.width and (joined := self.join(streams, down.end, 1 << 60)):
                self.place("ffn", joined, self.wide(down, [c for c in free if c.end < down.start]))
                return
        experts = next((c for c in self.inner if any(p.dim() == 3 for p in c.module.parameters(recurse=False))), None)
        if experts is None:
            raise self.fail("the feed-forward (no linear's output joins the residual stream)")
        joined = self.join(streams, experts.end, 1 << 60)
        reads = next((c for c in self.inner if c.path == parent(experts.path)), experts)
        if joined is None:
            raise self.fail(f"where the experts {experts.path!r} join the residual stream")
        self.put("ffn.experts", experts)
        for call in self.inner:
            if parent(call.path) == parent(experts.path) and call.end < experts.start and list(call.module.parameters()):
                self.put("ffn.router", call)
        self.place("ffn", joined, reads)

    def wide(self, down: Call, before: Sequence[Call]) -> Call:
        """Name the projections into the wide space of the feed-forward; return the first of them."""
        inner = [c for c in before if c.x is not None and c.x.shape[-1] == self.width]
        if not 1 <= len(inner) <= 2 or down.x is None:
            raise self.fail(f"the projections that lead to {down.path!r}: {len(inner)} linears come into question")
        self.put("ffn.down", down)
        gated = [c.x for c in self.inner if c.end < down.start and not isinstance(c.module, LINEAR) and not _same(c.x, c.y)]
        if len(inner) == 2:
            gate = next((c for c in inner if any(_same(x, c.y) for x in gated)), inner[0])
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
            if any(_same(x, _part(only.y, 1, start, size)) for x in gated):
                self.fused["ffn.gate_up"] = Fused(order)
        return only

    def find_parallel(self, output: Call, reads: Call) -> bool:
        """Whether `input + attention + feed-forward == output`; if so, write both down."""
        free = [c for c in self.linears if c.path not in self.used and _rows(c.x) == _rows(self.x)]
        attended = self.plus(self.x, output)
        for down in free:
            for call in self.candidates(down.end, 1 << 60) if down.y is not None and down.y.shape[-1] == self.width else ():
                if not _same(self.plus(attended, call), self.y):
                    continue
                attention = next(c for c in self.candidates(output.end, 1 << 60) if _same(c.y, output.y))
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


# ----------------------------------------------------------------------------------------------------- the model


class _Inference:
    """A twin, its trace, and the blocks found in it."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor] | None) -> None:
        structure.base_path(model)
        self.name = type(model).__name__
        self.twin = twin(model)
        self.base = structure.base_path(self.twin)
        self.trace: Trace = self._trace(fitting(self.twin, batch))
        self.lists = self._lists()
        self.blocks = {name: [self._block(call).find() for call in calls] for name, calls in self._stacks().items()}

    def _trace(self, batch: Mapping[str, Tensor]) -> Trace:
        try:
            return trace(self.twin, batch)
        except Exception as error:
            raise SiteError(
                f"{self.name}: a forward pass of its small twin failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                "give infer or verify a batch that fits, or resolve a row"
            ) from error

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _inside(self, call: Call) -> list[Call]:
        return [c for c in self.trace.calls if call.start < c.start and c.end < call.end]

    def _is_block(self, call: Call) -> bool:
        """Whether the call holds an attention and, outside of that attention's module, a feed-forward."""
        inner = self._inside(call)
        linears = [c.path for c in inner if isinstance(c.module, LINEAR)]
        attentions = {core.path for core in self.trace.cores if call.start < core.time < call.end}
        attentions |= {parent(path) for path in linears if path.rpartition(".")[2] in PROJECTIONS}
        rest = [path for path in linears if parent(path) not in attentions]
        experts = any(p.dim() == 3 for c in inner for p in c.module.parameters(recurse=False))
        return bool(attentions) and (len(rest) >= 2 or experts)

    def _lists(self) -> dict[str, list[Call]]:
        """Calls of the blocks by the pattern of their list's path, in order of execution."""
        first = {call.path: call for call in reversed(self.trace.calls)}
        candidates = [
            path
            for path, module in self.twin.named_modules()
            if isinstance(module, nn.ModuleList)
            and (called := [first[join(path, child)] for child, _ in module.named_children() if join(path, child) in first])
            and all(self._is_block(call) for call in called)
        ]
        innermost = [path for path in candidates if not any(other.startswith(path + ".") for other in candidates)]
        found: dict[str, list[Call]] = {}
        for path in innermost:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", self.below(path))
            children = (join(path, child) for child, _ in self.twin.get_submodule(path).named_children())
            found.setdefault(pattern, []).extend(first[child] for child in children if child in first)
        if not found:
            raise SiteError(f"{self.name}: cannot find its blocks (no list of modules whose elements hold an attention and a feed-forward)")
        return {pattern: sorted(calls, key=lambda call: call.start) for pattern, calls in found.items()}

    def _stacks(self) -> dict[str, list[Call]]:
        if len(self.lists) == 1:
            return {"": next(iter(self.lists.values()))}
        crossing = [pattern for pattern, calls in self.lists.items() if self._block(calls[0]).find().crosses]
        if len(self.lists) != 2 or len(crossing) != 1:
            raise SiteError(f"{self.name}: cannot tell encoder and decoder apart among the lists of blocks {', '.join(self.lists)}")
        return {"encoder" if pattern != crossing[0] else "decoder": calls for pattern, calls in self.lists.items()}

    def _block(self, call: Call) -> _Block:
        cores = [core for core in self.trace.cores if call.start < core.time < call.end]
        return _Block(call, self._inside(call), cores)

    def below(self, path: str) -> str:
        """The path relative to the base."""
        return path[len(self.base) + 1 :] if self.base else path

    def in_base(self, path: str) -> bool:
        return not self.base or path.startswith(self.base + ".")

    # -- the row -----------------------------------------------------------------------------------------------------

    def anatomy(self) -> Anatomy:
        patterns = {id(calls[0]): pattern for pattern, calls in self.lists.items()}
        stacks: dict[str, Stack] = {}
        begin = -1
        for name, calls in sorted(self._stacks().items(), key=lambda entry: entry[1][0].start):
            blocks = self.blocks[name]
            around, tokens = self._around(calls, begin)
            stacks[name] = Stack(
                blocks=patterns[id(calls[0])],
                order=self._order(blocks),
                roles=self._roles(blocks),
                around=around,
                fused=dict(entry for block in blocks for entry in block.fused.items()),
                parallel=self._one([block.parallel for block in blocks], "parallel"),
                tokens=tokens,
                lend=self._lend(),
            )
            begin = calls[-1].end
        return Anatomy(stacks, shared=self._shared() if len(stacks) == 2 else "")

    def _one(self, values: Iterable[bool], word: str) -> bool:
        distinct = set(values)
        if len(distinct) > 1:
            raise SiteError(f"{self.name}: its blocks differ in {word!r}; one row cannot describe them")
        return distinct.pop()

    def _order(self, blocks: Sequence[_Block]) -> Order:
        orders = {order for block in blocks for order in block.orders.values()}
        if len(orders) > 1:
            raise SiteError(f"{self.name}: its sub-layers have their norms in different places ({', '.join(sorted(orders))}); one row cannot describe that")
        return orders.pop()

    def _roles(self, blocks: Sequence[_Block]) -> dict[str, str]:
        """The blocks' roles, those that not every block has marked as optional."""
        merged: dict[str, str] = {}
        for block in blocks:
            for role, path in block.roles.items():
                if merged.setdefault(role, path) != path:
                    raise SiteError(f"{self.name}: role {role!r} is at {merged[role]!r} in one block and at {path!r} in another; one row cannot describe that")
        return {role: path if all(role in block.roles for block in blocks) else path + "?" for role, path in merged.items()}

    def _around(self, calls: Sequence[Call], begin: int) -> tuple[dict[str, str], bool]:
        """What stands around a stack, and whether it reads token embeddings."""
        first, last = calls[0], calls[-1]
        assert first.x is not None and last.y is not None
        leading = [c for c in self.trace.calls if begin < c.start and c.end < first.start and self.in_base(c.path)]
        found: dict[str, str] = {}
        for call in leading:
            word = self._embedding(call, first)
            if word is None and _rows(call.x) == _rows(first.x) and call.y is not None:
                word = "embed.norm" if _is_norm(call.module) else "embed.project" if isinstance(call.module, LINEAR) else None
            if word is not None:
                found.setdefault(word, self.below(call.path))
        if sum(c.path == first.path for c in self.trace.calls) > 1:
            stem = [c for c in leading if _same(c.y, first.x)]
            if not stem:
                raise SiteError(f"{self.name}: the block {first.path!r} runs several times, and no module's output is its first input")
            found["stem"] = self.below(stem[-1].path)
        head = structure.output_embeddings(self.twin)
        runs = [c for c in self.trace.calls if c.path == last.path]
        for call in (c for c in self.trace.calls if c.start > runs[-1].end and self.in_base(c.path) and c.module is not head):
            if _is_norm(call.module) and _same(call.x, runs[-1].y):
                found.setdefault("final.norm", self.below(call.path))
            elif isinstance(call.module, LINEAR) and "pool" in call.path:
                found.setdefault("pooler", self.below(call.path))
            elif isinstance(call.module, LINEAR) and "proj" in call.path and parent(self.below(call.path)) == parent(self.below(parent(first.path))):
                found.setdefault("final.project", self.below(call.path))
        return found, "embed" in found

    @staticmethod
    def _embedding(call: Call, block: Call) -> str | None:
        """Words change with row and position, positions with the position only, types with neither."""
        assert block.x is not None
        if call.y is None or call.y.dim() not in (2, 3) or call.y.shape[-2] != block.x.shape[-2] or any(call.module.children()):
            return None
        y = call.y if call.y.dim() == 3 else call.y[None]
        if y.shape[0] > 1 and not _close(y[0], y[1]):
            return "embed" if call.x is None else None
        if y.shape[1] == 1 or _close(y[:, 0], y[:, 1]):
            return "embed.type"
        return "embed.position" if isinstance(call.module, nn.Embedding) or y.shape[-1] == block.x.shape[-1] else None

    def _lend(self) -> dict[str, str]:
        """Modules in the base whose parameters are read elsewhere in the base -> the innermost module around all readers."""
        found = {}
        for (owner, _), readers in self.trace.readers.items():
            if self.in_base(owner) and all(self.in_base(reader) for reader in readers):
                words = [self.below(reader).split(".") for reader in sorted(readers)]
                common = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))]
                found[self.below(owner)] = ".".join(common)
        return found

    def _shared(self) -> str:
        """An embedding that holds the stacks' tied weight but is never executed."""
        executed = {call.path for call in self.trace.calls}
        embeddings = [(path, module) for path, module in self.twin.named_modules() if isinstance(module, nn.Embedding)]
        used = {id(module.weight) for path, module in embeddings if path in executed}
        idle = [path for path, module in embeddings if path not in executed and id(module.weight) in used]
        return self.below(idle[0]) if idle else ""


# ---------------------------------------------------------------------------------------------------- comparison


def _compare(expected: Anatomy, inference: _Inference) -> list[Disagreement]:
    found = inference.anatomy()
    differences: list[Disagreement] = []

    def compare(stack: str, word: str, left: object, right: object) -> None:
        if left != right:
            differences.append(Disagreement(stack, word, left, right))

    compare("", "stacks", sorted(expected.stacks), sorted(found.stacks))
    shared = bare(expected.shared) if structure.find(inference.twin, join(inference.base, bare(expected.shared))) else ""
    compare("", "shared", shared, found.shared)
    for name in expected.stacks.keys() & found.stacks.keys():
        left, right = expected.stacks[name], found.stacks[name]
        for word in ("blocks", "order", "parallel", "tokens"):
            compare(name, word, getattr(left, word), getattr(right, word))
        compare(name, "lend", {k: v for k, v in left.lend.items() if _has(inference, k)}, dict(right.lend))
        blocks = [block.path for block in inference.blocks[name]]
        roles = {role: bare(path) for role, path in left.roles.items() if any(_has(inference, bare(path), block) for block in blocks)}
        around = {role: bare(path) for role, path in left.around.items() if _has(inference, bare(path))}
        for mine, theirs in ((roles, right.roles), (around, right.around)):
            for role in sorted((mine.keys() | theirs.keys()) - BEYOND):
                compare(name, role, mine.get(role), bare(theirs[role]) if role in theirs else None)
        for role, fused in right.fused.items():
            compare(name, f"fused {role}", left.fused.get(role), fused)
        differences += _executions(name, left, inference)
        differences += _interface(name, left, inference)
    return differences


def _has(inference: _Inference, path: str, root: str | None = None) -> bool:
    return structure.find(inference.twin, join(inference.base if root is None else root, path)) is not None


def _executions(name: str, stack: Stack, inference: _Inference) -> list[Disagreement]:
    """Roles whose module does not run exactly once in a block, although the row makes its output a site (or the reverse)."""
    block = inference.blocks[name][-1]
    times = Counter(call.path for call in block.inner)
    found = []
    for role, path in stack.roles.items():
        if not _has(inference, bare(path), block.path) or role in WEIGHT_ONLY:
            continue
        count = times[join(block.path, bare(path))]
        often = role in stack.unsited or role in stack.reused
        if (count == 1) == often:
            found.append(Disagreement(name, f"executions of {role}", "not once" if often else "once", count))
    return found


def _interface(name: str, stack: Stack, inference: _Inference) -> list[Disagreement]:
    """Attentions for which what their code says about the interface is not what the trace saw."""
    block = inference.blocks[name][-1]
    found = []
    for word in ("attn", "xattn"):
        first = stack.roles.get(f"{word}.q") or stack.roles.get(f"{word}.qkv")
        if first is None or not _has(inference, bare(first), block.path):
            continue
        path = parent(join(block.path, bare(first)))
        says = structure.calls_interface(inference.twin.get_submodule(path))
        saw = path in {core.path for core in block.cores}
        if says != saw:
            found.append(Disagreement(name, f"{word}.mem", says, saw))
    return found
