"""What the user typed -> a folder: the order, the refusals and what they tell the user to type; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from intarsia.bases import BASES, list_bases
from intarsia.bases.resolve import UNWANTED, WANTED, Found, resolve
from intarsia.bases.rows import EmbeddedBase
from intarsia.errors import BaseError

pytestmark = pytest.mark.usefixtures("no_network", "cache")


def find(name: str | Path, *, allow_network: bool = False, revision: str | None = None, verify: bool = False) -> Found:
    return resolve(name, allow_network=allow_network, revision=revision, verify=verify)


def folder(path: Path, files: Iterable[str] = ("model.safetensors",), **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    for name in files:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    return path


def test_a_folder_comes_before_an_embedded_name(tiny: EmbeddedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("tiny-e5").source.startswith("package tiny_e5_pkg 1.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-e5").mkdir()
    assert find("tiny-e5").source.startswith("package")  # not a model folder, so not meant
    folder(tmp_path / "tiny-e5")
    assert find("tiny-e5").source == "folder tiny-e5"
    assert find(tmp_path / "tiny-e5").name == "tiny-e5"


def test_the_embedded_base_knows_its_facts(tiny: EmbeddedBase) -> None:
    found = find("tiny-e5")
    assert (found.licence, found.pooling, found.text_prefix) == ("MIT", "mean", "query: ")
    assert found.parameters == tiny.parameters


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5", "flax_model.msgpack"])
def test_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=rf"(?s){name}.*can run code.*safetensors only.*save_pretrained"):
        find(folder(tmp_path / "m", [name]))


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    assert find(folder(tmp_path / "m", ["pytorch_model.bin", "model.safetensors"])).folder == tmp_path / "m"


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, message in (("adapter", "holds an adapter, not a base"), ("empty", "no config.json"), ("file", "is a file")):
        with pytest.raises(BaseError, match=message):
            find(tmp_path / name)
    with pytest.raises(BaseError, match="has no weights"):
        find(folder(tmp_path / "bare", []))
    with pytest.raises(BaseError, match="there is no model folder"):
        find(tmp_path / "absent")
    with pytest.raises(BaseError, match="there is no model folder absent/deep/down"):
        find("./absent/deep/down")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\xff", " " * (1 << 24) + "{}"])
def test_a_damaged_configuration(content: str, tmp_path: Path) -> None:
    folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BaseError, match=r"config\.json"):
        find(tmp_path / "m")


def test_a_revision_belongs_to_the_hub(tiny: EmbeddedBase, tmp_path: Path) -> None:
    for name in ("tiny-e5", str(folder(tmp_path / "m"))):
        with pytest.raises(BaseError, match="only hub ids do"):
            find(name, revision="main")


def test_facts_a_folder_declares(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", ["model.safetensors", "1_Pooling/config.json", "README.md"], auto_map={"AutoModel": "x.Y"})
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: mit\n")
    found = find(path)
    assert (found.pooling, found.licence) == ("cls", "apache-2.0")
    assert any("not run" in note for note in found.notes)
    (path / "README.md").write_text("license: mit\n")
    (path / "1_Pooling" / "config.json").write_text("{}")
    assert (find(path).pooling, find(path).licence) == (None, "unknown")


def test_an_absent_package_says_what_to_type(tiny: EmbeddedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES._items, "tiny-e5", replace(tiny, module="not_there"))
    with pytest.raises(BaseError, match=r"needs the package 'tiny_e5_pkg'.*type: pip install tiny-e5.*--allow-network"):
        find("tiny-e5")
    monkeypatch.setitem(BASES._items, "tiny-e5", replace(tiny, module="not_there", systems=(("plan9", "mips"),)))
    with pytest.raises(BaseError, match=r"exists for plan9 mips only \(this is .*someone/tiny-e5 \(--allow-network\)"):
        find("tiny-e5")


def test_me5_small_on_another_system_offers_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    row = BASES["me5-small"]
    monkeypatch.setitem(BASES._items, "me5-small", replace(row, module="not_there"))
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(BaseError, match=r"intfloat/multilingual-e5-small \(--allow-network\)"):
        find("me5-small")


@pytest.mark.parametrize("name", ["me5_small", "someone/something", "bert-base-uncased"])
def test_a_hub_id_without_network(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match="type: --allow-network"):
        find(name)


def test_a_misspelt_name_is_suggested() -> None:
    with pytest.raises(BaseError, match="did you mean 'me5-small'"):
        find("me5_small")


@pytest.mark.parametrize("name", ["a/b/c", "../../etc", "a b", "-x", "https://huggingface.co/a/b", "a/..", ""])
def test_what_cannot_be_a_hub_id_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    with pytest.raises(BaseError):
        find(name, allow_network=True)


def test_the_hub_is_asked_for_neither_code_nor_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
               "tokenizer.json", "vocab.txt", "spiece.model", "README.md", "1_Pooling/config.json", "pytorch_model.bin",
               "modeling_x.py", "model.pkl", "onnx/model.onnx", "onnx/tokenizer.json", "consolidated.safetensors",
               "x/y.safetensors", "rust_model.ot", "training_args.bin"]  # fmt: skip
    kept = list(filter_repo_objects(offered, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    assert kept == offered[:9]


def test_a_hub_id_with_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: EmbeddedBase) -> None:
    commit = folder(tmp_path / "snapshots" / "abc123")
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["revision"], options["local_files_only"]))
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find("someone/tiny-e5", allow_network=True, revision="v1")
    assert (found.name, found.source) == ("tiny-e5", "hub someone/tiny-e5@abc123")
    assert found.text_prefix == "query: "  # the original of an embedded base
    assert found.pooling == "mean"
    find("someone/else")  # an earlier download is found without network
    assert asked == [("someone/tiny-e5", "v1", False), ("someone/else", None, True)]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, message in (
        (LocalEntryNotFoundError("no connection"), "cannot reach the hub"),
        (OSError("certificate"), "cannot get 'someone/x' from the hub"),
    ):

        def download(*args: object, error: Exception = error, **options: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(BaseError, match=message):
            find("someone/x", allow_network=True)


def test_the_list_follows_what_is_here(tiny: EmbeddedBase, tmp_path: Path) -> None:
    def info() -> object:
        return next(info for info in list_bases() if info.name == "tiny-e5")

    assert (info().installed, info().cached, info().usable) == ("1.0", None, True)
    entry = find("tiny-e5").folder
    assert info().cached == entry
    assert info().type_next == "intarsia inspect tiny-e5"
    (tmp_path / "site").rename(tmp_path / "gone")
    assert (info().installed, info().cached, info().usable) == (None, entry, True)
    entry.rename(tmp_path / "gone too")
    assert (info().usable, info().type_next) == (False, "pip install tiny-e5")


def test_the_list_and_the_package_page_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, intarsia.bases as b; b.list_bases(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_row_is_complete() -> None:
    for row in BASES.values():
        assert row.licence and row.install.startswith("pip install") and len(row.sha256) == 64 and row.parameters > 1_000_000
        assert "/" in row.hub_id and row.languages and row.architecture
