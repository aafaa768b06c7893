"""Training on the Hugging Face Trainer: recipes, checkpoints, exact resume, configuration files.

Names are imported when they are asked for: reading a configuration needs no torch, describing a task no Trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intarsia.train.config import EvalConfig, PredictConfig, TrainConfig, load_config, save_config, schema
    from intarsia.train.loop import Result, train
    from intarsia.train.progress import Progress, reporter
    from intarsia.train.recipe import Recipe
    from intarsia.train.signals import Interrupted
    from intarsia.train.task import Prediction, Task

__all__ = [
    "EvalConfig",
    "Interrupted",
    "PredictConfig",
    "Prediction",
    "Progress",
    "Recipe",
    "Result",
    "Task",
    "TrainConfig",
    "load_config",
    "reporter",
    "save_config",
    "schema",
    "train",
]

_LATER = {
    "config": ("EvalConfig", "PredictConfig", "TrainConfig", "load_config", "save_config", "schema"),
    "loop": ("Result", "train"),
    "progress": ("Progress", "reporter"),
    "recipe": ("Recipe",),
    "signals": ("Interrupted",),
    "task": ("Prediction", "Task"),
}
_WHERE = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"intarsia.train.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
