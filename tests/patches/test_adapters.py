"""Laws of the adapter family's forms alone: edits, gates, generated factors, norms and residuals, label embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia._codec import decode, encode
from intarsia.errors import CompositionError, SpecError
from intarsia.methods import Patch
from intarsia.patches import (
    Add,
    Affine,
    Attend,
    Bottleneck,
    Const,
    Dense,
    Gated,
    Hyper,
    Kron,
    Linear,
    LowRank,
    Mul,
    MultiMaskLabels,
    Place,
    Scaled,
    SubspaceEdit,
    Tokens,
    WhyNot,
)
from intarsia.patches.labels import decide, hinge
from intarsia.patches.subspace import orthonormal
from intarsia.sites.address import Site
from tests.patches.seen import Glimpse

D = 8


def place(site: Site | None = None, seed: int = 0, **more: Any) -> Place:
    site = site or Site("0.ffn", "x", features=D, layer=0, residual="r", reads="r")
    return Place(site, D, D, torch.Generator().manual_seed(seed), **more)


def disturbed(form: torch.nn.Module, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return form


SPECS = [
    Bottleneck(3, norm="both", residual="inside", factor=Kron(2), vectors=Hyper(("a", "b"))),
    Gated(Bottleneck(3), "normed", masked=False),
    Scaled(Bottleneck(3), 4.0),
    Attend(3, None, mix="zero_gate"),
    Attend(3, 8, init="activations", ids=(5, 6)),
    Attend(3, None, factor=LowRank(2)),
    Const("ones", Hyper()),
    SubspaceEdit(2, 3, 4, tied=False, init="identity"),
    MultiMaskLabels(("a", "b"), 3, 7),
    Tokens(4, init="groups", groups=((5,), (6, 7))),
    Tokens(4, reparameterise="lstm"),
    Hyper(("a", "b"), ("task", "layer", "site"), 4, 5),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_specifications_are_data(spec: Any) -> None:
    assert decode(encode(spec)) == spec


# -- edits -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_subspace_holds_what_the_source_says(rank: int, seed: int) -> None:
    """R h' = W h + b exactly, and nothing changes orthogonally to R."""
    form = disturbed(SubspaceEdit(rank, positions="all").build(place(seed=seed)), seed)
    unit = form.units["edit"]
    h = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(seed))
    edited = h + form(h, Glimpse(h))
    rows = unit.rows()
    assert torch.allclose(rows @ rows.T, torch.eye(rank), atol=1e-5)
    assert torch.allclose(edited @ rows.T, h @ unit.source.T + unit.bias, atol=1e-4)
    rest = torch.eye(D) - rows.T @ rows
    assert torch.allclose(edited @ rest, h @ rest, atol=1e-4)


def test_orthonormal_rows_stay_themselves() -> None:
    start = orthonormal(torch.randn(3, D))
    assert torch.allclose(orthonormal(start), start, atol=1e-6)
    assert torch.allclose(orthonormal(start * 7), start, atol=1e-6)
    assert orthonormal(start.bfloat16()).dtype == torch.float32
    assert orthonormal(start.double()).dtype == torch.float64


@pytest.mark.parametrize("tied", [True, False])
def test_edited_positions(tied: bool) -> None:
    """First and last real tokens, whatever the padding; where both meet, an untied edit of the last ones."""
    h = torch.randn(3, 6, D)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    form = disturbed(SubspaceEdit(2, 1, 2, tied=tied).build(place()))
    change = form(h, Glimpse(h, mask))
    touched = change.abs().sum(-1) > 0
    assert touched.tolist() == [
        [True, False, False, False, True, True],
        [False, False, True, False, True, True],
        [True, True, False, False, False, False],
    ]
    if not tied:
        assert torch.allclose(change[2, 0], form.units["last"](h[2, 0]), atol=1e-6), "both are last"
        assert torch.allclose(change[0, 0], form.units["first"](h[0, 0]), atol=1e-6)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_identity_start_is_exact(orthogonal: bool) -> None:
    h = torch.randn(2, 6, D)
    spec = SubspaceEdit(3, 2, 2, orthonormal=orthogonal, init="identity")
    assert not spec.build(place())(h, Glimpse(h)).any()
    paper = SubspaceEdit(3, 2, 2, orthonormal=orthogonal)
    assert paper.build(place())(h, Glimpse(h)).abs().max() > 0.1, "the paper's start is not the base"


@pytest.mark.parametrize("spec", [SubspaceEdit(2, 1, 1), SubspaceEdit(2, 1, 1, orthonormal=False, tied=False)])
def test_edits_export_to_the_plain_form(spec: SubspaceEdit) -> None:
    form = disturbed(spec.build(place()))
    plain_spec, tensors = form.export()
    assert (plain_spec.subtract, plain_spec.orthonormal) == (False, False)
    plain = plain_spec.build(place())
    plain.load_state_dict({k: v.detach() for k, v in tensors.items()})
    h = torch.randn(2, 6, D)
    assert torch.allclose(form(h, Glimpse(h)), plain(h, Glimpse(h)), atol=1e-5)
    assert plain.export() is None


@pytest.mark.parametrize("spec", [SubspaceEdit(2, positions="all"), SubspaceEdit(2, positions="all", orthonormal=False, subtract=False)])
def test_edits_of_every_position_fold(spec: SubspaceEdit) -> None:
    form = disturbed(spec.build(place()))
    weight, bias, x = torch.randn(D, 5), torch.randn(D), torch.randn(7, 5)
    change = Add().fold(Linear(weight, bias), form, "out")
    assert isinstance(change, Linear)
    h = x @ weight.T + bias
    assert torch.allclose(h + form(h, Glimpse(x)), x @ (weight + change.weight).T + bias + change.bias, atol=1e-4)
    assert isinstance(Add().fold(Linear(weight, bias), SubspaceEdit(2, 1).build(place()), "out"), WhyNot)


def test_dropout_is_on_the_edited_state() -> None:
    form = disturbed(SubspaceEdit(2, positions="all", dropout=0.5).build(place())).train()
    h = torch.randn(4, 50, D)
    out = h + form(h, Glimpse(h))
    assert 0.4 < float((out.abs() < 1e-6).float().mean()) < 0.6


# -- bottlenecks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["self", "input"])
def test_linear_adapters_fold_behind_a_linear_layer(read: Any) -> None:
    """Law A4: W' = (I + U D) W, b' = (I + U D) b + U c + e."""
    spec = Bottleneck(3, activation="identity", read=read)
    where = Place(Site("0.attn.q", "x", features=D), 5 if read == "input" else D, D, torch.Generator().manual_seed(0))
    form = disturbed(spec.build(where))
    weight, bias, x = torch.randn(D, 5), torch.randn(D), torch.randn(7, 5)
    for base in (Linear(weight, bias), Linear(weight, None)):
        change = Add(0.5).fold(base, form, "out")
        assert isinstance(change, Linear) and change.bias is not None
        h = x @ weight.T + (0 if base.bias is None else bias)
        folded = x @ (weight + change.weight).T + (0 if base.bias is None else bias) + change.bias
        assert torch.allclose(h + 0.5 * form(h, Glimpse(x)), folded, atol=1e-4)
    assert isinstance(Add().fold(Linear(weight, bias), Bottleneck(3, read=read).build(where), "out"), WhyNot)


def test_norms_and_residuals() -> None:
    h, x = torch.randn(2, 4, D), torch.randn(2, 4, D)
    seen = Glimpse(x)
    layer = torch.nn.functional.layer_norm

    def made(**more: Any) -> Any:
        return disturbed(Bottleneck(3, read="reads", **more).build(place()))

    plain = made()
    branch = plain.branch(x, seen)
    assert torch.equal(plain(h, seen), branch)
    assert torch.allclose(made(residual="read")(h, seen), branch + x - h, atol=1e-6)
    assert torch.allclose(made(residual="none")(h, seen), branch - h, atol=1e-6)
    inside = made(norm="out", residual="inside")
    norm = inside.norm_out
    assert torch.allclose(inside(h, seen), layer(inside.branch(x, seen) + h, (D,), norm.weight, norm.bias) - h, atol=1e-5)
    outer = made(norm="out")
    norm = outer.norm_out
    assert torch.allclose(outer(h, seen), layer(outer.branch(x, seen), (D,), norm.weight, norm.bias), atol=1e-5)
    inner = made(norm="in")
    norm = inner.norm_in
    bare = made()
    bare.load_state_dict({k: v for k, v in inner.state_dict().items() if "norm" not in k})
    assert torch.allclose(inner(h, seen), bare(h, Glimpse(layer(x, (D,), norm.weight, norm.bias))), atol=1e-5)


# -- gates -----------------------------------------------------------------------------------------------------------


def test_a_gate_is_the_mean_over_tokens() -> None:
    x = torch.randn(2, 5, D)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    form = disturbed(Gated(Bottleneck(3, read="reads"), "reads").build(place()))
    each = torch.sigmoid(x @ form.gate + form.gate_bias)
    gate = torch.stack([each[0, :3].mean(), each[1, 1:].mean()])
    inner = form.inner(x, Glimpse(x))
    assert torch.allclose(form(x, Glimpse(x, mask)), inner * gate[:, None, None], atol=1e-6)
    official = Gated(Bottleneck(3, read="reads"), "reads", masked=False).build(place())
    official.load_state_dict(form.state_dict())
    assert torch.allclose(official(x, Glimpse(x, mask)), inner * each.mean(1)[:, None, None], atol=1e-6)


def test_a_closed_gate_leaves_zero_vectors_in_the_memory() -> None:
    site = Site("0.attn.mem", "x", port="mem", layer=0, heads=(2, 4), reads="r")
    form = Gated(Attend(3, None), "reads").build(place(site))
    with torch.no_grad():
        form.gate.zero_()
        form.gate_bias.fill_(-100.0)
    (block,) = form((), Glimpse(torch.randn(2, 5, D)))
    assert block.keys.shape == (2, 2, 3, 4) and block.length == 3 and not block.keys.any() and not block.values.any()


def test_gates_around_anything() -> None:
    """Vectors, LoRA, generated adapters; a gate of a half gives half the change."""
    h = torch.randn(2, 5, D)
    for spec in (Const("ones"), Affine(LowRank(2)), Bottleneck(3, factor=Hyper(), vectors=Hyper()), SubspaceEdit(2, positions="all")):
        form = disturbed(Gated(spec, "input").build(place()))
        with torch.no_grad():
            form.gate.zero_()
            form.gate_bias.zero_()
        whole = form.inner(h, Glimpse(h)).expand_as(h)
        assert torch.allclose(form(h, Glimpse(h)).expand_as(h), 0.5 * whole, atol=1e-6)
        assert isinstance(form.as_linear(), WhyNot) and isinstance(form.constant(), WhyNot)


def test_wrapped_forms_export_what_is_inside() -> None:
    site = Site("0.attn.mem", "x", port="mem", layer=0, heads=(2, 4), reads="r")
    form = disturbed(Gated(Attend(3, 6), "reads").build(place(site)))
    spec, tensors = form.export()
    assert spec.form.reparameterise is None and spec.length == 3
    plain = spec.build(place(site))
    plain.load_state_dict({k: v.detach() for k, v in tensors.items()})
    seen = Glimpse(torch.randn(2, 5, D))
    assert torch.allclose(form((), seen)[0].keys, plain((), seen)[0].keys, atol=1e-6)


def test_a_trained_scale_folds() -> None:
    form = disturbed(Scaled(Affine(LowRank(2)), 4.0).build(place()))
    weight = torch.randn(D, D)
    change = Add().fold(Linear(weight, None), form, "out")
    x = torch.randn(3, D)
    assert isinstance(change, Linear)
    assert torch.allclose(form(x, Glimpse(x)), x @ change.weight.T, atol=1e-5)
    assert Scaled(Bottleneck(3), 4.0).build(place()).scale.item() == 4.0


# -- generated factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [("task",), ("task", "layer", "site")])
def test_a_generated_factor_is_one_matrix_per_task(condition: Any) -> None:
    where = place()
    factor = disturbed(Hyper(("a", "b", "c"), condition, 4, 5).build((6, D), where))
    for part in where.shared.values():
        disturbed(part)
    x = torch.randn(3, 5, D)
    rows = ["c", 0, "c"]
    out = factor.given(Glimpse(x, said={"task": rows}))(x)
    for row, task in enumerate(rows):
        matrix = factor.fixed({"task": task})
        assert torch.allclose(out[row], x[row] @ matrix.T, atol=1e-5)
    flat = factor.given(Glimpse(x, said={"task": rows}))(x.flatten(0, 1))
    assert torch.allclose(flat.view(3, 5, 6), out, atol=1e-6), "layers that flatten [B, T]"
    with pytest.raises(CompositionError, match="name one"):
        factor.materialise()


def test_only_the_tasks_of_a_batch_are_taught() -> None:
    where = place()
    factor = Hyper(("a", "b", "c"), width=4).build((6, D), where)
    x = torch.randn(2, 5, D)
    factor.given(Glimpse(x, said={"task": ["a", "c"]}))(x).pow(2).sum().backward()
    gradient = where.shared["hyper", "tasks"].value.grad
    assert gradient[0].any() and gradient[2].any() and not gradient[1].any()


def test_generators_are_shared_where_they_read_what_differs() -> None:
    def built(condition: Any) -> tuple[Place, list[Any]]:
        first = place()
        forms = []
        for name in ("0.attn", "0.ffn", "1.attn", "1.ffn"):
            site = Site(name, "x", features=D, layer=int(name[0]))
            here = Place(site, D, D, torch.Generator().manual_seed(0), shared=first.shared)
            forms.append(Hyper(("a",), condition, 4, 5).build((6, D), here.named("down")))
        return first, forms

    _, apart = built(("task",))
    assert len({id(f.generator) for f in apart}) == 4
    _, layers = built(("task", "layer"))
    assert layers[0].generator is layers[2].generator is not layers[1].generator
    _, all_of_them = built(("task", "layer", "site"))
    assert len({id(f.generator) for f in all_of_them}) == 1
    assert len({id(f.parts.others[0]) for f in all_of_them}) == 2, "one embedding per layer"
    matrices = [f.materialise() for f in all_of_them]
    assert not any(torch.allclose(matrices[0], m) for m in matrices[1:])


def test_generated_vectors() -> None:
    """A generated (IA)^3: starts at one, differs per row."""
    form = Const("ones", Hyper(("a", "b"), width=4)).build(place())
    h = torch.ones(2, 5, D)
    seen = Glimpse(h, said={"task": ["a", "b"]})
    assert 0 < (form(h, seen) - 1).abs().max() < 0.1
    disturbed(form)
    change = Mul().change(h, form(h, seen))
    assert change.shape == h.shape and not torch.allclose(change[0], change[1])
    spec, tensors = form.export_for({"task": "b"})
    assert spec.factor is None and torch.allclose(1 + change[1, 0], tensors["value"], atol=1e-6)
    assert form.export() is None and isinstance(form.constant(), WhyNot)


def test_a_generated_map_folds_when_its_task_is_decided() -> None:
    """LoRA generated per task: refused for several tasks, an ordinary change of the weight for one."""
    h = torch.randn(2, 5, D)
    form = disturbed(Affine(Hyper(("a", "b"), width=4)).build(place()))
    assert isinstance(Add().fold(Linear(torch.randn(D, D), None), form, "out"), WhyNot)
    out = form(h, Glimpse(h, said={"task": ["b", "a"]}))
    spec, tensors = form.export_for({"task": "b"})
    assert torch.allclose(out[0], h[0] @ tensors["factor.value"].T, atol=1e-5) and spec == Affine(Dense())
    single = disturbed(Affine(Hyper(width=4)).build(place()))
    change = Add().fold(Linear(torch.randn(D, D), None), single, "out")
    assert isinstance(change, Linear) and torch.allclose(single(h, Glimpse(h)), h @ change.weight.T, atol=1e-5)


def test_a_generated_adapter_exports_to_an_ordinary_one() -> None:
    hyper = Hyper(("a", "b"), ("task", "layer", "site"), 4, 5)
    where = place()
    spec = Bottleneck(3, factor=hyper, vectors=hyper, norm="both", activation="gelu_new")
    form = disturbed(spec.build(where))
    for part in where.shared.values():
        disturbed(part)
    h = torch.randn(2, 5, D)
    out = form(h, Glimpse(h, said={"task": "b"}))
    plain_spec, tensors = form.export_for({"task": "b"})
    plain = plain_spec.build(place())
    plain.load_state_dict({k: v.detach() for k, v in tensors.items()})
    assert isinstance(plain_spec.factor, Dense) and plain_spec.vectors is None
    assert torch.allclose(plain(h, Glimpse(h)), out, atol=1e-5)
    assert form.export() is None and plain.export() is None


@pytest.mark.parametrize("factor", [Kron(2), LowRank(2), Hyper()])
def test_prefixes_of_factors(factor: Any) -> None:
    site = Site("0.attn.mem", "x", port="mem", layer=0, heads=(2, 4), reads="r")
    form = disturbed(Attend(4, None, factor=factor).build(place(site)))
    seen = Glimpse(torch.randn(2, 5, D))
    (block,) = form((), seen)
    assert block.keys.shape == (2, 4, 4)
    spec, tensors = form.export()
    plain = spec.build(place(site))
    plain.load_state_dict({k: v.detach() for k, v in tensors.items()})
    assert torch.allclose(plain((), seen)[0].values, block.values, atol=1e-6)


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_p_tuning_flattens_exactly() -> None:
    state = torch.get_rng_state()
    site = Site("seq", "x", port="seq", features=D)
    form = Tokens(5, "start", "unit", reparameterise="lstm").build(place(site))
    assert torch.equal(state, torch.get_rng_state()), "the global stream is left alone"
    again = Tokens(5, "start", "unit", reparameterise="lstm").build(place(site))
    assert all(torch.equal(a, b) for a, b in zip(form.parameters(), again.parameters()))
    disturbed(form)
    spec, tensors = form.export()
    plain = spec.build(place(site))
    plain.load_state_dict(tensors)
    seen = Glimpse(torch.randn(1, 5, D))
    with torch.no_grad():
        assert torch.equal(form((), seen)[0].embeddings, plain((), seen)[0].embeddings)
    assert plain.export() is None


def test_prompts_start_from_the_pieces_of_labels() -> None:
    rows = torch.randn(50, D)
    site = Site("seq", "x", port="seq", features=D)
    spec = Tokens(4, "start", "groups", groups=((7,), (8, 9, 10)))
    form = spec.build(place(site, embedding=lambda: rows))
    assert torch.equal(form.embeddings[0], rows[7])
    assert torch.allclose(form.embeddings[1], rows[8:11].mean(0))
    assert all(any(torch.equal(row, other) for other in rows[4:]) for row in form.embeddings[2:]), "the others are drawn"
    with pytest.raises(SpecError, match="token id 50 is outside"):
        Tokens(2, "start", "groups", groups=((50,),)).build(place(site, embedding=lambda: rows))


# -- label embeddings ------------------------------------------------------------------------------------------------


def labelled(masks: int = 2) -> Any:
    return disturbed(MultiMaskLabels(("x", "y", "z"), masks, mask_token=99).build(place(Site("logits", "", "logits"))))


def test_scores_are_products_with_the_states_at_the_masks() -> None:
    form = labelled()
    states = torch.randn(2, 6, D)
    ids = torch.tensor([[5, 99, 99, 5, 5, 5], [99, 5, 5, 5, 99, 0]])
    scores = form(None, Glimpse(states, ids=ids))
    assert scores.shape == (2, 2, 3)
    assert torch.allclose(scores[1, 1, 2], states[1, 4] @ form.labels[2, 1], atol=1e-5)
    said = MultiMaskLabels(("x", "y", "z"), 2).build(place(Site("logits", "", "logits")))
    said.load_state_dict(form.state_dict())
    assert torch.equal(said(None, Glimpse(states, said={"mask_positions": [[1, 2], [0, 4]]})), scores)
    with pytest.raises(CompositionError, match="needs 2 mask tokens"):
        form(None, Glimpse(states, ids=torch.full((2, 6), 5)))


def test_hinge_has_the_papers_value() -> None:
    scores = torch.tensor([[[2.0, 1.5, -1.0], [0.0, 0.0, 0.0]]])
    # first mask: (max(0, 1 - 2 + 1.5) + max(0, 1 - 2 - 1)) / 3; second: (1 + 1) / 3
    assert hinge(scores, torch.tensor([0])).item() == pytest.approx((0.5 / 3 + 2 / 3) / 2)


def test_prototypes_answer_after_training() -> None:
    form = labelled().eval()
    features = torch.randn(30, 2, D)
    labels = torch.arange(30) % 3
    states = torch.randn(4, 6, D)
    seen = Glimpse(states, ids=torch.tensor([[99, 99, 5, 5, 5, 5]] * 4))
    before = form(None, seen)
    form.fit_prototypes(features, labels)
    after = form(None, seen)
    assert not torch.allclose(before, after)
    unit = torch.nn.functional.normalize
    centre = unit(features[labels == 1].mean(0), dim=-1)
    expected = torch.exp(-(unit(states[2, 1], dim=0) - centre[1]).square().sum())
    assert torch.allclose(after[2, 1, 1], expected, atol=1e-5)
    assert torch.equal(form.train()(None, seen), before), "training goes on with the label embeddings"
    with pytest.raises(SpecError, match="no training row has the label 'z'"):
        form.fit_prototypes(features, labels % 2)


def test_one_mask_is_the_nearest_centroid_and_order_does_not_matter() -> None:
    features, labels = torch.randn(40, 1, D), torch.randint(0, 3, (40,))
    labels[:3] = torch.arange(3)
    states = torch.randn(9, 4, D)
    seen = Glimpse(states, ids=torch.tensor([[5, 99, 5, 5]] * 9))
    form = labelled(1).eval()
    form.fit_prototypes(features, labels)
    chosen = decide(form(None, seen)).argmax(1)
    unit = torch.nn.functional.normalize
    centres = torch.stack([unit(features[labels == k, 0].mean(0), dim=0) for k in range(3)])
    assert torch.equal(chosen, torch.cdist(unit(states[:, 1], dim=-1), centres).argmin(1))
    turned = labelled(1).eval()
    order = torch.tensor([2, 0, 1])
    turned.fit_prototypes(features, order.argsort()[labels])
    assert torch.equal(order[decide(turned(None, seen)).argmax(1)], chosen)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SubspaceEdit(2), "choose none"),
        (lambda: SubspaceEdit(0, 1), "rank must be at least 1"),
        (lambda: SubspaceEdit(2, 1, subtract=False, init="identity"), "only where R h is subtracted"),
        (lambda: SubspaceEdit(9, 1).build(place()), "rank 9 does not fit into 8"),
        (lambda: SubspaceEdit(2, 1).build(place(Site("seq", "", "seq", features=D))), "needs hidden states"),
        (lambda: Bottleneck(2, residual="inside"), "set norm='out'"),
        (lambda: Bottleneck(2, read="reads").build(place(Site("embed", "x", features=D))), "only sub-layers have one"),
        (lambda: Gated(Tokens(2)).build(place(Site("seq", "", "seq", features=D))), "none to look at"),
        (lambda: Patch("p", "ffn", Gated(Const("ones")), Mul()), "gate it under Gain"),
        (lambda: Scaled(Attend(2)).build(place(Site("0.attn.mem", "x", "mem", heads=(2, 4)))), "are not scaled by a number"),
        (lambda: Hyper(()), "names of its tasks"),
        (lambda: Hyper(("a", "a")), "each once"),
        (lambda: Hyper(condition=("layer",)), "begins with 'task'"),  # type: ignore[arg-type]
        (lambda: Attend(2, None, init="activations"), "needs its token ids"),
        (lambda: Attend(2, None, ids=(1,)), "needs its token ids"),
        (lambda: Attend(2, 8, factor=LowRank(1)), "take neither"),
        (lambda: Tokens(2, init="groups"), "needs the token ids of each label"),
        (lambda: Tokens(1, init="groups", groups=((1,), (2,))), "do not fit"),
        (lambda: Tokens(2, reparameterise="lstm", init="unit").build(place(Site("seq", "", "seq", features=7))), "even width"),
        (lambda: MultiMaskLabels(("a",)), "at least two labels"),
        (lambda: MultiMaskLabels(("a", "b"), 0), "at least one mask"),
    ],
)
def test_refusals(make: Any, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        make()
