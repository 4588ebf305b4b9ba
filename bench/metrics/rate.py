"""Bits per pixel, and how a codebook is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.metrics.pixel import mean_of_rows
from bench.types import Error, Estimate, Table


def bits_per_pixel(bits: Sequence[float], pixels: Sequence[float], side_bits: Sequence[float] | None = None):
    """float64 [B]: (bits + side bits) / pixels of each picture; pixels are height x width, frames counted."""
    bits, pixels = np.asarray(bits, dtype=np.float64), np.asarray(pixels, dtype=np.float64)
    side = np.zeros_like(bits) if side_bits is None else np.asarray(side_bits, dtype=np.float64)
    if bits.shape != pixels.shape or bits.shape != side.shape:
        raise Error(f"bits, side bits and pixels differ in number: {len(bits)}, {len(side)}, {len(pixels)}")
    if (pixels <= 0).any() or (bits < 0).any() or (side < 0).any():
        raise Error("a rate needs at least one pixel and no negative bits")
    return (bits + side) / pixels


def nominal_bits_per_pixel(channels: int, bits: float, stride: Sequence[int]) -> float:
    """Of a latent: channels x bits / product of strides; bits = 16 for bf16, log2(K) for a code of a book of K."""
    strides = float(np.prod(stride))
    if channels < 1 or bits <= 0 or strides <= 0:
        raise Error(f"channels {channels}, bits {bits} and stride {tuple(stride)} must be positive")
    return channels * bits / strides


class Histogram:
    """How often each of `size` codes was chosen; histograms merge by addition."""

    def __init__(self, size: int):
        if size < 1:
            raise Error(f"a codebook of {size} codes has no histogram")
        self.counts = np.zeros(size, dtype=np.int64)

    def update(self, indices: Any) -> Histogram:
        """Adds int codes of any shape; raises Error where one is outside 0..size-1."""
        flat = np.asarray(indices.cpu() if hasattr(indices, "cpu") else indices).reshape(-1)
        if flat.size and (flat.min() < 0 or flat.max() >= len(self.counts)):
            raise Error(f"code {flat.min()}..{flat.max()} is outside a codebook of {len(self.counts)}")
        self.counts += np.bincount(flat.astype(np.int64), minlength=len(self.counts))
        return self

    def merge(self, other: Histogram) -> Histogram:
        """Adds another set's counts; raises Error where the codebooks differ in size."""
        if len(other.counts) != len(self.counts):
            raise Error(f"codebooks differ in size: {len(self.counts)} and {len(other.counts)}")
        self.counts += other.counts
        return self

    @property
    def n(self) -> int:
        """The number of codes seen; usage depends on it."""
        return int(self.counts.sum())

    def usage(self) -> float | None:
        """Share of the codes that occur at all; None before the first."""
        return float((self.counts > 0).mean()) if self.n else None

    def entropy(self) -> float | None:
        """Plug-in entropy in bits per code; None before the first."""
        if not self.n:
            return None
        p = self.counts[self.counts > 0] / self.n
        return float(max(0.0, -(p * np.log2(p)).sum()))

    def perplexity(self) -> float | None:
        """2^entropy: the size of an evenly used codebook of the same entropy."""
        entropy = self.entropy()
        return None if entropy is None else float(2.0**entropy)


@dataclass(frozen=True)
class BitsPerPixel:
    """Rate as stored, side information included, from the columns `bits`, `side_bits` and `pixels` of the rows.

    `bits-per-pixel.side` is the part that the latent does not hold: conditioning frame, text, seeds.
    """

    name = "bits-per-pixel"
    version = 1
    unit = "bit/px"
    better = "lower"

    def measure(self, media: Mapping[str, Any], ctx: Any):
        if media.get("bits") is None or media.get("pixels") is None:
            raise Error("bits-per-pixel needs the columns bits and pixels", hint="run() yields them beside the media")
        side = media.get("side_bits")
        whole = bits_per_pixel(media["bits"], media["pixels"], side)
        rest = np.zeros(len(whole)) if side is None else bits_per_pixel(side, media["pixels"])
        return {self.name: whole.tolist(), f"{self.name}.side": rest.tolist()}

    def reduce(self, table: Table) -> Mapping[str, Estimate]:
        return {"": mean_of_rows(table, self.name), "side": mean_of_rows(table, f"{self.name}.side")}

    def signature(self, table: Table) -> str:
        return f"bpp|stored|side:in|v:{self.version}"
