"""Free combinations of site, form, op and factor: what the legality table allows obeys the laws, what it does not is refused in words."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from intarsia.errors import CompositionError, SiteError, SpecError
from intarsia.host import Host
from intarsia.methods import METHODS, Method, Patch
from intarsia.methods.legality import FORMS, OPS, refusal
from intarsia.modules import load, save
from intarsia.patches import (
    Add,
    Affine,
    Attend,
    Blocks,
    Bottleneck,
    Butterfly,
    Cayley,
    Circulant,
    Columns,
    Concat,
    Const,
    Core,
    Coupling,
    Dense,
    Diag,
    Fourier,
    Free,
    Gain,
    Gated,
    Hadamard,
    Head,
    Householder,
    Hyper,
    Kron,
    KronPair,
    Ladder,
    LowRank,
    Matrix,
    Mul,
    Pairs,
    Projection,
    Replace,
    Rot,
    Router,
    Scaled,
    Seeded,
    Set,
    Singular,
    Sketch,
    Sparse,
    SubspaceEdit,
    Sum,
    Tokens,
    Weigh,
)
from tests import zoo
from tests.host import kit

FAMILIES = ("bert", "gpt2", "llama", "t5")
#: factors whose tensor is zero when a form asks for zeros, and others
ZERO = (
    Dense(), LowRank(2), Kron(2, None, False), Core(4, Seeded(0), Diag(0.1), gain="zeros"), Core(4, Free(), Diag()), Core(4, Singular("none"), Dense()), Sparse(0.1),
    Projection(10, "fastfood"), Projection(10, "sparse"), Columns(0.2), Sketch(2), Blocks(2, 2, LowRank(1)), KronPair(2),
    Sum((LowRank(2), Sparse(0.1))), Hadamard((LowRank(2, "unit"), LowRank(2, "unit")), ("loha", "zeros")),
    Hadamard((Sparse(0.5), LowRank(2, "unit")), ("zeros", "loha")), Blocks(2, 2, Sparse(0.2)),
)  # fmt: skip
FACTORS = (*ZERO, Kron(2), Fourier(8), Circulant(4), Hyper(("task",)), Cayley(4), Butterfly(4, 1), Householder(2), Pairs(4), Blocks(2, 2, Kron(2, None, False)))
TURNS = (Cayley(4), Butterfly(4, 1), Householder(2), Pairs(4))
SITES = (
    ("attn.q", "out"), ("attn.o", "out"), ("ffn.down", "out"), ("attn", "out"), ("ffn", "out"), ("#", "out"), ("attn.heads", "in"), ("ffn.act", "in"),
    ("attn.v.weight", "weight"), ("ffn.down.weight", "weight"), ("**.norm.weight", "weight"), ("attn.mem", "mem"), ("seq", "seq"),
)  # fmt: skip


@st.composite
def plain_forms(draw: Any, port: str) -> Any:
    factor = draw(st.sampled_from(FACTORS))
    if port == "weight":
        return draw(st.sampled_from([Matrix(factor), Affine(factor, read="self")]))
    if port == "mem":
        return Attend(4, None, factor=factor, mix=draw(st.sampled_from(["shared", "zero_gate"])))
    if port == "seq":
        return Tokens(3, reparameterise=draw(st.sampled_from([None, "lstm"])))
    reads = draw(st.sampled_from(["self", "input", "reads", "normed"]))
    return draw(
        st.sampled_from(
            [
                Const(factor=factor), Affine(factor), Affine(factor, read="self"), SubspaceEdit(2, positions="all"),
                Bottleneck(4, activation=draw(st.sampled_from(["relu", "identity"])), read=reads, factor=factor, zero_up=draw(st.booleans()), norm=draw(st.sampled_from(["none", "in"]))),
            ]
        )
    )  # fmt: skip


@st.composite
def patches(draw: Any) -> tuple[str, Any, Any, str]:
    at, port = draw(st.sampled_from(SITES))
    form = draw(plain_forms(port))
    wrapped = draw(st.integers(0, 3))
    if wrapped == 1:
        form = Gated(form, "reads" if port == "mem" else "self")
    elif wrapped == 2:
        form = Scaled(form, 1.5)
    op = draw(st.sampled_from([Add(), Add(0.5), Gain(), Mul(), Rot(), Set(), Concat(), Replace()]))
    if draw(st.booleans()):  # as often as not one that the table allows
        op = draw(st.sampled_from([kind() for kind in OPS[port][0]]))
    return at, form, op, port


def promises_the_base(form: Any, op: Any) -> bool:
    """Whether a fresh patch is the base by what its parts say: zero is added, or what turns starts as the identity."""
    if isinstance(form, Scaled | Gated):
        return promises_the_base(form.form, op)
    if isinstance(form, Attend):
        return form.mix == "zero_gate"
    if isinstance(op, Rot):
        return getattr(form, "factor", None) in (Cayley(4), Butterfly(4, 1), Pairs(4))
    if not isinstance(op, Add | Gain):
        return False
    if isinstance(form, Bottleneck):
        return form.zero_up and form.factor in ZERO and not isinstance(form.factor, Projection)  # one vector for down and up, which starts as down does
    return isinstance(form, Const | Matrix | Affine) and form.factor in ZERO


def check_laws(family: str, at: str, form: Any, op: Any, port: str) -> None:
    """The laws of a module of one patch, unless this family or size does not take it, refused in words before anything is attached."""
    model, inputs = zoo.make(family)
    bare, before = kit.reference(family), kit.state(model)
    host = Host(model)
    method = Method("free", (Patch("p", at, form, op, port=port),))
    said = {"task": "task"}
    try:
        host.add("a", method)
    except (SpecError, SiteError) as refused:
        assert len(str(refused)) > 20 and host.names == ()
        host.close()
        assert kit.same_state(before, kit.state(model))
        return
    with host.using("a", **said):
        fresh = kit.run(model, inputs)
    if promises_the_base(form, op):
        assert torch.allclose(fresh, bare, atol=1e-6), "a fresh module is the base"
    host.add("b", method, seed=1)
    kit.disturb(host, "a")
    kit.disturb(host, "b", 1)
    single = {}
    for name in "ab":
        with host.using(name, **said):
            single[name] = kit.run(model, inputs)
    rows = None
    try:
        with host.using(["b", "a"], **said):
            rows = kit.run(model, inputs)
    except CompositionError as refused:
        assert "row" in str(refused)
    if rows is not None:
        assert torch.allclose(rows[0], single["b"][0], atol=1e-4) and torch.allclose(rows[1], single["a"][1], atol=1e-4)
    with host.using("a", **said):
        loss = kit.answer(model(**inputs)).float().pow(2).mean()
    loss.backward()
    mine = host.parameters("a")
    assert host.count(method) == sum(p.numel() for p in {id(p): p for p in mine.values()}.values())
    assert not [n for n, p in mine.items() if p.grad is None]
    assert not [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in {id(q) for q in mine.values()}]
    torch.optim.SGD(mine.values(), 1e-3).step()
    with host.using("a", **said):
        trained = kit.run(model, inputs)
    if host.why_not_foldable("a") is None:
        assert torch.allclose(kit.run(host.fold("a"), inputs), trained, atol=1e-4 * max(1.0, float(trained.abs().max())))
    with tempfile.TemporaryDirectory() as folder:
        save(host.extract("a"), Path(folder) / "a.safetensors")
        guest = Host(zoo.make(family)[0]).insert(load(Path(folder) / "a.safetensors"), name="again")
    with guest.using("again", **said):
        assert torch.equal(kit.run(guest.model, inputs), trained)
    model.zero_grad()
    host.close()
    assert kit.same_state(before, kit.state(model))


@given(st.sampled_from(FAMILIES), patches())
@example("bert", ("attn.mem", Attend(4, None, factor=Kron(2, None, False)), Concat(), "mem"))  # a Kronecker prefix
@example("llama", ("attn.k", Const("zeros", Hyper(("task",))), Gain(), "out"))  # generated (IA)^3
@example("t5", ("ffn", Bottleneck(4, factor=Projection(10, "fastfood"), zero_up=True), Add(), "out"))  # a Fastfood adapter
@example("gpt2", ("ffn", Bottleneck(4, factor=Sparse(0.2)), Add(), "out"))  # a sparse bottleneck
@example("bert", ("#", Gated(SubspaceEdit(2, positions="all"), "self"), Add(), "out"))  # a gated edit
@example("t5", ("attn.mem", Gated(Attend(4, None, factor=LowRank(2), mix="zero_gate"), "reads"), Concat(), "mem"))
@example("bert", ("attn.q", Affine(Kron(2, None, False)), Add(), "out"))
@example("llama", ("attn.q", Affine(Hyper(("task",))), Add(), "out"))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_what_is_legal_obeys_the_laws_and_what_is_not_is_refused(family: str, drawn: tuple[str, Any, Any, str]) -> None:
    at, form, op, port = drawn
    why = refusal(form, op, port)
    if why is not None:
        with pytest.raises(SpecError, match=r"patch 'p': .*(gives|go with|gate|identity)"):
            Patch("p", at, form, op, port=port)
        return
    check_laws(family, at, form, op, port)


@pytest.mark.slow
@given(st.sampled_from(zoo.FAMILIES), patches())
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_more(family: str, drawn: tuple[str, Any, Any, str]) -> None:
    at, form, op, port = drawn
    if refusal(form, op, port) is None:
        check_laws(family, at, form, op, port)


@pytest.mark.parametrize(
    ("form", "op", "port", "complaint"),
    [
        (Bottleneck(4), Add(), "weight", r"Bottleneck gives a function of what it reads, and has none at the port 'weight'; its ports: out, in"),
        (Attend(3), Add(), "mem", r"Add does not go with the port 'mem', where a memory of keys and values gets more of them: use Concat"),
        (Affine(LowRank(2), read="self"), Rot(), "out", r"LowRank starts as no identity; use Cayley"),
        (Const(), Rot(), "out", r"Const gives one vector for all positions, which does not enter by Rot; it enters by Add, Mul, Gain"),
        (Gated(Affine()), Mul(), "out", r"a closed one would make zero of what Mul gives"),
        (Matrix(), Set(), "weight", r"Set does not go with the port 'weight'"),
        (Gated(Matrix()), Add(), "weight", r"Gated\(Matrix\) gives a gated value, and has none at the port 'weight'"),
        (Head(("a",)), Add(), "out", r"Head gives logits"),
        (Coupling(), Mul(), "in", r"it enters by Add"),
        (Scaled(Attend(3)), Concat(), "mem", r"its ports: none"),
        (Scaled(Ladder()), Add(), "out", r"Scaled\(Ladder\) gives a scaled value, and has none .* its ports: none"),
        (Gated(Coupling()), Add(), "in", r"Gated\(Coupling\) gives what could not be undone .* its ports: none"),
        (Scaled(Coupling()), Add(), "in", r"could not be undone"),
        (Const(), Weigh(), "out", r"Const does not go with Weigh"),
        (Router(("a", "b")), Add(), "out", r"Router does not go with Add: a router gives weights \(Weigh\)"),
    ],
)  # fmt: skip
def test_refusals_name_what_does_not_go_together(form: Any, op: Any, port: Any, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        Patch("p", "attn.q", form, op, port=port)


def test_every_row_of_the_literature_is_legal_and_every_form_of_the_table_is_used() -> None:
    used = set()
    for row in METHODS.values():
        for patch in row.build().patches:
            assert refusal(patch.form, patch.op, patch.port) is None
            used |= {type(patch.form), type(getattr(patch.form, "form", None))}
    assert set(FORMS) - used <= {Head, Const, *(kind for kind in FORMS if kind.__name__ in ("LanguageModelHead", "MultiMaskLabels", "Biaffine", "Coupling"))}


def test_most_draws_are_taken() -> None:
    """The property is not empty: of the legal draws on BERT more than half are laid into the model."""
    taken = []

    @given(patches())
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def draw(drawn: tuple[str, Any, Any, str]) -> None:
        at, form, op, port = drawn
        if refusal(form, op, port) is None:
            host = Host(zoo.make("bert")[0])
            try:
                host.add("a", Method("free", (Patch("p", at, form, op, port=port),)))
                taken.append(True)
            except (SpecError, SiteError):
                taken.append(False)

    draw()
    assert sum(taken) > len(taken) / 2 > 10
