"""`train`, `eval`, `predict`: from files to a module to answers, on a tiny base; flags and configuration files agree."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from intarsia import bases, tasks
from intarsia.cli import main
from intarsia.cli.folding import without_head
from intarsia.data import read
from intarsia.host import Host
from intarsia.modules import load, save
from tests.cli.bases import make_base, make_tags, make_topics
from tests.cli.run import Here, environment, process

STEPS = ("--max-steps", "12", "--lr", "0.003")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, another base and data."""
    path = tmp_path_factory.mktemp("run")
    make_base(path / "base")
    make_base(path / "other", seed=1)
    make_topics(path / "train.csv", 96, 0)
    make_topics(path / "dev.csv", 30, 1)
    make_topics(path / "test.csv", 30, 2)
    make_tags(path / "train.conll", 48, 0)
    make_tags(path / "dev.conll", 16, 1)
    return path


def train_words(room: Path, out: str, *more: str) -> list[str]:
    return ["train", "--base", str(room / "base"), "--train", str(room / "train.csv"), "--dev", str(room / "dev.csv"), "--out", str(room / out), *more]


@pytest.fixture(scope="module")
def modules(room: Path) -> dict[str, Path]:
    """Two modules, trained by the command."""
    for name, more in (("lora", ("--set", "rank=2")), ("pfeiffer", ("--method", "pfeiffer", "--set", "reduction=8"))):
        assert main(train_words(room, name, "--quiet", *STEPS, *more)) == 0
    return {name: room / name / "module.safetensors" for name in ("lora", "pfeiffer")}


def test_train_says_what_it_did(cli: Here, room: Path) -> None:
    words = train_words(room, "said", "--method", "lora", "--set", "rank=2", "--lang", "swh", "--role", "domain=toys", "--card", "licence=CC0-1.0",
                        "--card", "data.licence=cc0-1.0", "--card", "title=007", "--name", "topic", *STEPS)  # fmt: skip
    told = cli(*words, "--json").ok().json
    module = load(told["file"])
    assert (module.digest, module.name, told["steps"]) == (told["digest"], "topic", 12)
    assert dict(module.roles) == {"language": "swh", "domain": "toys"}
    assert (module.card.languages, module.card.licence) == (("swh",), "CC0-1.0")
    assert (module.card.title, module.card.script, [d.licence for d in module.card.data]) == ("007", "Latn", ["CC0-1.0", "CC0-1.0"])
    stated = {"contact", "intended_use", "out_of_scope", *(f"data {d.name!r}: origin" for d in module.card.data)}
    assert set(told["card_missing"]) == stated, "all that training can know is written"
    assert set(told["dev"]) == {"accuracy", "macro_f1", "mcc"} and told["dev"]["accuracy"]["n"] == 30
    assert module.method.settings["rank"] == 2
    again = cli(*words[:-4])
    assert "holds a run already" in again.error(1)


def test_an_evaluation_completes_the_card(cli: Here, room: Path, modules: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(modules["lora"].read_bytes())
    told = cli("eval", "--base", str(room / "base"), "-m", str(file), f"test:swh={room / 'test.csv'}", "--out", str(tmp_path / "eval.json"), "--json").ok().json
    cli("card", "set", str(file), "--eval", str(tmp_path / "eval.json"), "contact=a@b.org", "intended_use=Toys.", "out_of_scope=People.", "licence=MIT", "languages=swh",
        "data.origin=made", "data.licence=MIT").ok()  # fmt: skip
    assert "complete" in cli("card", "check", str(file)).ok().out
    found = {(m.name, m.split, m.language): m for m in load(file).card.metrics}
    want = told["data"]["test:swh"]["metrics"]["accuracy"]
    assert (found["accuracy", "test", "swh"].value, found["accuracy", "test", "swh"].low, found["accuracy", "test", "swh"].seeds) == (want["value"], want["low"], (0,))
    other = cli("card", "set", str(modules["pfeiffer"]), "--eval", str(tmp_path / "eval.json"))
    assert "not an evaluation of this module" in other.error(4)


def test_flags_and_file_give_the_same_module(cli: Here, room: Path, modules: dict[str, Path]) -> None:
    config = {
        "name": "lora", "base": str(room / "base"), "task": "classify", "method_settings": {"rank": 2}, "train": str(room / "train.csv"),
        "dev": str(room / "dev.csv"), "out": str(room / "by-file"), "recipe": {"max_steps": 12, "learning_rate": 0.003},
    }  # fmt: skip
    for suffix, text in (("json", json.dumps(config)), ("yaml", yaml_of(config)), ("toml", toml_of(config))):
        file = room / f"run.{suffix}"
        file.write_text(text, "utf-8")
        told = cli("train", "--config", str(file), "--out", str(room / f"by-{suffix}"), "--quiet", "--json").ok().json
        assert told["digest"] == load(modules["lora"]).digest, suffix


def yaml_of(config: dict[str, Any]) -> str:
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())


def toml_of(config: dict[str, Any]) -> str:
    flat = "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items() if not isinstance(value, dict))
    return flat + "".join(f"[{k}]\n" + "".join(f"{a} = {b}\n" for a, b in v.items()) for k, v in config.items() if isinstance(v, dict))


def test_flags_win_over_the_file(cli: Here, room: Path) -> None:
    file = room / "flags.yaml"
    file.write_text(f"base: {room / 'base'}\ntrain: {room / 'train.csv'}\nrecipe: {{max_steps: 50}}\nmethod: bitfit\n", "utf-8")
    told = cli("train", "--config", str(file), "--max-steps", "2", "--out", str(room / "flags"), "--quiet", "--json").ok().json
    assert (told["steps"], told["name"], told["dev"]) == (2, "bitfit", {})


@pytest.mark.parametrize(
    ("text", "says"),
    [("bse: x", "did you mean 'base'"), ("recipe: {epoch: 2}", "did you mean 'epochs'"), ("recipe: {epochs: two}", "found 'two'"),
     ("task: clasify", "did you mean 'classify'"), ("method: pfeifer", "did you mean 'pfeiffer'"), ("read_settings: {colums: text}", "did you mean 'columns'"),
     ("card: {licens: x}", "did you mean 'licence'")],
)  # fmt: skip
def test_unknown_keys_are_refused_with_a_suggestion(cli: Here, room: Path, text: str, says: str) -> None:
    file = room / "bad.yaml"
    file.write_text(f"{text}\n", "utf-8")
    words = train_words(room, "never", "--config", str(file))
    if text.startswith("task"):
        words += ["--name", "x"]
    assert says in cli(*words).error(2)
    assert not (room / "never").exists()


def test_bad_data_stop_a_training_unless_forced(cli: Here, room: Path) -> None:
    words = ["train", "--base", str(room / "base"), "--train", str(room / "train.csv"), "--dev", str(room / "train.csv"), "--max-steps", "1", "--quiet"]
    assert "also occur in train" in cli(*words, "--out", str(room / "leak")).error(3)
    forced = cli(*words, "--out", str(room / "leak"), "--force").ok()
    assert "warning: " in forced.err and "also occur in train" in forced.err


def test_eval_is_what_the_library_says(cli: Here, room: Path, modules: dict[str, Path]) -> None:
    told = cli("eval", "-m", str(modules["lora"]), str(room / "test.csv"), "--base", str(room / "base"), "--json", "--out", str(room / "m.json"),
               "--predictions", str(room / "rows")).ok().json  # fmt: skip
    base = bases.load(room / "base", head="none")
    module = load(modules["lora"])
    host = Host(base.model, tokenizer=base.tokenizer).insert(module)
    found = tasks.evaluate(host, "lora", tasks.from_module(module, base.tokenizer, model=base.model), read(room / "test.csv"))
    for name, score in found.metrics.items():
        assert told["data"]["test"]["metrics"][name] == {"value": score.value, "low": score.low, "high": score.high, "n": 30}
    assert json.loads((room / "m.json").read_text("utf-8")) == told
    rows = [json.loads(line) for line in (room / "rows" / "test.jsonl").read_text("utf-8").splitlines()]
    assert [row["prediction"] for row in rows] == [p.value for p in found.predictions]
    assert f"{found.metrics['accuracy'].value:.4f}" in cli("eval", "-m", f"{modules['lora']}", f"t={room / 'test.csv'}", "--base", str(room / "base")).ok().out


def test_predict_reads_lines_files_and_standard_input(cli: Here, room: Path, modules: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["predict", "-m", str(modules["lora"]), "--base", str(room / "base"), "--quiet"]
    texts = ["cat dog 5", "sun \u2028moon é", "rice"]
    by_line = rows_of(cli(*words, *(w for text in texts for w in ("--line", text))).ok().out)
    (room / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    assert rows_of(cli(*words, str(room / "rows.jsonl")).ok().out) == by_line
    piped = process(*words, stdin="\n".join(t.replace("\u2028", "") for t in texts).encode()).ok().out
    assert [r["probabilities"] for r in rows_of(piped)][::2] == [r["probabilities"] for r in by_line][::2]
    assert cli(*words, str(room / "rows.jsonl"), "--json").ok().json == by_line
    cli(*words, str(room / "rows.jsonl"), "--out", str(room / "out.jsonl")).ok()
    assert rows_of((room / "out.jsonl").read_text("utf-8")) == by_line
    for row in by_line:
        values = list(row["probabilities"].values())
        assert abs(sum(values) - 1) < 1e-5 and values == sorted(values, reverse=True) and row["prediction"] == next(iter(row["probabilities"]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    cli(*words).error(3)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def test_json_lines_survive_an_ascii_terminal(room: Path, modules: dict[str, Path]) -> None:
    words = ["predict", "-m", str(modules["lora"]), "--base", str(room / "base"), "--line", "ɣ cat"]
    out = process(*words, env={"PYTHONIOENCODING": "ascii"}).ok().out
    assert rows_of(out)[0]["input"] == {"text": "ɣ cat"}


def test_expressions(cli: Here, room: Path, modules: dict[str, Path]) -> None:
    a, b = (str(path) for path in modules.values())
    words = ["predict", "--base", str(room / "base"), "--line", "cat dog sun"]

    def probabilities(*more: str) -> dict[str, float]:
        return dict(rows_of(cli(*words, *more).ok().out)[0]["probabilities"])

    alone = probabilities("-m", a)
    assert probabilities("-m", f"x={a}") == alone
    assert probabilities("-m", a, "-m", b, "--expr", "lora") == alone
    assert probabilities("-m", f"x={a}", "-m", f"y={a}", "--expr", "0.5*x + 0.5*y") == pytest.approx(alone, abs=2e-6)
    mixed = probabilities("-m", a, "-m", b, "--expr", "average(lora, pfeiffer)")
    assert mixed != alone
    stacked = probabilities("-m", a, "-m", b, "--expr", "lora >> pfeiffer", "--head", "pfeiffer")
    assert stacked not in (alone, mixed)
    assert "say what runs" in cli(*words, "-m", a, "-m", b).error(2)
    assert "did you mean 'lora'" in cli(*words, "-m", a, "-m", b, "--expr", "lra").error(2)
    assert "two modules are called" in cli(*words, "-m", a, "-m", a).error(2)
    assert "say which module" in cli("predict", "--line", "a").error(2)


def test_modules_of_the_store(cli: Here, room: Path, modules: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store:NAME` runs as the file does, in every verb."""
    monkeypatch.setenv("INTARSIA_STORE", str(tmp_path / "store"))
    cli("store", "add", str(modules["lora"]), "--name", "topic", "--tag", "best").ok()
    base = ("--base", str(room / "base"))
    words = ("predict", *base, "--line", "cat dog sun")
    wanted = cli(*words, "-m", f"{modules['lora']}").ok().out
    for more in (("-m", "store:topic"), ("-m", "a=store:topic@best"), ("--expr", "store:topic@1")):
        assert cli(*words, *more).ok().out == wanted
    told = [cli("eval", "-m", where, str(room / "test.csv"), *base, "--json").ok().json["data"]["test"]["metrics"] for where in (f"lora={modules['lora']}", "lora=store:topic")]
    assert told[0] == told[1]
    assert cli("explain", "store:topic", *base, "--json").ok().json["refusal"] is None


def test_another_base_is_refused(cli: Here, room: Path, modules: dict[str, Path]) -> None:
    words = ["predict", "-m", str(modules["lora"]), "--base", str(room / "other"), "--line", "cat"]
    assert "weights" in cli(*words).error(4)
    found = cli(*words, "--force-base").ok()
    assert "warning: module 'lora' belongs to another base (weights" in found.err and rows_of(found.out)[0]["forced_base"] == ["lora"]
    told = cli("eval", *words[1:-2], str(room / "test.csv"), "--force-base", "--json").ok().json
    assert list(told["forced_base"]) == ["lora"]


def test_training_on_top_of_a_module_of_another_base_is_said_and_marked(cli: Here, room: Path, modules: dict[str, Path]) -> None:
    below = room / "below.safetensors"
    save(without_head(load(modules["pfeiffer"])), below)
    words = ["train", "--base", str(room / "other"), "--train", str(room / "train.csv"), "--out", str(room / "forced"), "--quiet", "--max-steps", "1", "--name", "top",
             "-m", str(below), "--new", "mid=bitfit", "--expr", "pfeiffer >> mid >> top", "--card", "licence=CC0-1.0"]  # fmt: skip
    assert "weights" in cli(*words).error(4)
    told = cli(*words, "--force-base", "--json").ok()
    assert "warning: module 'pfeiffer' belongs to another base (weights" in told.err and list(told.json["forced_base"]) == ["pfeiffer"]
    for file in (Path(told.json["file"]), *(room / "forced" / "along").iterdir()):
        card = load(file).card
        assert any("on top of 'pfeiffer', which belongs to another base (weights" in warning for warning in card.warnings), file


def test_a_module_on_top_of_another(cli: Here, room: Path, modules: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked-LM module below a new task module, as language and task modules are; from the store, pinned to its bytes."""
    monkeypatch.setenv("INTARSIA_STORE", str(room / "store"))
    (room / "text.txt").write_text("".join(f"{t} the end\n" for t in read(room / "train.csv").texts("text")), "utf-8")
    words = ["train", "--base", str(room / "base"), "--train", str(room / "text.txt"), "--task", "mlm", "--method", "pfeiffer", "--name", "lang"]
    cli(*words, "--max-steps", "2", "--out", str(room / "lang"), "--quiet").ok()
    below = room / "lang" / "module.safetensors"
    sha256 = cli("store", "add", str(below), "--json").ok().json["sha256"]
    told = cli(*train_words(room, "upper", "-m", "store:lang", "--expr", "lang >> topic", "--name", "topic", "--quiet", "--json", *STEPS)).ok().json
    upper = load(told["file"])
    assert upper.requires == (load(below).digest,)
    assert json.loads((room / "upper" / "run.json").read_text("utf-8"))["config"]["modules"] == {"lang": f"store:{sha256}"}
    shown = cli("eval", "-m", str(below), "-m", told["file"], "--expr", "lang >> topic", f"dev={room / 'dev.csv'}", "--base", str(room / "base"), "--json")
    assert shown.ok().json["data"]["dev"]["metrics"]["accuracy"]["value"] == told["dev"]["accuracy"]["value"]


def test_tagging(cli: Here, room: Path) -> None:
    told = cli("train", "--base", str(room / "base"), "--train", str(room / "train.conll"), "--dev", str(room / "dev.conll"), "--out", str(room / "tags"),
               "--max-steps", "3", "--quiet", "--json").ok().json  # fmt: skip
    assert "span_f1" in told["dev"]
    rows = rows_of(cli("predict", "-m", told["file"], "--base", str(room / "base"), str(room / "dev.conll")).ok().out)
    table = read(room / "dev.conll")
    assert [len(row["prediction"]) for row in rows] == [len(tokens) for tokens in table.tokens("tokens")]
    assert "reads words" in cli("predict", "-m", told["file"], "--base", str(room / "base"), "--line", "cat").error(2)


def test_interrupt_and_resume_give_the_uninterrupted_module(cli: Here, room: Path) -> None:
    more = ("--max-steps", "200", "--recipe", "log_every=1", "--recipe", "save_every=1000", "--name", "long")
    whole = cli(*train_words(room, "whole", "--quiet", "--json", *more)).ok().json
    words = train_words(room, "parts", *more)
    child = subprocess.Popen([sys.executable, "-m", "intarsia", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    log = room / "parts" / "metrics.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (log.exists() and log.read_text("utf-8").count("\n") >= 5):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert f"intarsia train --resume {room / 'parts'}" in err and "Traceback" not in err
    told = cli("train", "--resume", str(room / "parts"), "--quiet", "--json").ok().json
    assert told["digest"] == whole["digest"] and told["steps"] == 200
    assert "no other options" in cli("train", "--resume", str(room / "parts"), "--epochs", "3").error(2)
    cli("train", "--resume", str(room / "nothing")).error(5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(cli: Here, room: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    cli(*train_words(room, "x", "--out", str(tmp_path / "x"), *STEPS)).error(5)


def test_one_design_element_exchanged(cli: Here, room: Path) -> None:
    """He et al. 2021: a sequential adapter made parallel and scaled, or moved to the attention, by one setting each."""
    words = train_words(room, "moved", "--method", "pfeiffer", "--name", "moved", "--max-steps", "2", "--set", "reduction=8")
    found = cli(*words, "--set", "insertion=parallel", "--set", "scale=4", "--set", "at=attn", "--json")
    assert found.code == 0, found.err
    module = load(Path(found.json["file"]))
    (patch,) = [p for p in module.method.patches if p.port != "logits"]
    assert patch.at == "attn" and patch.form.read == "reads" and patch.op.scale == 4.0  # type: ignore[union-attr]
    refused = cli(*train_words(room, "no", "--method", "pfeiffer"), "--set", "insertoin=parallel")
    assert refused.code == 2 and "insertion" in refused.err
