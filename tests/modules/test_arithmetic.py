"""Laws of arithmetic: what a result does equals what the expression does, for every additive method and four families."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from intarsia.errors import ModuleError, UsageError
from intarsia.host import Host
from intarsia.methods import METHODS, build
from intarsia.modules import Card, Module, dumps, loads
from intarsia.modules.arithmetic import add, average, negate, scale, subtract, weighted_sum
from intarsia.patches import Head
from tests import zoo
from tests.host.kit import answer, disturb, run, small

ADDITIVE = ("lora", "rslora", "lora_plus", "lora_fa", "miss", "adalora", "hira", "loha", "lokr", "gralora", "lora_xs", "svft",
            "fourierft", "c3a", "pissa", "full", "child_tuning_f", "freeze_k", "ln", "bitfit", "ia3",
            "child_tuning_d", "fish", "lt_sft", "shira", "rosa", "s2ft", "spiel", "diff_pruning")  # fmt: skip
SCALABLE = (*ADDITIVE, "vera")
REFUSED = {
    "houlsby": "function of what it reads", "pfeiffer": "function of what it reads", "parallel": "function of what it reads",
    "prompt": "tokens in front", "prefix": "tokens in front", "p_tuning_v2": "tokens in front", "dora": "row norms",
    "oft": "turns the weight", "road": "turns the weight", "intrinsic": "shared by all sites", "compacter": "shared by all sites",
    "loreft": "function of what it reads", "vera": "frozen sides", "supermask": "a mask has no sum", "lottery": "takes entries of the base away",
}  # fmt: skip


def pair(family: str, method: str, other: str = "") -> tuple[Host, dict[str, Tensor], Module, Module]:
    """A host with modules `a` and `b`, and the two as values, in the form that training leaves them in."""
    model, inputs = zoo.make(family)
    host = Host(model)
    for seed, (name, kind) in enumerate((("a", method), ("b", other or method))):
        host.add(name, small(kind, family), seed=seed)
        disturb(host, name, seed)
    one, two = (host.extract(name, flatten=host.method(name).policy.flatten) for name in "ab")
    return host, inputs, one, two


def says(host: Host, inputs: dict[str, Tensor], expression: str | None) -> Tensor:
    with host.using(expression):
        return run(host.model, inputs)


def same(host: Host, inputs: dict[str, Tensor], module: Module, expression: str | None, tolerance: float = 2e-5) -> None:
    """The module, through its file, does what the expression does."""
    host.insert(loads(dumps(module)), name="result")
    try:
        got, want = says(host, inputs, "result"), says(host, inputs, expression)
    finally:
        host.remove("result")
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


OF_EACH_KIND = ("lora", "hira", "full", "ln", "bitfit", "ia3", "c3a", "lt_sft", "rosa", "s2ft")
"""Everything is tried on an encoder and on transposed weights; grouped heads, missing biases and a decoder's second attention with these."""


@pytest.mark.parametrize(("method", "family"), [*itertools.product(ADDITIVE, ("bert", "gpt2")), *itertools.product(OF_EACH_KIND, ("llama", "t5"))])
def test_sums_are_the_expression(method: str, family: str) -> None:
    host, inputs, a, b = pair(family, method)
    assert not torch.allclose(says(host, inputs, "a"), says(host, inputs, None), atol=1e-4), "the module does nothing"
    same(host, inputs, weighted_sum([a, b], [0.7, -1.3]), "0.7*a + -1.3*b")
    same(host, inputs, average([a, b]), "0.5*a + 0.5*b")
    same(host, inputs, average([a, a]), "a")


@pytest.mark.parametrize("method", SCALABLE)
def test_one_times_a_is_a_and_a_minus_a_is_the_base(method: str) -> None:
    host, inputs, a, _ = pair("bert", method)
    same(host, inputs, scale(a, 1.0), "a", 1e-6)
    same(host, inputs, scale(a, 0.5), "0.5*a")
    same(host, inputs, subtract(a, a), None, 1e-6)
    same(host, inputs, negate(negate(a)), "a", 1e-6)


@pytest.mark.parametrize("other", ["full", "loha", "lokr", "adalora", "bitfit", "freeze_k", "gralora", "fourierft"])
def test_methods_mix(other: str) -> None:
    host, inputs, a, b = pair("bert", "lora", other)
    result = weighted_sum([a, b], [0.5, 2.0])
    assert result.method.name == "mixed"
    same(host, inputs, result, "0.5*a + 2*b")


def test_commutes_and_associates() -> None:
    host, inputs, a, b = pair("gpt2", "lora")
    host.add("c", build("lora", rank=3, at="attn.{q,k}, ffn.up"))
    disturb(host, "c", 5)
    c = host.extract("c")
    for one, other in ((add(a, b), add(b, a)), (add(add(a, b), c), add(a, add(b, c))), (add(subtract(a, b), c), subtract(add(a, c), b))):
        host.insert(one, name="one").insert(other, name="other")
        torch.testing.assert_close(says(host, inputs, "one"), says(host, inputs, "other"), atol=1e-6, rtol=1e-6)
        host.remove("one").remove("other")
    same(host, inputs, add(a, b, c), "a + b + c")


def test_mixed_ranks_sites_and_scales() -> None:
    model, inputs = zoo.make("llama")
    host = Host(model)
    host.add("a", build("lora", rank=2, alpha=5.0)).add("b", build("rslora", rank=5, at="attn.{q,o}", layers="-1:"))
    for seed, name in enumerate("ab"):
        disturb(host, name, seed)
    a, b = host.extract("a"), host.extract("b")
    result = average([a, b], [3, 1])
    same(host, inputs, result, "0.75*a + 0.25*b")
    ranks = {k.split("/")[0]: t.shape[1] for k, t in result.tensors.items() if k.endswith(".up")}
    assert ranks == {"0.attn.q": 2, "0.attn.v": 2, "1.attn.q": 7, "1.attn.v": 2, "1.attn.o": 5}, "ranks add up where both are"


def test_average_of_rslora_with_itself_keeps_its_scale() -> None:
    """A peer multiplies the result by the root of the rank."""
    host, inputs, a, _ = pair("bert", "rslora")
    same(host, inputs, average([a], [1]), "a", 1e-6)
    assert average([a, a]).nbytes == a.nbytes


def test_low_precision_is_summed_in_single() -> None:
    host, inputs, a, b = pair("bert", "lora")
    halves = [Module(m.name, m.method, {k: t.bfloat16() for k, t in m.tensors.items()}, m.base) for m in (a, b)]
    host.insert(halves[0], name="c").insert(halves[1], name="d")
    same(host, inputs, average(halves), "0.5*c + 0.5*d", 1e-4)
    assert {t.dtype for t in average(halves).tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("method", "reason"), REFUSED.items())
def test_what_is_not_additive_is_refused_with_the_reason(method: str, reason: str) -> None:
    _, _, a, b = pair("bert", method)
    with pytest.raises(ModuleError, match=reason) as caught:
        add(a, b)
    assert "expression" in str(caught.value)


def test_every_method_is_decided() -> None:
    """A method is summed rightly or refused in words: no other error, and no third way."""
    additive = set()
    for method in METHODS:
        if method == "head":
            continue
        host, inputs, a, b = pair("bert", method)
        try:
            result = average([a, b])
        except ModuleError as error:
            assert "use" in str(error) or "take" in str(error), method
        else:
            additive.add(method)
            same(host, inputs, result, "0.5*a + 0.5*b")
    assert additive == set(ADDITIVE), "the laws are tried over every additive method"


def test_unions_of_entries_stay_entries() -> None:
    """Two sparse differences are one with the entries of both: no larger than the two, no dense tensor anywhere."""
    for method in ("lt_sft", "s2ft", "shira", "fish"):
        _, _, a, b = pair("bert", method)
        for result in (add(a, b), average([a, b]), subtract(a, b)):
            assert {key.rpartition(".")[2] for key in result.tensors} == {"index", "values"} and result.n_parameters <= a.n_parameters + b.n_parameters
        assert add(a, scale(a, 3.0)).n_parameters == a.n_parameters, "the same entries are not stored twice"


def test_masks_of_different_seeds_and_columns_of_different_channels() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.add(name, build("s2ft", share=0.3, seed=seed, heads=False, inputs=True)).add(f"{name}2", build("shira", rank=2, seed=seed))
        disturb(host, name, seed)
        disturb(host, f"{name}2", seed)
    a, b, c, d = (host.extract(name) for name in ("a", "b", "a2", "b2"))
    assert any(not torch.equal(t, b.tensors[k]) for k, t in a.tensors.items() if k.endswith("index")), "they choose alike"
    same(host, inputs, weighted_sum([a, b], [0.5, 2.0]), "0.5*a + 2*b")
    same(host, inputs, weighted_sum([c, d, a], [1.0, -1.0, 0.5]), "a2 - b2 + 0.5*a")


def test_a_product_and_a_sum_at_one_layer_are_refused() -> None:
    model, _ = zoo.make("bert")
    host = Host(model).add("a", build("ia3")).add("b", build("lora", at="ffn.down")).add("c", build("lora", at="attn.q"))
    a, b, c = (host.extract(n) for n in "abc")
    with pytest.raises(ModuleError, match=r"0\.ffn\.down.*a product and a sum"):
        add(a, b)
    add(a, c)


def test_weights_must_fit() -> None:
    _, _, a, b = pair("bert", "lora")
    with pytest.raises(UsageError, match="2 modules and 1 weights"):
        weighted_sum([a, b], [1.0])
    with pytest.raises(UsageError, match="2 modules and 3 weights"):
        average([a, b], [1.0, 1.0, 1.0])
    with pytest.raises(UsageError, match="sum to zero"):
        average([a, b], [1.0, -1.0])
    with pytest.raises(UsageError, match="finite"):
        scale(a, float("nan"))
    with pytest.raises(UsageError, match="one or more"):
        average([])


def test_other_bases_and_contexts_are_refused() -> None:
    _, _, a, _ = pair("bert", "lora")
    _, _, b, _ = pair("gpt2", "lora")
    with pytest.raises(ModuleError, match="different bases"):
        add(a, b)
    c = Module("c", a.method, a.tensors, a.base, context={"prefix": "query: "})
    with pytest.raises(ModuleError, match="prefix"):
        add(a, c)


def heads(names: dict[str, tuple[str, ...]]) -> tuple[Host, dict[str, Tensor], list[Module]]:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, (name, labels) in enumerate(names.items()):
        method = build("lora", rank=2)
        host.add(name, method.with_head(Head(labels, dropout=0.0)) if labels else method, seed=seed)
        disturb(host, name, seed)
        for key, tensor in host.tensors(name).items():
            if key.endswith((".mean", ".scale")):
                tensor.add_(0.3)
    return host, inputs, [host.extract(name) for name in names]


def test_the_only_head_is_kept_as_it_is() -> None:
    host, inputs, (a, b) = heads({"a": ("x", "y"), "b": ()})
    result = add(scale(a, 2.0), b)
    assert result.labels == ("x", "y")
    same(host, inputs, result, "2*a + b")


def test_heads_over_the_same_labels_are_averaged() -> None:
    host, inputs, (a, b) = heads({"a": ("x", "y"), "b": ("x", "y")})
    result = average([a, b], [1, 3])
    host.insert(result, name="result")
    with host.using("result"):
        got = run(host.model, inputs)
    with torch.no_grad(), host.using("0.25*a + 0.75*b"):
        want = answer(host.model(**inputs))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    with pytest.raises(UsageError, match="head='a'"):
        add(a, b)
    assert add(a, b, head="b").labels == ("x", "y")


def test_different_labels_need_a_choice() -> None:
    _, _, (a, b) = heads({"a": ("x", "y"), "b": ("u", "v")})
    with pytest.raises(UsageError, match="name the one"):
        average([a, b])
    assert average([a, b], head="b").labels == ("u", "v")
    with pytest.raises(UsageError, match="none of these"):
        average([a, b], head="c")


def test_the_result_tells_where_it_comes_from() -> None:
    _, _, a, b = pair("bert", "lora")
    a = a.with_card(Card(licence="MIT", languages=("swh",), warnings=("religious text only",), base="tiny"))
    b = b.with_card(Card(licence="CC-BY-SA-4.0", languages=("kab",), warnings=("small",), base="tiny"))
    card = average([a, b], [1, 3]).card
    assert card.parents == (a.digest, b.digest) and card.parent_names == ("a", "b")
    assert card.recipe == {"operation": "average", "weights": (0.25, 0.75)}
    assert (card.licence, card.languages, card.warnings, card.base) == ("CC-BY-SA-4.0", ("swh", "kab"), ("religious text only", "small"), "tiny")
    assert not card.metrics and card.bias_evaluation == "not evaluated"


def test_operands_stay_as_they_are() -> None:
    _, _, a, b = pair("bert", "ia3")
    before = {k: t.clone() for k, t in a.tensors.items()}
    average([a, b])
    negate(a)
    assert all(torch.equal(t, a.tensors[k]) for k, t in before.items())
