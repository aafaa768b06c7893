"""Recipes: the systems of the literature as stages of data: what trains, on which batches, over what, and what is checked frozen.

Names are templates: `{source}`, `{target}` and `{sources}` stand for languages (`{sources}`: one after the other).  The base is frozen in every stage but
those of method `full`, which trains a difference of all its parameters and leaves it as it was.  `runner.py` carries the stages out;
recipes with `ready_for` wait for parts that are built elsewhere, and are refused by name.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from intarsia._registry import Registry
from intarsia.errors import UsageError, listing

Kind = Literal["head", "vocabulary", "language", "task", "evaluate"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        kind: what is done: an LM head is warmed up, a vocabulary made, a language module trained, a task's module trained, or results are taken.
        module: the module that it makes; empty for `evaluate`.
        method: of that module, as `intarsia lang train --method` or `intarsia methods` call it.
        settings: of the method.
        objective: of a language stage.
        text: languages whose corpora are read; several are seen equally often.
        labels: languages whose labelled data are read.
        expression: what runs; empty for the module alone.
        cycle: expressions that take turns, step by step; empty for `expression` always.
        vocabulary: the vocabulary module that is trained along.
        head: the LM head, for bases without one.
        frozen: modules that are verified to stay as they are (the base always is).
        requires: modules without which the new one must not be used (they are written into it).
    """

    kind: Kind
    module: str = ""
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "mlm"
    text: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    expression: str = ""
    cycle: tuple[str, ...] = ()
    vocabulary: str = ""
    head: str = ""
    frozen: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def filled(self, names: Mapping[str, str]) -> Stage:
        """The stage with its templates filled in.

        Raises:
            UsageError: a name is lacking.
        """

        def one(text: str) -> str:
            lacks = [key for _, key, _, _ in string.Formatter().parse(text) if key and key not in names]
            if lacks:
                raise UsageError(f"stage {self.kind} {self.module!r}: {listing(f'{{{key}}}' for key in lacks)} stands for nothing; given: {listing(names)}")
            return text.format(**names)

        def many(texts: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(language for text in texts for language in one(text).split("+"))

        return Stage(
            self.kind, one(self.module), self.method, dict(self.settings), self.objective, many(self.text), many(self.labels), one(self.expression),
            tuple(map(one, self.cycle)), one(self.vocabulary), one(self.head), tuple(map(one, self.frozen)), tuple(map(one, self.requires)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LanguageRecipe:
    """A system.

    Attributes:
        name: of the literature.
        summary: one line.
        paper: whom it follows.
        stages: in order.
        ready_for: what it waits for, empty if it runs.
    """

    name: str
    summary: str
    paper: str
    stages: tuple[Stage, ...]
    ready_for: str = ""

    def filled(self, **names: str) -> tuple[Stage, ...]:
        """The stages with their templates filled in; `sources` as `eng+fra`."""
        return tuple(stage.filled(names) for stage in self.stages)


RECIPES: Registry[LanguageRecipe] = Registry("language recipe")


def _add(name: str, summary: str, paper: str, *stages: Stage, ready_for: str = "") -> None:
    RECIPES.add(name, LanguageRecipe(name, summary, paper, stages, ready_for))


def _language(which: str, method: str, settings: Mapping[str, Any] | None = None, **more: Any) -> Stage:
    return Stage("language", f"lang-{which}", method, settings or {}, text=(which,), **more)


def _evaluate(*expressions: str, labels: tuple[str, ...] = ("{target}",)) -> tuple[Stage, ...]:
    return tuple(Stage("evaluate", expression=expression, labels=labels) for expression in expressions)


_MADX2 = {"layers": ":-1"}
_TASK = {"reduction": 16.0}

_add(
    "task-only", "a task's module, used as it is in the other language: the baseline of all", "",
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",)),
    *_evaluate("task"),
)  # fmt: skip
_add(
    "mad-x", "language and invertible adapters by MLM, a task adapter on top of the source's, languages swapped", "Pfeiffer et al. 2020, arXiv 2005.00052",
    _language("{source}", "mad-x"), _language("{target}", "mad-x"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "mad-x-2", "MAD-X without the last layer", "Pfeiffer et al. 2021, arXiv 2012.15562",
    _language("{source}", "mad-x", _MADX2), _language("{target}", "mad-x", _MADX2),
    Stage("task", "task", "pfeiffer", {**_TASK, **_MADX2}, labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "mad-x-no-inv", "MAD-X without invertible adapters", "Pfeiffer et al. 2020, arXiv 2005.00052, ablation",
    _language("{source}", "mad-x", {"invertible": False}), _language("{target}", "mad-x", {"invertible": False}),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "bad-x", "one adapter for a pair of languages, both seen equally often; no swap", "Parović et al. 2022, NAACL",
    Stage("language", "lang-{source}-{target}", "mad-x", _MADX2, text=("{source}", "{target}")),
    Stage("task", "task-{source}-{target}", "pfeiffer", {**_TASK, **_MADX2}, labels=("{source}",), expression="lang-{source}-{target} >> task-{source}-{target}",
          frozen=("lang-{source}-{target}",), requires=("lang-{source}-{target}",)),
    *_evaluate("lang-{source}-{target} >> task-{source}-{target}", labels=("{target}", "{source}")),
)  # fmt: skip
_add(
    "tlr", "a task adapter trained under the source's and the target's language adapters in turn", "Parović et al. 2023, ACL",
    _language("{source}", "mad-x", _MADX2), _language("{target}", "mad-x", _MADX2),
    Stage("task", "task", "pfeiffer", {**_TASK, **_MADX2}, labels=("{source}",), cycle=("lang-{source} >> task", "lang-{target} >> task"),
          frozen=("lang-{source}", "lang-{target}")),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "lt-sft", "sparse differences for language and task, which add up", "Ansell et al. 2022, arXiv 2110.07560",
    _language("{source}", "lt-sft"), _language("{target}", "lt-sft"),
    Stage("task", "task", "lt-sft", labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "lt-sft-multi", "LT-SFT with one task module for the labels of several languages", "Ansell et al. 2023, EACL",
    _language("{target}", "lt-sft"),
    Stage("task", "task", "lt-sft", labels=("{sources}",)),
    *_evaluate("lang-{target} >> task", "task"),
)  # fmt: skip
_add(
    "lora-mlm", "a low-rank language module by MLM, a task module beside it", "Hu et al. 2021, arXiv 2106.09685",
    _language("{target}", "lora"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",)),
    *_evaluate("lang-{target} >> task", "task"),
)  # fmt: skip
_add(
    "full-mlm", "continued MLM on all parameters, then the task", "Ebrahimi & Kann 2021, ACL (+MLM)",
    _language("{target}", "full"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{target} >> task", frozen=("lang-{target}",)),
    *_evaluate("lang-{target} >> task", labels=("{target}", "{source}")),
)  # fmt: skip
_add(
    "tlm", "translation language modelling on parallel verses, all parameters", "Ebrahimi & Kann 2021, ACL (+TLM)",
    _language("{target}", "full", objective="tlm"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{target} >> task", frozen=("lang-{target}",)),
    *_evaluate("lang-{target} >> task", labels=("{target}", "{source}")),
)  # fmt: skip
_add(
    "extend", "whole words of the language appended to the vocabulary, a low-rank module beside them (the paper trains all parameters)",
    "after Ebrahimi & Kann 2021, ACL (+Extend)",
    Stage("vocabulary", "vocab-{target}", settings={"mode": "append", "init": "mean"}, text=("{target}",)),
    _language("{target}", "lora", vocabulary="vocab-{target}"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "unks", "a vocabulary of the language's own with copied rows, trained with its language adapter; the task keeps the base's", "Pfeiffer et al. 2021, arXiv 2012.15562 (EL-LEX)",
    Stage("vocabulary", "vocab-{target}", settings={"mode": "replace", "init": "lex"}, text=("{target}",)),
    _language("{source}", "mad-x"), _language("{target}", "mad-x", vocabulary="vocab-{target}"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "unks-mf", "the same with codes over the base's factorised embeddings", "Pfeiffer et al. 2021, arXiv 2012.15562 (MF)",
    Stage("vocabulary", "vocab-{target}", settings={"mode": "replace", "init": "mf"}, text=("{target}",)),
    _language("{source}", "mad-x"), _language("{target}", "mad-x", vocabulary="vocab-{target}"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    *_evaluate("lang-{target} >> task"),
)  # fmt: skip
_add(
    "align", "the target's sentences get the vectors of their translations", "Reimers & Gurevych 2020, arXiv 2004.09813",
    _language("{target}", "lora", objective="align"),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",)),
    *_evaluate("lang-{target} >> task", "task"),
)  # fmt: skip
_add(
    "head-mlm", "a base without an LM head: one is warmed up on seen languages, then the language module under it", "measured here, not published",
    Stage("head", "lm-head", text=("{sources}",)),
    _language("{target}", "mad-x", head="lm-head", frozen=("lm-head",)),
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",)),
    *_evaluate("lang-{target} >> task", "task"),
)  # fmt: skip
_add(
    "nearest", "the module of the nearest language that has one (mandatory baseline where only typology is known)", "",
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",)),
    *_evaluate("lang-{near} >> task"),
)  # fmt: skip
_add(
    "emea", "a mixture of relatives' modules, weighted at test time by the entropy of the answers", "Wang et al. 2021, Findings of EMNLP",
    Stage("task", "task", "pfeiffer", _TASK, labels=("{source}",), expression="lang-{source} >> task", frozen=("lang-{source}",)),
    ready_for="the test-time router over {relatives}",
)  # fmt: skip
_add(
    "phylogeny", "adapters of family, genus and language in sequence, trained together", "Faisal & Anastasopoulos 2022, AACL",
    Stage("language", "lang-{target}", "mad-x", text=("{sources}", "{target}"), expression="family >> genus >> lang-{target}"),
    ready_for="a trainer that trains several modules of an expression, one path of the tree per batch",
)  # fmt: skip
_add(
    "hierarchical-domains", "the mean over a path of domain modules", "Chronopoulou et al. 2022, NAACL",
    Stage("language", "domain", "pfeiffer", text=("{sources}",)),
    ready_for="a trainer that trains several modules of an expression, one path of the tree per batch",
)  # fmt: skip
_add(
    "generated", "modules generated from typology (MAD-G, UDapter)", "Ansell et al. 2021, Findings of EMNLP; Üstün et al. 2020, EMNLP",
    Stage("language", "lang-{target}", "mad-x"),
    ready_for="a generator of modules from typology vectors",
)  # fmt: skip
