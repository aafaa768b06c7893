"""Structure without names: a traced forward pass of a small twin, and arithmetic identities that one place fulfils.

* a block is an element of the innermost list whose elements each hold an attention and a feed-forward;
* `v` is the linear whose output *equals* the values the attention was given (or a part of it: a fused projection),
  `o` the linear whose input equals the attention's result;
* `attn` is the last module whose output `h` fulfils `residual + h == input of something later` (or `== the block's
  output`), `ffn` likewise; where neither holds but `input + attn + ffn == output`, the sub-layers are parallel;
* a norm stands before a sub-layer if its input is the residual and its output what the sub-layer reads, after it if its
  input is `residual + h`, inside if its output is `h`.

Where an attention does not go through transformers' interface (DeBERTa-v2, BLOOM, XGLM) a short list of names stands in
for the first step; the rest is arithmetic as well.  `verify.py` compares a row of `anatomy.py` with what is found here,
so neither can rot alone.  Nothing here touches the user's model: see `twin.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.anatomy import Anatomy, Order, Stack
from intarsia.sites.arithmetic import close, holds_experts, is_norm, rows, same
from intarsia.sites.roles import PROJECTIONS, BlockRoles
from intarsia.sites.structure import LINEAR, join, parent
from intarsia.sites.trace import Call, Trace, trace
from intarsia.sites.twin import fitting, twin


def infer(model: PreTrainedModel, batch: Mapping[str, Tensor] | None = None) -> Anatomy:
    """The anatomy of a model of unknown architecture.

    Args:
        model: never run, hooked or changed; a small twin of it is.
        batch: inputs for the twin's forward pass; made up where the model reads token ids or spectrograms.

    Raises:
        SiteError: the twin could not be built or run, or something could not be found; the message says what and where.
    """
    return Inference(model, batch).anatomy()


class Inference:
    """A twin, its trace, and the blocks found in it."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor] | None) -> None:
        structure.base_path(model)
        self.name = type(model).__name__
        self.twin = twin(model)
        self.base = structure.base_path(self.twin)
        self.trace: Trace = self._trace(fitting(self.twin, batch))
        self.lists = self._lists()
        self.stacks = self._stacks()
        self.blocks = {name: [self._block(call).find() for call in calls] for name, calls in self.stacks.items()}

    def _trace(self, batch: Mapping[str, Tensor]) -> Trace:
        try:
            return trace(self.twin, batch)
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            raise SiteError(
                f"{self.name}: a forward pass of its small twin failed ({type(error).__name__}: {said}); "
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
        experts = any(holds_experts(c.module) for c in inner)
        return bool(attentions) and (len(rest) >= 2 or experts)

    def _lists(self) -> dict[str, list[Call]]:
        """Calls of the blocks by the pattern of their list's path, in order of execution."""
        first = {call.path: call for call in reversed(self.trace.calls)}
        candidates = [
            path
            for path, module in self.twin.named_modules()
            if isinstance(module, nn.ModuleList)
            and (
                called := [
                    first[join(path, child)] for child, _ in module.named_children() if join(path, child) in first
                ]
            )
            and all(self._is_block(call) for call in called)
        ]
        innermost = [path for path in candidates if not any(other.startswith(path + ".") for other in candidates)]
        found: dict[str, list[Call]] = {}
        for path in innermost:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", self.below(path))
            children = (join(path, child) for child, _ in self.twin.get_submodule(path).named_children())
            found.setdefault(pattern, []).extend(first[child] for child in children if child in first)
        if not found:
            raise SiteError(
                f"{self.name}: cannot find its blocks "
                "(no list of modules whose elements hold an attention and a feed-forward)"
            )
        return {pattern: sorted(calls, key=lambda call: call.start) for pattern, calls in found.items()}

    def _stacks(self) -> dict[str, list[Call]]:
        if len(self.lists) == 1:
            return {"": next(iter(self.lists.values()))}
        crossing = [pattern for pattern, calls in self.lists.items() if self._block(calls[0]).find().crosses]
        if len(self.lists) != 2 or len(crossing) != 1:
            raise SiteError(
                f"{self.name}: cannot tell encoder and decoder apart among the lists of blocks {', '.join(self.lists)}"
            )
        return {"encoder" if pattern != crossing[0] else "decoder": calls for pattern, calls in self.lists.items()}

    def _block(self, call: Call) -> BlockRoles:
        cores = [core for core in self.trace.cores if call.start < core.time < call.end]
        return BlockRoles(call, self._inside(call), cores)

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
        for name, calls in sorted(self.stacks.items(), key=lambda entry: entry[1][0].start):
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
                reused=frozenset(role for block in blocks for role in block.reused()),
                entry=self._entry(calls[0]) if len(self.stacks) == 1 else "",
            )
            begin = calls[-1].end
        return Anatomy(stacks, shared=self._shared() if len(stacks) == 2 else "")

    def _one(self, values: Iterable[bool], word: str) -> bool:
        distinct = set(values)
        if len(distinct) > 1:
            raise SiteError(f"{self.name}: its blocks differ in {word!r}; one row cannot describe them")
        return distinct.pop()

    def _order(self, blocks: Sequence[BlockRoles]) -> Order:
        orders = {order for block in blocks for order in block.orders.values()}
        if len(orders) > 1:
            raise SiteError(
                f"{self.name}: its sub-layers have their norms in different places ({', '.join(sorted(orders))}); "
                "one row cannot describe that"
            )
        return orders.pop()

    def _roles(self, blocks: Sequence[BlockRoles]) -> dict[str, str]:
        """The blocks' roles, those that not every block has marked as optional."""
        merged: dict[str, str] = {}
        for block in blocks:
            for role, path in block.roles.items():
                if merged.setdefault(role, path) != path:
                    raise SiteError(
                        f"{self.name}: role {role!r} is at {merged[role]!r} in one block and at {path!r} in another; "
                        "one row cannot describe that"
                    )
        return {
            role: path if all(role in block.roles for block in blocks) else path + "?" for role, path in merged.items()
        }

    def _around(self, calls: Sequence[Call], begin: int) -> tuple[dict[str, str], bool]:
        """What stands around a stack, and whether it reads token embeddings."""
        first, last = calls[0], calls[-1]
        assert first.x is not None and last.y is not None
        leading = [c for c in self.trace.calls if begin < c.start and c.end < first.start and self.in_base(c.path)]
        found: dict[str, str] = {}
        for call in leading:
            word = self._embedding(call, first)
            if word is None and rows(call.x) == rows(first.x) and call.y is not None:
                word = (
                    "embed.norm"
                    if is_norm(call.module)
                    else "embed.project"
                    if isinstance(call.module, LINEAR)
                    else None
                )
            if word is not None:
                found.setdefault(word, self.below(call.path))
        if sum(c.path == first.path for c in self.trace.calls) > 1:
            stem = [c for c in leading if same(c.y, first.x)]
            if not stem:
                raise SiteError(
                    f"{self.name}: the block {first.path!r} runs several times, "
                    "and no module's output is its first input"
                )
            found["stem"] = self.below(stem[-1].path)
        head = structure.output_embeddings(self.twin)
        runs = [c for c in self.trace.calls if c.path == last.path]
        for call in (
            c for c in self.trace.calls if c.start > runs[-1].end and self.in_base(c.path) and c.module is not head
        ):
            if is_norm(call.module) and same(call.x, runs[-1].y):
                found.setdefault("final.norm", self.below(call.path))
            elif isinstance(call.module, LINEAR) and "pool" in call.path:
                found.setdefault("pooler", self.below(call.path))
            elif (
                isinstance(call.module, LINEAR)
                and "proj" in call.path
                and parent(self.below(call.path)) == parent(self.below(parent(first.path)))
            ):
                found.setdefault("final.project", self.below(call.path))
        return found, "embed" in found

    @staticmethod
    def _embedding(call: Call, block: Call) -> str | None:
        """Words change with row and position, positions with the position only, types with neither."""
        assert block.x is not None
        if (
            call.y is None
            or call.y.dim() not in (2, 3)
            or call.y.shape[-2] != block.x.shape[-2]
            or any(call.module.children())
        ):
            return None
        y = call.y if call.y.dim() == 3 else call.y[None]
        if y.shape[0] > 1 and not close(y[0], y[1]):
            return "embed" if call.x is None else None
        if y.shape[1] == 1 or close(y[:, 0], y[:, 1]):
            return "embed.type"
        return "embed.position" if isinstance(call.module, nn.Embedding) or y.shape[-1] == block.x.shape[-1] else None

    def enters(self, stack: str, path: str) -> bool:
        """Whether a module's output (path below the base) is the first input of a stack's first block."""
        first = self.stacks[stack][0]
        return any(
            same(call.y, first.x)
            for call in self.trace.calls
            if self.below(call.path) == path and call.end < first.start
        )

    def _entry(self, block: Call) -> str:
        """The module around the blocks that a model really calls, where it is not the base (OPT)."""
        around = [c for c in self.trace.calls if c.start < block.start and c.end > block.end]
        if any(call.path == self.base for call in around):
            return ""
        inner = [self.below(call.path) for call in around if self.in_base(call.path)]
        return inner[0] if inner else ""

    def _lend(self) -> dict[str, str]:
        """Modules whose parameters are read elsewhere in the base -> the innermost module around all readers."""
        found = {}
        for (owner, _), readers in self.trace.readers.items():
            if self.in_base(owner) and all(self.in_base(reader) for reader in readers):
                words = [self.below(reader).split(".") for reader in sorted(readers)]
                common = [
                    column[0]
                    for column in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
                ]
                found[self.below(owner)] = ".".join(common)
        return found

    def _shared(self) -> str:
        """An embedding that holds the stacks' tied weight but is never executed."""
        executed = {call.path for call in self.trace.calls}
        embeddings = [(path, module) for path, module in self.twin.named_modules() if isinstance(module, nn.Embedding)]
        used = {id(module.weight) for path, module in embeddings if path in executed}
        idle = [path for path, module in embeddings if path not in executed and id(module.weight) in used]
        return self.below(idle[0]) if idle else ""
