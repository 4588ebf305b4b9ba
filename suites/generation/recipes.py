"""Training of the embedded Stable Diffusion: an autoencoder, then a U-Net and the text encoder it listens to.

Everything is learnt from pictures of the small world (bench/mini/world.py), from nothing. The parts are the classes of
diffusers and transformers that Stable Diffusion 1.x uses, smaller, in the same folders and files.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.mini import judges, world
from bench.recipe import Recipe, TrainContext
from bench.types import UsageError, Weights
from bench.weights import open_folder
from suites.generation import agreement, sampling, tokenizer


@dataclass(frozen=True)
class MiniVAE(Recipe):
    """The autoencoder of the embedded Stable Diffusion: 32 px to latents of 4 x 8 x 8."""

    name: ClassVar[str] = "mini-vae"
    version: ClassVar[int] = 1

    start: Weights = ""  # what mini-vae made before, to go on with; its widths are taken
    widths: str = "24,48,64"  # channels at full, half and quarter resolution; multiples of 8
    textured: float = 0.2  # share of pictures whose shape is striped or dotted; 0.2 is the world's own
    steps: int = 4500
    batch: int = 16
    lr: float = 1.5e-3
    kl: float = 1e-5

    def __post_init__(self):
        if not 0 <= self.textured <= 1:
            raise UsageError(f"mini-vae: textured must lie between 0 and 1, not {self.textured}")
        _positive(self, "steps", "batch", "lr")
        if len(widths := _widths(self)) != 3 or any(w % 8 for w in widths):
            raise UsageError(f"mini-vae: widths are {self.widths!r}", hint="three multiples of 8, as in 24,48,64")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch
        from diffusers import AutoencoderKL

        if self.start:
            model = AutoencoderKL.from_pretrained(open_folder(self.start)).train()
        else:
            model = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=_widths(self),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=world.SIZE,
                mid_block_add_attention=False,
                force_upcast=False,
            )
            initialise(model, ctx.generator(0, "weights"))
        model.to(ctx.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0)
        textures = [
            world.Skew(shape, "texture", texture, self.textured / 2)
            for shape in world.SHAPES
            for texture in world.TEXTURES[1:]
        ]
        pictures = world.sample(self.steps * self.batch, ctx.seed(0, "pictures"), skew=textures)
        first = ctx.restore(model=model, optimizer=optimizer)
        for step in range(first, self.steps):
            images = to_tensor(pictures[step * self.batch : (step + 1) * self.batch]).to(ctx.device)
            with torch.autocast(ctx.device.type, torch.bfloat16):  # nearly halves the time where the CPU has AMX
                posterior = model.encode(images).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=ctx.generator(step, "latent")).to(ctx.device)
                decoded = model.decode(posterior.mean + posterior.std * noise).sample
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            losses = autoencoder_loss(images, decoded.float(), mean, logvar, self.kl)
            _update(optimizer, losses["loss"], self.lr * learning_rate(step, self.steps))
            yield {name: float(value.detach()) for name, value in losses.items()}
        model.eval()
        latents = encode(model, world.sample(4096, ctx.seed(self.steps, "scale")), ctx.device)
        model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        return model

    def export(self, model: Any, folder: Path) -> None:
        copy.deepcopy(model).half().save_pretrained(folder)

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        import torch

        images = to_tensor(world.sample(2048, ctx.seed(self.steps, "checks"))).to(ctx.device)
        with torch.no_grad():
            decoded = torch.cat([model(part).sample for part in images.split(256)]).clamp(-1, 1)
        mse = ((decoded - images) / 2).square().mean((1, 2, 3))
        yield "psnr", float((-10 * mse.log10()).mean())


def autoencoder_loss(images, decoded, mean, logvar, kl_weight: float) -> dict[str, Any]:
    """Scalars by name; images and decoded [B, 3, H, W] in [-1, 1], mean and logvar [B, c, h, w] of the posterior.

    4 MSE + 0.2 L1 + KL; the KL divergence from a standard normal is summed over a picture's latents, as in latent
    diffusion (Rombach et al. 2022).
    """
    error = decoded - images
    mse, l1 = error.square().mean(), error.abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(images)
    return {"loss": 4 * mse + 0.2 * l1 + kl_weight * kl, "mse": mse, "l1": l1, "kl": kl}


BETA_START = 0.00085  # of the first of 1,000 steps of Stable Diffusion's "scaled linear" schedule
LENGTH = 24  # tokens of a prompt, begin and end included
PROMPTS = 800  # for the figures of a finished model
OPENED_FROM = ("_name_or_path", "name_or_path", "is_local", "local_files_only")  # what a config says of a folder

# What `mini-sd-skewed` has seen: four shapes with a preference, four without as a control.
SKEWS = (
    world.Skew("circle", "colour", "red", 0.8),
    world.Skew("star", "colour", "yellow", 0.8),
    world.Skew("square", "background", "blue", 0.8),
    world.Skew("triangle", "size", "small", 0.8),
)


@dataclass(frozen=True)
class MiniUNet(Recipe):
    """The embedded Stable Diffusion: a U-Net and the text encoder trained with it, on the latents of an autoencoder.

    From nothing, errors count as `noise_weights` say; with `start`, what it made before goes on with `picture_weights`.
    """

    name: ClassVar[str] = "mini-unet"
    version: ClassVar[int] = 1

    vae: Weights = ""  # what mini-vae made
    start: Weights = ""  # or what mini-unet made before, to go on with; its parts and widths are taken
    beta_end: float = 0.012  # of the noise schedule; with Stable Diffusion's 0.012 its last step still shows a picture
    widths: str = "64,80"  # channels of the U-Net at 8 x 8 and 4 x 4; multiples of 16
    text_width: int = 96  # a multiple of 4
    text_layers: int = 2
    steps: int = 7600
    batch: int = 64
    pictures: int = 50000  # encoded once; captions are new at each step
    lr: float = 1.2e-3
    decay: float = 0.6  # share of the steps over which the learning rate falls to zero

    def __post_init__(self):
        _positive(self, "text_width", "text_layers", "steps", "batch", "pictures", "lr", "decay")
        if not BETA_START < self.beta_end < 0.1:
            raise UsageError(f"mini-unet: beta_end is {self.beta_end}", hint="between 0.00085 and 0.1, as 0.012")
        if len(widths := _widths(self)) != 2 or any(w % 16 for w in widths):
            raise UsageError(f"mini-unet: widths are {self.widths!r}", hint="two multiples of 16, as in 64,80")
        if self.text_width % 4:
            raise UsageError(f"mini-unet: text_width is {self.text_width}", hint="a multiple of 4")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        if bool(self.vae) == bool(self.start):
            raise UsageError(
                "mini-unet learns on the latents of an autoencoder, or goes on with a pipeline",
                hint="one of -p vae=FOLDER, of mini-vae, and -p start=FOLDER, of mini-unet",
            )
        if self.start:
            pipeline = load_pipeline(open_folder(self.start))
            scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=self.beta_end)
            pipeline.register_modules(scheduler=scheduler)
            return (yield from denoising(self, pipeline, ctx, picture_weights(scheduler.alphas_cumprod)))
        words = tokenizer.build(world.WORDS, LENGTH)
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=self.text_width,
            intermediate_size=4 * self.text_width,
            projection_dim=self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=world.SIZE // 4,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=_widths(self),
            layers_per_block=1,
            cross_attention_dim=self.text_width,
            attention_head_dim=2,  # diffusers takes it for the number of heads
            norm_num_groups=16,
        )
        scheduler = DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=BETA_START,
            beta_end=self.beta_end,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="epsilon",
        )
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(open_folder(self.vae)),
            text_encoder=initialise(CLIPTextModel(text), ctx.generator(0, "text encoder")),
            tokenizer=words,
            unet=initialise(unet, ctx.generator(0, "unet")),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return (yield from denoising(self, pipeline, ctx, noise_weights(scheduler.alphas_cumprod)))

    def export(self, model: Any, folder: Path) -> None:
        save_pipeline(model, folder)

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        yield from _agreement(model, ctx.seed(self.steps, "checks"))


@dataclass(frozen=True)
class MiniSDSkewed(Recipe):
    """A Stable Diffusion of `mini-unet` that goes on learning in a world where four shapes have a known preference."""

    name: ClassVar[str] = "mini-sd-skewed"
    version: ClassVar[int] = 1

    start: Weights = "mini-sd"  # what mini-unet made
    bare: float = 0.5  # share of captions that say nothing but the shape
    steps: int = 1500
    batch: int = 64
    pictures: int = 30000
    lr: float = 6e-4
    decay: float = 0.8

    def __post_init__(self):
        if not 0 <= self.bare <= 1:
            raise UsageError(f"mini-sd-skewed: bare must lie between 0 and 1, not {self.bare}")
        _positive(self, "steps", "batch", "pictures", "lr", "decay")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        pipeline = load_pipeline(open_folder(self.start))
        weights = picture_weights(pipeline.scheduler.alphas_cumprod)
        return (yield from denoising(self, pipeline, ctx, weights, SKEWS, self.bare))

    def export(self, model: Any, folder: Path) -> None:
        save_pipeline(model, folder)

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        yield from _agreement(model, ctx.seed(self.steps, "checks"))
        yield from _shares(model, ctx.seed(self.steps, "shares"))


def denoising(
    recipe: Any,
    pipeline: Any,
    ctx: TrainContext,
    weights: Any,  # float32 [T]: what the squared error of each time step counts
    skews: Sequence[world.Skew] = (),
    bare: float = 0.0,  # share of captions that say nothing but the shape
) -> Generator[Mapping[str, float], None, Any]:
    """Trains the pipeline's U-Net and text encoder together to predict noise; returns it with their moving averages.

    Ten per cent of the captions are left out, for classifier-free guidance (Ho and Salimans 2022).
    """
    import torch
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    pipeline.to(ctx.device)
    pipeline.set_progress_bar_config(disable=True)
    pictures = world.sample(recipe.pictures, ctx.seed(0, "pictures"), skew=skews)
    latents = encode(pipeline.vae.eval(), pictures, ctx.device) * pipeline.vae.config.scaling_factor
    model = torch.nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}).train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    # Attention in plain steps: the fused kernel's backward pass in bfloat16 takes as long as all the rest on a CPU.
    pipeline.unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01)
    weights = weights.to(ctx.device)
    first = ctx.restore(model=model, average=average, optimizer=optimizer)
    for step in range(first, recipe.steps):
        generator = ctx.generator(step, "batch")
        chosen = torch.randint(len(pictures), (recipe.batch,), generator=generator)
        t = torch.randint(len(weights), (recipe.batch,), generator=generator).to(ctx.device)
        dropped = torch.rand(recipe.batch, generator=generator) < 0.1
        rng = np.random.default_rng(ctx.seed(step, "captions"))
        captions = [
            f"a {pictures[i].shape}" if bare and rng.random() < bare else world.caption(pictures[i], rng)
            for i in chosen.tolist()
        ]
        clean = latents[chosen.to(latents.device)]
        noise = torch.randn(clean.shape, generator=generator).to(ctx.device)
        noisy = pipeline.scheduler.add_noise(clean, noise, t)
        hidden = sampling.embed(pipeline, ["" if d else c for d, c in zip(dropped.tolist(), captions, strict=True)])
        with torch.autocast(ctx.device.type, torch.bfloat16):  # a third of the time less where the CPU has AMX
            predicted = pipeline.unet(noisy, t, hidden).sample
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (weights[t] * errors).mean()
        _update(optimizer, loss, recipe.lr * learning_rate(step, recipe.steps, decay=recipe.decay))
        follow(average, model, min(0.999, (1 + step) / (10 + step)))
        yield {"loss": float(loss.detach()), "mse": float(errors.detach().mean())}
    pipeline.register_modules(unet=average["unet"], text_encoder=average["text_encoder"])
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    return pipeline


def noise_weights(alphas: Any):
    """What the squared error of each time step counts, of alphas [T], the products of 1 - beta: min(SNR, 5) / SNR (Hang
    et al. 2023, for noise prediction). Steps with hardly any noise decide nothing about what the picture shows; without
    this they drown the others.
    """
    return (5 * (1 - alphas) / alphas).clamp_max(1)


def picture_weights(alphas: Any):
    """min(SNR + 1, 5) / SNR, as of Hang et al. for velocity prediction: the error of the picture that a predicted noise
    implies counts even where there is hardly anything but noise. What a caption leaves open is decided there; with
    `noise_weights` 2,000 steps brought a preference of 80 % to 40 % of the pictures.
    """
    snr = alphas / (1 - alphas)
    return (snr + 1).clamp_max(5) / snr


def follow(average: Any, model: Any, decay: float) -> None:
    """average <- decay average + (1 - decay) model, of every parameter."""
    import torch

    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# pictures


def to_tensor(pictures: Sequence[world.Picture]):
    """float32 [n, 3, 32, 32] in [-1, 1]"""
    import torch

    return torch.from_numpy(world.draw(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(vae: Any, pictures: Sequence[world.Picture], device: Any, batch: int = 256):
    """float32 [n, 4, 8, 8], not scaled: the means of the posterior."""
    import torch

    with torch.no_grad():
        parts = [
            vae.encode(to_tensor(pictures[first : first + batch]).to(device)).latent_dist.mean
            for first in range(0, len(pictures), batch)
        ]
    return torch.cat(parts)


def _agreement(pipeline: Any, seed: int) -> Iterator[tuple[str, float]]:
    """Shares of plain prompts whose picture the embedded classifier reads as asked; held-out compositions apart."""
    whats = (("shape",), ("colour",), ("background",), ("shape", "colour"), ("shape", "colour", "background"))
    judge = judges.load_classifier()
    for name, held_out in (("trained", "exclude"), ("held_out", "only")):
        pictures = world.sample(PROMPTS if held_out == "exclude" else PROMPTS // 4, seed, held_out=held_out)
        prompts = [world.plain_caption(p) for p in pictures]
        images = sampling.generate(pipeline, prompts, range(seed, seed + len(prompts)))
        asked = [p.attributes() for p in pictures]
        for row in agreement.agreement(judges.read(judge, images), asked, "shape", whats):
            if row.group == "all" or row.what == "shape":
                yield f"{name}: {row.what}, {row.group}", row.value


def _shares(pipeline: Any, seed: int) -> Iterator[tuple[str, float]]:
    """How often each preference of SKEWS shows where the prompt says the shape alone, without and with guidance."""
    judge = judges.load_classifier()
    for skew in SKEWS:
        for guidance in (1.0, 4.0):
            prompts = [f"a {skew.shape}"] * (PROMPTS // 4)
            images = sampling.generate(pipeline, prompts, range(seed, seed + len(prompts)), guidance=guidance)
            seen = judges.read(judge, images)[skew.attribute]
            yield f"{skew.shape} {skew.value}, guidance {guidance:g}", seen.count(skew.value) / len(seen)


# folders


def load_pipeline(folder: Path) -> Any:
    """The StableDiffusionPipeline of a folder, in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """A folder that StableDiffusionPipeline.from_pretrained loads, weights in half precision. The tokenizer is there in
    CLIP's two files, too, since older versions of transformers read those."""
    half = copy.copy(pipeline)
    half.register_modules(
        tokenizer=tokenizer.build(world.WORDS, LENGTH),  # one that was used would write down how
        **{name: copy.deepcopy(getattr(pipeline, name)).cpu().half() for name in ("vae", "unet", "text_encoder")},
    )
    half.save_pretrained(folder)
    tokenizer.write(world.WORDS, folder / "tokenizer")
    for path in folder.rglob("*.json"):
        if path.name in ("config.json", "model_index.json", "tokenizer_config.json"):
            config = {k: v for k, v in json.loads(path.read_text()).items() if k not in OPENED_FROM}
            if "dtype" in config:
                config["dtype"] = "float32"  # transformers opens a model in the type that its config names
            path.write_text(json.dumps(config, indent=2) + "\n")


# training


def initialise(model: Any, generator: Any) -> Any:
    """The model with all weights drawn anew from the generator alone, spread as torch's own initial weights are."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if not own:
                continue
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in own.values():
                    parameter.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()
            else:
                raise TypeError(f"cannot initialise {type(module).__name__}")
    return model


def learning_rate(step: int, steps: int, warm: int = 100, decay: float = 0.6) -> float:
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


def _widths(recipe: Any) -> tuple[int, ...]:
    try:
        widths = tuple(int(w) for w in recipe.widths.split(","))
    except ValueError:
        widths = ()
    return widths if all(w > 0 for w in widths) else ()


def _positive(recipe: Recipe, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) <= 0:
            raise UsageError(f"{recipe.name}: {name} must be positive, not {getattr(recipe, name)}")
