"""Training of the embedded networks: small KL autoencoders, and the features of the offline Fréchet distance.

Both learn from drawn pictures alone, so that the photographs they are scored on were never seen.
"""

from __future__ import annotations

import io
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.mini import features
from bench.mini.drawn import blur, draw
from bench.recipe import Recipe, TrainContext
from bench.types import Error, UsageError

DEGRADATIONS = ("blur", "noise", "jpeg", "shrink", "quantise", "fade", "tint", "expose")


@dataclass(frozen=True)
class MiniAE(Recipe):
    """A KL autoencoder (f = 4) of diffusers, trained from scratch on drawn pictures."""

    name: ClassVar[str] = "mini-ae"
    version: ClassVar[int] = 1

    width: int = 16  # channels at full resolution; 2 and 3 times as many below; a multiple of 8
    latent_channels: int = 4
    steps: int = 2000
    batch: int = 4
    size: int = 64  # px
    lr: float = 1.5e-3
    kl: float = 1e-6

    def __post_init__(self):
        _positive(self, "steps", "batch", "lr")
        if self.latent_channels < 3:
            raise UsageError(f"mini-ae: latent_channels must be at least 3, not {self.latent_channels}")
        if self.width <= 0 or self.width % 8:
            raise UsageError(f"mini-ae: width must be a multiple of 8, not {self.width}")
        if self.size <= 0 or self.size % 4:
            raise UsageError(f"mini-ae: size must be a multiple of 4, not {self.size}")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            model = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(self.width, 2 * self.width, 3 * self.width),
                layers_per_block=1,
                latent_channels=self.latent_channels,
                norm_num_groups=1,
                sample_size=self.size,
                mid_block_add_attention=False,
                force_upcast=False,
            )
        model = begin_as_resampler(initialise(model, ctx.generator(0, "weights"))).to(ctx.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0)
        first = ctx.restore(model=model, optimizer=optimizer)
        for step in range(first, self.steps):
            images = torch.from_numpy(_pictures(ctx, step, self.batch, self.size)).to(ctx.device)
            images = images.permute(0, 3, 1, 2) / 127.5 - 1
            with torch.autocast(ctx.device.type, torch.bfloat16):  # halves the time where the CPU has AMX
                posterior = model.encode(images).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=ctx.generator(step, "latent")).to(ctx.device)
                decoded = model.decode(posterior.mean + posterior.std * noise).sample
            losses = kl_autoencoder_loss(
                images, decoded.float(), posterior.mean.float(), posterior.logvar.float(), self.kl
            )
            _update(optimizer, losses["loss"], self.lr * learning_rate(step, self.steps))
            yield {name: float(value.detach()) for name, value in losses.items()}
        model.eval()
        with torch.no_grad():
            images = torch.from_numpy(_pictures(ctx, self.steps, 64, self.size)).to(ctx.device)
            latents = model.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
        model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        return model

    def export(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        import torch

        pictures = _pictures(ctx, self.steps + 1, 64, self.size)
        with torch.no_grad():
            images = torch.from_numpy(pictures).to(ctx.device).permute(0, 3, 1, 2) / 127.5 - 1
            decoded = model.decode(model.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((decoded - images) / 2).square().mean((1, 2, 3))
        yield "psnr_drawn", float((-10 * mse.clamp_min(1e-10).log10()).mean())


@dataclass(frozen=True)
class MiniFeatures(Recipe):
    """The embedded feature network: learns to tell how, and how much, drawn pictures were degraded."""

    name: ClassVar[str] = "mini-features"
    version: ClassVar[int] = 1

    steps: int = 1900
    pictures: int = 12  # drawn for each step
    variants: int = 4  # differently degraded copies of each
    size: int = 64  # px
    lr: float = 2e-3

    def __post_init__(self):
        _positive(self, "steps", "pictures", "variants", "lr")
        if self.size < 64:
            raise UsageError(f"mini-features: size must be at least 64, not {self.size}")
        if self.pictures * self.variants < 2:
            raise UsageError("mini-features: pictures x variants must be at least 2, for a covariance")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch

        with torch.device("meta"):
            model = features.build()
            head = torch.nn.Linear(features.DIM, len(DEGRADATIONS) + 10)
        model = initialise(model, ctx.generator(0, "weights"), gain=math.sqrt(6)).to(ctx.device)
        head = initialise(head, ctx.generator(0, "head")).to(ctx.device)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=self.lr, weight_decay=1e-3)
        first = ctx.restore(model=model, head=head, optimizer=optimizer)
        for step in range(first, self.steps):
            images, strengths = self._examples(ctx, step)
            images, strengths = images.to(ctx.device), strengths.to(ctx.device)
            codes = model(images)
            losses = feature_loss(codes, head(codes), torch.cat([strengths, statistics(images)], 1))
            _update(optimizer, losses["loss"], self.lr * learning_rate(step, self.steps))
            yield {name: float(value.detach()) for name, value in losses.items()}
        model.eval()
        with torch.no_grad():  # unit variance on clean drawn pictures, folded into the last layer
            pictures = torch.from_numpy(_pictures(ctx, self.steps, 256, self.size)).to(ctx.device).permute(0, 3, 1, 2)
            codes = model(pictures)
            scale = 1 / codes.std(0)
            model.project.bias.copy_((model.project.bias - codes.mean(0)) * scale)
            model.project.weight.mul_(scale[:, None])
        return model

    def export(self, model: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "features.safetensors")

    def _examples(self, ctx: TrainContext, step: int):
        """uint8 [B, 3, size, size] and their strengths, float32 [B, D], of pictures * variants degraded pictures."""
        import torch

        border = 8  # px: what is cut off, so that JPEG's grid may lie anywhere
        rng = np.random.default_rng(ctx.seed(step, "degradations"))
        images, strengths = [], []
        for picture in _pictures(ctx, step, self.pictures, self.size + border):
            for _ in range(self.variants):
                amounts = np.where(rng.random(len(DEGRADATIONS)) < 0.3, rng.random(len(DEGRADATIONS)), 0)
                y, x = rng.integers(0, border + 1, 2)
                degraded = degrade(picture, dict(zip(DEGRADATIONS, amounts.tolist(), strict=True)), rng)
                images.append(degraded[y : y + self.size, x : x + self.size])
                strengths.append(amounts)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return stacked, torch.from_numpy(np.stack(strengths).astype(np.float32))


def kl_autoencoder_loss(images, decoded, mean, logvar, kl_weight: float) -> dict[str, Any]:
    """Scalars by name; images and decoded [B, 3, H, W] in [-1, 1], mean and logvar [B, c, h, w] of the posterior.

    4 MSE + 0.2 L1 + 0.2 L1 of the differences between neighbours + KL as in latent diffusion (Rombach et al. 2022): its
    sum over a picture's latents against the mean error over that picture's values.
    """
    error = decoded - images
    mse, l1 = error.square().mean(), error.abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(images)
    return {"loss": 4 * mse + 0.2 * l1 + 0.1 * edges + kl_weight * kl, "mse": mse, "l1": l1, "kl": kl}


def feature_loss(codes, predicted, target) -> dict[str, Any]:
    """Scalars by name: squared error of [B, T], and the distance of the covariance of codes [B, d] from the identity.

    The second keeps every feature in use (the covariance term of VICReg, Bardes et al. 2022).
    """
    import torch

    error = (predicted - target).square().mean()
    centred = codes - codes.mean(0)
    covariance = centred.T @ centred / (len(codes) - 1)
    spread = (covariance - torch.eye(codes.shape[1], device=codes.device)).square().sum() / codes.shape[1]
    return {"loss": error + 0.02 * spread, "error": error, "spread": spread}


def statistics(images):
    """float32 [B, 10] of uint8 [B, 3, H, W]: means and deviations of the channels, log energies of four octaves."""
    import torch
    from torch.nn.functional import avg_pool2d

    x = images.float() / 127.5 - 1
    columns = [x.mean((2, 3)), 2 * x.std((2, 3))]
    grey = x.mean(1, keepdim=True)
    for _ in range(4):
        low = avg_pool2d(grey, 2)
        energy = grey.square().mean((1, 2, 3)) - low.square().mean((1, 2, 3))  # what the means of 2 x 2 px lose
        columns.append(0.2 * (energy.clamp_min(0) + 1e-5).log()[:, None] + 1)
        grey = low
    return torch.cat(columns, 1)


def degrade(picture: np.ndarray, amounts: Mapping[str, float], rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3] after each degradation in turn, of strength 0 (none) to 1, in the order of pipelines: colour,
    optics, sampling, sensor, storage."""
    from PIL import Image

    x = picture.astype(np.float32) / 255
    if amounts["fade"]:
        grey = x.mean(2, keepdims=True)
        x = grey + (x - grey) * np.float32(1 - amounts["fade"])
    if amounts["tint"]:
        x = x + np.float32(0.25 * amounts["tint"]) * np.array([1, 0, -1], np.float32) * (
            1 if rng.random() < 0.5 else -1
        )
    if amounts["expose"]:
        x = np.clip(x, 0, 1) ** np.float32(math.exp((1 if rng.random() < 0.5 else -1) * 0.9 * amounts["expose"]))
    if amounts["blur"]:
        x = blur(x, 3 * amounts["blur"] ** 1.5 + 0.2)
    x = np.clip(x, 0, 1)
    if amounts["shrink"]:
        height, width = x.shape[:2]
        factor = 1 + 3 * amounts["shrink"]
        image = Image.fromarray(np.rint(x * 255).astype(np.uint8))
        small = image.resize((round(width / factor), round(height / factor)), Image.Resampling.BILINEAR)
        x = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    if amounts["noise"]:
        x = x + np.float32(0.15 * amounts["noise"] ** 1.5) * rng.standard_normal(x.shape, dtype=np.float32)
    x = np.clip(x, 0, 1)
    if amounts["quantise"]:
        levels = round(2 ** (6 - 4 * amounts["quantise"])) - 1
        x = np.rint(x * levels) / levels
    pixels = np.rint(x * 255).astype(np.uint8)
    if amounts["jpeg"]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=round(95 - 88 * amounts["jpeg"]))
        pixels = np.asarray(Image.open(file))
    return pixels


def initialise(model: Any, generator: Any, gain: float = 1.0) -> Any:
    """A model built on torch's meta device, with torch's usual initial weights, drawn from the generator alone.

    Without normalisation layers, a gain of sqrt(6) keeps the scale of the signal (He et al. 2015).
    """
    import torch

    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            weight, bias = own.pop("weight", None), own.pop("bias", None)
            if own:
                raise Error(f"cannot initialise {type(module).__name__}: unknown parameters {', '.join(own)}")
            if weight is None:
                continue
            if weight.ndim == 1:  # of a normalisation
                weight.fill_(1)
                bias.zero_()
                continue
            bound = 1 / math.sqrt(weight[0].numel())
            weight.uniform_(-gain * bound, gain * bound, generator=generator)
            if bias is not None:
                bias.uniform_(-bound, bound, generator=generator)
    return model


def begin_as_resampler(model: Any, constant: float = 8.0) -> Any:
    """An AutoencoderKL (one norm group, no attention) whose first three latents are the picture shrunk by averaging and
    whose decoder enlarges them bilinearly: training starts above 20 dB instead of at noise, which saves most of it.

    The colours and their negatives run through six lanes of channels; since silu(x) - silu(-x) = x, a pair passes the
    last activation unchanged. Two more lanes hold a large constant, so that the last normalisation divides by almost
    the same number for every picture. Residual blocks start as their shortcuts; all other channels stay random.
    """
    import torch
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    def straight(conv: Any, kernel: torch.Tensor) -> None:
        conv.weight[:8] = 0
        conv.weight[:, 6:8] = 0
        conv.bias[:8] = 0
        middle = len(kernel) // 2
        for lane in range(6):
            conv.weight[lane, lane] = kernel
        for lane in (6, 7):
            conv.weight[lane, lane, middle, middle] = 1

    def enter(conv: Any) -> None:
        conv.weight[:8] = 0
        conv.bias[:8] = torch.tensor([0.0] * 6 + [constant, -constant])
        for lane in range(6):
            conv.weight[lane, lane // 2, 1, 1] = 1 - 2 * (lane % 2)

    def undo(norm: Any) -> None:
        norm.weight.fill_(constant * math.sqrt(2 / norm.num_channels))
        norm.weight[6:8] /= constant

    def leave(norm: Any, conv: Any) -> None:
        undo(norm)
        conv.weight[:3] = 0
        conv.bias[:3] = 0
        for lane in range(6):
            conv.weight[lane // 2, lane, 1, 1] = 1 - 2 * (lane % 2)

    bilinear = torch.tensor([0.25, 0.5, 0.25])  # after doubling each pixel
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    channels = model.config.latent_channels
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResnetBlock2D):
                undo(module.norm1)
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
                if module.conv_shortcut is not None:
                    straight(module.conv_shortcut, torch.ones(1, 1))
            elif isinstance(module, Downsample2D):
                straight(module.conv, average)
            elif isinstance(module, Upsample2D):
                straight(module.conv, bilinear[:, None] * bilinear)
        for half in (model.encoder, model.decoder):
            enter(half.conv_in)
            leave(half.conv_norm_out, half.conv_out)
        model.encoder.conv_out.weight[channels:] = 0
        model.encoder.conv_out.bias[channels:] = -8  # log variance of the posterior
        for conv in (model.quant_conv, model.post_quant_conv):
            conv.weight[:, :, 0, 0] = torch.eye(len(conv.weight))
            conv.bias.zero_()
    return model


def learning_rate(step: int, steps: int, warm: int = 100, decay: float = 0.4) -> float:
    """Factor of the learning rate: up over the first `warm` steps, flat, down to zero over the last share `decay`."""
    return min(1.0, (step + 1) / warm, (steps - step) / (decay * steps))


def _update(optimizer: Any, loss: Any, lr: float) -> None:
    import torch

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _pictures(ctx: TrainContext, step: int, count: int, size: int) -> np.ndarray:
    return draw([ctx.seed(step, f"picture/{i}") for i in range(count)], size)


def _positive(recipe: Recipe, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) <= 0:
            raise UsageError(f"{recipe.name}: {name} must be positive, not {getattr(recipe, name)}")
