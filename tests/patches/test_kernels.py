"""The hand-written kernels equal plain operations, outputs and gradients; what they keep and what they cost in randomness."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.host import Host
from intarsia.methods import build
from intarsia.patches import kernels
from tests import zoo


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.sampled_from([1.0, 0.25, -3.0]), st.booleans())
@settings(deadline=None, max_examples=30)
def test_added(rows: int, rank: int, bias: bool, scale: float, in_place: bool) -> None:
    leaves = [numbers(rows, 4, 5), numbers(rows, 4, rank, seed=1), numbers(5, rank, seed=2), numbers(5, seed=3)]
    plain, fused = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    h, x, up, b = plain
    want = h * 1.0 + scale * F.linear(x, up, b if bias else None)
    h, x, up, b = fused
    found = kernels.added(h * 1.0, x, up, b if bias else None, scale, in_place)
    torch.testing.assert_close(found, want)
    for value in (want, found):
        (value.square() * numbers(rows, 4, 5, seed=4)).sum().backward()
    for a, c in zip(plain[: 3 + bias], fused):
        torch.testing.assert_close(a.grad, c.grad)


@given(st.floats(0.01, 0.9), st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_the_mask_has_its_rate(rate: float, seed: int) -> None:
    keep = kernels.keep_mask(torch.Size((200, 501)), rate, seed)
    assert keep.dtype == torch.int8 and set(keep.unique().tolist()) <= {0, 1}
    sigma = (rate * (1 - rate) / keep.numel()) ** 0.5
    assert abs((keep == 0).double().mean().item() - rate) < 5 * sigma + 1e-5
    assert torch.equal(keep, kernels.keep_mask(torch.Size((200, 501)), rate, seed))
    assert 1 / kernels.scale_of(rate) == pytest.approx(1 - rate, abs=2e-5)


def test_dropout_and_its_gradient_use_one_mask() -> None:
    torch.manual_seed(3)
    x = numbers(30, 40).requires_grad_()
    y = kernels.dropout(x, 0.3)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] * kernels.scale_of(0.3))
    torch.testing.assert_close(x.grad, kept * kernels.scale_of(0.3) * torch.ones_like(x))
    torch.manual_seed(3)
    assert torch.equal(kernels.dropout(x, 0.3), y)
    assert not torch.equal(kernels.dropout(x, 0.3), y)


def test_dropped_linear_is_linear_of_dropout() -> None:
    x, down = numbers(6, 7, 8), numbers(3, 8, seed=1)
    found = []
    for run in (lambda a, b: kernels.dropped_linear(a, b, 0.25), lambda a, b: F.linear(kernels.dropout(a, 0.25), b)):
        torch.manual_seed(0)
        a, b = x.clone().requires_grad_(), down.clone().requires_grad_()
        y = run(a, b)
        (y * numbers(6, 7, 3, seed=5)).sum().backward()
        found.append((y, a.grad, b.grad))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(seen.values())


def test_dropped_linear_keeps_nothing_wide_of_its_own() -> None:
    x = torch.randn(64, 128, requires_grad=True)
    down = torch.nn.Parameter(torch.randn(4, 128))
    assert kept_bytes(lambda: kernels.dropped_linear(x, down, 0.1)) == x.numel() * 4
    assert kept_bytes(lambda: F.linear(F.dropout(x, 0.1), down)) > 2 * x.numel() * 4


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["lora", "pfeiffer", "parallel", "houlsby", "mam"])
def test_the_fused_path_equals_the_plain_one(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients on a live model, and that it is the fused path that ran."""
    outputs, calls = [], []
    real = kernels.added
    monkeypatch.setattr(kernels, "added", lambda *a: (calls.append(a[-1]), real(*a))[1])
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
        model, batch = zoo.make(family)
        host = Host(model)
        host.add("m", build(method))
        for number, p in enumerate(host.parameters("m").values()):
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        with host.using("m"):
            out = model(**batch)[0]
        out.square().mean().backward()
        outputs.append((out.detach(), {n: p.grad for n, p in host.parameters("m").items()}))
        if not plain:
            assert calls
        host.close()
    (a, grads), (b, others) = outputs
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-4)


def test_what_others_hold_is_not_overwritten() -> None:
    """A user's own hook on the layer keeps the layer's own output."""
    model, batch = zoo.make("bert")
    kept = []
    layer = next(m for n, m in model.named_modules() if n.endswith("query"))
    handle = layer.register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        model(**batch)
        host = Host(model)
        host.add("m", build("lora"))
        for p in host.parameters("m").values():
            p.add_(0.5)
        with host.using("m"):
            model(**batch)
    assert torch.equal(kept[0], kept[1])
    handle.remove()
    host.close()
