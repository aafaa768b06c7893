"""Writing a model folder in the layout of the transformers library, without building the model.

What is here: `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`.  What is not: where the
folder lies and that it appears at once (`cache.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer

WEIGHTS = "model.safetensors"


def write_folder(
    out: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, NDArray[np.float32]],
    tokenizer: Tokenizer,
    tokenizer_config: Mapping[str, Any],
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a model and its tokenizer to an existing, empty folder.

    Args:
        config: content of `config.json`.
        weights: float32 arrays by the model's own parameter names.
        tokenizer_config: content of `tokenizer_config.json`.
        extra: further JSON files by name.

    Raises:
        OSError: a file cannot be written.
    """
    (out / "config.json").write_text(_json({**config, "dtype": "float32"}), "utf-8")
    (out / "tokenizer_config.json").write_text(
        _json({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}), "utf-8"
    )
    for name, content in (extra or {}).items():
        (out / name).write_text(_json(content), "utf-8")
    (out / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    try:
        save_file(dict(weights), str(out / WEIGHTS), metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports, for one, a full disk
        raise OSError(f"cannot write {WEIGHTS}: {error}") from error


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
