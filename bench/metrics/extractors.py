"""Feature networks: pictures in, float32 [B, d] out; float32 with TF32 off, whatever the model under test does."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.metrics.pixel import quantise
from bench.types import Error, UsageError

INCEPTION = "inception-2015-12-05-pytorch-fid"  # manifest of the state dict
RESIZES = ("clean", "tf1", "pytorch")
EXTRACTORS = ("embedded", *(f"inception-{resize}" for resize in RESIZES))
BATCH = 32  # pictures per forward pass


class Extractor(Protocol):
    name: str
    fingerprint: str  # network and eight hex digits of its weights: "embedded-v1@3f2a90c1"
    dim: int

    def __call__(self, images: Any) -> np.ndarray:
        """float32 [B, dim] of a tensor [B, 3, H, W]: uint8, or float in [-1, 1] which is not rounded."""


class Network:
    """An extractor made of a name, a fingerprint and a function of levels: float32 [B, 3, H, W] in 0..255."""

    def __init__(self, name: str, fingerprint: str, dim: int, forward: Callable[[Any], Any], device: str):
        self.name, self.fingerprint, self.dim = name, fingerprint, dim
        self._forward, self._device = forward, device

    def __call__(self, images: Any) -> np.ndarray:
        import torch

        if images.dim() != 4 or images.shape[1] != 3:
            raise Error(f"feature networks need pictures [B, 3, H, W], not {list(images.shape)}")
        found = [np.empty((0, self.dim), dtype=np.float32)]
        with torch.no_grad(), full_precision():
            for part in images.split(BATCH):
                levels = part.to(self._device)
                levels = levels.float() if levels.dtype == torch.uint8 else (levels.float() + 1) * 127.5
                found.append(self._forward(levels).float().cpu().numpy())
        features = np.concatenate(found)
        if not np.isfinite(features).all():
            raise Error(f"{self.fingerprint} gave NaN or infinity")
        return features


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products are float32: TF32 and autocast off inside, as they were before afterwards."""
    import torch

    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def opened(name: str, ctx: Any) -> Extractor:
    """The extractor of a name in EXTRACTORS, with the weights that the context finds; opened once per process."""
    if name == "embedded":
        return embedded(str(ctx.device))
    if name not in EXTRACTORS:
        raise UsageError(f"extractor {name!r} is not one of {', '.join(EXTRACTORS)}")
    return inception(ctx.weights(INCEPTION), name.partition("-")[2], str(ctx.device))


def manifests(name: str) -> tuple[str, ...]:
    """The weights manifests that opening an extractor will ask for."""
    return (INCEPTION,) if name.startswith("inception") else ()


_recent: list[tuple[Any, Any, np.ndarray]] = []


def features(name: str, images: Any, ctx: Any, mode: str = "round", value_range: tuple[float, float] = (-1.0, 1.0)):
    """float32 [B, d] of one batch of media, quantised first; metrics that ask for the same batch share one pass."""
    key = (name, str(ctx.device), mode, value_range, _contents(images))
    for reference, known, found in _recent:
        if reference() is images and known == key:
            return found
    pictures = quantise(images, mode, value_range)
    if mode == "none" and value_range != (-1.0, 1.0) and pictures.is_floating_point():
        low, high = value_range
        pictures = (pictures - low) * (2.0 / (high - low)) - 1.0
    found = opened(name, ctx)(pictures)
    _recent.append((weakref.ref(images), key, found))
    del _recent[:-4]  # original and reconstruction, for two extractors
    return found


def _contents(images: Any) -> Any:
    """Changes when a tensor is written to; for what does not count its writes, never the same twice."""
    counted = hasattr(images, "is_inference") and not images.is_inference()
    return images._version if counted else object()


@cache
def embedded(device: str = "cpu") -> Network:
    """The network that comes with the harness (bench/mini): 32 features, pictures of at least 64 px."""
    from bench.identity import file_digest
    from bench.mini import features as network

    if not network.path().is_file():
        raise Error(f"the embedded feature network is missing: {network.path()}", hint="install the package again")
    fingerprint = f"{network.NAME}@{file_digest(network.path())[:8]}"
    forward = network.load(device)

    def checked(levels: Any) -> Any:
        if min(levels.shape[-2:]) < 64:
            raise Error(f"{network.NAME} needs pictures of at least 64 px, not {list(levels.shape[-2:])}")
        return forward(levels)

    return Network("embedded", fingerprint, network.DIM, checked, device)


@cache
def inception(weights: Path, resize: str = "clean", device: str = "cpu") -> Network:
    """Inception of the FID papers, 2048 features after the last mean, with one of three ways to 299 x 299 px.

    `clean`: antialiased bicubic in float (clean-fid); `tf1`: bilinear as TensorFlow 1 did it (torch-fidelity);
    `pytorch`: torch's bilinear without antialiasing (pytorch-fid). `weights` is the state dict of pytorch-fid, which
    holds tensors alone. The TorchScript file that others use carries code that runs on loading, so it is not read.
    """
    from bench.identity import file_digest

    if resize not in RESIZES:
        raise UsageError(f"resize {resize!r} is not one of {', '.join(RESIZES)}")
    path = Path(weights)
    if not path.is_file():
        raise Error(f"the weights of Inception are missing: {path}", hint=f"bench data fetch weights/{INCEPTION}")
    layers = folded(read_state(path), path, device)

    def forward(levels: Any) -> Any:
        if resize == "clean":
            return inception_features(layers, (resize_clean(levels, 299) - 128.0) / 128.0)
        if resize == "tf1":
            return inception_features(layers, (resize_tf1(levels, 299) - 128.0) / 128.0)
        return inception_features(layers, resize_pytorch(levels, 299) / 127.5 - 1.0)

    return Network(f"inception-{resize}", f"inception-2015-12-05@{file_digest(path)[:8]}", 2048, forward, device)


def read_state(path: Path) -> dict[str, Any]:
    """The named tensors of a safetensors file, or of a torch file read as data alone; else raises Error."""
    from bench.weights import load_weights

    return load_weights(path, pickle="allow")  # of a file whose SHA-256 a manifest holds


def resize_pytorch(images: Any, size: int) -> Any:
    """float32 [B, 3, size, size]: torch's bilinear, half-pixel centres, no antialiasing."""
    import torch

    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def resize_tf1(images: Any, size: int) -> Any:
    """float32 [B, 3, size, size]: TensorFlow 1's bilinear, which samples at i * in / out without half-pixel centres."""
    import torch

    def sample(x: Any, axis: int) -> Any:
        count = x.shape[axis]
        place = torch.arange(size, dtype=torch.float32, device=x.device) * (count / size)
        low = place.floor().long()
        share = (place - low).reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=count - 1))
        return first + (second - first) * share

    return sample(sample(images, -1), -2)


def resize_clean(images: Any, size: int) -> Any:
    """float32 [B, 3, size, size] in 0..255: PIL's antialiased bicubic on float channels, clipped, as clean-fid does."""
    import torch

    height, width = images.shape[-2:]
    across = torch.from_numpy(_bicubic(width, size)).to(images.device)
    down = torch.from_numpy(_bicubic(height, size)).to(images.device)
    return (down @ (images @ across.T)).clamp(0.0, 255.0)


@cache
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


def folded(state: Mapping[str, Any], path: Path, device: str = "cpu") -> dict[str, tuple[Any, Any]]:
    """(weight, bias) of each convolution, its batch normalisation folded in in float64 (eps 0.001)."""
    layers = {}
    for key in state:
        if not key.endswith(".conv.weight"):
            continue
        name = key.removesuffix(".conv.weight")
        try:
            weight, bias, mean, variance = (
                state[f"{name}.{part}"].double()
                for part in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
            )
        except KeyError as e:
            raise Error(f"{path} is not a state dict of Inception: it lacks {e}") from None
        scale = weight / (variance + 1e-3).sqrt()
        kernel = state[key].double() * scale.reshape(-1, 1, 1, 1)
        layers[name] = (kernel.float().to(device), (bias - mean * scale).float().to(device))
    if not {"Conv2d_1a_3x3", "Mixed_7c.branch_pool"} <= set(layers):
        raise Error(
            f"{path} is not a state dict of Inception in pytorch-fid's layout",
            hint=f"bench data fetch weights/{INCEPTION}",
        )
    return layers


def inception_features(layers: Mapping[str, tuple[Any, Any]], x: Any) -> Any:
    """float32 [B, 2048] of pictures [B, 3, 299, 299] in [-1, 1].

    Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as TensorFlow released it on 2015-12-05: means leave the
    padding out, and the last block pools by maximum.
    """
    import torch
    from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

    def conv(x: Any, name: str, stride: int = 1, same: bool = True) -> Any:
        weight, bias = layers[name]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else 0
        return conv2d(x, weight, bias, stride, padding).relu_()

    def chain(x: Any, block: str, *names: str) -> Any:
        for name in names:
            x = conv(x, f"{block}.{name}")
        return x

    def mean3(x: Any) -> Any:
        return avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def wide(x: Any, block: str) -> Any:  # 35 x 35
        return torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch5x5_1", "branch5x5_2"),
                chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                chain(mean3(x), block, "branch_pool"),
            ],
            1,
        )

    def factored(x: Any, block: str) -> Any:  # 17 x 17
        return torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                chain(x, block, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                chain(mean3(x), block, "branch_pool"),
            ],
            1,
        )

    def split(x: Any, block: str, pooled: Any) -> Any:  # 8 x 8
        three = chain(x, block, "branch3x3_1")
        double = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        ends = [conv(three, f"{block}.branch3x3_2{end}") for end in "ab"]
        ends += [conv(double, f"{block}.branch3x3dbl_3{end}") for end in "ab"]
        return torch.cat([chain(x, block, "branch1x1"), *ends, chain(pooled, block, "branch_pool")], 1)

    x = conv(x, "Conv2d_1a_3x3", stride=2, same=False)
    x = conv(conv(x, "Conv2d_2a_3x3", same=False), "Conv2d_2b_3x3")
    x = conv(max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = max_pool2d(conv(x, "Conv2d_4a_3x3", same=False), 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = wide(x, block)
    narrow = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
    parts = [conv(x, "Mixed_6a.branch3x3", 2, False), conv(narrow, "Mixed_6a.branch3x3dbl_3", 2, False)]
    x = torch.cat([*parts, max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = factored(x, block)
    three = conv(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, False)
    seven = chain(x, "Mixed_7a", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    x = torch.cat([three, conv(seven, "Mixed_7a.branch7x7x3_4", 2, False), max_pool2d(x, 3, 2)], 1)
    x = split(x, "Mixed_7b", mean3(x))
    x = split(x, "Mixed_7c", max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3))
