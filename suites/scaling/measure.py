"""Measuring a diffusion loss so finely that a law can be fitted to it.

The loss is a mean over data, noise and times. All three are fixed once, so that every training of a study answers the
same questions: what differs between two losses is then the models. E of a law is no entropy here, it is the conditional
variance of the target, weighted by the density of times: losses compare inside one cell of data, autoencoder and
density only (`loss_signature`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BINS = 10
CELL = ("data", "autoencoder", "latents", "condition", "target", "density", "weighting", "samples", "seed")


@dataclass(frozen=True)
class Questions:
    """What a model is asked: latents [n, c, H, W], condition [n, m], noise as the latents, times [n] from small to
    large."""

    latents: Tensor
    text: Tensor
    noise: Tensor
    times: Tensor

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class Measured:
    """The loss of each sample, in the order of times, and what follows: mean, standard error, and means of ten equal
    parts of the samples, from the noisiest."""

    losses: np.ndarray  # float64 [n]

    @property
    def mean(self) -> float:
        return float(self.losses.mean())

    @property
    def se(self) -> float:
        return stratified_error(self.losses)

    @property
    def bins(self) -> list[float]:
        return [float(part.mean()) for part in np.array_split(self.losses, BINS)]


def questions(latents: Tensor, text: Tensor, seed: int) -> Questions:
    """Sample i has noise from a generator of (seed, i) and the time F^-1((i + u_i) / n), with u_i from there as well; F
    is the logit-normal distribution. Fewer samples have the same noise, at other times."""
    import torch
    from scipy.special import expit, ndtri

    n = len(latents)
    shape = tuple(latents.shape[1:])
    noise = np.empty((n, *shape), np.float32)
    places = np.empty(n)
    for i in range(n):
        rng = np.random.Generator(np.random.Philox(key=[seed, i]))
        noise[i] = rng.standard_normal(shape, np.float32)
        places[i] = (i + rng.random()) / n
    times = expit(ndtri(np.clip(places, 1e-12, 1 - 1e-12))).astype(np.float32)
    return Questions(
        latents, text, torch.from_numpy(noise).to(latents.device), torch.from_numpy(times).to(latents.device)
    )


def measure(model: Callable[[Tensor, Tensor, Tensor], Tensor], asked: Questions, batch: int = 256) -> Measured:
    """Squared errors of velocities, data - noise, at t data + (1 - t) noise. The model is called without gradients."""
    import torch

    found = []
    with torch.no_grad():
        for at in range(0, len(asked), batch):
            part = slice(at, at + batch)
            data, noise, times = asked.latents[part], asked.noise[part], asked.times[part]
            t = times.view(-1, 1, 1, 1)
            error = model(t * data + (1 - t) * noise, times, asked.text[part]) - (data - noise)
            found.append(error.square().mean((1, 2, 3)).double().cpu().numpy())
    return Measured(np.concatenate(found))


def stratified_error(values: np.ndarray) -> float:
    """Standard error of the mean of values in the order of their strata: neighbours are two draws of one stratum, so
    that their differences alone are chance. NaN below four values."""
    n = len(values)
    if n < 4:
        return math.nan
    pairs = values[: n - n % 2].reshape(-1, 2)
    return float(np.sqrt((np.diff(pairs, axis=1) ** 2).sum() * n / (n - n % 2)) / n)


def difference(a: Measured, b: Measured) -> tuple[float, float]:
    """Mean of b - a over the same questions, and its standard error, far below that of either.

    Raises ValueError where the numbers of samples differ: they cannot be the same questions.
    """
    if len(a.losses) != len(b.losses):
        raise ValueError(f"{len(a.losses)} and {len(b.losses)} samples: these answer different questions")
    return float((b.losses - a.losses).mean()), stratified_error(b.losses - a.losses)


def loss_signature(cell: Mapping[str, Any]) -> str:
    """What a loss means, as text that a table keeps: the parts of CELL, and a digest of them all.

    Raises ValueError where a part is missing or unknown.
    """
    if set(cell) != set(CELL):
        wrong = sorted(set(cell) ^ set(CELL))
        raise ValueError(f"a loss is described by {', '.join(CELL)}; {wrong[0]} is missing or not among them")
    digest = hashlib.sha256(json.dumps(dict(cell), sort_keys=True).encode()).hexdigest()[:12]
    return f"{cell['target']}|t:{cell['density']}|w:{cell['weighting']}|n:{cell['samples']}|cell:{digest}"


def one_cell(signatures: Sequence[str]) -> str:
    """The signature that all have. Raises ValueError where they differ: such losses have floors of their own."""
    found = sorted(set(signatures))
    if len(found) != 1:
        raise ValueError(
            f"losses of {len(found)} cells cannot be pooled into one law: {', '.join(found[:3]) or 'none is named'}"
        )
    return found[0]
