"""PSNR on the pictures as they would be saved: 8-bit, exact integer sums, one number per picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.types import BadOutput, Error, Estimate, NonFinite, Table, UsageError

QUANTISE = ("round", "trunc", "vavae", "none")
RUN = 256  # squares of 8-bit differences per float32 sum: 256 x 255^2 < 2^24, so that no order of adding rounds
PIECE = 256 * RUN
FAR_OUT = 8.0  # floats this many times as far from mid grey as white are no overshoot of a decoder; levels 0..255 are


def quantise(x: Any, mode: str = "round", value_range: tuple[float, float] = (-1.0, 1.0)) -> Any:
    """uint8 [B, 3, H, W] of float pictures in `value_range`; torch in, torch out, NumPy in, NumPy out.

    `round` rounds half up: floor(clamp((v + 1) * 127.5, 0, 255) + 0.5), the canonical form; `trunc` drops the fraction;
    `vavae` truncates clamp(127.5 v + 128) as LightningDiT's evaluate_tokenizer.py does; `none` leaves floats alone.
    8-bit pictures pass unchanged. Raises BadOutput where a value is not finite or its scale must be another.
    """
    import torch

    if mode not in QUANTISE:
        raise UsageError(f"quantise {mode!r} is not one of {', '.join(QUANTISE)}")
    if isinstance(x, np.ndarray):
        return quantise(torch.from_numpy(np.ascontiguousarray(x)), mode, value_range).numpy()
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise BadOutput(
            f"pictures of type {x.dtype} are neither uint8 nor float", hint="convert them to uint8 [B, 3, H, W]"
        )
    low, high = value_range
    if x.numel():
        least, most = (float(bound) for bound in x.aminmax())
        if not np.isfinite([least, most]).all():
            raise NonFinite("a picture holds NaN or infinity", hint="look at the model's output before it is scored")
        middle = (low + high) / 2
        if max(middle - least, most - middle) > FAR_OUT * (high - middle):
            message = f"float pictures must lie in [{low:g}, {high:g}]; these reach from {least:g} to {most:g}"
            raise BadOutput(message, hint="levels 0..255 belong in uint8")
    if mode == "none":
        return x
    levels = (x if x.dtype == torch.float64 else x.float()) - low
    levels.mul_(255.0 / (high - low))
    if mode == "vavae":
        levels.add_(0.5)
    levels.clamp_(0.0, 255.0)
    if mode == "round":
        levels.add_(0.5)
    return levels.to(torch.uint8)  # drops the fraction


def mse(x: Any, y: Any) -> np.ndarray:
    """Mean squared difference of each pair, float64 [B]; x, y of one shape [B, ...], both uint8 or both float.

    8-bit pictures give the exact integer sum divided once; floats are subtracted in float64. Units: levels squared.
    """
    import torch

    x, y = _tensor(x), _tensor(y)
    same_shape(x, y)
    if x.dtype == y.dtype == torch.uint8 and x.device.type == "cpu":
        total = np.array([_squares(a, b) for a, b in zip(_rows(x), _rows(y), strict=True)], dtype=np.float64)
    else:
        wide = torch.int32 if x.dtype == y.dtype == torch.uint8 else torch.float64
        difference = x.to(wide) - y.to(wide)
        total = (difference * difference).flatten(1).sum(1).cpu().numpy()  # of int32 an int64
    return total.astype(np.float64) / max(1, x[0].numel() if len(x) else 1)


def _rows(pictures: Any) -> np.ndarray:
    return pictures.reshape(len(pictures), -1).numpy() if len(pictures) else np.empty((0, 0), dtype=np.uint8)


def _squares(a: np.ndarray, b: np.ndarray) -> float:
    """The exact sum of (a - b)^2 of two flat uint8 arrays, in pieces that stay in the cache."""
    total = 0.0
    for start in range(0, len(a), PIECE):
        one, other = a[start : start + PIECE], b[start : start + PIECE]
        difference = (np.maximum(one, other) - np.minimum(one, other)).astype(np.float32)
        whole = len(difference) // RUN * RUN
        runs = difference[:whole].reshape(-1, RUN)
        rest = difference[whole:]
        total += float(np.vecdot(runs, runs).sum(dtype=np.float64)) + float(np.vecdot(rest, rest))
    return total


def psnr(x: Any, y: Any, data_range: float | None = None) -> np.ndarray:
    """10 log10(range^2 / mse) in dB of each pair, float64 [B]; identical pictures give inf.

    x, y of one shape [B, ...]; `data_range` is 255 for uint8 and must be given for floats (2 for [-1, 1]).
    """
    if data_range is None:
        if not (str(x.dtype).endswith("uint8") and str(y.dtype).endswith("uint8")):
            raise UsageError("psnr of floats needs a data_range", hint="2.0 for pictures in [-1, 1], 1.0 for [0, 1]")
        data_range = 255.0
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / mse(x, y))


def same_shape(x: Any, y: Any) -> None:
    """Raises Error unless two batches of pictures have one shape."""
    if tuple(x.shape) != tuple(y.shape):
        raise Error(f"pictures to compare differ in shape: {list(x.shape)} and {list(y.shape)}")


def null_where_not_finite(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """A column for the rows: no infinity and no NaN is ever stored."""
    return [float(v) if np.isfinite(v) else None for v in values]


def withheld(name: str, n: int, reason: str) -> dict[str, list[str | None]]:
    """Columns of a value that a rule makes null, with the reason beside it."""
    return {name: [None] * n, f"{name}-withheld": [reason] * n}


def mean_of_rows(table: Table, column: str, withheld: int = 0, reason: str = "") -> Estimate:
    """Mean of a column's non-null rows with a clustered interval.

    Nulls that a rule made have their reason in the column `<column>-withheld`; or `withheld` counts them and `reason`
    says why. It becomes the note, but only where every null is explained, as a note says that nothing is missing.
    """
    from bench import stats

    found = stats.mean(table.values(column), clusters=table.clusters(), seed=table.seed)
    reasons = Counter(r for r in table.column(f"{column}-withheld") if r)
    withheld += reasons.total()
    if found.n + withheld != table.expected:
        return replace(found, note="")
    notes = [found.note, reason if withheld else "", *(f"{n} {r}" for r, n in reasons.items())]
    return replace(found, note="; ".join(n for n in notes if n))


def _tensor(x: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x


@dataclass(frozen=True)
class PSNR:
    """Peak signal-to-noise ratio per picture; an identical copy is null and counted in the column `identical`."""

    real: str = "image"  # media name
    fake: str = "recon"
    quantise: str = "round"  # both pictures, before they are compared; "none" compares floats
    value_range: tuple[float, float] = (-1.0, 1.0)  # of float media

    name = "psnr"
    version = 1
    unit = "dB"
    better = "higher"

    def measure(self, media, ctx):
        x = quantise(media[self.real], self.quantise, self.value_range)
        y = quantise(media[self.fake], self.quantise, self.value_range)
        decibels = psnr(x, y, 255.0 if self.quantise != "none" else self.value_range[1] - self.value_range[0])
        identical = np.isinf(decibels).tolist()
        return {
            self.name: null_where_not_finite(decibels),
            f"{self.name}-withheld": ["identical" if same else None for same in identical],
            "identical": identical,
        }

    def reduce(self, table):
        return mean_of_rows(table, self.name)

    def signature(self, table):
        span = "255" if self.quantise != "none" else f"{self.value_range[1] - self.value_range[0]:g}"
        return f"psnr|range:{span}|{self.quantise}|v:{self.version}"
