"""Text to pictures with a Stable Diffusion pipeline of diffusers, each picture from a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def generate(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int = 20, guidance: float = 4.0, batch: int = 64
):
    """float32 [n, 3, H, W] in [0, 1]; picture i is drawn from prompts[i] and seeds[i].

    The pipeline's own scheduler with classifier-free guidance (Ho and Salimans 2022): empty + guidance (prompt -
    empty); a guidance of 1 is the prompt alone. Schedulers that draw noise at each step are not for this loop.
    """
    import torch

    parts = []
    with torch.no_grad():
        for first in range(0, len(prompts), batch):
            chosen = slice(first, first + batch)
            hidden = embed(pipeline, prompts[chosen])
            if guidance != 1:
                hidden = torch.cat([embed(pipeline, [""] * len(hidden)), hidden])
            latents = _sample(pipeline, hidden, _noise(pipeline, seeds[chosen]), steps, guidance)
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
            parts.append((decoded / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(parts)


def embed(pipeline: Any, prompts: Sequence[str]):
    """float32 [n, L, c]: what the U-Net attends to."""
    ids = pipeline.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0]


def _noise(pipeline: Any, seeds: Sequence[int]):
    import torch

    size = pipeline.unet.config.sample_size
    shape = (pipeline.unet.config.in_channels, size, size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipeline.unet.device)


def _sample(pipeline: Any, hidden: Any, latents: Any, steps: int, guidance: float):
    import torch

    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = latents if guidance == 1 else torch.cat([latents, latents])
        predicted = pipeline.unet(scheduler.scale_model_input(both, t), t, hidden).sample
        if guidance != 1:
            empty, prompted = predicted.chunk(2)
            predicted = empty + guidance * (prompted - empty)
        latents = scheduler.step(predicted, t, latents).prev_sample
    return latents
