"""A plain function as a model: `draw(prompts, seeds)` in a file of one's own is a TextToImage as it stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bench.types import Error

if TYPE_CHECKING:
    from torch import Tensor


def draws(found: Any) -> bool:
    """Is it a function of prompts and seeds, and of nothing else that must be given?"""
    if not inspect.isfunction(found):
        return False
    parameters = list(inspect.signature(found).parameters.values())
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return required == ["prompts", "seeds"]


def model_of(function: Callable[..., Any]) -> type:
    """A class whose `generate` calls the function.

    The function gets lists of B prompts and B seeds. It returns a tensor [B, 3, H, W], float in [0, 1] or uint8, or a
    list of B PIL images of one size.
    """

    class Drawing:
        def __init__(self, *, device: str = "cpu"):
            self.device = device

        def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            """float32 [B, 3, H, W] in [0, 1]."""
            pictures = function(list(prompts), list(seeds))
            return _as_float(pictures, function.__name__, len(prompts)).to(self.device)

    Drawing.__name__ = Drawing.__qualname__ = function.__name__
    Drawing.__doc__ = function.__doc__
    return Drawing


def _as_float(pictures: Any, name: str, n: int) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(pictures, list | tuple) and pictures and all(isinstance(p, Image.Image) for p in pictures):
        if len({p.size for p in pictures}) > 1:
            raise Error(f"{name} returned pictures of several sizes", hint="one size in a batch; resize them")
        stack = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
        pictures = torch.from_numpy(stack).permute(0, 3, 1, 2)
    if not isinstance(pictures, torch.Tensor) or pictures.dim() != 4 or pictures.shape[1] != 3:
        shape = f" of shape {list(pictures.shape)}" if hasattr(pictures, "shape") else ""
        raise Error(
            f"{name} returned {type(pictures).__name__}{shape}",
            hint="return a tensor [B, 3, H, W], float in [0, 1] or uint8, or a list of PIL images",
        )
    if len(pictures) != n:
        raise Error(f"{name} returned {len(pictures)} pictures for {n} prompts")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    return pictures.float()
