"""The embedded feature network: a small convolutional net for a Fréchet distance that needs no download.

Its distances are not those of Inception and compare with no paper; they grow when pictures degrade (README.md here).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "embedded-v1"
DIM = 32
WIDTHS = (16, 32, 64, 64)


def path() -> Path:
    """The weights file."""
    return Path(__file__).parent / "checkpoints" / "mini-features" / "features.safetensors"


def build() -> Any:
    """The network with weights as torch left them: uint8 [B, 3, H, W], H and W >= 64 -> float32 [B, 32].

    Four strided convolutions; the means of the last three over the picture go through one linear layer. There is no
    normalisation over the batch, so the features of a picture are its own.
    """
    import torch
    from torch.nn.functional import silu

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            pairs = zip((3, *WIDTHS), WIDTHS, strict=False)
            self.stages = torch.nn.ModuleList(torch.nn.Conv2d(i, o, 3, stride=2) for i, o in pairs)
            self.project = torch.nn.Linear(sum(WIDTHS[1:]), DIM)

        def forward(self, images):
            x = images.float() / 127.5 - 1
            pooled = []
            for number, stage in enumerate(self.stages):
                x = silu(stage(x))
                if number > 0:
                    pooled.append(x.mean((2, 3)))
            return self.project(torch.cat(pooled, 1))

    return Features()


def load(device: str = "cpu") -> Any:
    """The trained network in evaluation mode: uint8 [B, 3, H, W], H and W >= 64 -> float32 [B, 32]."""
    import torch
    from safetensors.torch import load_file

    with torch.device("meta"):
        network = build()
    network.load_state_dict(load_file(path()), assign=True)
    return network.requires_grad_(False).eval().to(device)
