"""Conditioning of diffusion transformers: control schedules, size encoding, padding, guidance, change of resolution.

Building blocks of arXiv 2411.03177, whose code was not released: exponents and noise scales are tunables here, not
reproductions. Arrays are NumPy or torch alike where only arithmetic is done; nothing here has a global state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POWERS = (0.5, 1.0, 2.0, 4.0, 8.0)  # swept for each kind of control; 4 is MDTv2's for guidance
FREQUENCIES = 16  # of the size encoding, for each of its seven numbers
LARGEST = 4096.0  # px; sizes are divided by it
PADDING_NOISE = 0.02  # of the real tokens' deviation, in each channel


def control_strength(time: Any, power: float = 1.0) -> Any:
    """gamma(t) = (1 - cos(pi (1 - t)^power)) / 2, with t = 1 noise and t = 0 data: 0 at noise, 1 at data."""
    return 0.5 * (1 - np.cos(np.pi * (1 - np.asarray(time, np.float64)) ** power))


def size_features(
    original: tuple[float, float], crop: tuple[float, float], target: tuple[float, float], flip: bool = False
) -> np.ndarray:
    """Fourier features float64 [7 * 2 * 16] of (height, width), (top, left), (height, width) in pixels, and flip.

    sin and cos of pi 2^k v, k < 16, v = pixels / 4096 or the flip. Project them with `zero_projection`, and replace
    them by a learned null in a tenth of the samples.
    """
    values = np.array([*original, *crop, *target], np.float64) / LARGEST
    values = np.append(values, float(flip))
    angle = np.pi * values[:, None] * 2.0 ** np.arange(FREQUENCIES)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).ravel()


def zero_projection(features: int, width: int) -> Any:
    """A linear layer whose weights and biases are 0: a new control changes nothing before it is trained."""
    from torch import nn

    layer = nn.Linear(features, width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def replicate_padding(tokens: Any, length: int, rng: np.random.Generator, noise: float = PADDING_NOISE) -> np.ndarray:
    """Tokens [n, d] repeated cyclically to [length, d]; the copies carry normal noise, `noise` x each channel's sd.

    `noise` 0 is plain replication. Raises ValueError without tokens or with more than `length`.
    """
    x = np.asarray(tokens, np.float64)
    if not 0 < len(x) <= length:
        raise ValueError(f"{len(x)} tokens cannot be padded to {length}")
    found = x[np.arange(length) % len(x)]
    found[len(x) :] += noise * x.std(0) * rng.standard_normal((length - len(x), x.shape[1]))
    return found


def two_way_guidance(empty: Any, semantic: Any, full: Any, of_semantics: float, of_control: float) -> Any:
    """v(0,0) + w_s [v(c,0) - v(0,0)] + w_k [v(c,k) - v(c,0)]: class or text, and control, each with its strength."""
    return empty + of_semantics * (semantic - empty) + of_control * (full - semantic)


def shifted_time(time: Any, tokens: int, base: int) -> Any:
    """t' = s t / (1 + (s - 1) t), s = sqrt(tokens / base): more noise for more tokens (Esser et al. 2024, eq. 23)."""
    s = math.sqrt(tokens / base)
    return s * time / (1 + (s - 1) * time)


def shifted_log_snr(log_snr: Any, side: int, base: int) -> Any:
    """For schedules that preserve variance: ln SNR + 2 ln(base / side) (Hoogeboom et al. 2023, section 3.1)."""
    return log_snr + 2 * math.log(base / side)


def rescaled_positions(side: int, base: int) -> np.ndarray:
    """Positions [side] for rotary embeddings that span the range seen at `base`: centres of side cells on [0, base)."""
    return (np.arange(side) + 0.5) * base / side - 0.5


def resized_table(table: Any, side: int) -> np.ndarray:
    """A learned positional table [base, base, d] brought to [side, side, d] by bicubic interpolation (torch's)."""
    import torch

    x = torch.as_tensor(np.asarray(table, np.float64)).permute(2, 0, 1)[None]
    found = torch.nn.functional.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
    return found[0].permute(1, 2, 0).numpy()


# -- ablations


@dataclass(frozen=True)
class Cell:
    """One configuration's metric over seeds: mean, its 95 % t interval, and the difference to the first cell.

    The difference pairs equal seeds: what they share cancels.
    """

    name: Hashable
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


def ablate(cells: Iterable[Hashable], seeds: Sequence[int], measure: Callable[[Any, int], float]) -> list[Cell]:
    """`measure(cell, seed)` for every cell and seed; the first cell is the one that others are compared with.

    Raises ValueError for fewer than three seeds, and for a metric that is not finite, naming the cell and the seed.
    """
    if len(set(seeds)) < 3:
        raise ValueError(f"{len(set(seeds))} seeds: an ablation needs three or more")
    found, base = [], None
    for cell in cells:
        values = np.array([float(measure(cell, seed)) for seed in seeds])
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{cell} gave {values[bad[0]]} with seed {seeds[bad[0]]}")
        base = values if base is None else base
        found.append(Cell(cell, tuple(values.tolist()), *_interval(values), *_interval(values - base)))
    return found


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    from scipy.special import stdtrit

    mean = float(values.mean())
    half = float(stdtrit(len(values) - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half
