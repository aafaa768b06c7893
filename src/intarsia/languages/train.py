"""`train_language`: a language module on a corpus, by one of the methods and objectives, with or without a vocabulary of its own.

    mlm, the base has an LM head        module alone; the head is the base's
    mlm, it has none, a head is given   `head >> module`, the head frozen           (warmed up on seen languages, see `warm_head`)
    mlm, it has none, none is given     the module brings one along and trains it
    a vocabulary of its own             the module holds it, and a head tied to it, which starts from the head that is given
    align                               no head

Heads are taken off the module that is given back: it is to be composed with modules of tasks.  What is frozen is verified bit by
bit by the trainer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.bases import load
from intarsia.data import Table
from intarsia.errors import UsageError, listing, nearest
from intarsia.host import Host
from intarsia.languages.bits import Bits, bits, spread
from intarsia.languages.cards import card_of
from intarsia.languages.corpus.build import Corpus
from intarsia.languages.objectives import LENGTH, Objective, learning
from intarsia.languages.vocabulary.build import OUTPUT_BIAS, bias_start, has_tied_head, output_bias
from intarsia.languages.vocabulary.build import method_of as vocabulary_method
from intarsia.languages.vocabulary.tokenizer import tokenizer_of, vocabulary_of
from intarsia.methods import METHODS, Method
from intarsia.modules import Module
from intarsia.patches import LanguageModelHead
from intarsia.patches.vocabulary import Vocabulary, VocabularyBias
from intarsia.sites.address import split_top
from intarsia.tasks import build
from intarsia.train import Recipe, Result, train

NAMES = {"mad-x": "madx", "lt-sft": "lt_sft", "lora": "lora", "bitfit": "bitfit", "full": "full"}
"""Names of the language path -> methods of `intarsia methods`; any other method goes by its own name."""
BODY = "#.**, embed.**, final.**, pooler.**, other.**"
BODY_BIASES = "#.**.bias, embed.**.bias, final.**.bias"
"""Everything but an LM head: a language module is composed with modules of tasks, on a base without one."""
HEAD = "lm_head"
BITS_LINES = 32


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training of a language gave.

    Attributes:
        module: without a head, to be kept and composed.
        whole: with its head, or the bias of its vocabulary's pieces in the base's head; None where there is neither.
        result: of the trainer.
        before, after: bits per character of the held-out text; None where nothing could be measured.
    """

    module: Module
    whole: Module | None
    result: Result
    before: Bits | None
    after: Bits | None


def method_of(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method behind a name of the language path, or of `intarsia methods`; `full` and `bitfit` leave the base's LM head alone.

    Raises:
        UsageError: there is none.
    """
    own = NAMES.get(name, name)
    if own not in METHODS:
        raise UsageError(f"no method {name!r}{nearest(name, [*NAMES, *METHODS])}; for languages: {listing(NAMES)}")
    method = METHODS[own].build(**(settings or {}))
    if own == "full":
        return replace(method, patches=tuple(replace(p, at=BODY) for p in method.patches))
    if own == "bitfit" and "at" not in (settings or {}):
        return METHODS[own].build(**{**(settings or {}), "at": BODY_BIASES})
    return method


def with_vocabulary(method: Method, vocabulary: Module, *, output_bias: bool) -> Method:
    """A method and a vocabulary as one method, its policy that of the method; refused where both change the embeddings.

    Args:
        output_bias: the base's own LM head is tied to the embeddings and has a bias, which goes along.
    """
    if any(p.port == "weight" and {"**", "embed.**", "embed.weight"} & set(split_top(p.at)) for p in method.patches):
        raise UsageError(f"method {method.name!r} changes the word embeddings itself, so it has no place beside a vocabulary; take lora, mad-x or bitfit")
    spec = vocabulary_of(vocabulary)
    assert spec is not None
    return replace(method, patches=(*vocabulary_method(spec, output_bias=output_bias).patches, *method.patches))


def train_language(
    host: Host,
    base: Any,
    corpora: Sequence[Corpus],
    *,
    name: str,
    method: Method,
    objective: Objective = "mlm",
    recipe: Recipe | None = None,
    vocabulary: Module | None = None,
    head: Module | None = None,
    settings: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    seed: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    progress: Any = None,
    measure: bool = True,
    resume: bool = False,
) -> Trained:
    """Train a language module.

    Args:
        host: a fresh host on the base (loaded with its masked-LM head, or with none; `align` wants none).
        base: what `intarsia.bases.load` gave.
        corpora: one, or several for a module of several languages, whose lines are then seen equally often.
        vocabulary: a vocabulary module that is trained along.
        head: an LM head for a base without one.
        settings: of the task (`rate`, `whole_words` ...; for align `how`, `both` ...).
        measure: bits per character of held-out lines before and after.

    Raises:
        UsageError: the parts do not go together.
    """
    _check(host, objective, vocabulary, head, method)
    tokenizer = host.tokenizer if vocabulary is None else tokenizer_of(vocabulary, host.tokenizer)
    if vocabulary is not None:
        method = with_vocabulary(method, vocabulary, output_bias=objective != "align" and output_bias(host.model) is not None)
    own_head = objective != "align" and _brings_head(host, vocabulary, head)
    found = learning(corpora, objective, tokenizer, base, lm_head="new" if own_head else "base", settings=settings, max_length=max_length)
    roles = {"language": "+".join(corpus.language for corpus in corpora)}
    card = card_of(*corpora, base=base.name, method=method.name, task=objective)
    frozen_head = head is not None and vocabulary is None
    if frozen_head and head is not None:
        host.insert(head, name=HEAD)
    host.add(name, method.with_head(found.task.head) if own_head and found.task.head is not None else method, seed=seed, roles=roles)
    host.describe(name, card=card)
    _start(host, name, vocabulary, head if own_head else None)
    expression = f"{HEAD} >> {name}" if frozen_head else name
    lines = _lines(corpora) if measure and objective != "align" else []
    before = None if own_head and head is None else _bits(host, tokenizer, lines, None if not frozen_head else HEAD, name, own_head)
    result = train(
        host, name, found.task, found.train, found.dev, recipe=recipe or Recipe(max_length=None), run_dir=run_dir, expression=expression, progress=progress,
        resume=resume,
    )  # fmt: skip
    after = _bits(host, tokenizer, lines, expression, name, own_head)
    bare = without_head(result.module)
    return Trained(bare, None if bare is result.module else result.module, result, before, after)


def _check(host: Host, objective: Objective, vocabulary: Module | None, head: Module | None, method: Method) -> None:
    own = host.model.get_output_embeddings() is not None
    if objective == "align" and (own or head is not None):
        raise UsageError("align reads sentence vectors: load the base without a head, and give no LM head")
    if own and head is not None:
        raise UsageError("this base has an LM head of its own; leave the other out")
    if own and vocabulary is not None and objective != "align" and not has_tied_head(host.model):
        raise UsageError("the base's LM head is not tied to its word embeddings, so it cannot answer for another vocabulary; load the base without a head")
    if vocabulary is not None and vocabulary_of(vocabulary) is None:
        raise UsageError(f"module {vocabulary.name!r} holds no vocabulary; make one with intarsia vocab extend")
    if head is not None and not isinstance(head.method.head, LanguageModelHead):
        raise UsageError(f"module {head.name!r} holds no LM head; make one with intarsia lang head")
    if method.head is not None:
        raise UsageError(f"method {method.name!r} brings a head; a language module has none")


def _brings_head(host: Host, vocabulary: Module | None, head: Module | None) -> bool:
    """Whether the module needs a head of its own while it trains."""
    return host.model.get_output_embeddings() is None and (head is None or vocabulary is not None)


def _start(host: Host, name: str, vocabulary: Module | None, head: Module | None) -> None:
    """Put a vocabulary's tensors, and the head's, in place."""
    live = host.tensors(name)
    with torch.no_grad():
        if vocabulary is not None:
            for key, tensor in vocabulary.tensors.items():
                if key in live or key != OUTPUT_BIAS:
                    live[key].copy_(tensor)
            if OUTPUT_BIAS in live and OUTPUT_BIAS not in vocabulary.tensors:
                live[OUTPUT_BIAS].copy_(bias_start(host.model, len(live[OUTPUT_BIAS])))
        if head is not None:
            for key, tensor in head.tensors.items():
                _copy_head(live[key], tensor, key, vocabulary)


def _copy_head(live: Tensor, stored: Tensor, key: str, vocabulary: Module | None) -> None:
    """One tensor of a head; numbers per piece follow the vocabulary: copied with their rows, the median for new ones."""
    spec: Vocabulary | None = None if vocabulary is None else vocabulary_of(vocabulary)
    if live.shape == stored.shape and (spec is None or not key.endswith("head.bias")):
        live.copy_(stored)
    elif spec is not None and spec.mode == "append":
        live.fill_(float(stored.median()))
        live[: len(stored)] = stored
    elif spec is not None and vocabulary is not None:
        source = vocabulary.tensors["tied/vocabulary.source"].long()
        live.copy_(torch.where(source >= 0, stored[source.clamp(min=0)], stored.median()))


def without_head(module: Module) -> Module:
    """A module without its LM head and without what it changes of the base's (the bias of a vocabulary's pieces); itself if it has neither."""
    bare = module.part(lambda patch: patch.port != "logits" and not isinstance(patch.form, VocabularyBias))
    return bare if bare is module else replace(bare, labels=None, context={})


def _lines(corpora: Sequence[Corpus]) -> list[str]:
    held = [text for corpus in corpora if corpus.dev is not None for text in corpus.dev.texts("text")]
    return spread(held, BITS_LINES)


def _bits(host: Host, tokenizer: Any, lines: Sequence[str], expression: str | None, name: str, own_head: bool) -> Bits | None:
    """Bits per character of held-out lines under an expression (None: the base alone, or the fresh module where it brings vocabulary and head)."""
    if not lines or tokenizer.mask_token_id is None:
        return None
    if expression is None and (own_head or tokenizer is not host.tokenizer):
        expression = name  # the base alone has no head, or does not know this tokenizer

    def run(batch: dict[str, Tensor]) -> Any:
        with host.using(expression) as model:
            return model(**{key: value.to(host.model.device) for key, value in batch.items()})

    return bits(host.model, tokenizer, lines, run=run)


def warm_head(
    host: Host, base: Any, texts: Sequence[str], dev: Sequence[str] = (), *, name: str = HEAD, recipe: Recipe | None = None, max_length: int | None = None,
    run_dir: str | os.PathLike[str] | None = None, progress: Any = None, seed: int = 0,
) -> Result:  # fmt: skip
    """Train an LM head alone, on texts in languages that the base knows; the base stays frozen.

    Raises:
        UsageError: the base has a head.
    """
    if host.model.get_output_embeddings() is not None:
        raise UsageError(f"{base.name} has an LM head of its own; there is nothing to warm up")
    task = build("mlm", host.tokenizer, settings={"lm_head": "new", "max_length": max_length or LENGTH}, columns={})
    assert task.head is not None
    host.add(name, METHODS["head"].build().with_head(task.head), seed=seed, roles={"role": "lm-head"})
    tables = [Table.of({"text": list(lines)}) if lines else None for lines in (texts, dev)]
    assert tables[0] is not None
    return train(host, name, task, tables[0], tables[1], recipe=recipe or Recipe(), run_dir=run_dir, progress=progress)


def base_head(base_name: str | Path, objective: Objective, *, allow_network: bool = False) -> Any:
    """The base, with its masked-LM head where it has weights for one and the objective wants it, else without a head."""
    if objective != "align":
        whole = load(base_name, allow_network=allow_network)
        if whole.model.get_output_embeddings() is not None and whole.tokenizer.mask_token_id is not None:
            return whole
    return load(base_name, head="none", allow_network=allow_network)
