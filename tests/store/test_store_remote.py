"""Remotes: what is sent arrives whole or not at all, is verified on the way, and nothing is reached unasked.

The same laws hold for a folder, a file system of fsspec (in memory) and a repository of the Hub (its HTTP API on this machine).
"""

from __future__ import annotations

import hashlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from intarsia.errors import IntarsiaError, ModuleError, StoreError, UsageError
from intarsia.modules.readme import render
from intarsia.store import remote as remotes
from intarsia.store.hub import HubRemote
from intarsia.store.remote import FileSystemRemote, FolderRemote, Remote, open_remote
from intarsia.store.store import Store
from intarsia.store.transfer import pull, push
from tests.network import forbid
from tests.store.hub_server import Hub
from tests.store.small import age, lora, module


@pytest.fixture(scope="module")
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    """A hub on this machine, and the real client allowed to talk to it."""
    import huggingface_hub.constants as constants

    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    patch.setenv("NO_PROXY", "127.0.0.1")
    served = Hub()
    yield served
    served.close()
    patch.undo()


@pytest.fixture
def api(hub: Hub) -> Any:
    from huggingface_hub import HfApi

    hub.__dict__.update(commits=[{".gitattributes": b""}], requests=[], damage="")
    return HfApi(endpoint=hub.endpoint, token="hf_test")


@pytest.fixture(params=["folder", "file", "memory", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Remote]:
    """A new look at the same remote, at each call."""
    if request.param == "folder":
        return lambda: FolderRemote(tmp_path / "remote")
    if request.param == "file":  # not a store with a lock, but a file system of fsspec like any other
        return lambda: FileSystemRemote(f"file://{tmp_path / 'remote'}")
    if request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}"
        return lambda: FileSystemRemote(url)
    api = request.getfixturevalue("api")
    return lambda: HubRemote("hf://user/modules", api)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    lang = lora(0, "lang", layers=(0,))
    store.add(lang)
    store.add(lora(1, "Ŋ task/x", layers=(0,), requires=(lang.digest,)), tags=("best",))
    store.add(module(3, name="other"), version="1.10")
    store.add(module(4, name="other"), version="1.9")
    return store


def test_there_and_back(place: Callable[[], Remote], store: Store, tmp_path: Path) -> None:
    sent = push(store, place(), ["Ŋ task/x@best", "other"])
    assert [str(each) for each in sent.labels] == ["Ŋ task/x@1", "Ŋ task/x@best", "other@1.10"]
    assert sent.required == (store.resolve("lang"),) and len(sent.files) == 3
    assert place().names() == sorted(["Ŋ task/x", "other"]) and place().listed("other") == ["1.10"] and place().listed("nothing") == []
    back = Store(tmp_path / "back")
    got = pull(back, place(), ["Ŋ task/x@best"])
    assert got.required == sent.required and back.names() == {"Ŋ task/x": store.names()["Ŋ task/x"]} and back.verify() == []
    assert back.get("Ŋ task/x").digest == store.get("Ŋ task/x").digest
    age(back)
    assert back.gc(grace=0).removed == ()  # what is required stays, also without a name
    push(store, place(), everything=True)
    everything = Store(tmp_path / "everything")
    pull(everything, place(), everything=True)
    assert everything.names() == store.names() and everything.verify() == []
    assert pull(everything, place(), everything=True).files  # again: nothing changes
    assert everything.names() == store.names()


def test_unknown_names_are_refused(place: Callable[[], Remote], store: Store, tmp_path: Path) -> None:
    push(store, place(), ["other"])
    back = Store(tmp_path / "back")
    for reference, reason in (("othr", "did you mean 'other'"), ("other@7", "'other' has 1.10"), ("../up", "path"), ("other@../1", "'other' has 1.10")):
        with pytest.raises(IntarsiaError, match=reason):
            pull(back, place(), [reference])
    with pytest.raises(UsageError, match="--all"):
        pull(back, place())
    assert not back.path.exists()


def test_versions_do_not_change_on_either_side(place: Callable[[], Remote], store: Store, tmp_path: Path) -> None:
    push(store, place(), ["lang"])
    other = Store(tmp_path / "other")
    other.add(module(9, name="lang"), tags=("best",))
    with pytest.raises(StoreError, match="never changes"):
        push(other, place(), ["lang"])
    with pytest.raises(StoreError, match="never changes"):
        pull(other, place(), ["lang"])
    assert place().pointer("lang", "1") == store.resolve("lang") and other.resolve("lang") == other.resolve("lang@best")
    other.add(module(8, name="lang"))
    push(other, place(), ["lang@2"])
    assert sorted(place().listed("lang")) == ["1", "2"]


def test_tags_move(place: Callable[[], Remote], store: Store, tmp_path: Path) -> None:
    store.tag("other@1.9", "best")
    push(store, place(), ["other@best"])
    back = Store(tmp_path / "back")
    pull(back, place(), ["other@best"])
    store.tag("other@1.10", "best")
    push(store, place(), ["other@best"])
    pull(back, place(), ["other@best"])
    assert back.names() == {"other": store.names()["other"]}


def test_what_is_required_must_come_along(place: Callable[[], Remote], store: Store, tmp_path: Path) -> None:
    loose = Store(tmp_path / "loose")
    sha256 = loose.add(store.get("Ŋ task/x"), name="task", allow_missing=True)
    with pytest.raises(StoreError, match="requires digest"):
        push(loose, place(), ["task"])
    push(loose, place(), ["task"], allow_missing=True)
    back = Store(tmp_path / "back")
    with pytest.raises(StoreError, match=r"no name was written.*--allow-missing"):
        pull(back, place(), ["task"])
    assert back.names() == {}
    pull(back, place(), ["task"], allow_missing=True)
    assert back.resolve("task") == sha256
    third = Store(tmp_path / "third")
    third.add(store.get("lang"))
    pull(third, place(), ["task"])  # it is here already
    assert third.verify() == []


def test_a_limit_of_bytes_holds(place: Callable[[], Remote], store: Store, tmp_path: Path) -> None:
    push(store, place(), ["lang"])
    with pytest.raises(StoreError, match="at most 100 are read"):
        pull(Store(tmp_path / "back"), place(), ["lang"], limit=100)


def test_a_damaged_file_here_is_mended_by_pulling(place: Callable[[], Remote], store: Store) -> None:
    push(store, place(), ["lang"])
    blob = store.path / "blobs" / f"{store.resolve('lang')}.safetensors"
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert store.verify() != []
    pull(store, place(), ["lang"])
    assert store.verify() == []


# -- the file system of fsspec -----------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> tuple[str, Any]:
    url = f"memory://{uuid.uuid4().hex}"
    return url, fsspec.filesystem("memory")


def files(url: str) -> dict[str, bytes]:
    root = url.removeprefix("memory:/")
    fs = fsspec.filesystem("memory")
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in (fs.find(root) if fs.exists(root) else [])}


def test_layout(memory: tuple[str, Any], store: Store) -> None:
    url, _ = memory
    push(store, FileSystemRemote(url), ["other"])
    sha256 = store.resolve("other")
    assert files(url) == {
        f"blobs/{sha256}.safetensors": store.read(sha256), f"digests/{store.get('other').digest}": f"{sha256}\n".encode(), "names/other/1.10": f"{sha256}\n".encode(),
    }  # fmt: skip


def test_a_byte_lost_on_the_way_is_noticed(memory: tuple[str, Any], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, fs = memory
    real = type(fs).pipe_file

    def lossy(self: Any, path: str, value: bytes, **more: Any) -> None:
        real(self, path, value[:-1] if "/blobs/" in path else value, **more)

    monkeypatch.setattr(type(fs), "pipe_file", lossy)
    with pytest.raises(ModuleError, match="damaged in the transfer"):
        push(store, FileSystemRemote(url), ["other"])
    monkeypatch.undo()
    assert files(url) == {}  # neither a name nor the file, nor the temporary one
    push(store, FileSystemRemote(url), ["other"])
    path = next(path for path in fs.find(url.removeprefix("memory:/")) if "/blobs/" in path)
    fs.pipe_file(path, fs.cat_file(path)[:-1] + b"?")
    back = Store(tmp_path / "back")
    with pytest.raises(ModuleError, match="damaged"):
        pull(back, FileSystemRemote(url), ["other"])
    assert back.names() == {} and not list(back.path.rglob("*.safetensors"))
    push(store, FileSystemRemote(url), ["other"])  # sending again mends it
    pull(back, FileSystemRemote(url), ["other"])
    assert back.verify() == []


@pytest.mark.parametrize("call", ["pipe_file", "mv"])
def test_a_push_that_breaks_off_shows_old_or_new(memory: tuple[str, Any], store: Store, tmp_path: Path, call: str) -> None:
    url, fs = memory
    store.tag("other@1.9", "best")
    push(store, FileSystemRemote(url), ["other@best"])
    old, new = store.resolve("other@1.9"), store.resolve("other@1.10")
    store.tag("other@1.10", "best")
    broke = 0
    for step in range(20):
        patch, count = pytest.MonkeyPatch(), iter(range(100))
        real = getattr(type(fs), call)

        def fails(self: Any, *words: Any, real: Any = real, count: Any = count, step: int = step, **more: Any) -> Any:
            if next(count) == step:
                raise ConnectionResetError("the line is dead")
            return real(self, *words, **more)

        patch.setattr(type(fs), call, fails)
        try:
            push(store, FileSystemRemote(url), ["other@best"])
            done = True
        except StoreError as error:
            assert "ConnectionResetError: the line is dead" in str(error)
            done, broke = False, broke + 1
        finally:
            patch.undo()
        seen = Store(tmp_path / f"seen{step}")
        pull(seen, FileSystemRemote(url), everything=True)
        labels = seen.names()["other"]
        assert seen.verify() == [] and labels["best"] in (old, labels.get("1.10")) and labels.get("1.10") in (None, new)
        assert not [path for path in files(url) if "tmp" in path]
        if done:
            break
    assert broke >= 3 and labels["best"] == new


def test_hostile_remotes(memory: tuple[str, Any], store: Store, tmp_path: Path) -> None:
    url, fs = memory
    push(store, FileSystemRemote(url), ["other"])
    root, back = url.removeprefix("memory:/"), Store(tmp_path / "back")
    sha256 = store.resolve("other")
    for path, content, reason in (
        ("names/other/9", b"../../etc/passwd\n", "damaged"), ("names/other/9", b"a" * 10_000_000, "damaged"), ("names/other/9", b"ab" * 32 + b"\n", "no file"),
        ("names/%2E%2E%2Fup/1", f"{sha256}\n".encode(), "path"), ("names/Other/1", f"{sha256}\n".encode(), "not the name"),
        ("names/other/LOUD", f"{sha256}\n".encode(), "neither a version"),
    ):  # fmt: skip
        fs.pipe_file(f"{root}/{path}", content)
        with pytest.raises(IntarsiaError, match=reason):
            pull(back, FileSystemRemote(url), everything=True)
        fs.rm_file(f"{root}/{path}")
        assert back.names() == {}
    pull(back, FileSystemRemote(url), everything=True)
    assert back.names() == {"other": {"1.10": sha256}}


def test_nothing_is_reached_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a file system was opened")

    monkeypatch.setattr(fsspec.core, "url_to_fs", never)
    for url in ("s3://bucket/x", "hf://user/modules", "https://example.org/x", "ssh://host/x", "gs://bucket"):
        with pytest.raises(UsageError, match="--allow-network"):
            open_remote(url)
    for url in ("simplecache::s3://bucket/x", "zip://x::file:///tmp/x"):
        with pytest.raises(UsageError, match="chained"):
            open_remote(url, allow_network=True)


def test_urls(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}"):
        found = open_remote(url)
        assert isinstance(found, FolderRemote) and found.store.path == tmp_path
    assert isinstance(open_remote("memory://x"), FileSystemRemote)
    with pytest.raises(UsageError, match="nosuch"):
        open_remote("nosuch://x", allow_network=True)
    assert isinstance(open_remote("hf://user/modules@v1", allow_network=True), HubRemote)
    for wrong in ("hf://user", "hf://datasets/user/x", "hf://user/x/y/z", "hf://../x"):
        with pytest.raises(UsageError, match="expected hf://USER/REPOSITORY"):
            open_remote(wrong, allow_network=True)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_a_push_to_the_hub_is_one_commit_and_is_read_back(hub: Hub, api: Any, store: Store) -> None:
    push(store, HubRemote("hf://user/modules", api), everything=True)
    assert len(hub.commits) == 2 and hub.files[".gitattributes"] == b"" and "README.md" not in hub.files
    for sha256 in {sha256 for labels in store.names().values() for sha256 in labels.values()}:
        assert hashlib.sha256(hub.files[f"blobs/{sha256}.safetensors"]).hexdigest() == sha256
        assert f"GET /user/modules/resolve/{hub.oid()}/blobs/{sha256}.safetensors" in hub.requests
    assert hub.files["names/%C5%8A%20task%2Fx/best"] == hub.files["names/%C5%8A%20task%2Fx/1"]


def test_a_module_alone_brings_its_card_as_the_readme(hub: Hub, api: Any, store: Store) -> None:
    push(store, HubRemote("hf://user/modules", api), ["other@1.9"])
    assert hub.files["README.md"].decode() == render(store.header("other@1.9").card)
    hub.commits.append({**hub.files, "README.md": b"mine"})
    push(store, HubRemote("hf://user/modules", api), ["other@1.10"])
    assert hub.files["README.md"] == b"mine"


def test_somebody_was_faster(hub: Hub, api: Any, store: Store) -> None:
    remote = HubRemote("hf://user/modules", api)
    remote.names()
    hub.commits.append({**hub.files, "README.md": b"# new"})
    with pytest.raises(StoreError, match="hf://user/modules"):
        push(store, remote, ["other"])
    assert len(hub.commits) == 2
    push(store, HubRemote("hf://user/modules", api), ["other"])
    assert hub.files["README.md"] == b"# new"


def test_a_hub_that_answers_with_other_bytes(hub: Hub, api: Any, store: Store, tmp_path: Path) -> None:
    push(store, HubRemote("hf://user/modules", api), ["other"])
    hub.damage = "blobs/"
    back = Store(tmp_path / "back")
    with pytest.raises(ModuleError, match="damaged in the transfer"):
        pull(back, HubRemote("hf://user/modules", api), ["other"])
    assert back.names() == {}
    with pytest.raises(ModuleError, match="damaged in the transfer"):
        push(store, HubRemote("hf://user/modules", api), ["lang"])


def test_a_repository_that_is_not_there_and_a_client_that_is_offline(hub: Hub, api: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"hf://user/nothing.*(404|RepositoryNotFound)"):
        push(store, HubRemote("hf://user/nothing", api), ["other"])
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="OfflineModeIsEnabled"):
        push(store, HubRemote("hf://user/modules", api), ["other"])


# -- arriving in a store -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync"])  # before and after every rename
def test_a_pull_killed_at_every_step_leaves_old_or_new(store: Store, tmp_path: Path, call: str) -> None:
    from tests.store.test_store import kill_at

    back = Store(tmp_path / "back")
    store.tag("other@1.9", "best")
    pull(back, FolderRemote(store.path), ["other@best"])
    store.tag("other@1.10", "best")
    old, new = store.resolve("other@1.9"), store.resolve("other@1.10")
    for step in range(60):
        pid = os.fork()
        if pid == 0:
            kill_at(call, step)
            pull(Store(back.path), FolderRemote(store.path), ["other@best"])
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        assert back.verify() == []
        labels = back.names()["other"]
        assert labels["best"] in (old, labels.get("1.10")) and labels.get("1.10") in (None, new)
        if status == 0:
            break
    assert step > 2 and labels["best"] == new


def test_backends_that_fail_name_the_remote(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    class Strange(Exception):
        pass

    def fails(*_: Any, **__: Any) -> None:
        raise Strange

    remote = FileSystemRemote("memory://strange")
    monkeypatch.setattr(type(remote._fs), "isfile", fails)
    with pytest.raises(StoreError, match="remote memory://strange: Strange: no answer"):
        push(store, remote, ["other"])
    assert remotes.LOCAL == ("file", "local", "memory")


def test_nothing_but_a_remote_opens_a_connection(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving, loading and everything a store does work without a network (peft asks the Hub while it saves, huggingface/peft#1452)."""
    from intarsia.modules import load, save
    from intarsia.store.transfer import bundle, take

    forbid(monkeypatch)
    save(module(7, name="seven"), tmp_path / "seven.safetensors")
    assert load(tmp_path / "seven.safetensors").digest == module(7).digest
    store.add(tmp_path / "seven.safetensors")
    bundle(store, tmp_path / "all.tar", everything=True)
    other = Store(tmp_path / "other")
    take(other, tmp_path / "all.tar")
    push(other, open_remote(str(tmp_path / "third")), everything=True)
    assert other.verify() == [] and Store(tmp_path / "third").names() == store.names() and store.find(language="swh")
