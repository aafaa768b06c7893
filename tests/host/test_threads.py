"""What is active travels with the call: threads, nesting, exceptions, two hosts."""

from __future__ import annotations

import threading

import pytest
import torch

from intarsia.errors import CompositionError
from intarsia.host import Host
from tests import zoo
from tests.host import kit


@pytest.mark.parametrize("method", ["lora", "pfeiffer", "prefix", "prompt", "ln", "full", "head", "ia3"])
@pytest.mark.parametrize("family", ["bert", "llama-tied", "t5"])
def test_two_threads_give_single_threaded_answers(family: str, method: str) -> None:
    model, inputs, host = kit.woven(family, method)
    wanted = {}
    for name in ("a", "b", "0.5*a + 0.5*b", "base"):
        with host.using(name):
            wanted[name] = kit.run(model, inputs)
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(15):
            with host.using(name):
                if not torch.allclose(kit.run(model, inputs), wanted[name], atol=1e-5):
                    wrong.append(name)

    if method == "head":
        wanted.pop("base")
    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nesting_and_exceptions_restore_the_call() -> None:
    model, inputs, host = kit.woven("bert", "lora")
    with host.using("a"):
        a = kit.run(model, inputs)
        with host.using("b"):
            b = kit.run(model, inputs)
        assert torch.equal(kit.run(model, inputs), a)
        with pytest.raises(RuntimeError, match="stop"), host.using("b"):
            raise RuntimeError("stop")
        assert torch.equal(kit.run(model, inputs), a)
    assert not torch.equal(a, b)
    assert torch.equal(kit.run(model, inputs), kit.reference("bert"))


@pytest.mark.parametrize("method", ["full", "ln", "lora", "prompt", "prefix"])
def test_a_failing_forward_leaves_nothing_lent(method: str) -> None:
    model, inputs, host = kit.woven("bert", method)
    before = {n: p for n, p in model.named_parameters() if "intarsia" not in n}
    with host.using("a"):
        a = kit.run(model, inputs)
        with pytest.raises((IndexError, RuntimeError)):
            kit.run(model, {"input_ids": inputs["input_ids"] + 10_000})
        with pytest.raises((TypeError, ValueError)):
            model(no_such_argument=1)
        assert torch.equal(kit.run(model, inputs), a)
    for name, parameter in model.named_parameters():
        if "intarsia" not in name:
            assert parameter is before[name], name


def test_two_hosts_on_one_model_are_independent() -> None:
    model, inputs = zoo.make("bert")
    before = kit.state(model)
    first, second = Host(model), Host(model)
    first.add("a", kit.small("lora"))
    second.add("a", kit.small("prefix"))
    kit.disturb(first, "a")
    with first.using("a"):
        one = kit.run(model, inputs)
    with second.using("a"):
        two = kit.run(model, inputs)
    with first.using("a"), second.using("a"):
        both = kit.run(model, inputs)
    assert not torch.allclose(one, two, atol=1e-3) and not torch.allclose(both, one, atol=1e-3)
    first.close()
    with second.using("a"):
        assert torch.equal(kit.run(model, inputs), two)
    second.close()
    assert kit.same_state(before, kit.state(model))


def test_a_call_on_one_model_is_none_on_another() -> None:
    model, inputs, host = kit.woven("bert", "lora")
    other, _, guest = kit.woven("bert", "lora")
    with host.using("a"):
        assert torch.equal(kit.run(other, inputs), kit.reference("bert"))
        with guest.using("b"):
            assert not torch.equal(kit.run(model, inputs), kit.run(other, inputs))


def test_rows_must_fit_the_batch() -> None:
    model, inputs, host = kit.woven("bert", "lora")
    with host.using(["a", "b", "a"]), pytest.raises(CompositionError, match="3 rows"):
        kit.run(model, inputs)
    with pytest.raises(CompositionError, match="empty"), host.using([]):
        pass
