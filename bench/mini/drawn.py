"""Procedurally drawn pictures with the statistics of photographs: what the embedded networks are trained on.

A coloured dead-leaves model: opaque shapes of many sizes cover one another. With radii of density r^-3 between two
cut-offs the pictures have the scale invariance, heavy-tailed gradients and 1/f spectra of photographs (Lee, Mumford and
Huang 2001; that networks learn from such pictures: Baradad et al. 2021, "Learning to See by Looking at Noise").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# RGB from (lightness, blue-yellow, red-green): natural scenes vary least along the last axis (Ruderman et al. 1998).
OPPONENT = np.array([[1.0, 1.0, 1.0], [0.6, 0.3, -1.2], [0.8, -0.4, 0.2]], dtype=np.float32)
SPREAD = np.array([0.22, 0.08, 0.09], dtype=np.float32)
SMALLEST = 1.2  # px, radius of the smallest leaf


def draw(seeds: Sequence[int], size: int) -> np.ndarray:
    """uint8 [B, size, size, 3]; picture i depends on seeds[i] and the size alone."""
    return np.stack([_picture(np.random.default_rng(seed), size) for seed in seeds])


def _picture(rng: np.random.Generator, size: int) -> np.ndarray:
    noises = [_noise(rng, size, exponent) for exponent in rng.uniform(0.4, 1.8, 2)]
    palette = _palette(rng)
    softness = float(rng.uniform(0.5, 1.0) if rng.random() < 0.7 else rng.uniform(1.0, 4.0))  # px, of the edges
    busy = float(rng.uniform(0.1, 1.0)) ** 2  # how much texture the leaves of this picture have
    canvas = np.empty((size, size, 3), dtype=np.float32)
    grid = np.arange(size, dtype=np.float32)
    _leaf(rng, canvas, grid, palette, noises, 4.0 * size, softness, busy)
    for radius in _radii(rng, size).tolist():
        _leaf(rng, canvas, grid, palette, noises, radius, softness, busy)
    if rng.random() < 0.5:  # light that falls off across the scene
        direction = rng.normal(0, 0.25, 2).astype(np.float32)
        shade = 1 + direction[0] * (grid / size - 0.5)[:, None] + direction[1] * (grid / size - 0.5)[None, :]
        canvas *= shade[..., None]
    if rng.random() < 0.35:
        canvas = blur(canvas, rng.uniform(0.3, 1.3))
    if rng.random() < 0.25:
        canvas += np.float32(rng.uniform(0.003, 0.03)) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _radii(rng: np.random.Generator, size: int) -> np.ndarray:
    """Radii in px, large leaves first in part, so that small ones are not all buried."""
    count = int(rng.integers(12, 60) * (size / 64) ** 1.5)
    low, high = SMALLEST, 0.6 * size
    exponent = rng.uniform(
        0.1, 1.4
    )  # density r^-(1 + exponent); flatter than 2, since small leaves cost as much to draw
    u = rng.random(count)
    radii = (low**-exponent + u * (high**-exponent - low**-exponent)) ** (-1 / exponent)
    return radii[np.argsort(-radii * rng.lognormal(0, 0.7, count))]


def _palette(rng: np.random.Generator) -> np.ndarray:
    """float32 [n, 3] in (lightness, blue-yellow, red-green)."""
    count = rng.integers(3, 8)
    mean = np.array([rng.uniform(0.25, 0.7), *(rng.normal(0, 0.6, 2) * SPREAD[1:])], dtype=np.float32)
    vivid = rng.gamma(2.0, 0.5)
    scale = SPREAD * np.array([rng.uniform(0.6, 1.4), vivid, vivid], dtype=np.float32)
    return mean + scale * rng.laplace(0, 0.8, (count, 3)).astype(np.float32)


def _noise(rng: np.random.Generator, size: int, exponent: float) -> np.ndarray:
    """float32 [2 size, 2 size], periodic, of unit variance; amplitudes fall as 1 / frequency^exponent."""
    grain = math.exp(rng.normal(0, 0.4))  # like fur and water, textures may run in one direction
    fy, fx = np.fft.fftfreq(size)[:, None] * grain, np.fft.rfftfreq(size)[None, :] / grain
    amplitude = (fx * fx + fy * fy + (0.5 / size) ** 2) ** (-exponent / 2)
    amplitude[0, 0] = 0
    phases = rng.random(amplitude.shape, dtype=np.float32) * np.float32(2 * np.pi)
    field = np.fft.irfft2(amplitude * np.exp(1j * phases), s=(size, size))
    return np.tile((field / field.std()).astype(np.float32), (2, 2))


def _leaf(rng, canvas, grid, palette, noises, radius, softness, busy):
    """Paints one shape over the canvas, inside its bounding box."""
    size = len(grid)
    y, x = rng.uniform(0, size, 2).tolist()
    kind, texture, angle, stretch, corner, amplitude = rng.random(6).tolist()
    reach = radius * (1.5 if kind < 0.85 else 4.0) + softness
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, size)
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, size)
    dy, dx = (grid[top:bottom] - y)[:, None], (grid[left:right] - x)[None, :]
    cosine, sine = math.cos(2 * math.pi * angle) / radius, math.sin(2 * math.pi * angle) / radius
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx  # float32, in radii

    if radius > 2 * size:
        distance = None  # the background
    elif kind < 0.35:  # discs and ellipses
        distance = np.sqrt(u * u + (v * (1 + 2 * stretch)) ** 2)
    elif kind < 0.6:  # boxes
        distance = np.maximum(np.abs(u), np.abs(v) * (1 + 2 * stretch))
    elif kind < 0.85:  # triangles to hexagons
        corners = 3 + int(4 * corner)
        turns = (2 * math.pi * (np.arange(corners) + 0.6 * (rng.random(corners) - 0.5)) / corners).tolist()
        distance = np.full(u.shape, -1.0, dtype=np.float32)
        for turn in turns:
            np.maximum(distance, 1.3 * math.cos(turn) * u + 1.3 * math.sin(turn) * v, out=distance)
    else:  # lines, wires, branches: long, thin, slightly bent
        thickness = min(max(0.6, (0.02 + 0.2 * stretch * stretch) * radius), 0.3 * radius) / radius
        distance = np.maximum(np.abs(u) / 3.5, np.abs(v + 0.3 * (corner - 0.5) * u * u) + (1 - thickness))
    colour = palette[int(rng.integers(len(palette)))] + SPREAD * rng.normal(0, 0.2, 3).astype(np.float32)
    paint = colour @ OPPONENT

    strength = busy * (0.02 + 0.25 * amplitude**2)
    if texture < 0.3:  # plain, or shaded from side to side
        pattern = (corner - 0.3) * 2 * u if radius < 2 * size else 4 * u
    elif texture < 0.75:  # 1/f noise, cut from a field at a random place
        field = noises[int(amplitude * 16) % 2]
        sy, sx = rng.integers(0, size, 2)
        pattern = field[sy : sy + bottom - top, sx : sx + right - left]
    elif texture < 0.92:  # stripes, waves
        period = math.exp(rng.uniform(math.log(2.5), math.log(0.5 * size)))
        pattern = np.sin((2 * math.pi * radius / period) * (u + 0.3 * stretch * v))
        pattern = np.sign(pattern) * 0.7 if corner < 0.2 else pattern
    else:  # weave, tiles
        period = math.exp(rng.uniform(math.log(4), math.log(0.5 * size)))
        pattern = np.sin((2 * math.pi * radius / period) * u) * np.sin((2 * math.pi * radius / period) * v) * 1.5
    tint = (strength * rng.normal(1, 0.4, 3)).astype(np.float32)
    pixels = paint + pattern[..., None] * tint

    region = canvas[top:bottom, left:right]
    if distance is None:
        region[:] = pixels
        return
    cover = np.clip((1 - distance) * (radius / softness) + 0.5, 0, 1)[..., None]
    region += cover * (pixels - region)


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of [H, W, C], cut at three sigma, edges repeated."""
    reach = max(1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(pixels.dtype)
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(pixels, width, mode="edge")
        length = pixels.shape[axis]
        pixels = sum(k * padded.take(np.arange(i, i + length), axis) for i, k in enumerate(kernel))
    return pixels
