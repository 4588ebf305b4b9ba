"""Pictures on their way to and from a model: batches of a manifest, their extremes, and PNG for those that are kept."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.types import Error

if TYPE_CHECKING:
    import numpy as np
    import torch


def batch_of(source: Any, ids: Sequence[str], size: int, resize: str, device: Any) -> torch.Tensor:
    """float32 [B, 3, size, size] in [-1, 1] on the device; an Error names the item whose picture cannot be read.

    `source.read(id)` gives a picture: a manifest, or the worker.
    """
    import numpy as np
    import torch

    from bench.images import RESIZES

    if resize not in RESIZES:
        raise Error(f"unknown resize {resize!r}", hint=f"one of {', '.join(RESIZES)}")
    found = []
    for id in ids:
        try:
            found.append(RESIZES[resize](source.read(id), size))
        except Error as e:
            raise Error(f"item {id}: {e}", hint=e.hint) from None
    x = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).to(device)
    return x.contiguous().float().div_(127.5).sub_(1.0)


def extremes(media: Any) -> tuple[list[float], list[float]]:
    """Lowest and highest value of each entry of [B, ...]; NaN where an entry holds one."""
    flat = media.reshape(len(media), -1)
    if hasattr(flat, "aminmax"):
        low, high = flat.aminmax(dim=1)
        return low.tolist(), high.tolist()
    return flat.min(axis=1).tolist(), flat.max(axis=1).tolist()


def rgb(picture: Any) -> np.ndarray:
    """uint8 [H, W, 3] of a picture as models are given it: uint8 [3, H, W], or float in [0, 1], rounded half up.

    Raises Error for another shape, and for NaN and infinity.
    """
    import numpy as np

    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    if array.ndim != 3 or array.shape[0] != 3 or 0 in array.shape:
        raise Error(f"a picture is {list(array.shape)}, not [3, height, width]")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise Error("a picture holds NaN or infinity", hint="look at the model's output before it is asked about")
        array = np.floor(np.clip(array.astype(np.float64), 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def encode(picture: Any, value_range: tuple[float, float]) -> tuple[bytes, str]:
    """A kept picture as PNG (uint8, or float rounded half up from `value_range`); anything else as npy."""
    import numpy as np

    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    if array.ndim == 3 and array.shape[0] in (1, 3):
        if array.dtype != np.uint8:
            low, high = value_range
            array = np.floor(np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) * 255 + 0.5).astype(
                np.uint8
            )
        from PIL import Image

        out = io.BytesIO()
        image = array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0))
        Image.fromarray(image).save(out, "PNG", compress_level=1)
        return out.getvalue(), ".png"
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue(), ".npy"
