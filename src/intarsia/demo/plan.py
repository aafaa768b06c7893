"""`Plan`: what the demo does, as data.  The command runs `PLAN`; tests run a smaller one on a tiny base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from intarsia.train import Recipe

#: folder of the bundled data -> name for people
LANGUAGES: Mapping[str, str] = {
    "eng_Latn": "English",
    "deu_Latn": "German",
    "swh_Latn": "Swahili",
    "amh_Ethi": "Amharic",
    "kab_Latn": "Kabyle",
    "quy_Latn": "Quechua",
}
#: languages that were not among those the base's vocabulary was made for
UNSEEN = ("kab_Latn", "quy_Latn")
#: the demo trains in this language
SOURCE = "eng_Latn"

#: short enough for two cores: one and a half passes, one look at the dev set, the frozen base without dropout
RECIPE = Recipe(epochs=1.5, base_dropout=False, calibration_rows=128, eval_every=100_000, eval_batch_size=32)


@dataclass(frozen=True)
class Plan:
    """What the demo does.

    Attributes:
        base: embedded name or folder of the base.
        methods: name of a method -> its settings; a module of each is trained and gets the method's name.
        pair: the two of them that are laid together.
        recipe: hyper-parameters of every training.
        max_length: pieces per row.
        rows: rows of each file; None for all.
    """

    base: str = "me5-small"
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"head": {}, "bitfit": {}, "lora": {}, "pfeiffer": {}})
    pair: tuple[str, str] = ("lora", "pfeiffer")
    recipe: Recipe = RECIPE
    max_length: int = 96
    rows: int | None = None

    @property
    def compositions(self) -> dict[str, tuple[str, str | None]]:
        """The ways in which the pair is laid together: name -> (expression, whose head answers; None averages them)."""
        a, b = self.pair
        return {"stack": (f"{a} >> {b}", b), "average": (f"0.5*{a} + 0.5*{b}", None)}


PLAN = Plan()
