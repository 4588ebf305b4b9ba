"""Autoencoders in the format of diffusers, of images and of videos."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bench.capabilities import Latents
from bench.types import Error, UsageError, Weights
from bench.weights import open_folder

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel", "AutoencoderDC", "AutoencoderKLCosmos")
VIDEO_CLASSES = ("AutoencoderKLCosmos", "AutoencoderKLWan", "AutoencoderKLHunyuanVideo")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class GaussianLatents(Latents):
    """The posterior of a variational autoencoder: `data` is its mean, which is its mode."""

    std: Any = None  # [B, c, ...], like data


class VAE:
    """An image autoencoder from a folder with `config.json` and safetensors, or from a hub id that was fetched.

    `dtype` is that of weights, computation and latents; a continuous latent counts as many bits per value. A VQModel
    counts log2 of its codebook's size per code, and is decoded from the codes alone. Latents are not scaled, images
    are not tiled; sides that are no multiple of `factor` raise Error, as padding is for a protocol to decide.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        *,
        device: str = "cpu",
    ):
        import torch

        self.net = _open(weights, dtype, IMAGE_CLASSES).to(device)
        self.kind = type(self.net).__name__
        if self.kind != "AutoencoderKLCosmos":  # whose convolutions are three-dimensional
            self.net.to(memory_format=torch.channels_last)  # up to twice as fast
        self.factor = _factor(self.net)  # px of an image's side per latent
        self.device = device

    def encode(self, images: Tensor) -> Latents:
        """float32 [B, 3, H, W] in [-1, 1] -> latents [B, c, H / factor, W / factor], or codes for a VQModel."""
        import torch

        _check_sides(images, self.factor)
        with torch.no_grad():
            x = images.to(self.device, self.net.dtype).contiguous(memory_format=torch.channels_last)
            if self.kind == "VQModel":
                return self._codes(self.net.encode(x).latents)
            if self.kind == "AutoencoderTiny":
                return _continuous(self.net.encode(x).latents)
            if self.kind == "AutoencoderDC":
                return _continuous(self.net.encode(x).latent)
            if self.kind == "AutoencoderKLCosmos":
                return _continuous(self.net.encode(x.unsqueeze(2)).latent_dist.mode().squeeze(2))
            posterior = self.net.encode(x).latent_dist
            return _continuous(posterior.mean, posterior.std)

    def decode(self, latents: Tensor | Latents, seeds: Sequence[int] | None = None) -> Tensor:
        """float32 [B, 3, H, W], not clamped.

        With seeds, latents of an AutoencoderKL are drawn from the posterior, each from its own generator on the CPU;
        the other classes have no posterior and ignore seeds. A tensor is decoded as it is (codes for a VQModel).
        """
        import torch

        with torch.no_grad():
            if self.kind == "VQModel":
                codes = latents.indices if isinstance(latents, Latents) else latents
                return self._from_codes(codes).float()
            z = draw(latents, seeds).to(self.device, self.net.dtype)
            if self.kind == "AutoencoderKLCosmos":
                return self.net.decode(z.unsqueeze(2)).sample.squeeze(2).float()
            return self.net.decode(z).sample.float()

    def _codes(self, z: Tensor) -> Latents:
        """z [B, d, h, w] -> the nearest entries of the codebook, as int64 [B, h, w]."""
        book = self.net.quantize
        quantised, _, (_, _, codes) = book(z)
        codes = codes.reshape(len(z), *z.shape[2:])
        bits = math.log2(book.n_e) * codes[0].numel() if len(z) else 0.0
        return Latents(quantised, [bits] * len(z), indices=codes)

    def _from_codes(self, codes: Tensor) -> Tensor:
        codes = codes.to(self.device)
        shape = (*codes.shape, self.net.quantize.vq_embed_dim)  # [B, h, w, d], as the codebook wants it
        if self.net.config.lookup_from_codebook:
            return self.net.decode(codes.reshape(-1), force_not_quantize=True, shape=shape).sample
        entries = self.net.quantize.get_codebook_entry(codes.reshape(-1), shape)
        return self.net.decode(entries, force_not_quantize=True).sample


class VideoVAE:
    """A causal video autoencoder: the first frame alone, then groups of `temporal_factor` frames.

    As VAE, for clips of 1 + k * temporal_factor frames; other lengths raise Error, because the network would return
    another number of frames than it was given. Clips are coded whole, without tiles in space or time. Wan and
    HunyuanVideo have a posterior to draw from, Cosmos has none.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        *,
        device: str = "cpu",
    ):
        self.net = _open(weights, dtype, VIDEO_CLASSES).to(device)
        self.factor = _factor(self.net)  # px of a frame's side per latent
        wan = type(self.net).__name__ == "AutoencoderKLWan"
        config = self.net.config  # frames per latent, after the first
        self.temporal_factor = config.scale_factor_temporal if wan else config.temporal_compression_ratio
        if hasattr(self.net, "use_framewise_encoding"):  # HunyuanVideo would cut long clips into overlapping pieces
            self.net.use_framewise_encoding = self.net.use_framewise_decoding = False
        self.device = device

    def encode_video(self, clips: Tensor) -> Latents:
        """float32 [B, 3, T, H, W] in [-1, 1] -> [B, c, 1 + (T - 1) / temporal_factor, H / factor, W / factor]."""
        import torch

        _check_sides(clips, self.factor)
        if (clips.shape[2] - 1) % self.temporal_factor:
            raise Error(
                f"vae: {clips.shape[2]} frames are not 1 + k * {self.temporal_factor}",
                hint="choose another length; a protocol may repeat the last frame and cut it off again",
            )
        with torch.no_grad():
            posterior = self.net.encode(clips.to(self.device, self.net.dtype)).latent_dist
            return _continuous(posterior.mode(), getattr(posterior, "std", None))

    def decode_video(self, latents: Tensor | Latents, seeds: Sequence[int] | None = None) -> Tensor:
        """float32 [B, 3, T, H, W], not clamped; seeds as for VAE."""
        import torch

        with torch.no_grad():
            return self.net.decode(draw(latents, seeds).to(self.device, self.net.dtype)).sample.float()


def draw(latents: Tensor | Latents, seeds: Sequence[int] | None) -> Tensor:
    """The latent to decode: the posterior's mode, or, with seeds and a standard deviation, mean + std * noise.

    The noise of item i is float32 from a CPU generator seeded with seeds[i]: the same in any batch, on any device.
    """
    import torch

    if not isinstance(latents, Latents):
        return latents
    mean, std = latents.data, getattr(latents, "std", None)
    if seeds is None or std is None:
        return mean
    draws = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return mean + std * torch.stack(draws).to(mean.device, mean.dtype)


def _open(weights: str, dtype: str, classes: tuple[str, ...]) -> Any:
    """The network, in evaluation mode; raises Error where the folder is unfit, of another class, or incomplete."""
    if dtype not in DTYPES:
        raise UsageError(f"vae: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = open_folder(weights)  # looks through the folder before diffusers sees it
    if not (folder / "config.json").is_file():
        inside = "; the autoencoder of a pipeline is in its folder vae" if (folder / "vae").is_dir() else ""
        raise Error(f"vae: {weights} has no config.json", hint=f"name a folder that diffusers wrote{inside}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in classes:
        raise Error(f"vae: {weights} holds {name or 'no class'}", hint=f"read here: {', '.join(classes)}")

    import diffusers
    import torch

    try:
        net, loading = getattr(diffusers, name).from_pretrained(
            folder,
            torch_dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as e:
        raise Error(f"vae: {weights} cannot be opened as {name}: {str(e).splitlines()[0][:300]}") from e
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:  # diffusers would leave random numbers in place of missing weights
            raise Error(f"vae: {weights} has {len(loading[kind])} {kind.replace('_', ' ')}: {list(loading[kind])[:3]}")
    return net.eval().requires_grad_(False)


def _factor(net: Any) -> int:
    """Pixels of the side of an image per latent."""
    config = net.config
    kind = type(net).__name__
    if kind in ("AutoencoderKLCosmos", "AutoencoderKLHunyuanVideo"):
        return config.spatial_compression_ratio
    if kind == "AutoencoderKLWan":
        return config.scale_factor_spatial
    if kind == "AutoencoderTiny":
        return 2 ** (len(config.num_encoder_blocks) - 1)
    return 2 ** (len(config.encoder_block_out_channels if kind == "AutoencoderDC" else config.block_out_channels) - 1)


def _check_sides(images: Tensor, factor: int) -> None:
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise Error(
            f"vae: {height} x {width} px is not a multiple of the factor {factor}",
            hint=f"choose sizes that are multiples of {factor}",
        )


def _continuous(z: Tensor, std: Tensor | None = None) -> GaussianLatents:
    bits = 8.0 * z.element_size() * (z[0].numel() if len(z) else 0)
    return GaussianLatents(z, [bits] * len(z), std=std)
