"""`check_method`: the laws that every method obeys, for methods of one's own.

    from intarsia.testing import check_method

    def test_my_method():
        check_method(build("my_method", rank=2))

Models are tiny, made from configurations with random weights; nothing is loaded.  A broken law raises `LawBroken`, an
AssertionError, that names the law, the family and what was seen.  A family that has no site for a method must refuse it by
SiteError and be left as it was; at least one family must take it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from intarsia.errors import CompositionError, SiteError
from intarsia.host import Host
from intarsia.methods import METHODS, Method
from intarsia.modules import load, save

_SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
FAMILIES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, {**_SIZE, "max_position_embeddings": 64}),
    "gpt2": (AutoModelForCausalLM, _GPT2),
    "llama": (AutoModelForCausalLM, {**_SIZE, "num_key_value_heads": 2, "max_position_embeddings": 64}),
    "t5": (AutoModelForSeq2SeqLM, _T5),
}
"""An encoder, two decoders (fused and grouped projections) and an encoder-decoder."""

Start = Literal["base", "near", "anywhere"]


class LawBroken(AssertionError):
    """A method does what no method may do."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What was found.

    Attributes:
        taken: families that have the method's sites -> number of trained parameters.
        refused: families without -> the reason.
        folds: families -> None where the module folds, else why not.
        rows: families -> None where rows of one batch may have different modules, else why not.
    """

    taken: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    folds: dict[str, str | None] = field(default_factory=dict)
    rows: dict[str, str | None] = field(default_factory=dict)


def tiny(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model of a family with random weights, and a batch of two rows.  The caller's random state stays as it was."""
    make, settings = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = make.from_config(AutoConfig.for_model(family, **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        batch["decoder_input_ids"] = ids[:, :5].flip(1)
    return model, batch


def check_method(
    method: Method | str, *, families: Sequence[str] = tuple(FAMILIES), start: Start = "anywhere", tolerance: float = 1e-4
) -> Contract:
    """Check a method against the laws.

    Args:
        method: a method, or the name of a registered one (with its defaults; give a small one to be quick).
        families: of `FAMILIES`.
        start: what a fresh module must be: the `base` to the bit, `near` it, or `anywhere`.
        tolerance: of outputs that are computed in another order, relative to the largest.

    Raises:
        LawBroken: the first law that does not hold.
    """
    chosen = METHODS[method].build() if isinstance(method, str) else method
    found = Contract()
    for family in families:
        try:
            _check(chosen, family, start, tolerance, found)
        except SiteError as error:
            found.refused[family] = str(error)
    if not found.taken:
        reasons = "; ".join(f"{f}: {why}" for f, why in found.refused.items())
        raise LawBroken(f"{chosen.name}: no family has a site for it: {reasons}")
    return found


def _check(method: Method, family: str, start: Start, tolerance: float, found: Contract) -> None:
    model, batch = tiny(family)

    def law(holds: bool, sentence: str) -> None:
        if not holds:
            raise LawBroken(f"{method.name} on {family}: {sentence}")

    bare = answer(model, batch)
    before = state(model)
    host = Host(model)
    with _left_alone(host, model, before, law):
        host.add("a", method)
        law(torch.equal(answer(model, batch), bare), "a module that is not active changes the output")
        with host.using("a"):
            fresh = answer(model, batch)
        gap = _gap(fresh, bare)
        law(start != "base" or torch.equal(fresh, bare), f"a fresh module is not the base, it differs by {gap:.3g}")
        law(start != "near" or gap < 0.2, f"a fresh module is not near the base, it differs by {gap:.3g} of the largest output")
        number = host.size("a")
        law(host.count(method) == number, f"counted {host.count(method)} parameters beforehand, it has {number}")
        law(number > 0, "it trains nothing")
        found.taken[family] = number

        a, b = _disturbed(host, "a", batch), _disturbed(host.add("b", method, seed=1), "b", batch)
        law(_gap(a, bare) > 1e-4, "an active module has no effect")
        law(_gap(a, b) > 1e-4, "two modules give the same output")
        for text in ("base >> a", "1.0*a", *(() if method.masks else ("0.25*a + 0.75*a", "average(a, a)"))):
            with host.using(text):
                law(_gap(answer(model, batch), a) < tolerance, f"`{text}` is not `a`")
        found.rows[family] = _rows(host, batch, a, b, tolerance, law)
        _gradients(host, batch, law)
        found.folds[family] = _folds(host, batch, a, tolerance, law)
        _stored(host, family, batch, a, law)


@contextmanager
def _left_alone(host: Host, model: PreTrainedModel, before: Mapping[str, Any], law: Callable[[bool, str], None]) -> Iterator[None]:
    """Close the host behind the block, whatever happened, and compare the model with what it was."""
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        host.close()
        after = state(model)
    changed = [what for what in before if not _same(before[what], after[what])]
    law(not changed, f"after closing the host the model differs in its {', '.join(changed)}")


def _disturbed(host: Host, name: str, batch: Mapping[str, Tensor]) -> Tensor:
    """The output with a module moved away from its start."""
    generator = torch.Generator().manual_seed(len(host.names))
    with torch.no_grad():
        for parameter in host.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with host.using(name):
        return answer(host.model, batch)


def _rows(host: Host, batch: Mapping[str, Tensor], a: Tensor, b: Tensor, tolerance: float, law: Callable[[bool, str], None]) -> str | None:
    try:
        with host.using(["b", "a"]):
            mixed = answer(host.model, batch)
    except CompositionError as error:
        return str(error)
    law(_gap(mixed[0], b[0]) < tolerance and _gap(mixed[1], a[1]) < tolerance, "rows with different modules are not what each gives alone")
    return None


def _gradients(host: Host, batch: Mapping[str, Tensor], law: Callable[[bool, str], None]) -> None:
    try:
        with host.using("a") as model:
            _logits(model(**batch)).float().square().mean().backward()
    except RuntimeError as error:
        law(False, f"the backward fails: {error}")
    mine = host.parameters("a")
    idle = [name for name, p in mine.items() if p.grad is None]
    law(not idle, f"no gradient reaches {idle[:3]}")
    ours = {id(p) for p in mine.values()}
    others = [name for name, p in host.model.named_parameters() if p.grad is not None and id(p) not in ours]
    law(not others, f"a gradient reaches the base or another module: {others[:3]}")


def _folds(host: Host, batch: Mapping[str, Tensor], a: Tensor, tolerance: float, law: Callable[[bool, str], None]) -> str | None:
    reason = host.why_not_foldable("a")
    if reason is None:
        law(_gap(answer(host.fold("a"), batch), a) < tolerance, "the folded copy is not what the active module gives")
        return None
    try:
        host.fold("a")
    except CompositionError:
        return reason
    raise LawBroken(f"{host.method('a').name}: it folds although why_not_foldable says: {reason}")


def _stored(host: Host, family: str, batch: Mapping[str, Tensor], a: Tensor, law: Callable[[bool, str], None]) -> None:
    module = host.extract("a")
    other, _ = tiny(family)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save(module, path)
        guest = Host(other).insert(load(path), name="again")
    with guest.using("again"):
        law(torch.equal(answer(other, batch), a), "stored and loaded on another copy of the base it gives another output")
    law(guest.extract("again").digest == module.digest, "stored and loaded it has another digest")


def answer(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a forward without gradients and without a cache."""
    with torch.no_grad():
        return _logits(model(**batch, **({"use_cache": False} if model.can_generate() else {})))


def _logits(output: Any) -> Tensor:
    return output["logits"]


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What closing a host must restore: weights, flags, submodules, modes, hooks, configuration."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradient flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "submodules": [(name, type(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [sum(len(getattr(module, kind)) for kind in kinds) for module in model.modules()],
        "configuration": {**model.config.to_dict(), "attention": model.config._attn_implementation},
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and any(isinstance(value, Tensor) for value in a.values()):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return bool(a == b)
