"""The embedded Stable Diffusion in miniature: drawn shapes of 32 px, from captions of a world of its own."""

from __future__ import annotations

from typing import Literal

from bench.adapters.stable_diffusion import StableDiffusion
from bench.types import Weights

CHECKPOINT = Weights("mini-sd")


class MiniSD(StableDiffusion):
    """StableDiffusion on an embedded checkpoint, with the settings that it was tuned for (`bench/mini/README.md`).

    `checkpoint` is `mini-sd`, `mini-sd-skewed`, or a folder that a recipe made of one of them.
    """

    def __init__(
        self,
        checkpoint: Weights = CHECKPOINT,
        unet: Weights | None = None,
        text_encoder: Weights | None = None,
        lora: Weights | None = None,
        guidance: float = 4.0,
        steps: int = 20,
        scheduler: Literal["ddim", "ddpm", "euler", "lms", "pndm"] = "ddim",
        *,
        pickle: Literal["refuse", "allow"] = "refuse",
        device: str = "cpu",
    ):
        edits = {"unet": unet, "text_encoder": text_encoder, "lora": lora, "pickle": pickle}
        super().__init__(checkpoint, **edits, guidance=guidance, steps=steps, scheduler=scheduler, device=device)
