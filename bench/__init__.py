"""Touchstone: scores generative image and video models the way the papers do, and says how sure it is.

Importing this package loads the standard library alone; heavier things are imported by what needs them.
"""

from bench.capabilities import (
    Answer,
    Autoencoder,
    ChatModel,
    ClassToImage,
    Completion,
    Condition,
    DenoiserAccess,
    Latents,
    PictureSet,
    TextToImage,
    VideoAutoencoder,
    VQAModel,
)
from bench.recipe import Recipe, TrainContext
from bench.suite import Context, Metric, Suite
from bench.types import (
    Data,
    Error,
    Estimate,
    Figure,
    Item,
    Media,
    Model,
    Record,
    Score,
    Table,
    Unit,
    UsageError,
    Weights,
)

_LAZY = {
    "LocalEngine": "bench.engine",
    "Store": "bench.store",
    "execute": "bench.execution",
    "load": "bench.report",
    "load_weights": "bench.weights",
    "check_folder": "bench.weights",
}

__all__ = [
    "Answer",
    "Autoencoder",
    "ChatModel",
    "ClassToImage",
    "Completion",
    "Condition",
    "Context",
    "Data",
    "DenoiserAccess",
    "Error",
    "Estimate",
    "Figure",
    "Item",
    "Latents",
    "Media",
    "Metric",
    "Model",
    "PictureSet",
    "Recipe",
    "Record",
    "Score",
    "Suite",
    "Table",
    "TextToImage",
    "TrainContext",
    "Unit",
    "UsageError",
    "VQAModel",
    "VideoAutoencoder",
    "Weights",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bench' has no attribute {name!r}")
