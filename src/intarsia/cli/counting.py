"""Exact counts of what a method trains on a model: a folder, an embedded base, or a configuration without weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from intarsia.errors import BaseError, IntarsiaError, UsageError
from intarsia.host import Host
from intarsia.methods import Method
from intarsia.patches import Head

#: how the class in `config.architectures` ends -> what builds a model with that head; any other ending: none
AUTOMATIC = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "MTModel": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Counter:
    """Counts methods on one model.

    Attributes:
        name: of the model, for messages.
        host: the model with nothing on it.
        source, licence, notes: what is known of a base that has weights.
    """

    name: str
    host: Host
    source: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()

    def __call__(self, method: Method) -> tuple[int | None, str]:
        """(trainable parameters, why the model cannot have the method if it cannot)."""
        try:
            return self.host.count(method), ""
        except IntarsiaError as error:
            return None, str(error)

    @functools.cached_property
    def total(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(p.numel() for p in self.host.model.parameters())

    @functools.cached_property
    def head_text(self) -> str:
        """What a head for texts adds."""
        return f"{self.host.count(Method('head').with_head(Head(('label',)))):,} per label"


def counter(base: str | None, config: Path | None, *, allow_network: bool = False) -> Counter:
    """The counter for a base or a configuration; for neither, of BERT-base's shape."""
    if base is not None and config is not None:
        raise UsageError("give --base or --config, not both")
    if base is not None:
        from intarsia.bases import load

        loaded = load(base, allow_network=allow_network)
        host = Host(loaded.model, tokenizer=loaded.tokenizer, base_name=loaded.name)
        return Counter(loaded.name, host, loaded.source, loaded.licence, loaded.notes)
    if config is not None:
        return Counter(str(config), Host(meta_model(read_config(config))))
    from transformers import BertConfig

    return Counter("BERT-base", Host(meta_model(BertConfig())))


def read_config(path: Path) -> Any:
    """A configuration from `config.json` or the folder that holds it.  Nothing it names is imported.

    Raises:
        BaseError: it cannot be read, or is of a kind transformers does not know.
    """
    import json

    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise BaseError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise BaseError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(raw, Mapping) or not isinstance(raw.get("model_type"), str):
        raise BaseError(f"{file}: not a model's configuration, it has no model_type")
    if "auto_map" in raw:
        raise BaseError(f"{file}: it names code of its own (auto_map), which is never run")
    settings = {k: v for k, v in raw.items() if k not in ("model_type", "transformers_version") and not k.startswith("_")}
    try:
        return AutoConfig.for_model(raw["model_type"], **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise BaseError(f"{file}: {str(error).splitlines()[0]}") from None


def meta_model(config: Any) -> PreTrainedModel:
    """A model of this configuration on the meta device, with the head it declares: shapes, no weights."""
    name = (getattr(config, "architectures", None) or [""])[0]
    automatic = next((auto for ending, auto in AUTOMATIC.items() if name.endswith(ending)), "AutoModel")
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, automatic).from_config(config)
    return model
