"""Ways to the input size of a feature network; each is part of a protocol, as swapping two moves a Fréchet distance.

Pictures are float32 [B, 3, H, W] in levels 0..255, and so is what comes back, of the `size` (height, width) in px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from bench.types import Error, UsageError

Size = tuple[int, int]  # height, width
CROPS = ("none", "centre")


def resize_clean(images: Any, size: Size) -> Any:
    """PIL's antialiased bicubic on float channels, clipped to 0..255, as clean-fid does (Parmar et al. 2022)."""
    return resize_bicubic(images, size).clamp(0.0, 255.0)


def resize_bicubic(images: Any, size: Size) -> Any:
    """Antialiased bicubic (a = -0.5) in float, overshoot kept: what jax.image.resize does, and so CMMD's authors."""
    return _weighed(images, size, "bicubic")


def resize_tf1(images: Any, size: Size) -> Any:
    """TensorFlow 1's bilinear, which samples at i * in / out without half-pixel centres (torch-fidelity)."""
    return _weighed(images, size, "tf1")


def _weighed(images: Any, size: Size, how: str) -> Any:
    """Both axes by products with a band matrix, of which only the bands are multiplied."""
    import torch

    def bands(count: int, wanted: int) -> Iterator[tuple[slice, Any]]:
        for columns, weights in _bands(count, wanted, how):
            yield columns, torch.from_numpy(weights).to(images.device)

    down = [weights @ images[..., rows, :] for rows, weights in bands(images.shape[-2], size[0])]
    x = torch.cat(down, -2)
    return torch.cat([x[..., columns] @ weights.T for columns, weights in bands(images.shape[-1], size[1])], -1)


def resize_pytorch(images: Any, size: Size) -> Any:
    """torch's bilinear, half-pixel centres, no antialiasing (pytorch-fid)."""
    import torch

    return torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)


def resize_tm(images: Any, size: Size) -> Any:
    """torch's bilinear with antialiasing, the default of torchmetrics' FID."""
    import torch

    return torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def resize_pil(images: Any, size: Size) -> Any:
    """PIL's bicubic on 8-bit pictures, rounded between its two passes (torchvision's Resize of a PIL image: CLIP,
    dgm-eval). Raises Error where the levels are not whole."""
    import torch
    from PIL import Image

    levels = images.to("cpu", torch.uint8)
    if not torch.equal(levels.float(), images.cpu()):
        raise Error("resize pil is for 8-bit pictures", hint="quantise them first, or take resize clean")
    height, width = size
    resized = [
        np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC))
        for one in levels
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().to(images.device)


RESIZES: Mapping[str, Callable[[Any, Size], Any]] = {
    "clean": resize_clean,
    "bicubic": resize_bicubic,
    "tf1": resize_tf1,
    "pytorch": resize_pytorch,
    "tm": resize_tm,
    "pil": resize_pil,
}


def resized(images: Any, how: str, size: int, crop: str = "none") -> Any:
    """float32 [B, 3, size, size] by a way of RESIZES; crop `none` squashes, `centre` resizes the short side and cuts.

    The long side and the cut are rounded as torchvision's Resize and CenterCrop do. A video [B, 3, T, H, W] is resized
    frame by frame. Raises UsageError for names that are not known.
    """
    if how not in RESIZES:
        raise UsageError(f"resize {how!r} is not one of {', '.join(RESIZES)}")
    if crop not in CROPS:
        raise UsageError(f"crop {crop!r} is not one of {', '.join(CROPS)}")
    if images.dim() == 5:
        batch, channels, frames, height, width = images.shape
        flat = images.transpose(1, 2).reshape(batch * frames, channels, height, width)
        found = resized(flat, how, size, crop)
        return found.reshape(batch, frames, channels, size, size).transpose(1, 2)
    height, width = images.shape[-2:]
    if crop == "none" or height == width:
        return RESIZES[how](images, (size, size))
    short = min(height, width)
    grown = (int(size * height / short), int(size * width / short))
    found = RESIZES[how](images, grown)
    top, left = (round((side - size) / 2) for side in grown)
    return found[..., top : top + size, left : left + size]


@cache
def _bands(count: int, size: int, how: str) -> list[tuple[slice, np.ndarray]]:
    """A matrix in bands of 32 output samples: the input samples that a band takes of, and its weights of those."""
    matrix = _bicubic(count, size) if how == "bicubic" else _tf1(count, size)
    found = []
    for start in range(0, size, 32):
        band = matrix[start : start + 32]
        (taken,) = np.nonzero(band.any(0))
        columns = slice(int(taken[0]), int(taken[-1]) + 1)
        found.append((columns, np.ascontiguousarray(band[:, columns])))
    return found


def _tf1(count: int, size: int) -> np.ndarray:
    """float32 [size, count]: two neighbours by their distance; the last sample has no right one."""
    place = np.arange(size, dtype=np.float32) * np.float32(count / size)
    low = np.floor(place).astype(int)
    share = place - low.astype(np.float32)
    matrix = np.zeros((size, count), np.float32)
    rows = np.arange(size)
    matrix[rows, low] += 1 - share
    matrix[rows, np.minimum(low + 1, count - 1)] += share
    return matrix


def _bicubic(count: int, size: int) -> np.ndarray:
    """float32 [size, count]: what each output sample takes of each input sample (PIL's Resample.c; a = -0.5)."""
    scale = count / size
    stretch = max(scale, 1.0)
    matrix = np.zeros((size, count))
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2.0 * stretch + 0.5), 0)
        last = min(int(centre + 2.0 * stretch + 0.5), count)
        x = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
        matrix[i, first:last] = weights / weights.sum()
    return matrix.astype(np.float32)
