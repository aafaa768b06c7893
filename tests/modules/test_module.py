"""Laws of the value: it owns its tensors, its digest covers what decides the numbers and nothing else."""

from __future__ import annotations

import copy
import hashlib
import pickle
from typing import Any

import pytest
import torch

from intarsia._codec import canonical_json
from intarsia.errors import ModuleError, SpecError
from intarsia.methods import build
from intarsia.modules import DTYPES, Card, Module, Owned, load, save
from tests.modules.make import base, module, one_of_each, tensors


def test_tensors_are_copies() -> None:
    live = torch.nn.Parameter(torch.ones(2, 3))
    view = torch.arange(12.0).reshape(3, 4).t()
    made = module(tensors={"0.ffn/x.a": live, "0.ffn/x.b": view, "0.ffn/x.c": live})
    a, b = made.tensors["0.ffn/x.a"], made.tensors["0.ffn/x.b"]
    assert not a.requires_grad and type(a) is torch.Tensor
    assert b.is_contiguous() and torch.equal(b, view)
    before = made.digest
    with torch.no_grad():
        live.zero_()
        view.zero_()
    assert torch.equal(a, torch.ones(2, 3)) and float(b.sum()) == 66.0
    assert Module(**{**vars_of(made), "tensors": made.tensors}).digest == before
    pointers = [t.data_ptr() for t in made.tensors.values()]
    assert len(set(pointers)) == 3


def vars_of(made: Module) -> dict[str, Any]:
    return {k: getattr(made, k) for k in ("name", "method", "tensors", "base", "labels", "roles", "requires", "card", "context")}


def test_mappings_and_fields_are_read_only() -> None:
    made = module()
    for mapping in (made.tensors, made.roles, made.context):
        with pytest.raises(TypeError):
            mapping["x"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        made.name = "other"  # type: ignore[misc]


def test_digest_covers_what_decides_the_numbers() -> None:
    one = module()
    changed = tensors()
    changed["1.attn.q/lora.up"][0, 0] = torch.nextafter(changed["1.attn.q/lora.up"][0, 0], torch.tensor(9.0))
    reshaped, retyped, renamed = tensors(), tensors(), tensors()
    reshaped["1.attn.q/lora.up"] = reshaped["1.attn.q/lora.up"].reshape(2, 6)
    retyped["head/head.bias"] = retyped["head/head.bias"].view(torch.float16)
    renamed["2.attn.q/lora.up"] = renamed.pop("1.attn.q/lora.up")
    others = [
        module(tensors=changed), module(tensors=reshaped), module(tensors=retyped), module(tensors=renamed),
        module(method=build("lora", rank=2, alpha=3)), module(base=base("bb")), module(base=base(layers=(3,))), module(labels=("yes", "no", "ŋ'ombe")),
        module(labels=None), module(requires=()), module(context={"prefix": "query: ", "max_length": 129}),
    ]  # fmt: skip
    digests = [m.digest for m in (one, *others)]
    assert len(set(digests)) == len(digests)
    assert all(m != one for m in others)


def test_digest_leaves_out_what_does_not_decide_them() -> None:
    one = module()
    assert base(dtype="bfloat16") == base()  # how the base was loaded is told, not compared
    for other in (module(name="x"), module(base=base(dtype="bfloat16")), module(roles={}), module(card=Card()), one.rename("y"), one.with_card(Card(title="z"))):
        assert other.digest == one.digest and other == one and hash(other) == hash(one)
    assert one.rename("y").name == "y" and one.with_card(Card(title="z")).card.title == "z"


def test_digest_is_frozen() -> None:
    """Part of the file format: a change of this value orphans every stored module."""
    made = module(tensors={"0.ffn/x.a": torch.arange(6.0).reshape(2, 3)}, labels=("a", "b"), requires=(), context={})
    document = (
        b'{"base":{"architecture":"bert","layers":[2],"quantisation":null,"shapes":"5a","tokenizer":"7c","vocabulary":99,'
        b'"weights":"aa","width":4},"context":{},"labels":["a","b"],"method":' + canonical_json(made.method)
        + b',"requires":[],"tensors":{"0.ffn/x.a":["F32",[2,3],"'
        + _sha(made.tensors["0.ffn/x.a"].numpy().astype("<f4").tobytes()).encode() + b'"]}}'
    )  # fmt: skip
    assert made.digest == _sha(document)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_order_of_tensors_does_not_matter() -> None:
    reverse = dict(reversed(list(tensors().items())))
    assert module(tensors=reverse).digest == module().digest
    assert list(module(tensors=reverse).tensors) == sorted(reverse)


def test_pickle_and_deepcopy_are_equal_values_with_memory_of_their_own() -> None:
    one = module(tensors=one_of_each())
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other == one and other.name == one.name and other.card == one.card and other.roles == one.roles
        assert all(torch.equal(t, one.tensors[k]) for k, t in other.tensors.items())
        assert not {t.data_ptr() for t in other.tensors.values() if t.numel()} & {t.data_ptr() for t in one.tensors.values() if t.numel()}


def test_renaming_does_not_copy_tensors() -> None:
    one = module()
    assert all(one.rename("z").tensors[k] is t for k, t in one.tensors.items())


def test_counts() -> None:
    made = module()
    assert made.n_parameters == 12 + 8 + 3
    assert made.nbytes == 4 * 20 + 2 * 3 + 3
    assert "23 parameters" in repr(made) and made.digest[:12] in repr(made)


@pytest.mark.parametrize(
    ("key", "tensor", "error", "words"),
    [
        ("0.ffn/x.a", torch.zeros(2, device="meta"), ModuleError, "meta device"),
        ("0.ffn/x.a", torch.eye(3).to_sparse(), ModuleError, "layout torch.sparse_coo"),
        ("0.ffn/x.a", torch.zeros(2, dtype=torch.complex64), ModuleError, "complex64"),
        ("0.ffn/x.a", [1.0], ModuleError, "not a tensor but list"),
        ("0.ffn", torch.zeros(2), SpecError, "<site>/<patch>"),
        ("0.ffn/", torch.zeros(2), SpecError, "<site>/<patch>"),
        ("/etc/passwd", torch.zeros(2), SpecError, "<site>/<patch>"),
        ("../x/y", torch.zeros(2), SpecError, "<site>/<patch>"),
        ("a/b\n", torch.zeros(2), SpecError, "<site>/<patch>"),
        ("é/b", torch.zeros(2), SpecError, "<site>/<patch>"),
        ("a/" + "b" * 300, torch.zeros(2), SpecError, "<site>/<patch>"),
        ("__metadata__", torch.zeros(2), SpecError, "<site>/<patch>"),
    ],
)
def test_unfit_tensors_are_refused(key: str, tensor: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        module(tensors={key: tensor})
    assert words in str(caught.value)


def test_tensor_subclasses_are_refused() -> None:
    class Sharded(torch.Tensor):
        pass

    with pytest.raises(ModuleError, match="is a Sharded"):
        module(tensors={"0.ffn/x.a": torch.ones(2).as_subclass(Sharded)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "empty"),
        ({"labels": "abc"}, "sequence of names"),
        ({"labels": ("a", "b", "a")}, "stand twice: 'a'"),
        ({"labels": (1, 2)}, "label names are strings"),
        ({"roles": {"language": 3}}, "role 'language'"),
        ({"requires": ("abc",)}, "not a digest"),
        ({"requires": ("AB" * 32,)}, "not a digest"),
        ({"context": {"x": float("nan")}}, r"$.context.x: nan"),
        ({"context": {"x": torch.zeros(1)}}, r"$.context.x: expected a plain value"),
        ({"method": object()}, "cannot be stored"),
    ],
)
def test_malformed_fields_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        module(**change)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_every_dtype_has_a_digest(dtype: torch.dtype) -> None:
    for shape in [(), (0,), (0, 3), (2, 3)]:
        made = module(tensors={"0.ffn/x.a": torch.ones(shape).to(dtype)})
        assert made.digest == module(tensors={"0.ffn/x.a": torch.ones(shape).to(dtype)}).digest


def test_owned_tensors_are_taken_as_they_are(tmp_path: Any) -> None:
    tensor = torch.ones(3)
    assert module(tensors=Owned({"0.ffn/x.a": tensor})).tensors["0.ffn/x.a"] is tensor
    save(module(), tmp_path / "m.safetensors")
    assert "digest" in load(tmp_path / "m.safetensors").__dict__  # verified while reading, not computed again


def test_a_part_keeps_what_is_shared_and_loses_the_labels_with_the_head() -> None:
    from intarsia.host import Host
    from intarsia.methods import build
    from intarsia.patches import Head
    from tests import zoo

    host = Host(zoo.make("bert")[0])
    whole = host.add("m", build("prefix").with_head(Head(("a", "b")))).extract("m")
    part = whole.part(lambda patch: patch.port != "logits")
    assert part.labels is None and part.method == build("prefix") and whole.labels == ("a", "b")
    assert set(part.tensors) == {key for key in whole.tensors if not key.startswith("logits/")} and any(key.startswith("tied/") for key in part.tensors)
    assert part.part(lambda patch: True) is part
    host.insert(part, name="n")
