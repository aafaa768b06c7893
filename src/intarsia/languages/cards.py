"""Cards of language modules: what the corpus says goes into them, with the reminder of its domain and of the base's biases."""

from __future__ import annotations

from intarsia.languages.corpus.build import Corpus
from intarsia.modules import Card
from intarsia.modules.card import DataSource

BIAS = "the base's biases are the module's: they were not evaluated here"


def card_of(corpus: Corpus, *, base: str, method: str, task: str = "mlm") -> Card:
    """What is known of a module that is trained on a corpus."""
    manifest = corpus.manifest
    sources = [
        DataSource(name=source["name"], licence="" if source["licence"] == "unknown" else source["licence"], sha256=source["sha256"], rows=source["lines"], origin=f"{source['kind']}, given by the user")
        for source in manifest["sources"]
    ]
    sources.append(DataSource(name="corpus (as used)", sha256=corpus.digest, rows=len(corpus.train)))
    return Card(
        title=f"{method} for {corpus.language}", languages=(corpus.language,), base=base, method=method, task=task, data=tuple(sources),
        warnings=(*reminders(corpus), *filtered(corpus)),
    )  # fmt: skip


def reminders(corpus: Corpus) -> tuple[str, ...]:
    """What every output of this path reminds of: the domain of the text, and the base's biases."""
    kinds = {source["kind"] for source in corpus.manifest["sources"]}
    domain = ("religious text only",) if kinds == {"bible"} else ()
    return (*domain, BIAS)


def filtered(corpus: Corpus) -> tuple[str, ...]:
    """One sentence per step that dropped lines."""
    return tuple(
        f"corpus: {step['name']} dropped {sum(step['dropped'].values()):,} of {step['before']:,} lines" for step in corpus.manifest["steps"] if step["dropped"]
    )
