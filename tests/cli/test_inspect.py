"""`inspect` and `methods`: what they print is what the library says, for models with weights and for shapes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from intarsia.errors import IntarsiaError
from intarsia.host import Host
from intarsia.methods import METHODS
from tests import zoo
from tests.cli.run import Here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, as a local base."""
    path = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (path / "vocab.txt").write_text("\n".join(words), "utf-8")
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    return path


def write_config(path: Path, family: str) -> Path:
    """The configuration of a family as a file, with the class its model has."""
    model, _ = zoo.make(family)
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    return path / "config.json"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "bloom", "deberta-v2"])
def test_counts_of_a_configuration_are_those_of_the_model(cli: Here, tmp_path: Path, family: str) -> None:
    model, _ = zoo.make(family)
    shown = cli("inspect", "--config", str(write_config(tmp_path, family)), "--json").ok().json
    assert shown["class"] == type(model).__name__
    assert shown["parameters"] == sum(p.numel() for p in model.parameters())
    host = Host(model)
    for entry in shown["methods"]:
        if entry["trainable"] is None:
            assert entry["refused"]
        else:
            assert entry["trainable"] == host.count(METHODS[entry["name"]].build()), entry["name"]
    assert {e["name"] for e in shown["methods"]} == set(METHODS)
    assert sum(role["count"] for role in shown["roles"]) == len(host.sites)


def test_what_a_model_cannot_have_is_said(cli: Here, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, "bloom"))
    out = cli("inspect", "--config", config).ok().out
    assert "no attn.mem:" in out and "\nprefix: " in out
    assert "trainable  not on" in cli("methods", "prefix", "--config", config).ok().out


def test_a_local_base(cli: Here, folder: Path) -> None:
    shown = cli("inspect", str(folder), "--json", "--sites").ok().json
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert shown["layers"] == {"": 2} and shown["norms"] == {"": "post"}
    assert shown["fingerprint"]["weights"] == Host(model).fingerprint.weights
    assert shown["fingerprint"]["tokenizer"]
    assert {s["name"] for s in shown["sites"]} == set(Host(model).sites)
    text = cli("inspect", str(folder), "--sites").ok().out
    assert "post-norm" in text and "1.attn.q.weight" in text and shown["fingerprint"]["weights"] in text


def test_every_method_is_in_the_table_with_its_source(cli: Here) -> None:
    lines = cli("methods").ok().out.splitlines()
    for row in METHODS.values():
        found = [line for line in lines if line.split()[:1] == [row.name]]
        assert len(found) == 1 and row.source in found[0]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_method(cli: Here, tmp_path: Path, name: str) -> None:
    config = str(write_config(tmp_path, "bert"))
    out = cli("methods", name, "--config", config).ok().out
    assert METHODS[name].equation in out and METHODS[name].summary in out
    model, _ = zoo.make("bert")
    try:
        says = f"{Host(model).count(METHODS[name].build()):,} of"
    except IntarsiaError as error:
        says = f"trainable  not on {config}: {error}"
    assert says in out


def test_settings_change_the_count(cli: Here, folder: Path) -> None:
    def count(*words: str) -> int:
        return int(cli("methods", "lora", "--base", str(folder), "--json", *words).ok().json["trainable"])

    assert count("--set", "rank=2", "--set", "layers=-1:") * 8 == count()
    assert count("--set", "at=attn.{q,k,v,o}") == 2 * count()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lora", "--set", "rnk=2"], "did you mean 'rank'"),
        (["lora", "--set", "rank=two"], "a whole number"),
        (["lora", "--set", "rank=2.5"], "a whole number"),
        (["lora", "--set", "rank"], "KEY=VALUE"),
        (["lora", "--set", "rank=2", "--set", "rank=3"], "given twice"),
        (["houlsby", "--set", "norms=yes"], "true or false"),
        (["pfeifer"], "did you mean 'pfeiffer'"),
        (["lora", "--base", "x", "--config", "y"], "not both"),
    ],
)
def test_usage(cli: Here, words: list[str], says: str) -> None:
    assert says in cli("methods", *words).error(2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not a readable JSON"),
        ("[]", "no model_type"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}', "never run"),
    ],
)
def test_hostile_configurations(cli: Here, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "config.json").write_text(content, "utf-8")
    assert says in cli("inspect", "--config", str(tmp_path)).error(4)


def test_a_model_or_a_configuration(cli: Here, tmp_path: Path) -> None:
    cli("inspect").error(2)
    cli("inspect", "a", "--config", "b").error(2)
    cli("inspect", str(tmp_path / "nothing")).error(4)
    cli("inspect", "--config", str(tmp_path / "nothing.json")).error(4)


def test_bases(cli: Here) -> None:
    shown = cli("bases", "--json").ok().json
    assert {"me5-small", "smollm2-135m", "minilm-l6"} <= {base["name"] for base in shown}
    json.dumps(shown)
    for base in shown:
        assert base["name"] in cli("bases").ok().out
