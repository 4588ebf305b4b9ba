"""Stable Diffusion pipelines of a few hundred thousand random weights, made from configurations and saved."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

WORDS = ("a", "red", "blue", "house", "cat", "dog", "by", "on", "lake", "street", "night", "two", "the", "of", "old")


def tokenizer(folder: Path, max_length: int, pad: str) -> None:
    """A CLIPTokenizer of single characters and WORDS: vocab.json and merges.txt, as CLIP's own are written."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *[c + "</w>" for c in letters]]
    merges = []
    for word in WORDS:  # left to right: each merge is new, so that the word becomes one token
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                vocabulary.append(parts[0] + parts[1])
            parts[:2] = [parts[0] + parts[1]]
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    config = {"model_max_length": max_length, "tokenizer_class": "CLIPTokenizer", "pad_token": pad}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def fill(network: torch.nn.Module, salt: str = "") -> torch.nn.Module:
    """The same random weights in every run, of a size that keeps activations near one."""
    for name, p in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.data = 0.8 * noise / (p[0].numel() ** 0.5)
        else:
            p.data = 0.05 * noise + name.endswith("weight")  # norms near one, biases near zero
    return network.eval()


def save(folder: Path, kind: str = "sd1") -> Path:
    """A pipeline: "sd1" (epsilon, padded with the end) or "sd2" (velocity, linear projections, padded with "!")."""
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    second = kind == "sd2"
    width = 24 if second else 16
    tokenizer(folder / "files", 16, "!" if second else "<|endoftext|>")
    tokens = CLIPTokenizer.from_pretrained(folder / "files")
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2 if second else 1,
        cross_attention_dim=width,
        attention_head_dim=(2, 4) if second else 2,
        norm_num_groups=8,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.9,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if second:
        scheduler = DDIMScheduler(**schedule, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    else:  # as the folders of SD 1.x are: of another scheduler, and silent about clip_sample
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(
        vae=fill(vae),
        text_encoder=fill(CLIPTextModel(text)),
        tokenizer=tokens,
        unet=fill(unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
