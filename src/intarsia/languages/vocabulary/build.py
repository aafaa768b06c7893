"""`plan` and `extend`: what a vocabulary for a language would cost and cover; the vocabulary as a module.

The module holds pieces, where rows are copied from, and the rows that are its own; training it (with a language module, see
`intarsia.languages.train`) changes these rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import UsageError
from intarsia.languages.measures import measures
from intarsia.languages.vocabulary.factorise import FACTORISATIONS, factorise
from intarsia.languages.vocabulary.start import STARTS, overlap, rows
from intarsia.languages.vocabulary.tokenizer import Pieces, appended, make, train, vocabulary_of
from intarsia.methods import Method, Patch, Policy
from intarsia.modules import Card, Module
from intarsia.patches import Dense
from intarsia.patches.vocabulary import Coded, Exchange, Vocabulary, VocabularyBias

Mode = Literal["replace", "append"]
OUTPUT_BIAS = "head.bias/words_bias.value"
INITS = ("lex", *STARTS[1:], *FACTORISATIONS)
"""`lex`: overlapping rows copied, the others random; the others copy too, and start what is left as their names say."""


@dataclass(frozen=True, slots=True)
class Sized:
    """One line of a plan.

    Attributes:
        size: pieces; 0 for the base's own vocabulary.
        pieces_per_word: on the held-out text.
        unknown_words: share of its words with unknown pieces.
        copied: rows that are copied from the base.
        dense: trained numbers with a row of numbers per new piece; `coded`: with codes of rank 100.
    """

    size: int
    pieces_per_word: float
    unknown_words: float
    copied: int
    dense: int
    coded: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(texts: Sequence[str], held_out: Sequence[str], base: Any, sizes: Sequence[int], *, normaliser: str = "NFKC", rank: int = 100) -> list[Sized]:
    """What vocabularies of some sizes would do to a text; the first line is the base's own.

    Args:
        held_out: text that no vocabulary is trained on.
        base: as `intarsia.bases.load` gives it.
    """
    width = embeddings_of(base.model).shape[1]
    own = measures(base.tokenizer, held_out)
    found = [Sized(0, own.pieces_per_word, own.unknown_word_share, len(base.tokenizer), 0, 0)]
    for size in sizes:
        pieces = train(texts, size, base.tokenizer, normaliser=normaliser)
        seen = measures(make(pieces, base.tokenizer), held_out)
        copied = len(overlap(pieces, base.tokenizer))
        new = len(pieces) - copied
        found.append(Sized(len(pieces), seen.pieces_per_word, seen.unknown_word_share, copied, new * width, new * rank))
    return found


def embeddings_of(model: Any) -> Tensor:
    """The word embeddings [V, d] of a model.

    Raises:
        UsageError: it has none.
    """
    module = model.get_input_embeddings()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise UsageError(f"{type(model).__name__} has no word embeddings: a vocabulary has nothing to stand on")
    return weight


def method_of(spec: Vocabulary, *, output_bias: bool) -> Method:
    """The method of a vocabulary.

    Args:
        output_bias: the base has a language-model head that is tied to the embeddings, whose bias goes along.
    """
    patches = [Patch("words", "embed.weight", spec, Exchange(), port="weight", tag="vocabulary")]
    if output_bias:
        patches.append(Patch("words_bias", "head.bias", VocabularyBias(), Exchange(), port="weight", tag="vocabulary", optional=True))
    return Method("vocabulary", tuple(patches), Policy(learning_rate=1e-3), source="Pfeiffer et al. 2021, arXiv 2012.15562", settings={"size": spec.size, "mode": spec.mode})


@dataclass(frozen=True, slots=True)
class Extended:
    """A vocabulary as a module, and how it came about.

    Attributes:
        module: to be kept.
        tokenizer: that goes with it.
        started: rows by how they start.
        error: relative error of the factorisation, None without one.
    """

    module: Module
    tokenizer: Any
    started: Mapping[str, int]
    error: float | None = None


def extend(
    texts: Sequence[str],
    base: Any,
    fingerprint: Any,
    *,
    name: str,
    language: str,
    size: int = 10_000,
    mode: Mode = "replace",
    init: str = "lex",
    normaliser: Literal["NFC", "NFKC", "none"] = "NFKC",
    train_copied: bool = False,
    rank: int = 100,
    clusters: int = 10,
    hidden: int = 256,
    pairs: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    card: Card | None = None,
) -> Extended:
    """Train a tokenizer on text and start rows for its pieces.

    Args:
        texts: of the language.
        base: as `intarsia.bases.load` gives it.
        fingerprint: of the base.
        size: pieces; in `append`, pieces to be learnt, of which those that the base has fall away.
        init: one of `INITS`.
        train_copied: copied rows are rows of its own that only start as the base's (all but those of special tokens).
        rank, clusters, hidden: of a factorisation.
        pairs: parallel lines (other language, this one), for `parallel`.

    Raises:
        UsageError: an unknown name, or a combination that means nothing.
    """
    if init not in INITS:
        raise UsageError(f"init is one of {', '.join(INITS)}; found {init!r}")
    if mode == "append" and init in FACTORISATIONS:
        raise UsageError(f"{init} stands for a whole vocabulary (mode replace); appended rows start as {', '.join(INITS[:4])}")
    matrix = embeddings_of(base.model)
    pieces = train(texts, size, base.tokenizer, normaliser=normaliser, replace=mode == "replace")
    alike = overlap(pieces, base.tokenizer) if mode == "replace" else {}
    copied = {i: j for i, j in alike.items() if not train_copied or pieces.texts[i] in pieces.specials}
    if mode == "append":
        own, started = _appended(pieces, base, matrix, init, seed)
    else:
        how = "random" if init == "lex" or init in FACTORISATIONS else init
        # what overlaps anchors the new rows whether or not it is copied
        free, started = rows(pieces, base.tokenizer, matrix, alike, how, texts, pairs, seed)  # type: ignore[arg-type]
        own = _with_copies(free, matrix, alike, copied, len(pieces))
        started = {"copied": len(copied), "started as the base's": len(alike) - len(copied), **started}
    spec = Vocabulary(len(pieces), len(copied), len(pieces.as_bytes()), mode, Dense(), normaliser)
    tensors = {f"tied/vocabulary.{leaf}": tensor for leaf, tensor in _held(pieces, copied).items()}
    error = None
    if init in FACTORISATIONS:
        shared = factorise(matrix, init, rank, clusters, hidden, seed)
        spec, coded, error = replace(spec, factor=shared.spec), *_coded(shared, own)
        tensors |= {f"tied/vocabulary.factor.{leaf}": tensor for leaf, tensor in coded.items()}
    else:
        tensors["tied/vocabulary.factor.value"] = own.clone()
    biased = output_bias(base.model) is not None
    if biased:
        tensors[OUTPUT_BIAS] = bias_start(base.model, len(pieces) - len(copied))
    card = card or Card(title=f"Vocabulary for {language}", languages=(language,), base=base.name, method="vocabulary")
    module = Module(
        name=name, method=method_of(spec, output_bias=biased), tensors=tensors, base=fingerprint, roles={"language": language},
        card=card,
    )  # fmt: skip
    tokenizer = make(pieces, base.tokenizer) if mode == "replace" else appended(pieces, base.tokenizer)
    return Extended(module, tokenizer, {k: v for k, v in started.items() if v}, error)


def _held(pieces: Pieces, copied: Mapping[int, int]) -> dict[str, Tensor]:
    source = torch.full((len(pieces),), -1, dtype=torch.int32)
    for i, j in copied.items():
        source[i] = j
    return {"source": source, "pieces": pieces.as_bytes(), "scores": torch.tensor(pieces.scores, dtype=torch.float32)}


def _with_copies(free: Tensor, matrix: Tensor, alike: Mapping[int, int], copied: Mapping[int, int], size: int) -> Tensor:
    """Rows of one's own in the order of ids: started ones, and the base's for pieces that overlap and are not copied."""
    place = iter(free)
    found = []
    for i in range(size):
        if i in copied:
            continue
        found.append(matrix[alike[i]].detach().float() if i in alike else next(place))
    return torch.stack(found) if found else free[:0]


def _appended(pieces: Pieces, base: Any, matrix: Tensor, init: str, seed: int) -> tuple[Tensor, dict[str, int]]:
    if init in ("focus", "parallel"):
        raise UsageError(f"{init} compares pieces of a vocabulary of its own (mode replace); appended rows start as lex (random) or mean")
    made, started = rows(pieces, base.tokenizer, matrix, {}, "mean" if init == "mean" else "random", seed=seed)
    return made, started


def _coded(shared: Any, own: Tensor) -> tuple[dict[str, Tensor], float]:
    codes, cluster = shared.encode(own)
    leaves = {"codes": codes.contiguous(), **{name: value.contiguous() for name, value in shared.shared.items()}}
    if cluster is not None:
        leaves["cluster"] = cluster
    return leaves, shared.error


def has_tied_head(model: Any) -> bool:
    """Whether the model's own language-model head shares the word embeddings."""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is embeddings_of(model)


def output_bias(model: Any) -> Tensor | None:
    """The bias of the model's own language-model head, where that is tied to the embeddings and has one."""
    found = getattr(model.get_output_embeddings(), "bias", None) if has_tied_head(model) else None
    return found if isinstance(found, Tensor) else None


def bias_start(model: Any, count: int) -> Tensor:
    """New pieces are as rare as the base thinks that its middling piece is: the median of its biases."""
    bias = output_bias(model)
    assert bias is not None
    return torch.full((count,), float(bias.detach().float().median()))


def size_of(module: Module) -> tuple[int, int]:
    """Trained numbers of a vocabulary module, and bytes of all it stores."""
    spec = vocabulary_of(module)
    leaf = "codes" if spec is not None and isinstance(spec.factor, Coded) else "value"
    trained = module.tensors[f"tied/vocabulary.factor.{leaf}"].numel() + sum(t.numel() for k, t in module.tensors.items() if k == OUTPUT_BIAS)
    return trained, sum(t.numel() * t.element_size() for t in module.tensors.values())
