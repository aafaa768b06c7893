"""`intarsia vocab`: a vocabulary for a language: what it would cost and cover, and the vocabulary as a module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from intarsia.cli.console import Console, size_text
from intarsia.cli.lang import BaseOf
from intarsia.cli.options import AllowNetwork
from intarsia.cli.verb import verb
from intarsia.errors import DataError, UsageError

CorpusFolder = Annotated[Path, typer.Argument(help="A corpus folder, see `intarsia corpus build`.")]
Sizes = Annotated[str, typer.Option("--size", help="Numbers of pieces, with commas.")]
NormaliserOf = Annotated[str, typer.Option("--normalise", help="Unicode form of the tokenizer: NFC, NFKC or none.")]


def register(app: typer.Typer) -> None:
    room = typer.Typer(help="A vocabulary for a language.", no_args_is_help=True)
    verb(room, "plan")(plan)
    verb(room, "extend")(extend)
    app.add_typer(room, name="vocab")


def plan(
    console: Console, corpus: CorpusFolder, base: BaseOf = "me5-small", size: Sizes = "5000,10000,20000", normalise: NormaliserOf = "NFKC", allow_network: AllowNetwork = False
) -> None:
    """Compare vocabularies of some sizes on the held-out text: pieces per word, copied rows, trained numbers."""
    from intarsia.bases import load
    from intarsia.languages.corpus.build import read_corpus
    from intarsia.languages.vocabulary import build

    held = read_corpus(corpus)
    if held.dev is None:
        raise DataError(f"{corpus}: the corpus has no held-out part to measure a vocabulary on; build it with --dev 0.05")
    loaded = load(base, allow_network=allow_network)
    found = build.plan(held.texts(), list(held.dev.texts("text")), loaded, sizes_of(size), normaliser=form_of(normalise))

    def human() -> None:
        rows = [
            ["the base's own" if not s.size else s.size, f"{s.pieces_per_word:.2f}", f"{s.unknown_words:.1%}", s.copied if s.size else None, s.dense or None, s.coded or None]
            for s in found
        ]
        console.table(["pieces", "pieces per word", "words with unknown pieces", "rows copied", "trained, rows of numbers", "trained, codes of rank 100"], rows)

    console.result([s.to_dict() for s in found], human)


def extend(
    console: Console,
    corpus: CorpusFolder,
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the new module.")],
    base: BaseOf = "me5-small",
    size: Annotated[int, typer.Option("--size", help="Number of pieces.", min=32)] = 10_000,
    mode: Annotated[str, typer.Option("--mode", help="replace: a tokenizer of its own; append: whole words behind the base's pieces.")] = "replace",
    init: Annotated[str, typer.Option("--init", help="How new rows start: lex, mean, focus, parallel, mf, mf-kmeans or mf-neural.")] = "lex",
    train_copied: Annotated[bool, typer.Option("--train-copied", help="Rows that overlap start as the base's and are trained too.")] = False,
    rank: Annotated[int, typer.Option("--rank", help="Of a factorisation's codes.", min=1)] = 100,
    clusters: Annotated[int, typer.Option("--clusters", help="Of mf-kmeans.", min=1)] = 10,
    hidden: Annotated[int, typer.Option("--hidden", help="Width of mf-neural's network.", min=1)] = 256,
    name: Annotated[str | None, typer.Option("--name", help="Name of the module.", show_default="vocab-LANGUAGE")] = None,
    normalise: NormaliserOf = "NFKC",
    seed: Annotated[int, typer.Option("--seed", help="Of random rows.", min=0)] = 0,
    allow_network: AllowNetwork = False,
) -> None:
    """Train a tokenizer on a corpus and start rows for its pieces; the module holds pieces and new rows only.

    intarsia vocab extend corpora/kab --base me5-small --size 8000 --init lex --out vocab-kab.safetensors
    """
    from intarsia.bases import load
    from intarsia.languages.cards import card_of
    from intarsia.languages.corpus.build import read_corpus
    from intarsia.languages.vocabulary import build
    from intarsia.modules import save
    from intarsia.sites.fingerprint import fingerprint

    if out.exists():
        raise UsageError(f"--out {out} exists; give a new file name")
    if mode not in ("replace", "append"):
        raise UsageError(f"--mode {mode} is neither replace nor append")
    held = read_corpus(corpus)
    loaded = load(base, allow_network=allow_network)
    pairs = list(zip(held.parallel_train.texts("source"), held.parallel_train.texts("target"))) if held.parallel_train is not None else []
    made = build.extend(
        held.texts(), loaded, fingerprint(loaded.model, loaded.tokenizer), name=name or f"vocab-{held.language}", language=held.language, size=size,
        mode=mode, init=init, normaliser=form_of(normalise), train_copied=train_copied, rank=rank, clusters=clusters, hidden=hidden, pairs=pairs,  # type: ignore[arg-type]
        seed=seed, card=card_of(held, base=loaded.name, method=f"vocabulary ({mode}, {init})", task=""),
    )  # fmt: skip
    save(made.module, out)
    trained, stored = build.size_of(made.module)
    told: dict[str, Any] = {
        "file": str(out), "digest": made.module.digest, "pieces": len(made.tokenizer), "started": dict(made.started), "trained": trained, "bytes": stored,
        "factorisation_error": made.error,
    }  # fmt: skip

    def human() -> None:
        console.line(f"{out}: {len(made.tokenizer):,} pieces; rows: {', '.join(f'{count:,} {how}' for how, count in made.started.items())}")
        if made.error is not None:
            console.line(f"the factorisation rebuilds the base's rows with a relative error of {made.error:.1%}")
        console.line(f"{trained:,} numbers to train, {size_text(stored)} stored; train it with: intarsia lang train {corpus} --vocab {out}")

    console.result(told, human)


def sizes_of(text: str) -> list[int]:
    """`5000,10000` as numbers.

    Raises:
        UsageError: a part is no number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--size {text!r}: expected numbers with commas, such as 5000,10000")
    return [int(part) for part in parts]


def form_of(name: str) -> Literal["NFC", "NFKC", "none"]:
    """A Unicode form that a tokenizer can have."""
    if name not in ("NFC", "NFKC", "none"):
        raise UsageError(f"--normalise {name} is not one of NFC, NFKC, none")
    return name  # type: ignore[return-value]
