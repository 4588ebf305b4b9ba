"""FVD: the Fréchet distance between two sets of clips, on the features of a video network (Unterthiner, 1812.01717).

Published FVDs differ in network, frames, resize and covariance; a signature names all four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.metrics.frechet import check_covariance, frechet_differences, frechet_estimates, frechet_from_features
from bench.metrics.sets import SetMetric
from bench.types import Error, UsageError


def fvd(features_a: np.ndarray, features_b: np.ndarray, covariance: str = "unbiased") -> float:
    """Squared Fréchet distance of two sets of clip features [n, d] and [m, d]; rows are clips.

    StyleGAN-V and cd-fvd divide the covariance by n ("biased"). Raises Error naming the fault of the features.
    """
    return frechet_from_features(features_a, features_b, covariance=covariance)


def first_frames(clips: Any, frames: int, stride: int = 1) -> Any:
    """Frames 0, stride, 2 stride, ... of clips [B, 3, T, H, W], `frames` of them; raises Error where T is too short."""
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise Error(f"clips must be [B, 3, T, H, W], not {list(clips.shape)}")
    needed = (frames - 1) * stride + 1
    if clips.shape[2] < needed:
        raise Error(
            f"clips of {clips.shape[2]} frames are shorter than {frames} frames at stride {stride}",
            hint=f"give {needed} frames, or ask for fewer",
        )
    return clips[:, :, :needed:stride]


@dataclass(frozen=True)
class FVD(SetMetric):
    """Fréchet video distance between two sets of clips: plug-in and, as `corrected`, without its bias, with an error.

    Media are clips [B, 3, T, H, W]. `extractor` names a network of clips; its weights manifest says how frames reach
    its size. Raises UsageError for frames or a stride below 1, and an unknown covariance.
    """

    extractor: str = "i3d-kinetics-400"
    real: str = "clip"  # media of the reference
    frames: int = 16
    stride: int = 1  # frames from one to the next
    covariance: str = "unbiased"  # of the plug-in; "biased" divides by n

    version = 1
    parts = ("", "corrected")
    family = "fvd"

    def __post_init__(self):
        check_covariance(self.covariance)
        if self.frames < 1 or self.stride < 1:
            raise UsageError(f"frames = {self.frames} and stride = {self.stride} must be 1 or more")

    def features_of(self, clips, ctx):
        return super().features_of(first_frames(clips, self.frames, self.stride), ctx)

    def estimates(self, sets):
        return frechet_estimates(sets, self.covariance)

    def difference(self, a, b):
        return frechet_differences(a, b)

    def settings(self) -> str:
        return f"cov:{self.covariance}|frames:{self.frames}|stride:{self.stride}|"
