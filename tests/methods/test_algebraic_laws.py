"""Laws A1 to A8 of the unified view on whole tiny models: two spellings of one method are one method.  See docs/methods-laws.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.host import Host
from intarsia.methods import Method, Patch, build
from intarsia.patches import (
    Add,
    Affine,
    Bottleneck,
    Cayley,
    Concat,
    Const,
    Dense,
    Householder,
    LowRank,
    Matrix,
    Mul,
    Rot,
    Rows,
    Sparse,
    SubspaceEdit,
)
from tests import zoo
from tests.host import kit

FAMILIES = ("bert", "gpt2", "llama", "t5")


def outputs(family: str, *spellings: tuple[Patch, ...]) -> tuple[list[Tensor], Host]:
    """The model's output under each spelling; all have the tensors of the first, moved away from its start, in order."""
    model, inputs = zoo.make(family)
    host = Host(model)
    found = []
    for number, patches in enumerate(spellings):
        name = f"m{number}"
        host.add(name, Method("law", patches))
        if number == 0:
            kit.disturb(host, name)
        else:
            with torch.no_grad():
                for mine, theirs in zip(host.parameters(name).values(), host.parameters("m0").values(), strict=True):
                    mine.copy_(theirs.view(mine.shape))
        with host.using(name):
            found.append(kit.run(model, inputs))
    assert (found[0] - kit.reference(family)).abs().max() > 2e-4
    return found, host


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factor", [LowRank(2), Dense()])
def test_a1_a_map_beside_a_layer_is_a_change_of_its_weight(family: str, factor: Any) -> None:
    beside = Patch("a", "attn.{q,o}, ffn.down", Affine(factor), Add(0.5))
    weight = Patch("a", "attn.{q,o}.weight, ffn.down.weight", Matrix(factor), Add(0.5), port="weight")
    (a, b), _ = outputs(family, (beside,), (weight,))
    assert torch.allclose(a, b, atol=1e-4)


def test_a2_a_vector_added_is_a_bias() -> None:
    (a, b), _ = outputs("bert", (Patch("a", "attn.q", Const(), Add()),), (Patch("a", "attn.q.bias", Matrix(), port="weight"),))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a2_a_vector_multiplied_on_an_output_scales_rows_and_bias(family: str) -> None:
    rows = [Patch("w", "attn.{q,o}.weight", Matrix(Rows()), Mul(), port="weight")]
    if family not in kit.BIAS_FREE:
        rows.append(Patch("b", "attn.{q,o}.bias", Matrix(), Mul(), port="weight"))
    model, inputs = zoo.make(family)
    host = Host(model).add("out", Method("law", (Patch("a", "attn.{q,o}", Const("ones"), Mul()),))).add("rows", Method("law", tuple(rows)))
    kit.disturb(host, "out")
    gains = host.parameters("out")
    with torch.no_grad():
        for name, tensor in host.parameters("rows").items():
            tensor.copy_(gains[f"{name.split('/')[0].rsplit('.', 1)[0]}/a.value"].view(tensor.shape))
    with host.using("out"):
        a = kit.run(model, inputs)
    with host.using("rows"):
        assert torch.allclose(kit.run(model, inputs), a, atol=1e-5)
    assert (a - kit.reference(family)).abs().max() > 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a2_a_vector_multiplied_on_an_input_scales_columns(family: str) -> None:
    """Against a copy of the base with scaled columns."""
    (a,), host = outputs(family, (Patch("a", "ffn.act", Const("ones"), Mul(), port="in"),))
    assert host.why_not_foldable("m0") is None
    plain = host.fold("m0")
    _, inputs = zoo.make(family)
    assert torch.allclose(kit.run(plain, inputs), a, atol=1e-4)
    for name, tensor in host.parameters("m0").items():
        site = host.sites[name.split("/")[0].replace(".act", ".down.weight")]
        before, after = (m.get_submodule(site.path)._parameters["weight"] for m in (host.model, plain))
        assert before is not None and after is not None
        torch.testing.assert_close(after, before * (tensor[:, None] if site.transposed else tensor))


def test_a3_a_prefix_is_a_convex_mixture_at_every_head() -> None:
    """h' = (1 - l) h + l softmax(q P_k) P_v, l being the share of the softmax that falls on the prefix."""
    model, inputs = zoo.make("bert")
    inputs = {"input_ids": inputs["input_ids"]}
    host = Host(model).add("p", build("prefix", length=3, reparameterise=None, layers="0"))
    kit.disturb(host, "p", size=1.0)
    attention = next(m for n, m in model.named_modules() if n.endswith("layer.0.attention.self"))
    output = next(m for n, m in model.named_modules() if n.endswith("layer.0.attention.output.dense"))
    seen: dict[str, Tensor] = {}
    hooks = [getattr(attention, word).register_forward_hook(lambda m, i, o, word=word: seen.__setitem__(word, o)) for word in ("query", "key", "value")]
    hooks.append(output.register_forward_pre_hook(lambda m, i: seen.__setitem__("heads", i[0])))
    kit.run(model, inputs)
    h = seen["heads"]
    with host.using("p"):
        kit.run(model, inputs)
    changed = seen["heads"]
    for hook in hooks:
        hook.remove()
    tensors = {k.rsplit(".", 1)[-1]: t for k, t in host.tensors("p").items() if k.startswith("0.")}
    keys, values = (next(t for k, t in tensors.items() if k.startswith(word)) for word in ("key", "value"))
    count, length, size = keys.shape
    q, k = (seen[word].unflatten(-1, (count, size)).transpose(1, 2) for word in ("query", "key"))
    own, there = q @ k.transpose(-1, -2) / size**0.5, q @ keys.transpose(-1, -2) / size**0.5
    share = torch.cat([there, own], -1).softmax(-1)[..., :length].sum(-1, keepdim=True)
    memory = (there.softmax(-1) @ values).transpose(1, 2).flatten(2)
    share = share.transpose(1, 2).expand(-1, -1, -1, size).flatten(2)
    assert torch.allclose(changed, (1 - share) * h + share * memory, atol=1e-5) and 0.05 < float(share.detach().mean()) < 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_a4_a_linear_adapter_behind_a_layer_is_a_change_of_it(family: str) -> None:
    """W' = (I + U D) W, b' = (I + U D) b + U b_d + b_u, written by hand into another copy of the base, and by folding."""
    _, host = outputs(family, (Patch("a", "attn.o, ffn.down", Bottleneck(3, activation="identity"), Add()),))
    tensors = host.parameters("m0")
    plain, inputs = zoo.make(family)
    with torch.no_grad():
        for key in sorted({name.rsplit("/", 1)[0] for name in tensors}):
            layer = plain.get_submodule(host.sites[key].path)
            up, down, first, second = (tensors[f"{key}/a.{leaf}"] for leaf in ("up.value", "down.value", "down_bias", "up_bias"))
            weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
            assert weight is not None
            if bias is None:  # no bias to hold U b_d + b_u
                first.zero_()
                second.zero_()
            canonical = weight.T if host.sites[f"{key}.weight"].transposed else weight
            canonical.copy_(canonical + up @ down @ canonical)
            if bias is not None:
                bias.copy_(bias + up @ (down @ bias) + up @ first + second)
    with host.using("m0"):
        a = kit.run(host.model, inputs)
    assert torch.allclose(kit.run(plain, inputs), a, atol=1e-4)
    if family in kit.BIAS_FREE:
        assert "no bias" in str(host.why_not_foldable("m0"))
    else:
        assert torch.allclose(kit.run(host.fold("m0"), inputs), a, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("factor", [Cayley(4), Householder(2)])
def test_a5_turning_what_a_layer_reads_is_turning_its_weight(family: str, factor: Any) -> None:
    """At the only layer that reads the tensor: the input of the output projection."""
    read = Patch("a", "attn.heads", Affine(factor, read="self"), Rot(), port="in")
    weight = Patch("a", "attn.o.weight", Affine(factor, read="self"), Rot(), port="weight")
    (a, b), host = outputs(family, (read,), (weight,))
    rotations = [form.factor.materialise() for form in host.forms("m0").values()]
    assert all(torch.allclose(r @ r.T, torch.eye(len(r)), atol=1e-5) for r in rotations)
    folded = kit.run(host.fold("m0"), zoo.make(family)[1])
    assert torch.allclose(folded, a, atol=1e-4), "x R^T W^T = x (W R)^T with the rotation that reads"
    assert torch.allclose(kit.run(host.fold("m1"), zoo.make(family)[1]), b, atol=1e-4)


def test_a6_an_edit_of_every_position_is_affine_and_one_of_some_is_not() -> None:
    (a,), host = outputs("bert", (Patch("a", "attn.q", SubspaceEdit(2, positions="all"), Add()),))
    assert torch.allclose(kit.run(host.fold("m0"), zoo.make("bert")[1]), a, atol=1e-4)
    host.add("some", Method("law", (Patch("a", "attn.q", SubspaceEdit(2, first=1), Add()),)))
    host.add("stream", Method("law", (Patch("a", "#", SubspaceEdit(2, positions="all"), Add()),)))
    assert host.why_not_foldable("some") and host.why_not_foldable("stream")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a7_sums_of_low_rank_are_low_rank_and_of_sparse_the_union(family: str) -> None:
    from intarsia.modules.arithmetic import add

    model, inputs = zoo.make(family)
    host = Host(model)
    for seed, (name, form, at, port) in enumerate(
        (("a", Affine(LowRank(2)), "attn.q", "out"), ("b", Affine(LowRank(3)), "attn.q", "out"),
         ("s", Matrix(Sparse(0.05, seed=1)), "attn.q.weight", "weight"), ("t", Matrix(Sparse(0.05, seed=2)), "attn.q.weight", "weight"))
    ):  # fmt: skip
        host.add(name, Method("law", (Patch("p", at, form, Add(), port=port),)), seed=seed)  # type: ignore[arg-type]
        kit.disturb(host, name, seed)
    for one, two, total in (("a", "b", "ab"), ("s", "t", "st")):
        host.insert(add(host.extract(one), host.extract(two)), name=total)
        with host.using(f"{one} + {two}"):
            expected = kit.run(model, inputs)
        with host.using(total):
            assert torch.allclose(kit.run(model, inputs), expected, atol=1e-5)
    ranks = {t.shape[0] for n, t in host.tensors("ab").items() if n.endswith(".down")}
    assert ranks == {5}
    index = {n: set(t.tolist()) for n, t in host.tensors("st").items() if n.endswith(".index")}
    for key, found in index.items():
        site = key.split("/")[0]
        parts = [set(next(t for n, t in host.tensors(name).items() if n.startswith(f"{site}/") and n.endswith(".index")).tolist()) for name in "st"]
        assert found == parts[0] | parts[1]


def test_a7_rotations_compose_by_product_and_their_order_matters() -> None:
    model, inputs = zoo.make("bert")
    host = Host(model)
    for seed, name in enumerate("ab"):
        host.add(name, build("oft", block=8), seed=seed)
        kit.disturb(host, name, seed, 0.5)
    found = {}
    for text in ("a >> b", "b >> a"):
        with host.using(text):
            found[text] = kit.run(model, inputs)
        assert torch.allclose(kit.run(host.fold(text), inputs), found[text], atol=1e-4)
    assert not torch.allclose(*found.values(), atol=1e-4)
    key = next(k for k in host.forms("a"))
    site = host.sites[key.split("/")[0]]
    a, b = (host.forms(name)[key].factor.materialise() for name in "ab")
    before, after = (m.get_submodule(site.path).weight for m in (model, host.fold("a >> b")))
    assert torch.allclose(after, before @ a.T @ b.T, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "exact"),
    [("prefix", True), ("p_tuning", True), ("hyperformer", True), ("diff_pruning", True), ("supermask", True), ("compacter", False), ("pissa", False), ("vera", False)],
)  # fmt: skip
def test_a8_a_cheaper_equal_form_gives_the_same(method: str, exact: bool) -> None:
    """To the bit for what is generated or gated, to rounding where products are summed in another order."""
    model, inputs = zoo.make("bert")
    host = Host(model).add("a", kit.small(method, "bert"))
    kit.disturb(host, "a")
    if method == "diff_pruning":
        from intarsia.methods.thinning import Project

        Project(0.05, 0.5).after_step(5, 10, host.forms("a"), {}, {})
    said = {"task": "task"} if method == "hyperformer" else {}
    with host.using("a", **said):
        whole = kit.run(model, inputs)
    flat = host.extract("a", flatten=True, **said)
    live = host.extract("a")
    host.insert(flat, name="flat")
    with host.using("flat"):
        found = kit.run(model, inputs)
    assert torch.equal(found, whole) if exact else torch.allclose(found, whole, atol=1e-4 * max(1.0, float(whole.abs().max())))
    if exact and method != "p_tuning":
        assert {n: t.shape for n, t in flat.tensors.items()} != {n: t.shape for n, t in live.tensors.items()}


def test_the_ops_of_the_table_are_their_formulas() -> None:
    h, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(Add(0.5).change(h, v), 0.5 * v) and torch.allclose(h + Mul().change(h, v), h * v, atol=1e-6)
    assert torch.allclose(h + Rot().change(h, v), v, atol=1e-6) and Concat().change((), (1,)) == (1,)
