"""`HubRemote`: a model repository of the Hugging Face Hub as a remote, by `huggingface_hub`.

    hf://USER/REPOSITORY              its branch `main`
    hf://USER/REPOSITORY@REVISION     another branch, tag or commit

Everything that one push sends is one commit, made on top of the commit whose names were looked at: if somebody else was faster,
the Hub refuses it.  Who may read and write is settled by the token that `hf auth login` keeps; it is never read here.

A repository without a README gets the module's card as one, if the first push is of one module.

What is not here: making repositories.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from intarsia.errors import StoreError, UsageError
from intarsia.modules.readme import render
from intarsia.store.entry import Label
from intarsia.store.pointers import check_label, check_store_name, decoded, encoded, is_version, pointed
from intarsia.store.remote import check_hash, check_versions, reaching, too_large
from intarsia.store.store import Store

README = "README.md"
_URL = re.compile(r"hf://([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9._/-]{1,100}))?/?")


class HubRemote:
    """A model repository.

    Args:
        url: see above.
        api: for tests; None is `HfApi()` as the environment has it.

    Raises:
        UsageError: the URL has another form.
    """

    def __init__(self, url: str, api: Any = None) -> None:
        found = _URL.fullmatch(url)
        if found is None or found[1].split("/")[0] in ("datasets", "spaces", "buckets"):
            raise UsageError(f"remote {url!r}: expected hf://USER/REPOSITORY, a model repository, or hf://USER/REPOSITORY@REVISION")
        if api is None:
            from huggingface_hub import HfApi

            api = HfApi()
        self.url = url
        self._api, self._repository, self._revision = api, found[1], found[2] or "main"
        self._commit = ""
        self._sizes: dict[str, int] = {}

    def names(self) -> list[str]:
        return sorted({decoded(path.split("/")[1], f"{self.url}/names") for path in self._tree() if re.fullmatch(r"names/[^/]+/[^/]+", path)})

    def listed(self, name: str) -> list[str]:
        lead = f"names/{encoded(check_store_name(name))}/"
        return sorted(check_label(path.removeprefix(lead)) for path in self._tree() if path.startswith(lead))

    def pointer(self, name: str, label: str) -> str | None:
        return self._pointer(f"names/{encoded(check_store_name(name))}/{check_label(label)}")

    def by_digest(self, digest: str) -> str | None:
        return self._pointer(f"digests/{digest}")

    def fetch(self, sha256: str, limit: int) -> bytes:
        """See `Remote`; the download goes to a temporary folder and leaves nothing in the cache of `huggingface_hub`."""
        data = self._read(f"blobs/{sha256}.safetensors", limit)
        check_hash(self.url, data, sha256)
        return data

    def send(self, source: Store, hashes: Sequence[str], labels: Sequence[Label]) -> None:
        from huggingface_hub import CommitOperationAdd

        check_versions(self, labels)
        files: dict[str, bytes | str] = {}
        for sha256 in hashes:
            files[f"blobs/{sha256}.safetensors"] = str(source.file(sha256))
            files[f"digests/{source.header(sha256).digest}"] = f"{sha256}\n".encode()
        for each in labels:
            files[f"names/{encoded(each.name)}/{each.label}"] = f"{each.sha256}\n".encode()
        if README not in self._tree() and len({each.name for each in labels}) == 1:
            files[README] = render(source.header(labels[0].sha256).card).encode()
        titles = ", ".join(str(each) for each in labels if is_version(each.label))[:200]
        with reaching(self.url), _silent():
            done = self._api.create_commit(
                self._repository, [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in sorted(files.items())],
                commit_message=f"Modules {titles}", repo_type="model", revision=self._revision, parent_commit=self._commit,
            )  # fmt: skip
        self._commit, self._sizes = done.oid, {}
        self._tree()
        for sha256 in hashes:
            self.fetch(sha256, source.header(sha256).size)
        for each in labels:
            if self.pointer(each.name, each.label) != each.sha256:
                raise StoreError(f"remote {self.url}: {each} was sent and is not there; look at the repository before going on")

    def _tree(self) -> dict[str, int]:
        """Size of every file by path, as of one commit: what is read later is read from the same."""
        if not self._sizes:
            with reaching(self.url):
                if not self._commit:
                    self._commit = self._api.repo_info(self._repository, repo_type="model", revision=self._revision).sha
                listed = self._api.list_repo_tree(self._repository, recursive=True, revision=self._commit, repo_type="model")
                self._sizes = {entry.path: entry.size for entry in listed if isinstance(getattr(entry, "size", None), int)}
        return self._sizes

    def _pointer(self, path: str) -> str | None:
        return pointed(self._read(path, 65), f"{self.url}/{path}") if path in self._tree() else None

    def _read(self, path: str, limit: int) -> bytes:
        size = self._tree().get(path)
        if size is None:
            raise StoreError(f"remote {self.url}: no file {path}")
        if size > limit:
            raise too_large(self.url, path.rpartition("/")[2], size, limit)
        with reaching(self.url), _silent(), tempfile.TemporaryDirectory(prefix="intarsia-") as folder:
            got = Path(self._api.hf_hub_download(self._repository, path, repo_type="model", revision=self._commit, local_dir=folder))
            if got.stat().st_size > limit:
                raise too_large(self.url, path.rpartition("/")[2], got.stat().st_size, limit)
            return got.read_bytes()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without progress bars: a pointer of 65 bytes needs none."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
