"""From what the user typed to a model folder on disk: a local path, an embedded name, a hub id.

What is here: finding, converting, downloading.  What is not: making a model of the folder (`loading.py`).  Without
`allow_network` nothing here opens a connection; a hub id that an earlier download left in the hub's own cache is found
there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from intarsia.bases.cache import digest, ensure, entry_path
from intarsia.bases.catalogue import cached_copy
from intarsia.bases.folder import WEIGHTS
from intarsia.bases.rows import BASES, EmbeddedBase
from intarsia.errors import BaseError, listing, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: what is fetched from the hub: never code, never pickles
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
UNWANTED = ["*/*.safetensors", "consolidated*", "onnx/*", "openvino/*"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
LARGEST_JSON = 1 << 24


@dataclass(frozen=True, slots=True)
class Found:
    """A model folder and what is known about it before it is opened."""

    folder: Path
    name: str
    source: str
    licence: str
    pooling: str | None = None
    text_prefix: str = ""
    notes: tuple[str, ...] = ()
    parameters: int | None = None
    comparer: str = ""


def named(path: str) -> Callable[..., Any]:
    """The function behind `module:function`."""
    module, _, function = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of limited size.

    Raises:
        BaseError: the file is unreadable, too large or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BaseError(f"{path} is larger than {LARGEST_JSON:,} bytes")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise BaseError(f"{path} does not hold a JSON object")
    return content


def resolve(name: str | Path, *, allow_network: bool, revision: str | None, verify: bool) -> Found:
    """Find the model folder for a path, an embedded name or a hub id, in this order.

    Raises:
        BaseError: there is none, or it may not be used; the message says what to type.
    """
    typed = str(name)
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise BaseError(f"cannot find the folder {typed!r}: {error}") from error
    if (folder / "config.json").is_file():
        _no_revision(revision, f"the folder {folder}")
        return _local(folder)
    if typed in BASES and not isinstance(name, Path):
        _no_revision(revision, f"the embedded base {typed}")
        return _embedded(BASES[typed], verify)
    if folder.exists():
        raise BaseError(_why_no_folder(folder))
    if isinstance(name, Path) or not HUB_ID.fullmatch(typed) or ".." in typed:
        raise BaseError(f"there is no model folder {folder}; embedded bases: {listing(BASES)}")
    return _hub(typed, allow_network, revision)


def _no_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise BaseError(f"revision {revision!r} was asked for, but {what} has none; only hub ids do")


def _why_no_folder(folder: Path) -> str:
    if folder.is_file():
        return f"{folder} is a file; a base is a folder with config.json, safetensors weights and a tokenizer"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a base; give the base it was trained on, and the adapter as a module"
    return f"the folder {folder} has no config.json, so it is not a model folder"


def _pooling(folder: Path) -> str | None:
    """Pooling mode that a sentence-transformers folder declares, None if it declares none we know."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    declared = read_json(path)
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    return next((mode for mode, key in modes.items() if declared.get(key) is True), None)


def _licence(folder: Path) -> str:
    """Licence from the front matter of the model card, `unknown` without."""
    path = folder / "README.md"
    if not path.is_file():
        return "unknown"
    with path.open(encoding="utf-8", errors="replace") as handle:
        head = handle.read(1 << 16)
    front = re.match(r"---\n(.*?)\n---", head, re.DOTALL)
    line = re.search(r"^license:[ \t]*([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
    return line.group(1) if line else "unknown"


def _local(folder: Path) -> Found:
    config = read_json(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        if pickles:
            raise BaseError(
                f"{folder} has its weights as {listing(pickles)}, a format that can run code when it is opened; intarsia "
                "reads safetensors only. If you trust where it came from, convert it once: python -c \"from transformers "
                f"import AutoModel as M; M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" "
                "(AutoModelForCausalLM and so on to keep a head), then copy the tokenizer's files beside it"
            )
        raise BaseError(f"{folder} has no weights: expected model.safetensors or several with an index")
    notes = []
    if "auto_map" in config:
        notes.append("the folder brings code of its own, which is not run")
    return Found(
        folder=folder,
        name=folder.resolve().name,
        source=f"folder {folder}",
        licence=_licence(folder),
        pooling=_pooling(folder),
        notes=tuple(notes),
    )


def _absent(row: EmbeddedBase) -> BaseError:
    hub = f"with network allowed the original is {row.hub_id} (--allow-network)"
    if row.runs_here:
        return BaseError(
            f"the base {row.name!r} needs the package {row.package!r} ({row.download_mb} MB), which is not installed or "
            f"lacks {row.file}; type: {row.install}; or, {hub}"
        )
    systems = ", ".join(" ".join(system) for system in row.systems)
    return BaseError(
        f"the base {row.name!r} comes in the package {row.package!r}, which exists for {systems} only (this is "
        f"{sys.platform} {platform.machine()}); {hub}"
    )


def _embedded(row: EmbeddedBase, verify: bool) -> Found:
    source = row.locate()
    found = Found(
        folder=Path(),
        name=row.name,
        source="",
        licence=row.licence,
        pooling=row.pooling,
        text_prefix=row.text_prefix,
        notes=row.notes,
        parameters=row.parameters,
        comparer=row.comparer,
    )
    if source is None:
        entry = cached_copy(row)
        if entry is None:
            raise _absent(row)
        ensure(entry, _facts(row), None, verify=verify)
        return replace(found, folder=entry, source=f"cached copy {entry}")
    version = row.installed_version() or "0"
    notes = list(row.notes)
    if version != row.tested:
        notes.append(f"{row.package} {version} is installed, {row.tested} was tested")
    if not row.converter:
        if verify or version != row.tested:
            _check_source(row, source / WEIGHTS, version)
        return replace(found, folder=source, source=f"package {row.package} {version}", notes=tuple(notes))

    def build(out: Path) -> None:
        _check_source(row, source, version)
        named(row.converter)(source, out)

    entry = entry_path(row.name, version, row.converter_version)
    notes += ensure(entry, {**_facts(row), "package_version": version}, build, verify=verify)
    return replace(found, folder=entry, source=f"package {row.package} {version}, {entry}", notes=tuple(notes))


def _facts(row: EmbeddedBase) -> dict[str, Any]:
    return {
        "base": row.name,
        "package": row.package,
        "converter": row.converter,
        "converter_version": row.converter_version,
    }


def _check_source(row: EmbeddedBase, file: Path, version: str) -> None:
    """Refuse a file of the tested package version whose content is not the tested one."""
    if version == row.tested and digest(file) != row.sha256:
        raise BaseError(
            f"{file} is not the file that {row.package} {version} distributes (SHA-256 differs); type: "
            f"{row.install} --force-reinstall"
        )


def _hub(repo: str, allow_network: bool, revision: str | None) -> Found:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(local: bool) -> Path:
        return Path(
            snapshot_download(
                repo, revision=revision, local_files_only=local, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )

    try:
        folder = fetch(local=not allow_network)
    except LocalEntryNotFoundError as error:
        if allow_network:
            raise BaseError(f"cannot reach the hub for {repo!r}: {error}") from error
        raise BaseError(
            f"{repo!r} is no model folder and no embedded base{nearest(repo, BASES)} (embedded: {listing(BASES)}); to "
            "download it from the hub, type: --allow-network"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise BaseError(f"cannot get {repo!r} from the hub{offline}: {error}") from error
    if not (folder / "config.json").is_file():
        raise BaseError(f"{repo!r} has no config.json, so it is not a model; to download again, type: --allow-network")
    local = _local(folder)
    known = next((row for row in BASES.values() if row.hub_id == repo), None)
    return replace(
        local,
        name=repo.rpartition("/")[2],
        source=f"hub {repo}@{folder.name}",
        pooling=known.pooling if known else local.pooling,
        text_prefix=known.text_prefix if known else "",
    )
