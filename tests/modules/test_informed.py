"""Merging by what modules were used for: the statistics are what they say, and the merges do what their papers derive."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import UsageError
from intarsia.host import Host
from intarsia.host.statistics import diagonal_fisher, grams
from intarsia.modules.arithmetic import average
from intarsia.modules.informed import fisher, regmean
from intarsia.modules.merging import aligned, dense
from intarsia.modules.terms import kind_of, scattered
from tests import zoo
from tests.host.kit import answer, disturb, small
from tests.modules.test_arithmetic import pair
from tests.modules.test_merging import changes


def loss(output, row):  # type: ignore[no-untyped-def]
    return answer(output).float().square().mean()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fisher_is_the_squared_gradient_of_the_change(family: str) -> None:
    """Against autograd through a full-rank module: the gradient by the weight is the gradient by the change."""
    model, inputs = zoo.make(family)
    host = Host(model)
    host.add("a", small("lora", family))
    disturb(host, "a")
    site = next(site.name for site, _ in host.deltas("a"))
    found = diagonal_fisher(host, "a", [inputs], loss=loss)
    dense_one = dense(host.extract("a"))
    host.insert(dense_one, name="d").trainable("d")
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(next(iter(inputs.values()))))]
    want = 0.0
    for row in rows:
        with host.using("d") as running:
            parameter = next(p for k, p in host.parameters("d").items() if k.startswith(site + "/"))
            want = want + torch.autograd.grad(loss(running(**row), row), parameter)[0].square() / len(rows)
    torch.testing.assert_close(found[site], want, atol=1e-9, rtol=1e-3)


def test_statistics_leave_the_model_as_it_was() -> None:
    host, inputs, _, _ = pair("bert", "lora")
    flags = [p.requires_grad for p in host.model.parameters()]
    diagonal_fisher(host, "a", [inputs], loss=loss)
    grams(host, "a", [inputs])
    assert flags == [p.requires_grad for p in host.model.parameters()]
    with pytest.raises(UsageError, match="no rows"):
        diagonal_fisher(host, "a", [], loss=loss)
    with pytest.raises(UsageError, match="no rows"):
        grams(host, "a", [])


def test_grams_see_what_the_mask_shows() -> None:
    host, inputs, _, _ = pair("bert", "lora")
    whole = grams(host, "a", [inputs])
    half = grams(host, "a", [{k: v[:1] for k, v in inputs.items()}, {k: v[1:] for k, v in inputs.items()}])
    for name, gram in whole.items():
        torch.testing.assert_close(gram, half[name], atol=1e-4, rtol=1e-4)
        assert bool((torch.linalg.eigvalsh(gram) > -1e-3).all())


def test_regmean_minimises_what_it_says() -> None:
    """No other matrix is nearer to both modules' outputs on their own inputs; the average is farther."""
    _, _, a, b = pair("bert", "lora")
    left, right, mean = changes(a), changes(b), changes(average([a, b]))
    g = torch.Generator().manual_seed(0)
    inputs = [{k: torch.randn(300, v.shape[1], generator=g) @ torch.randn(v.shape[1], v.shape[1], generator=g) for k, v in left.items()} for _ in "ab"]
    merged = changes(regmean([a, b], [{k: x.T @ x for k, x in one.items()} for one in inputs], shrink=1.0))

    def cost(of: torch.Tensor, site: str) -> float:
        return sum(float((x[site] @ (of - d[site]).T).square().sum()) for x, d in zip(inputs, (left, right)))

    for site, value in merged.items():
        best = cost(value, site)
        assert best < cost(mean[site], site)
        for scale in (1e-3, 1e-2):
            assert best <= cost(value + scale * torch.randn(value.shape, generator=g), site) * (1 + 1e-5)


def test_equal_statistics_give_the_average_and_one_module_itself() -> None:
    _, _, a, b = pair("bert", "lora")
    ones = {k: torch.ones_like(v) for k, v in changes(a).items()}
    eyes = {k: torch.eye(v.shape[1]) for k, v in changes(a).items()}
    for weights in (None, [0.25, 0.75]):
        want = changes(average([a, b], weights))
        for found in (fisher([a, b], [ones, ones], weights), regmean([a, b], [eyes, eyes], weights)):
            for site, value in changes(found).items():
                torch.testing.assert_close(value, want[site], atol=1e-6, rtol=1e-5)
    for site, value in changes(fisher([a], [ones])).items():
        torch.testing.assert_close(value, changes(a)[site])


def test_fisher_follows_who_cares() -> None:
    _, _, a, b = pair("bert", "lora")
    much = {k: torch.full_like(v, 1.0) for k, v in changes(a).items()}
    none = {k: torch.zeros_like(v) for k, v in changes(a).items()}
    for site, value in changes(fisher([a, b], [much, none])).items():
        torch.testing.assert_close(value, changes(a)[site], atol=1e-6, rtol=1e-5)
    for site, value in changes(fisher([a, b], [none, none])).items():  # nobody cares: the mean
        torch.testing.assert_close(value, (changes(a)[site] + changes(b)[site]) / 2, atol=1e-6, rtol=1e-5)


def test_statistics_that_do_not_fit_are_refused() -> None:
    _, _, a, b = pair("bert", "lora")
    ones = {k: torch.ones_like(v) for k, v in changes(a).items()}
    short = dict(list(ones.items())[1:])
    for statistics, words in (([ones], "2 modules and 1"), ([ones, short], "lack the site"), ([ones, {k: v[:1] for k, v in ones.items()}], "shape"),
                              ([ones, {k: -v for k, v in ones.items()}], "negative")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            fisher([a, b], statistics)
    with pytest.raises(UsageError, match="give one weight"):
        regmean([a, b], [ones, ones], [1.0])


@pytest.mark.parametrize("method", ["lt_sft", "s2ft", "full"])
def test_any_additive_method_has_statistics(method: str) -> None:
    """Fisher weights per chosen entry are those of the whole tensor there; RegMean multiplies what reads inputs, and averages the rest."""
    host, inputs, a, b = pair("bert", method)
    importance = [diagonal_fisher(host, name, [inputs], loss=loss) for name in "ab"]
    merged, left, right = aligned([fisher([a, b], importance), a, b])
    for place, (term, value) in merged.items():
        f, g = (one[place[0]] + 1e-12 for one in importance)
        d, e = (scattered(term.factor, {**term.tensors, "values": v[place][1]}, tuple(f.shape)) if kind_of(term.factor) else v[place][1] for v in (left, right))
        got = scattered(term.factor, {**term.tensors, "values": value}, tuple(f.shape)) if kind_of(term.factor) else value
        torch.testing.assert_close(got, ((f * d + g * e) / (f + g)).float(), atol=1e-6, rtol=1e-3)
    inside = [grams(host, name, [inputs]) for name in "ab"]
    assert all(site.endswith(".weight") for site in inside[0]) and "0.attn.o.weight" in inside[0]
    found, mean = aligned([regmean([a, b], inside), average([a, b])])
    differs = {site for (site, _), (_, value) in found.items() if not torch.allclose(value, mean[site, "matrix"][1], atol=1e-5)}
    assert differs <= set(inside[0]) and bool(differs) == (method == "full"), "chosen entries are averaged"
