"""`merge`: the checkpoint is what the expression does, for transformers alone; modules merged as the functions merge them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from intarsia import bases
from intarsia.cli import folding
from intarsia.cli.merge import HOW
from intarsia.errors import BaseError
from intarsia.host import Host
from intarsia.methods import build
from intarsia.modules import Card, Module, load, save
from intarsia.modules.arithmetic import weighted_sum
from intarsia.modules.merging import svd, ties
from intarsia.patches import Head
from tests import zoo
from tests.cli.bases import make_base
from tests.cli.run import Here
from tests.host.kit import disturb

TEXT = "cat dog 12"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base (whose word embeddings are tied to its output) and modules beside it."""
    folder = tmp_path_factory.mktemp("merge")
    make_base(folder / "base")
    loaded = bases.load(folder / "base")
    assert loaded.model.config.tie_word_embeddings
    host = Host(loaded.model, tokenizer=loaded.tokenizer)
    kinds = {"a": build("lora", rank=3), "b": build("lora", rank=2, at="attn.v"), "pf": build("pfeiffer", reduction=4),
             "headed": build("lora", rank=2).with_head(Head(("x", "y"))), "bias": build("bitfit")}  # fmt: skip
    for seed, (name, method) in enumerate(kinds.items()):
        host.add(name, method)
        disturb(host, name, seed)
        card = Card(licence="CC-BY-4.0" if name == "a" else "CC-BY-SA-4.0", base=str(folder / "base"), languages=("swh",))
        save(replace(host.extract(name), card=card), folder / f"{name}.safetensors")
    return folder


def given(room: Path, *names: str) -> list[str]:
    return [word for name in names for word in ("-m", f"{name}={room / name}.safetensors")]


def logits(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits


def expected(room: Path, expression: str, *names: str) -> torch.Tensor:
    loaded = bases.load(room / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer)
    for name in names:
        host.insert(load(room / f"{name}.safetensors", name=name))
    with host.using(expression):
        return logits(host.model, loaded.tokenizer)


def by_transformers(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return logits(model, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(("expression", "names"), [("0.5*a - 2*b", ("a", "b")), ("a >> b", ("a", "b")), ("0.5*a + bias", ("a", "bias"))])
def test_the_checkpoint_is_what_the_expression_does(cli: Here, room: Path, tmp_path: Path, expression: str, names: tuple[str, ...]) -> None:
    result = cli("merge", expression, *given(room, *names), "--base", str(room / "base"), "--out", str(tmp_path / "new"), "--json").ok().json
    want = expected(room, expression, *names)
    assert not torch.allclose(want, expected(room, "base"), atol=1e-3), "the expression does nothing"
    torch.testing.assert_close(by_transformers(tmp_path / "new"), want, atol=2e-5, rtol=1e-5)
    assert 0 <= result["mean_difference"] <= result["largest_difference"] < 1e-4 and result["probes"] == len(folding.SENTENCES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert len({path.stat().st_mode for path in (tmp_path / "new").iterdir()}) == 1, "all files are readable by whom the umask says"
    card = (tmp_path / "new" / "README.md").read_text("utf-8")
    assert "expression" in card and names[0] in card and "swh" in card


def test_a_head_is_left_out_and_said(cli: Here, room: Path, tmp_path: Path) -> None:
    done = cli("merge", "headed", *given(room, "headed"), "--out", str(tmp_path / "new")).ok()
    assert "the head of headed" in done.err and "differ by" in done.out
    body = replace(load(room / "headed.safetensors"), name="body")
    loaded = bases.load(room / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer).insert(folding.without_head(body))
    with host.using("body"):
        torch.testing.assert_close(by_transformers(tmp_path / "new"), logits(host.model, loaded.tokenizer), atol=2e-5, rtol=1e-5)


def test_a_module_of_another_base_is_said_and_marked(cli: Here, room: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "other", seed=1)
    words = ["merge", "a", *given(room, "a"), "--base", str(tmp_path / "other"), "--out", str(tmp_path / "new"), "--json"]
    assert "weights" in cli(*words).error(4)
    found = cli(*words, "--force-base").ok()
    assert "warning: module 'a' belongs to another base (weights" in found.err and list(found.json["forced_base"]) == ["a"]
    assert "**Warning:** 'a' was trained on another base (weights" in (tmp_path / "new" / "README.md").read_text("utf-8")
    told = cli("explain", "a", *given(room, "a"), "--base", str(tmp_path / "other"), "--force-base", "--json").ok()
    assert "warning: module 'a'" in told.err and list(told.json["forced_base"]) == ["a"]


def test_an_existing_target_is_refused_and_untouched(cli: Here, room: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        assert "exists already" in cli("merge", "a", *given(room, "a"), "--out", str(tmp_path / name)).error(5)
        assert "exists already" in cli("merge", "a", *given(room, "a"), "--to-module", str(tmp_path / name)).error(5)
    assert not list((tmp_path / "folder").iterdir()) and (tmp_path / "file").read_text() == "mine"
    assert "mkdir -p" in cli("merge", "a", *given(room, "a"), "--out", str(tmp_path / "no" / "folder")).error(5)


def test_what_cannot_be_folded_is_refused_with_the_reason(cli: Here, room: Path, tmp_path: Path) -> None:
    line = cli("merge", "a + pf", *given(room, "a", "pf"), "--out", str(tmp_path / "new")).error(2)
    assert "cannot become part of the weights" in line and "0." in line
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_differs_is_not_kept(cli: Here, room: Path, tmp_path: Path) -> None:
    line = cli("merge", "a", *given(room, "a"), "--out", str(tmp_path / "new"), "--tolerance", "-1").error(4)
    assert "not kept" in line and not list(tmp_path.iterdir())


def test_a_quantised_base_is_refused_by_name() -> None:
    for config, word in (({"quant_method": "bitsandbytes"}, "bitsandbytes"), (SimpleNamespace(quant_method="gptq"), "gptq")):
        loaded = SimpleNamespace(name="small-4bit", model=SimpleNamespace(config=SimpleNamespace(quantization_config=config)))
        with pytest.raises(BaseError, match=rf"small-4bit is quantised \({word}\)"):
            folding.refuse_quantised(loaded)  # type: ignore[arg-type]
    folding.refuse_quantised(SimpleNamespace(name="plain", model=SimpleNamespace(config=SimpleNamespace())))  # type: ignore[arg-type]


def test_tied_embeddings_stay_tied_and_a_change_of_one_side_is_refused(cli: Here, room: Path, tmp_path: Path) -> None:
    """Where the output matrix is the word embeddings, a change of the output layer alone has no checkpoint."""
    model, _ = zoo.make("llama", tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "tied")
    bases.load(room / "base").tokenizer.save_pretrained(tmp_path / "tied")
    loaded = bases.load(tmp_path / "tied")
    host = Host(loaded.model, tokenizer=loaded.tokenizer).add("q", build("lora", rank=2))
    host.add("top", build("lora", rank=2, at="head"))
    for name in ("q", "top"):
        disturb(host, name, 0)
        save(host.extract(name), tmp_path / f"{name}.safetensors")
    words = ("--base", str(tmp_path / "tied"), "--out", str(tmp_path / "new"))
    assert "tied" in cli("merge", "top", *given(tmp_path, "top"), *words).error(2) and not (tmp_path / "new").exists()
    cli("merge", "q", *given(tmp_path, "q"), *words).ok()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["gpt2", "t5", "opt"])
def test_other_families(cli: Here, room: Path, tmp_path: Path, family: str) -> None:
    """Transposed weights, an encoder with a decoder, biases."""
    zoo.make(family)[0].save_pretrained(tmp_path / "base")
    bases.load(room / "base").tokenizer.save_pretrained(tmp_path / "base")
    loaded = bases.load(tmp_path / "base")
    host = Host(loaded.model, tokenizer=loaded.tokenizer).add("m", build("lora", rank=2, at="attn.{q,v}, ffn.down"))
    disturb(host, "m", 0)
    save(host.extract("m"), tmp_path / "m.safetensors")
    words = ("merge", *given(tmp_path, "m"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "new"), "--json", "--", "-2*m")
    assert cli(*words).ok().json["largest_difference"] < 1e-4
    plain, new = (folding.outputs(bases.load(tmp_path / name).model, loaded.tokenizer, [TEXT]) for name in ("base", "new"))
    assert folding.difference(plain, new)[0] > 1e-3, "nothing was merged"


def test_probes_come_from_a_file(cli: Here, room: Path, tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("cat\n\ndog bird\n", "utf-8")
    words = ("merge", "a", *given(room, "a"), "--out", str(tmp_path / "new"), "--probe")
    (tmp_path / "empty").write_text("\n")
    cli(*words, str(tmp_path / "empty")).error(3)
    cli(*words, str(tmp_path / "none")).error(3)
    assert cli(*words, str(tmp_path / "probe"), "--json").ok().json["probes"] == 2


@pytest.mark.parametrize(("words", "message"), [
    (["a"], "say where to"), (["a", "--out", "x", "--to-module", "y"], "say where to"), (["base", "--out", "x"], "no module"),
    (["a + c", "--out", "x"], "'c'"), (["a", "--out", "x", "--how", "ties"], "--to-module"), (["a", "--to-module", "x", "--base", "b"], "modules alone"),
    (["a", "--to-module", "x", "--how", "tie"], "did you mean"), (["a", "--to-module", "x", "--how", "svd"], "--rank"),
    (["a", "--to-module", "x", "--how", "dare", "--set", "keep=1"], "no such setting"), (["a", "--to-module", "x", "--name", "a"], "another"),
])  # fmt: skip
def test_usage(cli: Here, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in cli("merge", *words, *given(room, "a")).error(2)
    assert not list(tmp_path.iterdir())


def test_modules_that_the_expression_leaves_out_are_refused(cli: Here, room: Path, tmp_path: Path) -> None:
    assert "does not name b" in cli("merge", "a", *given(room, "a", "b"), "--out", str(tmp_path / "x")).error(2)
    assert "no weighted sum" in cli("merge", "a >> b", *given(room, "a", "b"), "--to-module", str(tmp_path / "x")).error(2)
    union = cli("merge", "average(a, b)", *given(room, "a", "b"), "--to-module", str(tmp_path / "x"), "--how", "union")
    assert "weights mean nothing" in union.error(2)


def both(room: Path) -> list[Module]:
    return [load(room / f"{name}.safetensors", name=name) for name in "ab"]


def equal(one: Module, other: Module) -> None:
    assert one.method.patches == other.method.patches and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(t, other.tensors[k]) for k, t in one.tensors.items())


def test_to_a_module(cli: Here, room: Path, tmp_path: Path) -> None:
    a, b = both(room)
    words = ("merge", "0.5*(a + b) - b", *given(room, "a", "b"), "--to-module")
    shown = cli(*words, str(tmp_path / "sum"), "--name", "both", "--json").ok().json
    assert shown["weights"] == {"a": 0.5, "b": -0.5} and shown["licence"] == "CC-BY-SA-4.0"
    result = load(tmp_path / "sum")
    equal(result, weighted_sum([a, b], [0.5, -0.5]))
    assert result.name == "both" and result.card.parents == (a.digest, b.digest) and result.card.recipe["operation"] == "weighted"

    small = cli(*words, str(tmp_path / "small"), "--rank", "2", "--json").ok().json
    want, residual = svd(weighted_sum([a, b], [0.5, -0.5]), 2)
    equal(load(tmp_path / "small"), want)
    assert small["residual"] == pytest.approx(residual) and 0 < residual < 1

    cli("merge", "a + b", *given(room, "a", "b"), "--to-module", str(tmp_path / "ties"), "--how", "ties", "--set", "keep=0.5").ok()
    equal(load(tmp_path / "ties"), ties([a, b], 0.5))


@pytest.mark.parametrize("how", HOW)
def test_every_way_of_merging_writes_a_module(cli: Here, room: Path, tmp_path: Path, how: str) -> None:
    settings = {"dare": ["--set", "drop=0.5"], "magnitude": ["--set", "keep=0.5"], "svd": ["--rank", "2"]}.get(how, [])
    cli("merge", "a + b", *given(room, "a", "b"), "--to-module", str(tmp_path / "m.safetensors"), "--how", how, *settings).ok()
    result = load(tmp_path / "m.safetensors")
    assert result.card.recipe["operation"] == how and result.card.parents == tuple(m.digest for m in both(room))
    assert json.loads(json.dumps(dict(result.card.recipe)))["weights"] == [1.0, 1.0]
