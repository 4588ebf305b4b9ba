"""SSIM in the four flavours that papers mix up, and MS-SSIM; one number per picture.

The mean over an 8-bit picture is filtered in float32: within 3e-7 of float64 on photographs, and within 5e-6 on noisy
black and white. Everything else is float64.

SSIM: Wang et al. 2004 (10.1109/TIP.2003.819861). MS-SSIM: Wang, Simoncelli and Bovik 2003 (10.1109/ACSSC.2003.1292216).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from bench.metrics.pixel import mean_of_rows, quantise, same_shape, withheld
from bench.metrics.precision import full_precision
from bench.types import Error, UsageError


class Flavour(NamedTuple):
    window: int  # px
    sample: bool  # covariance over N - 1
    border: str  # "valid": windows inside the picture; "reflect": as many windows as pixels
    pool: bool  # average down by round(min side / 256) first


FLAVOURS = {
    "uniform7": Flavour(7, True, "valid", False),  # scikit-image's default; TokenBench
    "gauss11_valid": Flavour(11, False, "valid", False),  # Wang; scikit-image gaussian_weights; torchmetrics <= 1.4.1
    "gauss11_reflect": Flavour(11, False, "reflect", False),  # torchmetrics >= 1.4.2
    "avgpool_gauss11": Flavour(11, False, "valid", True),  # piq
}
CANONICAL = "gauss11_valid"
SIGMA = 1.5
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
TILE = 32  # rows and columns per matrix product: more is wasted work, less is wasted calls
WIDE = 20  # column tiles filtered at once, so that the maps stay in cache


def ssim(x: Any, y: Any, flavour: str = CANONICAL, data_range: float | None = None) -> np.ndarray:
    """SSIM of each pair, float64 [B]: mean over windows and channels.

    x, y [B, C, H, W], tensors or arrays; `data_range` L is 255 for uint8 and must be given for floats. C1 = (0.01 L)^2,
    C2 = (0.03 L)^2. Raises Error where a side is smaller than the window.
    """
    shape = _known(flavour)
    found = []
    for a, b, span in _parts(x, y, shape.window, data_range):
        framed = (_framed(v, shape) for v in (a, b))
        found.append(_means(*framed, shape, span)[0].mean(1).cpu().numpy())
    return np.concatenate(found)


def ssim_map(x: Any, y: Any, flavour: str = CANONICAL, data_range: float | None = None) -> tuple[Any, int]:
    """The SSIM of every window, float64 tensor [B, C, h, w], and the offset of its corner in the picture (px).

    Value [i, j] belongs to the window around pixel [i + offset, j + offset]. `avgpool_gauss11` has no such pixel.
    """
    import torch

    shape = _known(flavour)
    if shape.pool:
        raise UsageError(f"{flavour} shrinks the picture, so its map has no place in it", hint=f"use {CANONICAL}")
    edge = shape.window - 1
    found = []
    for a, b, span in _parts(x, y, shape.window, data_range):
        a, b = (_framed(v, shape).double() for v in (a, b))
        batch, channels, height, width = a.shape
        out = torch.empty(batch * channels, height - edge, width - edge, dtype=torch.float64, device=a.device)
        for row, column, values, _ in _tiles(a, b, shape, span, with_contrast=False):
            tiles, rows, planes, columns = values.shape
            place = slice(None), slice(row, row + rows), slice(column, column + tiles * columns)
            out[place] = values.permute(2, 1, 0, 3).reshape(planes, rows, tiles * columns)
        found.append(out.reshape(batch, channels, *out.shape[1:]))
    return torch.cat(found), 0 if shape.border == "reflect" else edge // 2


def ms_ssim(x: Any, y: Any, data_range: float | None = None) -> np.ndarray:
    """MS-SSIM of each pair, float64 [B]: five scales of `gauss11_valid`, 2 x 2 means between.

    As pytorch-msssim has it: odd sides get zeros around before they are halved; per channel the product of contrast
    terms and the last scale's SSIM, each to its weight and negative ones taken as 0, then the mean over channels.
    Raises Error where a side is at most 160 px.
    """
    import torch

    found = []
    for a, b, span in _parts(x, y, 161, data_range):
        product = 1.0
        for scale, weight in enumerate(SCALE_WEIGHTS):
            last = scale == len(SCALE_WEIGHTS) - 1
            whole, contrast = _means(a, b, FLAVOURS[CANONICAL], span, with_contrast=not last)
            product = product * (whole if last else contrast).clamp(min=0.0) ** weight
            if not last:
                odd = (a.shape[-2] % 2, a.shape[-1] % 2)
                a, b = (torch.nn.functional.avg_pool2d(v.double(), 2, padding=odd) for v in (a, b))
        found.append(product.mean(1).cpu().numpy())
    return np.concatenate(found)


def _known(flavour: str) -> Flavour:
    if flavour not in FLAVOURS:
        raise UsageError(f"SSIM flavour {flavour!r} is not one of {', '.join(FLAVOURS)}")
    return FLAVOURS[flavour]


def _parts(x: Any, y: Any, smallest: int, data_range: float | None):
    """Checked tensors of one shape, with the range: on a CPU one picture at a time, whatever the length of the clip."""
    import torch

    x, y = (torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for v in (x, y))
    same_shape(x, y)
    if x.dim() != 4:
        raise Error(f"SSIM needs pictures [B, C, H, W], not {list(x.shape)}")
    if data_range is None:
        if x.dtype != torch.uint8 or y.dtype != torch.uint8:
            raise UsageError("SSIM of floats needs a data_range", hint="2.0 for pictures in [-1, 1], 1.0 for [0, 1]")
        data_range = 255.0
    if min(x.shape[-2:]) < smallest:
        raise Error(f"a picture of {x.shape[-1]} x {x.shape[-2]} px is smaller than the {smallest} px that SSIM needs")
    size = 1 if x.device.type == "cpu" else max(1, len(x))
    for a, b in zip(x.split(size), y.split(size), strict=True):
        yield a, b, float(data_range)


def _framed(x: Any, shape: Flavour) -> Any:
    """Pictures pooled or reflected as the flavour says."""
    import torch

    if shape.pool and (factor := max(1, round(min(x.shape[-2:]) / 256))) > 1:
        x = torch.nn.functional.avg_pool2d(x.double(), factor)
    return _reflected(x, shape.window // 2) if shape.border == "reflect" else x


def _reflected(x: Any, edge: int) -> Any:
    """The picture with `edge` mirrored rows and columns on each side, the border itself not repeated; any dtype."""
    import torch

    for axis in (-1, -2):
        first, last = x.narrow(axis, 1, edge), x.narrow(axis, x.shape[axis] - 1 - edge, edge)
        x = torch.cat([first.flip(axis), x, last.flip(axis)], axis)
    return x


def _means(x: Any, y: Any, shape: Flavour, data_range: float, with_contrast: bool = False) -> tuple[Any, Any]:
    """Mean SSIM and mean contrast-structure term over the windows, float64 [B, C] each (None if not asked)."""
    import torch

    batch, channels, height, width = x.shape
    totals = torch.zeros(2, batch * channels, dtype=torch.float64, device=x.device)
    with full_precision():
        for _, _, values, contrast in _tiles(x, y, shape, data_range, with_contrast):
            totals[0] += values.sum((0, 1, 3), dtype=torch.float64)
            if with_contrast:
                totals[1] += contrast.sum((0, 1, 3), dtype=torch.float64)
    edge = shape.window - 1
    means = (totals / ((height - edge) * (width - edge))).reshape(2, batch, channels)
    return means[0], means[1] if with_contrast else None


def _tiles(x: Any, y: Any, shape: Flavour, data_range: float, with_contrast: bool):
    """(row, column, SSIM [tiles, rows, planes, columns], contrast) of tiles that cover all windows.

    With s = x + y and d = x - y the four filtered maps are s, d, s^2, d^2: 2 mu_x mu_y = (mu_s^2 - mu_d^2) / 2 and
    so on, which needs fewer passes than x, y, x^2 + y^2, xy and loses less where x is close to y. A strip's s
    and d are taken about their means, so that float32 is enough for 8-bit pictures: a variance is E s^2 - (E s)^2.
    The window is separable; each direction is a product with a small banded matrix, on rows then on columns.
    """
    import torch

    batch, channels, height, width = x.shape
    planes = batch * channels
    x, y = (v.reshape(planes, height, width) for v in (x, y))
    edge = shape.window - 1
    dtype = torch.float32 if x.dtype == y.dtype == torch.uint8 else torch.float64
    band = torch.from_numpy(_band(shape.window)).to(x.device, dtype)
    n = shape.window**2 if shape.window == 7 else 1  # what the window's weights add up to
    factor = n / (n - 1) if shape.sample else 1.0
    c1, c2 = 2 * (0.01 * data_range * n) ** 2, 2 * (0.03 * data_range) ** 2 * n / factor
    for column in range(0, width - edge, TILE * WIDE):
        columns = min(TILE * WIDE, width - edge - column)
        for row in range(0, height - edge, TILE):
            rows = min(TILE, height - edge - row)
            cut = slice(None), slice(row, row + rows + edge), slice(column, column + columns + edge)
            a, b = (v[cut].transpose(0, 1) for v in (x, y))
            maps = torch.empty(rows + edge, 4, planes, columns + edge, dtype=dtype, device=x.device)
            maps[:, 0] = a
            torch.sub(maps[:, 0], b, out=maps[:, 1])
            maps[:, 0].add_(b)
            centre = maps[:, :2].mean((0, 3), keepdim=True).round_()  # levels stay whole numbers
            maps[:, :2].sub_(centre)
            torch.mul(maps[:, :2], maps[:, :2], out=maps[:, 2:])
            down = (band[:rows, : rows + edge] @ maps.flatten(1)).reshape(rows * 4 * planes, columns + edge)
            for offset, found in _across(down, band, columns, edge):
                found = found.reshape(len(found), rows, 4, planes, found.shape[-1])
                yield row, column + offset, *_windows(found, centre * n, n, c1, c2, with_contrast)


def _across(down: Any, band: Any, columns: int, edge: int):
    """Filters the last axis of [.., columns + edge]: (first column, [tiles, .., TILE]), then what is left over."""
    whole, rest = divmod(columns, TILE)
    if whole:
        tiles = down.as_strided((whole, len(down), TILE + edge), (TILE, columns + edge, 1))
        yield 0, tiles @ band.T
    if rest:
        yield whole * TILE, (down[:, whole * TILE :] @ band[:rest, : rest + edge].T)[None]


def _windows(maps: Any, centre: Any, n: int, c1: float, c2: float, with_contrast: bool) -> tuple[Any, Any]:
    """SSIM and contrast of each window from the filtered maps [tiles, rows, 4, planes, columns].

    They are sums with weights that add up to n; `centre` was taken off s and d. c1 is in units of squared sums of s
    and d, c2 of sums of squares, both doubled.
    """
    sums, variances = maps[:, :, :2], maps[:, :, 2:]
    variances.sub_(sums * sums, alpha=1 / n)  # n times
    sums.add_(centre)
    squares = sums.square_()
    both, apart = squares[:, :, 0].add_(c1), squares[:, :, 1]
    spread, noise = variances[:, :, 0].add_(c2), variances[:, :, 1]
    structure, contrast_floor = spread - noise, spread.add_(noise)
    if with_contrast:
        contrast = structure / contrast_floor
        return contrast * (both - apart) / (both + apart), contrast
    return (both - apart).mul_(structure).div_(contrast_floor.mul_(both.add_(apart))), None


@cache
def _band(window: int) -> np.ndarray:
    """float64 [TILE, TILE + window - 1]: row i holds the window's weights from column i on."""
    if window == 7:
        weights = np.ones(7)  # sums of whole numbers, below 2^24 for 8-bit pictures: float32 holds them
    else:
        distance = np.arange(window) - window // 2
        weights = np.exp(-(distance**2) / (2 * SIGMA**2))
        weights /= weights.sum()
    band = np.zeros((TILE, TILE + window - 1))
    for i in range(TILE):
        band[i, i : i + window] = weights
    return band


def _pair(metric: Any, media: Any) -> tuple[Any, Any, float]:
    """Both pictures as the metric compares them, and their range."""
    x = quantise(media[metric.real], metric.quantise, metric.value_range)
    y = quantise(media[metric.fake], metric.quantise, metric.value_range)
    return x, y, 255.0 if metric.quantise != "none" else metric.value_range[1] - metric.value_range[0]


@dataclass(frozen=True)
class SSIM:
    """Structural similarity per picture; null with a reason where the picture is smaller than the window."""

    flavour: str = CANONICAL
    data_range: float | None = None  # None: 255, or the width of `value_range` for floats
    real: str = "image"
    fake: str = "recon"
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)

    version = 1
    unit = ""
    better = "higher"

    def __post_init__(self):
        _known(self.flavour)

    @property
    def name(self) -> str:
        return "ssim" if self.flavour == CANONICAL else f"ssim_{self.flavour}"

    def measure(self, media, ctx):
        x, y, span = _pair(self, media)
        window = FLAVOURS[self.flavour].window
        if min(x.shape[-2:]) < window:
            return withheld(self.name, len(x), f"pictures smaller than the window of {window} px")
        return {self.name: ssim(x, y, self.flavour, self.data_range or span).tolist()}

    def reduce(self, table):
        return mean_of_rows(table, self.name)

    def signature(self, table):
        span = self.data_range or (255.0 if self.quantise != "none" else self.value_range[1] - self.value_range[0])
        return f"ssim|{self.flavour}|range:{span:g}|{self.quantise}|v:{self.version}"


@dataclass(frozen=True)
class MSSSIM:
    """Multi-scale structural similarity per picture; null with a reason where a side is at most 160 px."""

    real: str = "image"
    fake: str = "recon"
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)

    name = "ms-ssim"
    version = 1
    unit = ""
    better = "higher"

    def measure(self, media, ctx):
        x, y, span = _pair(self, media)
        if min(x.shape[-2:]) <= 160:
            return withheld(self.name, len(x), "a side of at most 160 px")
        return {self.name: ms_ssim(x, y, span).tolist()}

    def reduce(self, table):
        return mean_of_rows(table, self.name)

    def signature(self, table):
        span = "255" if self.quantise != "none" else f"{self.value_range[1] - self.value_range[0]:g}"
        return f"ms-ssim|gauss11_valid x 5|range:{span}|{self.quantise}|v:{self.version}"
