"""What a method does that its specification does not say in words: what it trains and ties, whether it folds, how it combines.

Read off a module that is really built, on a tiny BERT with random weights (a wider one where the method's sizes need it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from intarsia.errors import IntarsiaError

if TYPE_CHECKING:
    from intarsia.methods import Method

_SIZES: tuple[dict[str, Any], ...] = (
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 768},
)


@dataclass(frozen=True, slots=True)
class Facts:
    """Attributes:
    trains: leaves of the trained tensors.
    ties: leaves that several sites share.
    why_not_foldable: None if a module of the method can become part of the base's weights.
    combines: what expressions may do with it.
    """

    trains: tuple[str, ...]
    ties: tuple[str, ...]
    why_not_foldable: str | None
    combines: str


def facts(method: Method) -> Facts:
    """The facts of a method; where it does not exist on a BERT, the refusal stands for the reason why it does not fold."""
    from intarsia.host import Host

    refusal: IntarsiaError | None = None
    for number in range(len(_SIZES)):
        host = Host(_model(number))
        try:
            host.add("m", method)
            live, tensors = host.parameters("m"), host.tensors("m")
            why = host.why_not_foldable("m") if live else "a head is new output, not a change of any weight"
            return Facts(_leaves(live), _leaves(k for k in tensors if k.startswith("tied/")), _reason(why), combines(method))
        except IntarsiaError as error:
            refusal = refusal or error
        finally:
            host.close()
    return Facts((), (), f"not on a BERT: {refusal}", combines(method))


@cache
def _model(number: int) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **_SIZES[number]), add_pooling_layer=False)


def _leaves(keys: Any) -> tuple[str, ...]:
    """Names of tensors without sites, patches and numbers, each once, in order."""
    found: dict[str, None] = {}
    for key in keys:
        words = [w for w in key.split("/")[-1].split(".")[1:] if not re.search(r"\d", w)]
        found[".".join(w for w in words if w not in ("value", "factor")) or words[-1]] = None
    return tuple(found)


def _reason(why: str | None) -> str | None:
    """A reason without the site it was found at."""
    return None if why is None else why.partition(": ")[2] or why


def combines(method: Method) -> str:
    """What expressions may do with its modules, by the kinds of sites it changes (docs/composing.md)."""
    ports = {patch.port for patch in method.patches if patch.port != "logits"}
    if not ports:
        return "one head answers"
    if method.masks:
        return "alone at its weights, >> elsewhere, rows"
    if ports <= {"out", "in", "weight"}:
        return ">> + - *, rows"
    return ">> (one behind the other), sums of equal lengths, rows" if ports <= {"mem", "seq"} else ">> , sums of equal lengths, rows"
