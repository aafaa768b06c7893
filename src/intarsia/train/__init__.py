"""Training on the Hugging Face Trainer: recipes, checkpoints, exact resume, configuration files.

Names are imported when they are asked for: reading a configuration needs no torch, describing a task no Trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Recipe": "recipe",
    "train": "loop",
    "Result": "loop",
    "Interrupted": "signals",
    "Progress": "progress",
    "reporter": "progress",
    "TrainConfig": "config",
    "EvalConfig": "config",
    "PredictConfig": "config",
    "load_config": "config",
    "save_config": "config",
    "schema": "config",
    "Task": "task",
    "Prediction": "task",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"intarsia.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'intarsia.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
