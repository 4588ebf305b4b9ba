"""A model small enough to check by hand: block averages as an autoencoder, coloured Gaussian noise as a generator.

Everything is a fixed function of the inputs and of one seed per item, the same to the last bit at any batch size,
so that tests and documentation can say what a score must be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.capabilities import Latents
from bench.types import Error

if TYPE_CHECKING:
    from torch import Tensor


class Toy:
    """A linear autoencoder, and a generator of Gaussian images.

    The latent is the mean of each `factor` x `factor` block, rounded to `bits` bits per value (`bits=0`: kept as
    float32); the decoder repeats it. With seeds, Gaussian noise of standard deviation `noise` is added to the latent.

    An image is a colour, drawn from the prompt or the label, plus Gaussian noise of standard deviation 0.1, drawn
    from the seed, clamped to [0, 1]. Colours lie in [0.3, 0.7].
    """

    num_classes = 10

    def __init__(self, factor: int = 4, bits: int = 8, noise: float = 0.0, size: int = 32, *, device: str = "cpu"):
        """factor >= 1 px, bits in 0..16 per latent value, noise >= 0, size of generated images >= 1 px; else Error."""
        for name, value, low, high in (("factor", factor, 1, 4096), ("bits", bits, 0, 16), ("size", size, 1, 4096)):
            if not low <= value <= high:
                raise Error(f"toy: {name} = {value} must lie in {low}..{high}")
        if not 0 <= noise < float("inf"):
            raise Error(f"toy: noise = {noise} must be 0 or a positive number")
        self.factor, self.bits, self.noise, self.size, self.device = factor, bits, noise, size, device

    def encode(self, images: Tensor) -> Latents:
        """float32 [B, 3, H, W] in [-1, 1] -> block means [B, 3, H / factor, W / factor]."""
        import torch
        from torch.nn.functional import avg_pool2d

        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise Error(
                f"toy: {height} x {width} px cannot be divided into blocks of {self.factor} px",
                hint=f"choose an image size that is a multiple of {self.factor}, or another factor",
            )
        z = avg_pool2d(images, self.factor)
        per_item = z[0].numel() if len(z) else 0
        if self.bits == 0:
            return Latents(z, [32.0 * per_item] * len(z))
        top = 2**self.bits - 1
        indices = torch.floor((z.clamp(-1, 1) + 1) * (top / 2) + 0.5)
        return Latents(indices * (2 / top) - 1, [float(self.bits * per_item)] * len(z), indices=indices.to(torch.int64))

    def decode(self, latents: Latents, seeds: Sequence[int] | None = None) -> Tensor:
        """float32 [B, 3, H, W]; with seeds, noise is added to the latent of item i from seeds[i] alone."""
        z = latents.data
        if seeds is not None and self.noise:
            z = z + self.noise * _noise(seeds, tuple(z.shape[1:])).to(z.device)
        return z.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float32 [B, 3, size, size] in [0, 1]."""
        return self._images(list(prompts), seeds)

    def generate_classes(self, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """float32 [B, 3, size, size] in [0, 1]; labels in 0..num_classes - 1, else Error."""
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise Error(f"toy: label {label} is not in 0..{self.num_classes - 1}")
        return self._images([f"class {label}" for label in labels], seeds)

    def _images(self, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        import torch

        means = torch.tensor([colour(text) for text in texts], dtype=torch.float32).reshape(-1, 3, 1, 1)
        return (means + 0.1 * _noise(seeds, (3, self.size, self.size))).clamp(0, 1).to(self.device)


def colour(text: str) -> tuple[float, float, float]:
    """The mean colour of the images of a text: three numbers in [0.3, 0.7] from its SHA-256."""
    red, green, blue = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:3]
    return tuple(0.3 + 0.4 * channel / 255 for channel in (red, green, blue))


def _noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape], one generator per item."""
    import torch

    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws) if draws else torch.empty(0, *shape)
