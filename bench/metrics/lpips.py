"""LPIPS v0.1: a distance of deep features that was fitted to human judgements (Zhang et al. 2018, arXiv 1801.03924)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.metrics.extractors import read_state
from bench.metrics.pixel import mean_of_rows, quantise, same_shape, withheld
from bench.metrics.precision import full_precision
from bench.types import Error, UsageError

# After which layers of torchvision's `features` the five (seven) comparisons are made.
TAPS = {
    "alex": (1, 4, 7, 9, 11),
    "vgg": (3, 8, 15, 22, 29),
    "squeeze": (1, 4, 7, 9, 10, 11, 12),
}
BUILDERS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 32  # px; below, the last layers of the networks have nothing left to see


class Judge:
    """A backbone with its linear heads. `backbone` and `heads` are state dicts: torchvision's, and lpips' `lin*`."""

    def __init__(self, net: str, backbone: Mapping[str, Any], heads: Mapping[str, Any], device: str = "cpu"):
        import torch
        import torchvision

        if net not in TAPS:
            raise UsageError(f"LPIPS network {net!r} is not one of {', '.join(TAPS)}")
        with torch.device("meta"):  # nothing is drawn: no generator is touched
            layers = getattr(torchvision.models, BUILDERS[net])(weights=None).features
        kept = {k.removeprefix("features."): v.float() for k, v in backbone.items() if k.startswith("features.")}
        try:
            layers.load_state_dict(kept, assign=True)
        except RuntimeError as e:
            raise Error(f"the backbone of LPIPS {net} does not fit: {str(e).splitlines()[-1].strip()}") from None
        self.net = net
        self.layers = layers.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        try:
            self.heads = [heads[f"lin{i}.model.1.weight"].float().to(device) for i in range(len(TAPS[net]))]
        except KeyError as e:
            raise Error(f"the heads of LPIPS {net} lack {e}") from None
        self.shift = torch.tensor(SHIFT, device=device).reshape(1, 3, 1, 1)
        self.scale = torch.tensor(SCALE, device=device).reshape(1, 3, 1, 1)

    def features(self, images: Any) -> list[Any]:
        """The tapped layers, each divided by its length over the channels; images float32 [B, 3, H, W] in [-1, 1]."""
        import torch

        x = ((images - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        found = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in TAPS[self.net]:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if i == TAPS[self.net][-1]:
                break
        return found


def lpips(judge: Judge, x: Any, y: Any) -> np.ndarray:
    """LPIPS of each pair, float64 [B]; x, y float tensors [B, 3, H, W] in [-1, 1], sides of at least 32 px."""
    return lpips_many(judge, x, [y])[0]


def lpips_many(judge: Judge, x: Any, ys: Sequence[Any]) -> np.ndarray:
    """LPIPS between originals and several versions of each, float64 [len(ys), B]; x and every y as in `lpips`.

    The features of an original are computed once and serve all its versions. One picture at a time, so that the batch
    changes neither the memory nor the last digit.
    """
    import torch

    distances = np.empty((len(ys), len(x)))
    with torch.no_grad(), full_precision():
        for i, layers in enumerate(_differences(judge, x, ys)):
            distances[i % len(ys), i // len(ys)] = sum(layer.mean(dtype=torch.float64) for layer in layers).item()
    if not np.isfinite(distances).all():
        raise Error(f"LPIPS {judge.net} gave NaN or infinity", hint="are the pictures in [-1, 1]?")
    return distances


def lpips_map(judge: Judge, x: Any, y: Any) -> Any:
    """LPIPS before the mean over the picture, float32 tensor [B, H, W]: every layer's map grown to its size."""
    import torch

    maps = []
    with torch.no_grad(), full_precision():
        for layers in _differences(judge, x, [y]):
            grown = [
                torch.nn.functional.interpolate(layer, x.shape[-2:], mode="bilinear", align_corners=False)
                for layer in layers
            ]
            maps.append(sum(grown)[0, 0])
    return torch.stack(maps)


def _differences(judge: Judge, x: Any, ys: Sequence[Any]):
    """For each original and each of its versions the weighted squared differences [1, 1, h, w] of the tapped layers."""
    import torch

    for y in ys:
        same_shape(x, y)
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < SMALLEST:
        raise Error(f"LPIPS needs pictures [B, 3, H, W] of at least {SMALLEST} px, not {list(x.shape)}")
    if not all(v.is_floating_point() for v in (x, *ys)):
        raise Error("LPIPS needs float pictures in [-1, 1]", hint="uint8 / 127.5 - 1")
    device = judge.shift.device
    for i in range(len(x)):
        original, *versions = (v[i : i + 1].to(device).float() for v in (x, *ys))
        reference = judge.features(original)
        for version in versions:
            pairs = zip(reference, judge.features(version), judge.heads, strict=True)
            yield [torch.nn.functional.conv2d((p - q).square(), head) for p, q, head in pairs]


@cache
def opened(net: str, backbone: Path, heads: Path, device: str) -> tuple[Judge, str]:
    """A judge from two weight files, opened once per process, and its fingerprint."""
    from bench.identity import file_digest

    judge = Judge(net, read_state(backbone), read_state(heads), device)
    return judge, f"{net}@{file_digest(backbone)[:8]}+{file_digest(heads)[:8]}"


@dataclass(frozen=True)
class LPIPS:
    """Learned perceptual distance per picture; null with a reason where the picture is smaller than 32 px."""

    net: str = "alex"  # or "vgg"; "squeeze" where its manifests are given
    real: str = "image"
    fake: str = "recon"
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)
    input_range: tuple[float, float] = (-1.0, 1.0)  # what the network is fed; (0, 1) is a known mistake of peers

    version = 1
    unit = ""
    better = "lower"

    @property
    def name(self) -> str:
        return f"lpips-{self.net}"

    def prepare(self, ctx):
        self._judge(ctx)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights manifests that measuring will ask for."""
        return (f"lpips-{self.net}-backbone", f"lpips-{self.net}-lin")

    def measure(self, media, ctx):
        x, y = (self._fed(media[name]) for name in (self.real, self.fake))
        if min(x.shape[-2:]) < SMALLEST:
            return withheld(self.name, len(x), f"pictures smaller than {SMALLEST} px")
        judge, fingerprint = self._judge(ctx)
        return {self.name: lpips(judge, x, y).tolist(), f"{self.name}-net": [fingerprint] * len(x)}

    def reduce(self, table):
        return mean_of_rows(table, self.name)

    def signature(self, table):
        nets = sorted({str(v) for v in table.column(f"{self.name}-net") if v is not None})
        fed = f"in:{self.input_range[0]:g}..{self.input_range[1]:g}"
        return f"lpips|v0.1|net:{'+'.join(nets) or self.net}|{fed}|{self.quantise}|v:{self.version}"

    def _judge(self, ctx):
        backbone, heads = (ctx.weights(name) for name in self.weights)
        return opened(self.net, backbone, heads, str(ctx.device))

    def _fed(self, images):
        images = quantise(images, self.quantise, self.value_range)
        low, high = self.value_range if images.is_floating_point() else (0.0, 255.0)
        if images.is_floating_point() and self.input_range == self.value_range:
            return images
        first, last = self.input_range
        return (images.float() - low) * ((last - first) / (high - low)) + first
