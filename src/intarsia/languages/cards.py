"""Cards of language modules: what the corpus says goes into them, with the reminder of its domain and of the base's biases."""

from __future__ import annotations

from intarsia.languages.corpus.build import Corpus
from intarsia.modules import Card
from intarsia.modules.card import DataSource

BIAS = "the base's biases are the module's: they were not evaluated here"


def card_of(*corpora: Corpus, base: str, method: str, task: str = "mlm") -> Card:
    """What is known of a module that is trained on a corpus, or on several."""
    languages = tuple(corpus.language for corpus in corpora)
    return Card(
        title=f"{method} for {', '.join(languages)}", languages=languages, base=base, method=method, task=task,
        data=tuple(source for corpus in corpora for source in _sources(corpus)),
        warnings=(*reminders(*corpora), *(line for corpus in corpora for line in filtered(corpus))),
    )  # fmt: skip


def _sources(corpus: Corpus) -> list[DataSource]:
    return [
        *(
            DataSource(
                name=source["name"], licence="" if source["licence"] == "unknown" else source["licence"], sha256=source["sha256"], rows=source["lines"],
                origin=f"{source['kind']}, given by the user",
            )
            for source in corpus.manifest["sources"]
        ),
        DataSource(name="corpus (as used)", sha256=corpus.digest, rows=len(corpus.train)),
    ]


def reminders(*corpora: Corpus) -> tuple[str, ...]:
    """What every output of this path reminds of: the domain of the text, and the base's biases."""
    kinds = {source["kind"] for corpus in corpora for source in corpus.manifest["sources"]}
    domain = ("religious text only",) if kinds == {"bible"} else ()
    return (*domain, BIAS)


def filtered(corpus: Corpus) -> tuple[str, ...]:
    """One sentence per step that dropped lines."""
    return tuple(
        f"corpus {corpus.language}: {step['name']} dropped {sum(step['dropped'].values()):,} of {step['before']:,} lines"
        for step in corpus.manifest["steps"]
        if step["dropped"]
    )
