"""`resolve`: from a model to its `SiteMap`, by a row of `anatomy` or by inference where no row is known.

No forward pass is made (an unknown architecture is inferred on a small twin), the model is not changed in any way, and
models on the meta device are welcome.  What is not here: the rows (`anatomy.py`), their proof (`verify.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from intarsia.errors import SiteError
from intarsia.sites import structure
from intarsia.sites.address import Site, SiteMap
from intarsia.sites.anatomy import WEIGHT_ONLY, Anatomy, Stack, bare, optional, row
from intarsia.sites.block import Block
from intarsia.sites.draft import Draft, Role
from intarsia.sites.infer import infer
from intarsia.sites.structure import join
from intarsia.sites.weights import add_weights

#: What stands before the blocks and after them, in order.
BEFORE = (
    "embed",
    "embed.position",
    "embed.type",
    "embed.norm",
    "embed.project",
    "embed.relative",
    "embed.relative.norm",
)
AFTER = ("final.norm", "final.project", "pooler")

#: Why sites that other models have are absent, if nothing more is known.
ABSENT = {
    "xattn": "it has no cross-attention",
    "ffn.gate": "its feed-forward has no gate",
    "embed.position": "it adds no positions to its embeddings",
    "embed.type": "it has no token types",
    "embed.norm": "it does not normalise its embeddings",
    "final.norm": "no norm follows its last block",
    "pooler": "it has no pooler, or was built without one",
    "head": "it has no output embeddings; the parameters of a task head are named head.<path>",
}


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The row that holds for the model, or what inference finds.

    Raises:
        SiteError: there is no row, and inference could not find something; the message says what.
    """
    structure.base_path(model)
    return row(model.config) or infer(model)


def resolve(model: PreTrainedModel, *, anatomy: Anatomy | None = None) -> SiteMap:
    """All sites of a model.

    Args:
        model: any transformers model, with or without a task head, on any device (also meta).
        anatomy: the row to use instead of the one known for `config.model_type`.

    Every parameter of the model gets exactly one `weight` site without a view (`SiteMap.parameters`): `<role>.weight`
    or `.bias` where it has a role, `head.<path>` in a task head outside the base, `other.<path below the base>`
    elsewhere.  `logits` is there also where the model computes none (a head may be added); its `features` are then 0.

    Raises:
        SiteError: a module the anatomy names is not in the model, or an unknown architecture could not be inferred.
    """
    draft = Draft(model, structure.base_path(model))
    anatomy = anatomy or anatomy_of(model)
    idle = join(draft.prefix, bare(anatomy.shared)) if anatomy.shared else ""
    if idle and draft.find(idle) is not None:
        draft.role(idle, Role("embed", None, ""))
    layers: dict[str, int] = {}
    for name, stack in anatomy.stacks.items():
        if name and draft.find(join(draft.prefix, stack.blocks.split(".")[0])) is None:
            draft.missing[name] = f"this model was built without its {name}"
        else:
            layers[name] = _add_stack(draft, name, stack, first=not layers)
    if not layers:
        raise SiteError(f"{draft.name}: it has none of the stacks {', '.join(anatomy.stacks)} of its anatomy")
    _add_answer(draft, anatomy, list(layers)[-1], layers)
    _add_head(draft)
    add_weights(draft, idle)
    for family, reason in ABSENT.items():
        if not any(f".{name}".endswith(f".{family}") for name in draft.sites):
            draft.missing.setdefault(family, reason)
    return SiteMap(draft.sites.values(), model=draft.name, layers=layers, missing=draft.missing)


def _add_stack(draft: Draft, name: str, stack: Stack, first: bool) -> int:
    """Add the sites of one stack; return its number of blocks."""
    blocks = _blocks(draft, stack)
    width = draft.features(join(blocks[0], bare(stack.roles["attn.o"])), "attn.o", 0)
    around = {role: join(draft.prefix, bare(path)) for role, path in stack.around.items() if _has(draft, role, path)}
    lend = {join(draft.prefix, path): join(draft.prefix, reader) for path, reader in stack.lend.items()}
    embedding = draft.features(around["embed"], "embed", width) if "embed" in around else width
    if first:
        _add_sequence(draft, name, stack, embedding)
    for role in BEFORE:
        _add_around(draft, name, role, around, lend, embedding)
    stem = around.get("stem")
    draft.add(Site(join(name, "stem"), stem or blocks[0], "out" if stem else "in", width, stack=name))
    for layer, block in enumerate(blocks):
        Block(draft, name, stack, layer, block, width).add_sites()
    for role in AFTER:
        _add_around(draft, name, role, around, lend, width)
    return len(blocks)


def _add_answer(draft: Draft, anatomy: Anatomy, name: str, layers: Mapping[str, int]) -> None:
    """What heads read: the last norm of the last stack, or the output of its last block."""
    if "stem" in anatomy.stacks[name].around:
        draft.missing["head.in"] = "its blocks run several times, so the output of the last one is not that of the model"
        return
    last = draft.sites.get(join(name, "final.norm")) or draft.sites[join(name, str(layers[name] - 1))]
    draft.add(Site("head.in", last.path, "out", last.features, stack=name))


def _blocks(draft: Draft, stack: Stack) -> list[str]:
    """Paths of the blocks in order; a `*` in the stack's path stands for every element of a list."""
    paths = [draft.prefix]
    for word in (*stack.blocks.split("."), "*"):
        if word == "*":
            paths = [join(path, child) for path in paths for child in _elements(draft, path)]
        else:
            paths = [join(path, word) for path in paths]
    if not paths:
        raise SiteError(f"{draft.name}: {join(draft.prefix, stack.blocks)!r} holds no blocks")
    return paths


def _elements(draft: Draft, path: str) -> list[str]:
    return [child for child, _ in draft.need(path, "blocks").named_children() if child.isdigit()]


def _has(draft: Draft, role: str, path: str) -> bool:
    """Whether a role around the blocks is there; one that is not marked optional must be."""
    full = join(draft.prefix, bare(path))
    return draft.find(full) is not None if optional(path) else bool(draft.need(full, role))


def _add_around(
    draft: Draft, name: str, role: str, around: Mapping[str, str], lend: Mapping[str, str], width: int
) -> None:
    """Add one role around the blocks; `width` is for modules that leave theirs open (sinusoids)."""
    if role not in around:
        return
    path = around[role]
    draft.role(path, Role(join(name, role), None, name, lend.get(path)))
    if role not in WEIGHT_ONLY:
        draft.add(Site(join(name, role), path, "out", draft.features(path, role, width), stack=name))


def _add_sequence(draft: Draft, name: str, stack: Stack, width: int) -> None:
    """The sequence of embeddings of the first stack, which can be lengthened (soft prompts)."""
    if not stack.tokens:
        draft.missing["seq"] = f"its {name} reads frames of sound, not a sequence of embeddings"
        return
    path = join(draft.prefix, stack.blocks.split(".")[0] if name else stack.entry)
    draft.add(Site(join(name, "seq"), path, "seq", width, stack=name))


def _add_head(draft: Draft) -> None:
    """The linear of a language-model head, and the logits."""
    head = structure.output_embeddings(draft.model)
    fields = structure.output_fields(draft.model)
    features = 0
    if head is not None:
        path = next(path for path, module in draft.model.named_modules() if module is head)
        features = structure.out_width(head) or 0
        draft.role(path, Role("head", None, ""))
        draft.add(Site("head", path, "out", features))
    elif (
        draft.prefix and fields is not None and "logits" in fields
    ):  # annotations of classes without a head are not reliable
        features = int(getattr(draft.model.config, "num_labels", 0) or 0)
    draft.add(Site("logits", "", "logits", features))
