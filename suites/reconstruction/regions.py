"""Where in the picture an error sits: edges, flat areas, dark and bright ones. NumPy alone.

The masks come from the 8-bit luma of the original, in integers, so they are the same on every machine.
"""

from __future__ import annotations

import numpy as np

REGIONS = ("edge", "flat", "dark", "bright")
MIN_PIXELS = 256  # a region smaller than this is not measured


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] -> int32 [H, W]: ITU-R BT.601 luma, rounded, 0..255."""
    red, green, blue = image.astype(np.int32)
    return (299 * red + 587 * green + 114 * blue + 500) // 1000


def edge_mask(luma: np.ndarray) -> np.ndarray:
    """bool [H, W]: the 10 % of the pixels with the largest Sobel gradient, ties included; none where there is none."""
    padded = np.pad(luma, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    gradient = (rows[:, 2:] - rows[:, :-2]) ** 2 + (columns[2:] - columns[:-2]) ** 2
    return gradient >= max(_nth_smallest(gradient, 0.9), 1)


def flat_mask(luma: np.ndarray) -> np.ndarray:
    """bool [H, W]: the 30 % of the pixels with the smallest variance of the 7 x 7 px around them, ties included."""
    padded = np.pad(luma, 3, mode="reflect")
    total, squares = _box7(padded), _box7(padded * padded)
    variance = 49 * squares - total * total  # times 49^2; below 2^31
    return variance <= _nth_smallest(variance, 0.3, below=True)


def dark_mask(luma: np.ndarray) -> np.ndarray:
    """bool [H, W]: luma below 32."""
    return luma < 32


def bright_mask(luma: np.ndarray) -> np.ndarray:
    """bool [H, W]: luma above 224."""
    return luma > 224


def masks(image: np.ndarray) -> dict[str, np.ndarray]:
    """The mask of every region of `REGIONS` for an original, uint8 [3, H, W] with sides of at least 7 px."""
    y = luma(image)
    return {"edge": edge_mask(y), "flat": flat_mask(y), "dark": dark_mask(y), "bright": bright_mask(y)}


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float | None:
    """The mean of [H, W] where the mask holds; None where it holds for fewer than `MIN_PIXELS` pixels."""
    count = np.count_nonzero(mask)
    return float(np.vdot(values, mask) / count) if count >= MIN_PIXELS else None


def squared_error(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """uint8 [3, H, W] twice -> float64 [H, W]: the mean over the channels of (y - x)^2."""
    error = y.astype(np.int32) - x
    return np.einsum("chw,chw->hw", error, error) / len(error)


def masked_psnr(x: np.ndarray, y: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, float | None]:
    """PSNR in dB of each region, uint8 [3, H, W] twice; None where the region is too small or has no error."""
    error = squared_error(x, y)
    found = {name: masked_mean(error, mask) for name, mask in masks.items()}
    return {name: float(10 * np.log10(255**2 / mse)) if mse else None for name, mse in found.items()}


def masked_ssim(values: np.ndarray, offset: int, masks: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Mean per region of an SSIM map [3, h, w] whose corner lies `offset` px inside; None where it is too small."""
    height, width = values.shape[1:]
    inside = np.s_[offset : offset + height, offset : offset + width]
    values = values.mean(axis=0)
    return {name: masked_mean(values, mask[inside]) for name, mask in masks.items()}


def _box7(padded: np.ndarray) -> np.ndarray:
    """Sums over 7 x 7 windows of an int32 array: [H + 6, W + 6] -> [H, W]."""
    for _ in range(2):  # 7 = 4 + 2 + 1, along one axis and then the other
        two = padded[:-1] + padded[1:]
        padded = (two[:-5] + two[2:-3] + two[4:-1] + padded[6:]).T
    return padded


def _nth_smallest(values: np.ndarray, share: float, below: bool = False) -> int:
    """The smallest value of the upper (1 - share), or the largest of the lower share where `below` is set."""
    index = round(share * values.size) - below
    return int(np.partition(values, index, axis=None)[index])
