"""`verify`: a row of `anatomy.py` against what arithmetic on a forward pass finds, so that neither can rot alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.anatomy import WEIGHT_ONLY, Anatomy, Stack, bare, optional, row
from intarsia.sites.infer import Inference
from intarsia.sites.roles import BlockRoles
from intarsia.sites.structure import join, parent

#: Roles of a row that arithmetic cannot find.
BEYOND = frozenset({"embed.relative", "embed.relative.norm", "attn.pos_q", "attn.pos_k"})


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One word on which a row and inference differ.

    Attributes:
        stack: `""`, `encoder` or `decoder`.
        word: the role, or `order`, `parallel`, `blocks`, `entry`, `fused`, `lend`, `shared`,
            `executions`.
        row, inferred: what each says, None for nothing.
    """

    stack: str
    word: str
    row: object
    inferred: object


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
            f"no row is known for model_type {getattr(model.config, 'model_type', '')!r}; "
            "give verify one, or use infer(model)"
        )
    return compare(anatomy, Inference(model, batch))


def compare(expected: Anatomy, inference: Inference) -> list[Disagreement]:
    """Where a row and what was inferred on a twin differ."""
    found = inference.anatomy()
    differences: list[Disagreement] = []

    def note(stack: str, word: str, left: object, right: object) -> None:
        if left != right:
            differences.append(Disagreement(stack, word, left, right))

    present = [
        name for name, stack in expected.stacks.items() if not name or _has(inference, stack.blocks.split(".")[0])
    ]
    pairs = {name: name for name in present if name in found.stacks}
    if len(present) == len(found.stacks) == 1:  # one of two stacks: inference has no name for it
        pairs = {present[0]: next(iter(found.stacks))}
    note("", "stacks", sorted(present), sorted(pairs))
    shared = bare(expected.shared) if expected.shared and _has(inference, bare(expected.shared)) else ""
    note("", "shared", shared, found.shared if len(present) > 1 else shared)
    for name, other in pairs.items():
        left, right = expected.stacks[name], found.stacks[other]
        for word in ("blocks", "order", "parallel", "tokens"):
            note(name, word, getattr(left, word), getattr(right, word))
        note(name, "lend", {k: v for k, v in left.lend.items() if _has(inference, k)}, dict(right.lend))
        executed = {call.path for call in inference.trace.calls}
        entry = left.entry or (left.blocks.split(".")[0] if name else "")
        note(name, "entry", entry, entry if join(inference.base, entry) in executed else right.entry)
        blocks = inference.blocks[other]
        roles = _present(left.roles, inference, [block.path for block in blocks])
        around = _present(left.around, inference, [inference.base])
        if "stem" not in right.around and "stem" in around and inference.enters(other, around["stem"]):
            del around["stem"]  # needed only where blocks run several times, true of this twin all the same
        for mine, theirs in ((roles, right.roles), (around, right.around)):
            for role in sorted((mine.keys() | theirs.keys()) - BEYOND):
                note(name, role, mine.get(role), bare(theirs[role]) if role in theirs else None)
        for role, fused in right.fused.items():
            note(name, f"fused {role}", left.fused.get(role), fused)
        differences += _executions(name, left, inference, blocks[-1])
        differences += _interface(name, left, inference, blocks[-1])
    return differences


def _present(paths: Mapping[str, str], inference: Inference, roots: Sequence[str]) -> dict[str, str]:
    """The row's roles, without optional ones that are under none of the roots."""
    return {
        role: bare(path)
        for role, path in paths.items()
        if not optional(path) or any(_has(inference, bare(path), root) for root in roots)
    }


def _has(inference: Inference, path: str, root: str | None = None) -> bool:
    return structure.find(inference.twin, join(inference.base if root is None else root, path)) is not None


def _executions(name: str, stack: Stack, inference: Inference, block: BlockRoles) -> list[Disagreement]:
    """Roles whose module does not run once in a block, although the row makes its output a site (or the reverse)."""
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


def _interface(name: str, stack: Stack, inference: Inference, block: BlockRoles) -> list[Disagreement]:
    """Attentions for which what their code says about the interface is not what the trace saw."""
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
