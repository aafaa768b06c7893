"""What published work says about adapting to a language, one row of data per situation.

The table orders the arms that are worth comparing; it does not decide.  Published results disagree where data sizes, capacity
and protocols differ, so none of them lets a tool choose silently.  `grade`: how the number behind a row is known to us
(`abstract`: the paper's abstract; `code`: the authors' released results; `ours`: a threshold of this library, not published;
`memory`: not looked up again).  What is not here: when a row applies (`probe.advise`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Grade = Literal["abstract", "code", "ours", "memory"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One situation.

    Attributes:
        key: short name.
        situation: in words.
        first: the arm to begin with.
        others: arms to compare it with.
        findings: what was published, with the source.
        grade: how we know.
    """

    key: str
    situation: str
    first: str
    others: tuple[str, ...]
    findings: tuple[str, ...]
    grade: Grade


TABLE: tuple[Evidence, ...] = (
    Evidence(
        "script", "more than about 5 % of the words have unknown pieces (the threshold is ours)",
        "vocabulary (lexical overlap or matrix factorisation) + language adapter", ("romanised text", "no adaptation"),
        (
            "UNKs Everywhere (Pfeiffer et al. 2021, arXiv 2012.15562): substantial gains for unseen scripts",
            "Muller et al. 2021 (NAACL): failures are largely related to the script; transliteration helps very significantly",
            "TransMI (2024): +3 to +34 % for transliterated input",
            "Jung et al.: romanisation is the best input in 7 of 8 settings",
        ),
        "abstract",
    ),
    Evidence(
        "testament", "the script is known, the text has about the size of a New Testament (8,000 verses)",
        "full (continued masked-language modelling on all parameters: one copy of the model per language)",
        ("lt-sft", "mad-x", "lora"),
        ("Ebrahimi & Kann 2021 (ACL): continued MLM is the best of five; up to +17.69 POS accuracy and +6.29 NER F1 over XLM-R",),
        "abstract",
    ),
    Evidence(
        "modular", "the script is known and the result must stay modular: many tasks, many languages",
        "lt-sft", ("mad-x", "task adapter trained under several languages' adapters (TLR)", "bad-x for one fixed pair"),
        (
            "LT-SFT (Ansell et al. 2022, arXiv 2110.07560): better than adapters by a large margin on UD, MasakhaNER and AmericasNLI",
            "MAD-X (Pfeiffer et al. 2020, arXiv 2005.00052): largest gains for languages the base has not seen; swaps per batch",
            "BAD-X (Parović et al. 2022): better than MAD-X for a fixed pair of languages",
        ),
        "abstract",
    ),
    Evidence(
        "sources", "task labels exist in several languages",
        "one task module trained on all of them", ("the nearest source alone",),
        ("composable-sft, NusaX (12 languages): 73.9 from one source, 84.9 from several; bbc 38.7 to 75.8, bug 29.6 to 71.8",),
        "code",
    ),
    Evidence(
        "relatives", "related languages have modules, and there is no text to train one",
        "emea over 2 to 4 relatives", ("their fixed average", "the nearest language's module", "modules of the family tree"),
        ("EMEA (Wang et al. 2021): NER for mr / bn / ta: English adapter 47.4 / 55.0 / 32.3, average 54.0 / 61.4 / 34.9, EMEA (10 steps) 58.0 / 67.9 / 37.8",),
        "code",
    ),
    Evidence(
        "family", "related languages have modules, and there is a little text in each",
        "phylogeny (adapters of family, genus and language in sequence)", ("mean over the path of the tree", "mad-x"),
        ("Faisal & Anastasopoulos 2022: more than 20 % relative gain, most for unseen languages",),
        "abstract",
    ),
    Evidence(
        "typology", "nothing but the typology is known",
        "the nearest language's module", ("modules generated from typology (MAD-G, UDapter)",),
        (
            "MAD-G (Ansell et al. 2021): competitive, about 50 times fewer parameters",
            "UDapter (Üstün et al. 2020): typology is crucial for zero-shot parsing and hurts NER",
        ),
        "abstract",
    ),
    Evidence(
        "labels", "a few labels (up to 100) in the language itself",
        "the source's task module, tuned on them", ("fusion over source tasks", "a new row of a routing table (Polytropon)"),
        ("no published comparison that covers this: run them all",),
        "memory",
    ),
    Evidence(
        "headless", "the base has no language-model head",
        "align (the sentence vector of a parallel verse)", ("mlm with a head of its own, warmed up on seen languages",),
        ("Reimers & Gurevych 2020 (arXiv 2004.09813): sentence vectors carried to other languages by parallel text; MLM on such a base is a measured unknown",),
        "abstract",
    ),
)
BY_KEY = {row.key: row for row in TABLE}

CONFLICT = (
    "Ebrahimi & Kann (texts of the size of a New Testament) find full MLM best, LT-SFT and MAD-X (texts of the size of Wikipedia) find modules "
    "best: data size, capacity and protocol differ, so compare the arms on your text."
)
