"""Autoencoder reconstruction: how much of a picture survives decode(encode(x)), and at what rate?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.capabilities import Autoencoder, Latents
from bench.suite import Metric, Suite
from bench.types import BadOutput, Data, Estimate, Figure, NonFinite, Table, Unit, UsageError
from suites.reconstruction import bands, protocols, regions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reconstruction(Suite):
    """Fidelity, structure, distribution and rate of an autoencoder's reconstructions, as a named protocol defines them.

    Raises UsageError for an unknown protocol, a size that is no multiple of 16 px, and a chunk below 1.
    """

    data: Data = "photographs"
    protocol: str = "embedded"  # what exactly is compared, as in `suites.reconstruction.protocols`
    size: int = 256  # px, of the square pictures; a multiple of 16
    chunk: int = 64  # pictures per unit: what a crash can cost

    name = "reconstruction"
    version = 2
    requires = (Autoencoder,)
    slices = ("kind",)

    def __post_init__(self):
        try:
            protocols.get(self.protocol)
        except ValueError as e:
            raise UsageError(str(e), hint=f"one of {', '.join(protocols.PRESETS)}") from None
        if self.size < 16 or self.size % 16:
            near = max(16, round(self.size / 16) * 16)
            raise UsageError(f"size = {self.size} must be a multiple of 16 px", hint=f"take {near}")
        if self.size < 64 and protocols.get(self.protocol).frechet == "embedded":
            raise UsageError(
                f"size = {self.size}: the embedded network needs 64 px", hint="take 64, or another protocol"
            )
        if self.chunk < 1:
            raise UsageError(f"chunk = {self.chunk} must be 1 or more")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        from bench import metrics

        p = protocols.get(self.protocol)
        found: list[Metric] = [metrics.BitsPerPixel()]
        if p.psnr:
            found.append(metrics.PSNR(**self._media(p.psnr_pixels)))
        if p.ssim:
            black, white = p.ssim_scale
            pair = self._media(p.ssim_pixels)
            width = 2 if pair["quantise"] == "none" else 255  # of the media
            similar = [metrics.SSIM(flavour=p.ssim, data_range=p.ssim_range * width / (white - black), **pair)]
            similar += [metrics.MSSSIM(**pair)] if p.ms_ssim else []
            if width == 2 and black == 0:
                similar = [FromBlack(metric) for metric in similar]
            elif p.ssim_pixels == protocols.SAME:
                similar[0] = RegionSSIM(similar[0])
            found += similar
        fed = {"input_range": p.lpips_scale, **self._media(p.lpips_pixels)}
        found += [metrics.LPIPS(net=net, **fed) for net in p.lpips]
        if p.frechet:
            extractor = p.frechet if p.frechet == "embedded" else f"{p.frechet}-{p.frechet_resize}"
            pair = self._media(p.frechet_pixels)
            kinds = {"kid": metrics.KID, "cmmd": metrics.CMMD, "prdc": metrics.PRDC} if p.on_features else {}
            compared = [metrics.Frechet, metrics.PairwiseFeatureDistance, *(kinds[name] for name in p.on_features)]
            found += [kind(extractor=extractor, **pair) for kind in compared]
        if p.psnr and p.psnr_pixels == protocols.SAME:
            found += [Bands(), Sharpness(), RegionPSNR()]
        return tuple(found)

    def units(self, data: Any) -> Iterator[Unit]:
        for i, ids in enumerate(data.chunks(self.chunk)):
            yield Unit(f"{i:04d}", tuple(ids), cost=len(ids))

    def run(self, unit: Unit, model: Any, ctx: Any) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        p = protocols.get(self.protocol)
        for ids in ctx.batches(unit):
            x = ctx.images(ids, self.size, p.resize)
            if p.scaling == "float64":
                x = _from_bytes(_pixels(x, "round"), float64=True)
            seeds = [ctx.seed(id, "posterior") for id in ids] if p.posterior == "sample" else None
            y, rate = _reconstruct(model, x, seeds)
            _check(ids, x, y)
            media = {"pixels": [self.size * self.size] * len(ids), **rate}
            for pair in self._pairs():
                names = self._media(pair)
                media[names["real"]], media[names["fake"]] = _prepare(x, y, pair)
            yield ids, media

    def figures(self, table: Table) -> Iterator[Figure]:
        p = protocols.get(self.protocol)
        if p.psnr and len(table):
            yield _psnr_figure(table, self.slices)
            if p.psnr_pixels == protocols.SAME:
                yield _bands_figure(table)

    def artifacts(self, table: Table) -> Iterator[tuple[str, bytes]]:
        """The whole definition behind the numbers, so that they can be compared in years."""
        p = protocols.get(self.protocol)
        record = {
            "name": p.name,
            "hash": p.hash(),
            "source": p.source,
            "departs": p.departs,
            "definition": p.definition(),
        }
        yield "protocol.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()

    def _pairs(self) -> list[tuple[str, str]]:
        """How originals and reconstructions reach the metrics: each way once, the way of PSNR first."""
        p = protocols.get(self.protocol)
        used = {"psnr": p.psnr_pixels, "ssim": p.ssim_pixels, "lpips": p.lpips_pixels, "frechet": p.frechet_pixels}
        return list(dict.fromkeys(pair for metric, pair in used.items() if getattr(p, metric)))

    def _media(self, pair: tuple[str, str]) -> dict[str, str]:
        """Which media a metric compares, and how they were quantised; fields of every metric of pairs."""
        suffix = "" if pair == self._pairs()[0] else "-" + "-".join(pair)
        quantise = pair[0] if pair in (("round", "round"), ("trunc", "trunc")) else "none"
        return {"real": f"image{suffix}", "fake": f"recon{suffix}", "quantise": quantise}


def _reconstruct(model: Any, x: Tensor, seeds: list[int] | None) -> tuple[Tensor, dict[str, list[float]]]:
    """The reconstruction, float32 and not clamped, and the columns `bits` and `side_bits` per picture."""
    import torch

    with torch.no_grad():
        latents = model.encode(x.clone())  # a model may write into what it is given
        if isinstance(latents, Latents):
            bits, side = list(latents.bits), list(latents.side_bits) or [0.0] * len(x)
        else:
            bits, side = [float(latents[0].numel() * latents.element_size() * 8)] * len(x), [0.0] * len(x)
        y = model.decode(latents, seeds)
    if not isinstance(y, torch.Tensor):
        raise BadOutput(f"the model decoded {type(y).__name__}", hint="decode returns a tensor, float32 [B, 3, H, W]")
    if not y.is_floating_point():
        raise BadOutput(f"the model decoded {y.dtype}", hint="decode returns float32, about [-1, 1], not rounded")
    if y.is_meta:
        raise BadOutput("the model decoded a tensor on the device meta, which holds no values")
    return y.detach().to(x.device, torch.float32, copy=True), {"bits": bits, "side_bits": side}


def _check(ids: list[str], x: Tensor, y: Tensor) -> None:
    """Raises BadOutput where a reconstruction is not a finite picture of the size of its original."""
    if y.shape != x.shape:
        raise BadOutput(
            f"the model decoded {list(x.shape)} into {list(y.shape)}",
            hint="choose a size that the model can code without padding",
        )
    low, high = y.flatten(1).aminmax(dim=1)
    finite = (low.isfinite() & high.isfinite()).tolist()
    bad = [id for id, ok in zip(ids, finite, strict=True) if not ok]
    if bad:
        raise NonFinite(f"the model decoded NaN or infinity in {len(bad)} of {len(ids)} pictures, item {bad[0]} first")


def _prepare(x: Tensor, y: Tensor, pair: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """A pair as a protocol compares it: both uint8 [B, 3, H, W], or both float32 where one of them is not quantised."""
    x, y = _pixels(x, pair[0]), _pixels(y, pair[1])
    if x.dtype == y.dtype:
        return x, y
    return (_from_bytes(x), y) if y.is_floating_point() else (x, _from_bytes(y))


def _pixels(v: Tensor, mode: str) -> Tensor:
    from bench.metrics.pixel import quantise

    if mode == "raw":
        return v
    return v.clamp(-1, 1) if mode == "clamp" else quantise(v, mode)


def _from_bytes(v: Tensor, float64: bool = False) -> Tensor:
    """uint8 -> float32 in [-1, 1], by float32 arithmetic or rounded once from float64."""
    return (v.double() / 127.5 - 1).float() if float64 else v.float().div(127.5).sub(1)


def _arrays(media: Mapping[str, Any]) -> zip:
    """Pairs of uint8 [3, H, W] arrays, original and reconstruction."""
    return zip(media["image"].cpu().numpy(), media["recon"].cpu().numpy(), strict=True)


@dataclass(frozen=True)
class FromBlack:
    """SSIM of float pictures with black at 0 and white at 2, which is not what it is in [-1, 1]."""

    metric: Any  # bench.metrics.SSIM or MSSSIM

    version = 1
    unit = ""
    better = "higher"

    @property
    def name(self) -> str:
        return self.metric.name

    def measure(self, media, ctx):
        return self.metric.measure({name: media[name] + 1 for name in (self.metric.real, self.metric.fake)}, ctx)

    def reduce(self, table):
        return self.metric.reduce(table)

    def signature(self, table):
        return self.metric.signature(table) + "|black:0"


@dataclass(frozen=True)
class Bands:
    """SNR of each scale of a Haar pyramid, from `bands.1` (finest) to `bands.4` and `bands.ll` (means of 16 x 16 px).

    Pooled: the energy of all originals over the energy of all errors, in dB. A mean of decibels would let flat
    pictures, which have no energy in a band, decide, and has no value for a picture without error.
    """

    name = "bands"
    version = 1
    unit = "dB"
    better = "higher"

    def measure(self, media, ctx):
        found = np.stack([bands.by_scale(bands.energies(x, y)) for x, y in _arrays(media)])
        return {
            f"band.{scale}.{what}": found[:, i, j].tolist()
            for i, scale in enumerate(bands.SCALES)
            for j, what in enumerate(("signal", "error", "output"))
        }

    def reduce(self, table):
        return {scale: _pooled(table, scale, "signal", "error", _decibels) for scale in bands.SCALES}

    def signature(self, table):
        return f"bands|haar:{bands.LEVELS}|pooled|v:{self.version}"


@dataclass(frozen=True)
class Sharpness:
    """Energy of the reconstructions over energy of the originals per scale: below 1 is blur, above 1 added detail."""

    name = "sharpness"
    version = 1
    unit = "ratio"
    better = "none"

    def measure(self, media, ctx):
        return {}  # what `Bands` measures is enough

    def reduce(self, table):
        return {scale: _pooled(table, scale, "output", "signal") for scale in bands.SCALES}

    def signature(self, table):
        return f"sharpness|haar:{bands.LEVELS}|pooled|v:{self.version}"


@dataclass(frozen=True)
class RegionPSNR:
    """Mean PSNR at edges and in flat, dark and bright areas of the original; null where an area is too small."""

    name = "region-psnr"
    version = 1
    unit = "dB"
    better = "higher"

    def measure(self, media, ctx):
        found = [regions.masked_psnr(x, y, regions.masks(x)) for x, y in _arrays(media)]
        return {f"{self.name}.{region}": [one[region] for one in found] for region in regions.REGIONS}

    def reduce(self, table):
        return {
            region: _region_mean(table, f"{self.name}.{region}", "no such area, or no error in it")
            for region in regions.REGIONS
        }

    def signature(self, table):
        return f"region-psnr|range:255|round|min:{regions.MIN_PIXELS}px|v:{self.version}"


@dataclass(frozen=True)
class RegionSSIM:
    """SSIM of 8-bit pictures, and the mean of the same map at edges and in flat, dark and bright areas."""

    metric: Any  # bench.metrics.SSIM

    version = 1
    unit = ""
    better = "higher"

    @property
    def name(self) -> str:
        return self.metric.name

    def measure(self, media, ctx):
        from bench.metrics.ssim import ssim_map

        pair = media[self.metric.real], media[self.metric.fake]
        maps, offset = ssim_map(*pair, self.metric.flavour, self.metric.data_range)
        found = []
        for x, values in zip(pair[0].cpu().numpy(), maps.cpu().numpy(), strict=True):
            found.append({"": values.mean(), **regions.masked_ssim(values, offset, regions.masks(x))})
        return {_suffixed(self.name, region): [one[region] for one in found] for region in ("", *regions.REGIONS)}

    def reduce(self, table):
        found = {
            region: _region_mean(table, _suffixed(self.name, region), "no such area") for region in regions.REGIONS
        }
        return {"": self.metric.reduce(table), **found}

    def signature(self, table):
        return self.metric.signature(table)


def _suffixed(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if suffix else name


def _region_mean(table: Table, column: str, reason: str) -> Estimate:
    """The mean over the rows that have the region; `reason` says why the others have none."""
    from bench import stats

    found = stats.mean(table.values(column), clusters=table.clusters(), seed=table.seed)
    without = len(table) - found.n
    if not without or len(table) < table.expected:  # a note would say that nothing is missing
        return replace(found, note="")
    return replace(found, note=f"{without} with {reason}")


def _decibels(ratio: np.ndarray) -> np.ndarray:
    return 10 * np.log10(ratio)


def _pooled(table: Table, scale: str, over: str, under: str, transform: Any = None) -> Estimate:
    """The ratio of two energies summed over the set, with the interval of a bootstrap by cluster."""
    from bench import stats

    top, bottom = table.values(f"band.{scale}.{over}"), table.values(f"band.{scale}.{under}")
    return stats.ratio(top, bottom, clusters=table.clusters(), seed=table.seed, transform=transform)


def _bands_figure(table: Table) -> Figure:
    rows = []
    for scale, estimate in Bands().reduce(table).items():
        rows.append({"scale": scale, "snr": estimate.value, "low": estimate.low, "high": estimate.high})

    def draw(axes: Any) -> None:
        drawn = [(i, row) for i, row in enumerate(rows) if row["snr"] is not None]
        axes.plot([i for i, _ in drawn], [row["snr"] for _, row in drawn], marker="o")
        bars = [(i, row["low"], row["high"]) for i, row in drawn if row["low"] is not None]
        axes.vlines(*([list(column) for column in zip(*bars, strict=True)] or ([], [], [])))
        axes.set_xticks(range(len(rows)), [f"{2**level} px" for level in range(1, len(rows))] + ["coarser"])
        axes.set_xlabel("scale")
        axes.set_ylabel("SNR (dB)")

    return Figure("bands", "Signal-to-noise ratio by scale", rows, draw)


def _psnr_figure(table: Table, slices: tuple[str, ...]) -> Figure:
    """The share of pictures up to each PSNR, for all and for each slice."""
    parts = {"all": table}
    for column in slices:
        for value in sorted({str(v) for v in table.column(column) if v is not None}):
            parts[f"{column}={value}"] = table.where(column, value)
    rows = []
    for name, part in parts.items():
        values = sorted(v for v in part.column("psnr") if v is not None)
        rows += [{"slice": name, "psnr": v, "share": (i + 1) / len(values)} for i, v in enumerate(values)]

    def draw(axes: Any) -> None:
        for name in parts:
            points = [(row["psnr"], row["share"]) for row in rows if row["slice"] == name]
            if points:
                axes.step(*zip(*points, strict=True), where="post", label=name)
        axes.set_xlabel("PSNR (dB)")
        axes.set_ylabel("share of pictures at or below")
        axes.legend()

    return Figure("psnr", "Distribution of PSNR", rows, draw)
