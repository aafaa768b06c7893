"""`detect`: whose format a folder or file is in, from its names and its configuration alone; no weights are opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from intarsia.errors import ModuleError, StoreError, listing
from intarsia.modules.file import read_header
from intarsia.store.convert.folder import read_config

FormatName = Literal["intarsia", "peft", "adapterhub", "composable-sft"]
CONFIG, HEAD_CONFIG, FUSION, SETUP, DIFF = "adapter_config.json", "head_config.json", "adapter_fusion_config.json", "adapter_setup.json", "pytorch_diff.bin"
#: weights by format, or kind: the file that is read, and the pickle that stands in its place in older folders
WEIGHTS: Mapping[str, tuple[str, str]] = {
    "peft": ("adapter_model.safetensors", "adapter_model.bin"),
    "adapterhub": ("adapter.safetensors", "pytorch_adapter.bin"),
    "fusion": ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"),
}


@dataclass(frozen=True, slots=True)
class Detected:
    """What lies at a path.

    Attributes:
        format: whose format it is.
        path: of the module file, or of the folder to give to that format's reader.
        kind: the method as the peer names it.
        pickled: whether the weights are a pickle, which only the restricted loader opens.
    """

    format: FormatName
    path: Path
    kind: str
    pickled: bool = False


def detect(path: str | os.PathLike[str]) -> Detected:
    """The format of a folder, or of a file in it.

    Raises:
        StoreError: nothing is there, or nothing that is known; what was looked for is named.
        ModuleError: a configuration is there and is damaged.
    """
    place = Path(path)
    if place.is_file():
        known = {CONFIG, HEAD_CONFIG, FUSION, SETUP, DIFF, *(name for pair in WEIGHTS.values() for name in pair)}
        return _folder(place.parent) if place.name in known else _file(place)
    if not place.is_dir():
        raise StoreError(f"{place}: no such file or folder")
    return _folder(place)


def _file(path: Path) -> Detected:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise StoreError(f"{path}: weights alone do not say what they are; give the folder with their configuration ({CONFIG}), or {DIFF} of composable-sft")
    try:
        header = read_header(path)
    except ModuleError as error:
        raise StoreError(f"{path} is no module file ({error}), and no file of a folder of peft, AdapterHub or composable-sft") from None
    return Detected("intarsia", path, str(header.specification.get("name", "")))


def _folder(folder: Path) -> Detected:
    if (folder / CONFIG).is_file():
        return _adapter(folder, read_config(folder, CONFIG))
    if (folder / FUSION).is_file():
        return Detected("adapterhub", folder, "fusion", _pickled(folder, "fusion"))
    if (folder / DIFF).is_file():
        return Detected("composable-sft", folder, "sparse difference", pickled=True)
    for name, what in ((SETUP, "a composed setup of AdapterHub"), (HEAD_CONFIG, "a prediction head of AdapterHub without an adapter")):
        if (folder / name).is_file():
            raise StoreError(f"{folder} is {what} ({name}); {_inside(folder) or 'it holds no adapter that could be read'}")
    looked = f"{CONFIG} (peft, AdapterHub), {DIFF} (composable-sft)"
    raise StoreError(f"{folder} is in no known format: looked for {looked}; {_inside(folder) or 'found ' + (listing(sorted(p.name for p in folder.iterdir())) or 'nothing')}")


def _inside(folder: Path) -> str:
    """The sub-folders that hold something, as a hint."""
    inner = sorted(p.parent.name for name in (CONFIG, FUSION, DIFF) for p in folder.glob(f"*/{name}"))
    return f"name one of its sub-folders: {listing(inner)}" if inner else ""


def _adapter(folder: Path, config: Mapping[str, Any]) -> Detected:
    """peft and AdapterHub give their configuration the same name."""
    if "peft_type" in config:
        return Detected("peft", folder, str(config["peft_type"]), _pickled(folder, "peft"))
    inner = config.get("config")
    if isinstance(inner, Mapping) and ("version" in config or "type" in config or "model_type" in config):
        parts = inner.get("configs") if inner.get("architecture") == "union" else None
        kinds = [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else [inner]
        return Detected("adapterhub", folder, "+".join(str(part.get("architecture") or "bottleneck") for part in kinds), _pickled(folder, "adapterhub"))
    raise StoreError(f"{folder / CONFIG} has neither 'peft_type' (peft) nor 'config' with a version (AdapterHub)")


def _pickled(folder: Path, whose: str) -> bool:
    safe, pickle = WEIGHTS[whose]
    return not (folder / safe).is_file() and (folder / pickle).is_file()
