"""`verify`: a row of `anatomy.py` against what arithmetic on a forward pass finds, so that neither can rot alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.anatomy import WEIGHT_ONLY, Anatomy, Stack, bare, row
from intarsia.sites.infer import Inference
from intarsia.sites.structure import join, parent

#: Roles of a row that arithmetic cannot find.
BEYOND = frozenset({"embed.relative", "embed.relative.norm", "attn.pos_q", "attn.pos_k"})


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
    return _compare(anatomy, Inference(model, batch))


def _compare(expected: Anatomy, inference: Inference) -> list[Disagreement]:
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


def _has(inference: Inference, path: str, root: str | None = None) -> bool:
    return structure.find(inference.twin, join(inference.base if root is None else root, path)) is not None


def _executions(name: str, stack: Stack, inference: Inference) -> list[Disagreement]:
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


def _interface(name: str, stack: Stack, inference: Inference) -> list[Disagreement]:
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
