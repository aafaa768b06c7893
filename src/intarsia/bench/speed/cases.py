"""The rows of the table: what is compared, against what, and the ratio that we want."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from intarsia.bench.speed.epochs import epochs
from intarsia.bench.speed.pairs import Case, Pair, apart
from intarsia.bench.speed.shapes import (
    ALL,
    QUERY_VALUE,
    answers_apart,
    batch,
    bert,
    kept_for_backward,
    peft_and_ours,
    step,
)
from intarsia.host import Host


@contextlib.contextmanager
def _step(targets: str, dropout: float = 0.0, dora: bool = False, bytes_only: bool = False, layers: int = 12) -> Iterator[Pair]:
    """A training step of a LoRA on a BERT-base shape, 4 rows of 128 tokens."""
    from peft import LoraConfig

    given = batch(4, 128)
    first = bert(layers, dropout=dropout)
    second, plain = bert(layers, like=first, dropout=dropout), bert(layers, like=first)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=dropout, use_dora=dora)
    with peft_and_ours(first, second, config) as (wrapped, host, _):
        second.eval()
        error, signal = answers_apart(wrapped, host, given)
        wrapped.train(dropout > 0)
        second.train(dropout > 0)
        theirs = step(wrapped, given, (p for p in wrapped.parameters() if p.requires_grad))
        ours = step(second, given, host.parameters("m").values(), partial(host.using, "m"))
        if bytes_only:
            def kept() -> int:
                with host.using("m"):
                    return kept_for_backward(second, lambda: second(**given).loss)

            yield Pair(kept, lambda: kept_for_backward(wrapped, lambda: wrapped(**given).loss), error, signal)
            return
        yield Pair(ours, theirs, error, signal, bound=None if dropout else _bound(plain, given))


def _bound(model: Any, given: Any) -> Any:
    """A frozen model with a gradient down to its first block: what every method at all layers has to do."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    rest = {key: value for key, value in given.items() if key != "input_ids"}
    states = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()

    def run() -> None:
        states.grad = None
        model(inputs_embeds=states, **rest).loss.backward()

    return run


@contextlib.contextmanager
def _mixed(against_base: bool = False, rows: int = 64, length: int = 32, count: int = 64) -> Iterator[Pair]:
    """A batch whose rows have `count` different LoRA modules, against peft's `adapter_names` or the base alone."""
    with _many(count) as (wrapped, host, bare), torch.no_grad():
        given = {key: value for key, value in batch(rows, length).items() if key != "labels"}
        names = [f"m{i * 7 % count}" for i in range(rows)]

        def ours() -> Any:
            with host.using(names) as model:
                return model(**given).logits

        def theirs() -> Any:
            return wrapped(**given, adapter_names=names).logits

        def alone() -> Any:
            return bare(**given).logits

        error, signal = apart(ours(), theirs()), apart(alone(), theirs())
        yield Pair(ours, alone, error, signal) if against_base else Pair(ours, theirs, error, signal, bound=alone)


@contextlib.contextmanager
def _many(count: int, layers: int = 4) -> Iterator[tuple[Any, Host, Any]]:
    """`count` LoRA modules with equal weights on both sides, and the bare model."""
    from peft import LoraConfig

    from intarsia.modules import Module

    first = bert(layers)
    second, bare = bert(layers, like=first), bert(layers, like=first)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=QUERY_VALUE)
    for model in (first, second, bare):
        model.eval()
    with peft_and_ours(first, second, config, name="m0") as (wrapped, host, module):
        draw = torch.Generator().manual_seed(3)
        for number in range(count):
            name = f"m{number}"
            if number:
                wrapped.add_adapter(name, config)
                tensors = {key: torch.randn(tensor.shape, generator=draw) * 0.02 for key, tensor in module.tensors.items()}
                made = Module(name=name, method=module.method, tensors=tensors, base=module.base, card=module.card)
                host.insert(made)
            else:
                wrapped.add_adapter("m0", config)
                tensors = dict(module.tensors)
            _copy(wrapped, host, name)
        wrapped.eval()
        yield wrapped, host, bare


def _copy(wrapped: Any, host: Host, name: str) -> None:
    """Let peft's adapter have the tensors of our module."""
    for key, tensor in host.tensors(name).items():
        site, leaf = key.split("/", 1)
        layer, _, role = site.split(".")
        attention = wrapped.base_model.model.bert.encoder.layer[int(layer)].attention.self
        linear = getattr(attention, {"q": "query", "v": "value"}[role])
        side = linear.lora_A if leaf.endswith("down") else linear.lora_B
        side[name].weight.data.copy_(tensor.detach())


@contextlib.contextmanager
def _idle() -> Iterator[Pair]:
    """A host that carries a module which is not active, around layers so small that only overhead is seen."""
    from intarsia.methods import build

    first = bert(12, width=64).eval()
    second = bert(12, width=64, like=first).eval()
    host = Host(second)
    host.add("m", build("lora"))
    given = {key: value for key, value in batch(2, 16).items() if key != "labels"}

    def many(model: Any) -> Any:
        with torch.no_grad():
            for _ in range(20):
                found = model(**given).logits
        return found

    yield Pair(lambda: many(second), lambda: many(first), apart(many(second), many(first)))
    host.close()


@contextlib.contextmanager
def _small() -> Iterator[Pair]:
    """One LoRA on such small layers."""
    from peft import LoraConfig

    first = bert(12, width=64).eval()
    second = bert(12, width=64, like=first).eval()
    given = {key: value for key, value in batch(2, 16).items() if key != "labels"}
    with peft_and_ours(first, second, LoraConfig(r=8, lora_alpha=16, target_modules=QUERY_VALUE)) as (wrapped, host, _):
        def theirs() -> Any:
            with torch.no_grad():
                for _ in range(20):
                    found = wrapped(**given).logits
            return found

        def ours() -> Any:
            with torch.no_grad():
                for _ in range(20):
                    with host.using("m") as model:
                        found = model(**given).logits
            return found

        yield Pair(ours, theirs, *answers_apart(wrapped, host, given))


@contextlib.contextmanager
def _switch(count: int = 300) -> Iterator[Pair]:
    """Which of many resident modules is active."""
    with _many(count, layers=2) as (wrapped, host, _):
        given = {key: value for key, value in batch(1, 4).items() if key != "labels"}
        wrapped.set_adapter(f"m{count - 1}")
        error, signal = answers_apart(wrapped, host, given, f"m{count - 1}")

        def ours() -> None:
            for number in range(20):
                with host.using(f"m{number * 37 % count}"):
                    pass

        def theirs() -> None:
            for number in range(20):
                wrapped.set_adapter(f"m{number * 37 % count}")

        yield Pair(ours, theirs, error, signal)


@contextlib.contextmanager
def _load() -> Iterator[Pair]:
    """From a file to an active module, all checks included."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from peft import LoraConfig

    from intarsia.modules import load, save

    first = bert(12).eval()
    second = bert(12, like=first).eval()
    given = {key: value for key, value in batch(1, 16).items() if key != "labels"}
    config = LoraConfig(r=8, lora_alpha=16, target_modules=QUERY_VALUE)
    with peft_and_ours(first, second, config) as (wrapped, host, module), TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        path = Path(folder) / "m.intarsia"
        save(module, path)

        def ours() -> None:
            host.insert(load(path), name="again")
            host.remove("again")

        def theirs() -> None:
            wrapped.load_adapter(folder, adapter_name="again")
            wrapped.delete_adapter("again")

        wrapped.load_adapter(folder, adapter_name="check")
        wrapped.set_adapter("check")
        host.insert(load(path), name="check")
        error, signal = answers_apart(wrapped, host, given, "check")
        wrapped.set_adapter("default")
        wrapped.delete_adapter("check")
        host.remove("check")
        yield Pair(ours, theirs, error, signal)


@contextlib.contextmanager
def _fold() -> Iterator[Pair]:
    """Into the weights and back: a folded copy (ours) against merging in place and unmerging (theirs)."""
    from peft import LoraConfig

    first = bert(12).eval()
    second = bert(12, like=first).eval()
    given = {key: value for key, value in batch(1, 16).items() if key != "labels"}
    with peft_and_ours(first, second, LoraConfig(r=8, lora_alpha=16, target_modules=ALL)) as (wrapped, host, _):
        wrapped.eval()

        def theirs() -> None:
            wrapped.merge_adapter()
            wrapped.unmerge_adapter()

        with torch.no_grad():
            wanted, bare = wrapped(**given).logits, host.model(**given).logits
            found = host.fold("m")(**given).logits
        yield Pair(lambda: host.fold("m"), theirs, apart(found, wanted), apart(bare, wanted))


@contextlib.contextmanager
def _flat(before: int) -> Iterator[Pair]:
    """Inserting the module after `before` others, against inserting the first."""
    from intarsia.methods import build

    first, second = bert(2).eval(), bert(2).eval()
    crowded, empty = Host(first), Host(second)
    module = Host(bert(2)).add("x", build("lora")).extract("x")
    for number in range(before):
        crowded.insert(module, name=f"m{number}")

    def put(host: Host) -> None:
        for _ in range(5):
            host.insert(module, name="last")
            host.remove("last")

    yield Pair(lambda: put(crowded), lambda: put(empty), 0.0)
    crowded.close()
    empty.close()


CASES = {
    case.name: case
    for case in (
        Case("lora-qv", "LoRA on query and value, a training step, no dropout", "peft", 1.0, partial(_step, QUERY_VALUE)),
        Case("lora-all", "LoRA on all linear layers, a training step, no dropout", "peft", 0.92, partial(_step, ALL)),
        Case("lora-all-dropout", "LoRA on all linear layers, dropout 0.1, a training step", "peft", 0.80, partial(_step, ALL, 0.1)),
        Case("lora-all-dropout-bytes", "the same: bytes kept for the backward", "peft", 0.65, partial(_step, ALL, 0.1, bytes_only=True), unit="bytes"),
        Case("dora-all", "DoRA on all linear layers, a training step", "peft", 0.80, partial(_step, ALL, dora=True), rounds=5),
        Case("dora-all-bytes", "the same: bytes kept for the backward", "peft", 0.45, partial(_step, ALL, dora=True, bytes_only=True), unit="bytes"),
        Case("epoch", "an epoch of LoRA on all linear layers of me5-small, real texts", "peft under the Trainer, defaults", 0.48, epochs, rounds=3),
        Case("epoch-grouped", "the same", "the same, texts grouped by length", 0.85, partial(epochs, grouped=True), rounds=3),
        Case("upper-half", "3 epochs of LoRA in the upper 6 of 12 blocks, the pass that fills the table included", "peft under the Trainer, defaults", 0.58,
             partial(epochs, 128, 3, range(6, 12)), rounds=3),
        Case("last-two", "5 epochs of LoRA in the last 2 of 12 blocks, the same", "peft under the Trainer, defaults", 0.25,
             partial(epochs, 128, 5, range(10, 12)), rounds=3),
        Case("mixed-64", "a batch of 64 rows with 64 modules", "peft, adapter_names", 0.78, _mixed),
        Case("mixed-64-base", "a batch of 64 rows with 64 modules", "the base alone", 1.12, partial(_mixed, True)),
        Case("load", "from a file to an active module and off again, checks included", "peft, load_adapter", 0.10, _load),
        Case("switch-300", "switch among 300 resident modules (with 1,000, peft takes minutes to be set up)", "peft, set_adapter", 0.03, _switch),
        Case("fold", "fold one module into the weights, and back", "peft, merge and unmerge", 0.28, _fold, rounds=5),
        Case("idle", "a host whose module is not active, around layers of width 64", "the bare model", 1.05, _idle, rounds=15),
        Case("small-lora", "one LoRA on layers of width 64", "peft", 0.50, _small, rounds=15),
        Case("module-1001", "put the 1,001st module on a host", "the first", 1.1, partial(_flat, 1000)),
    )
}
