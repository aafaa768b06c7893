"""A recipe is validated where it is made, and storable."""

from __future__ import annotations

import math
from typing import Any

import pytest

from intarsia._codec import decode, encode
from intarsia.errors import UsageError
from intarsia.train import Recipe


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("batch_size", (0, -1, 1.5, "16", True, None)),
        ("accumulation", (0, 17)),
        ("epochs", (0, -1.0, math.nan, math.inf, "3")),
        ("max_steps", (0,)),
        ("learning_rate", (0.0, -1e-3, math.inf)),
        ("head_learning_rate", (0,)),
        ("weight_decay", (-0.1,)),
        ("warmup", (1.0, -0.1)),
        ("clip", (0.0,)),
        ("seed", (-1, 2**63)),
        ("patience", (0,)),
        ("keep", (0,)),
        ("schedule", ("lin", None)),
        ("precision", ("fp16",)),
        ("optimiser", ("adam",)),
        ("select_best", (1, "true")),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=rf"recipe: .*{field}"):
            Recipe(**{field: value})


def test_checkpointing_needs_training_mode() -> None:
    with pytest.raises(UsageError, match="gradient_checkpointing needs base_dropout"):
        Recipe(gradient_checkpointing=True, base_dropout=False)


def test_a_recipe_is_stored_and_comes_back() -> None:
    recipe = Recipe(epochs=3, learning_rate=1e-4, max_steps=10, schedule="cosine")
    assert decode(encode(recipe), Recipe) == recipe
    assert encode(Recipe()) == {"type": "recipe"}
    assert Recipe(**recipe.values()) == recipe
