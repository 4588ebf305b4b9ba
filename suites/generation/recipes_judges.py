"""Training of the judges of the small world: they learn from pictures drawn for them, and are checked on fresh ones."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.mini import judges, world
from bench.recipe import Recipe, TrainContext
from bench.types import UsageError

NONSENSE = ("empty", "blob", "noise", "mixture", "half")  # kinds of pictures that show no shape, or not one


@dataclass(frozen=True)
class MiniClassifier(Recipe):
    """Reads every attribute of a picture of the small world, or says that it shows no shape."""

    name: ClassVar[str] = "mini-classifier"
    version: ClassVar[int] = 1

    steps: int = 1500
    batch: int = 128
    pictures: int = 20000  # drawn once, degraded anew at each step
    nonsense: int = 6000
    lr: float = 3e-3

    def __post_init__(self):
        _positive(self, "steps", "batch", "pictures", "nonsense", "lr")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch
        from torch.nn.functional import cross_entropy

        images, labels = examples(self.pictures, self.nonsense, ctx.seed(0, "pictures"))
        model = initialise(judges.build_classifier(), ctx.generator(0, "weights")).to(ctx.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.02)
        first = ctx.restore(model=model, optimizer=optimizer)
        model.train()
        for step in range(first, self.steps):
            generator = ctx.generator(step, "batch")
            chosen = torch.randint(len(images), (self.batch,), generator=generator)
            pictures = degrade(images[chosen], generator).to(ctx.device)
            with torch.autocast(ctx.device.type, torch.bfloat16):  # halves the time where the CPU has AMX
                logits = model(pictures)
            truth = labels[chosen].to(ctx.device)
            losses = {
                name: cross_entropy(logits[name].float(), truth[:, i], ignore_index=-1)
                for i, name in enumerate(judges.HEADS)
            }
            loss = sum(losses.values())
            _update(optimizer, loss, self.lr * learning_rate(step, self.steps))
            yield {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in losses.items()}}
        return model.eval()

    def export(self, model: Any, folder: Path) -> None:
        _save_half(model, folder / "classifier.safetensors")

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        seed = ctx.seed(self.steps, "checks")
        pictures = world.sample(2000, seed, held_out="any")
        clean = to_tensor(world.draw(pictures)).to(ctx.device)
        for condition, images in (("clean", clean), ("degraded", blur_and_noise(clean, 0.7, 0.05, seed))):
            found = judges.read(model, images)
            for name in judges.HEADS:
                right = sum(a == getattr(p, name) for a, p in zip(found[name], pictures, strict=True))
                yield f"{name}_{condition}", right / len(pictures)
        for kind in NONSENSE:
            found = judges.read(model, to_tensor(nonsense(kind, 500, seed)).to(ctx.device))
            yield f"none_{kind}", found["shape"].count(judges.NONE) / 500


# pictures


def examples(num_pictures: int, num_nonsense: int, seed: int):
    """uint8 [N, 3, 32, 32] and labels int64 [N, heads]: indices into judges.HEADS; of nonsense the shape alone has one,
    the others are -1."""
    import torch

    pictures = world.sample(num_pictures, seed, held_out="any")
    labels = np.full((num_pictures + num_nonsense, len(judges.HEADS)), -1, dtype=np.int64)
    for column, (name, values) in enumerate(judges.HEADS.items()):
        labels[:num_pictures, column] = [values.index(getattr(p, name)) for p in pictures]
    labels[num_pictures:, list(judges.HEADS).index("shape")] = judges.HEADS["shape"].index(judges.NONE)
    share = -(-num_nonsense // len(NONSENSE))
    others = np.concatenate([nonsense(kind, share, seed) for kind in NONSENSE])[:num_nonsense]
    return to_tensor(np.concatenate([world.draw(pictures), others])), torch.from_numpy(labels)


def nonsense(kind: str, n: int, seed: int) -> np.ndarray:
    """uint8 [n, 32, 32, 3], none of which shows one shape of the world, in the colours of the world.

    "empty" backgrounds, irregular or blurred "blob"s, "noise" from fine to coarse, a "mixture" of two pictures with
    different shapes (laid over each other, or side by side), and "half" a shape, cut through the middle.
    """
    rng = np.random.default_rng([seed, NONSENSE.index(kind)])
    some = world.sample(2 * n, seed ^ (NONSENSE.index(kind) + 1), held_out="any")
    pictures, others = some[:n], some[n:]
    backdrop = np.array([p.backdrop for p in pictures], dtype=np.float32)[:, None, None]
    foreground = np.array([p.foreground for p in pictures], dtype=np.float32)[:, None, None]
    centre = np.array([(p.x, p.y) for p in pictures], dtype=np.float32)[:, :, None, None] * world.SIZE
    grid = np.arange(world.SIZE, dtype=np.float32) + 0.5
    x, y = grid - centre[:, 0], grid[:, None] - centre[:, 1]  # [n, 1, 32], [n, 32, 1] px
    turn = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    along = np.cos(turn) * x + np.sin(turn) * y
    if kind == "empty":
        cover = rng.uniform(-0.15, 0.15, (n, 1, 1)) * along / world.SIZE
    elif kind == "blob":
        angle = np.arctan2(y, x)
        lobes = np.arange(2, 7)
        waves = rng.normal(size=(n, len(lobes))) / lobes
        waves *= rng.uniform(0.2, 0.45, (n, 1)) / np.linalg.norm(waves, axis=1, keepdims=True)  # never a circle
        phases = rng.uniform(0, 2 * np.pi, waves.shape)
        edge = np.ones((n, world.SIZE, world.SIZE), dtype=np.float32)
        for i, count in enumerate(lobes.tolist()):
            edge += waves[:, i, None, None] * np.cos(count * angle + phases[:, i, None, None])
        radius = np.array([p.radius for p in pictures])[:, None, None] * world.SIZE
        softness = np.where(rng.random((n, 1, 1)) < 0.5, 1.0, rng.uniform(0.5, 1.2, (n, 1, 1)) * radius)  # px
        cover = np.clip((radius * edge - np.hypot(x, y)) / softness + 0.5, 0, 1)
    elif kind == "noise":
        cover = rng.uniform(-1, 2, (n, world.SIZE, world.SIZE))
        for i, cell in enumerate(rng.integers(1, 9, n).tolist()):  # px
            coarse = rng.normal(0.5, 0.7, (world.SIZE // cell + 2,) * 2)
            cover[i] = _enlarged(coarse, cell)[: world.SIZE, : world.SIZE]
        cover = np.clip(cover, 0, 1)
    elif kind == "mixture":
        first, second = world.draw(pictures) / 255, world.draw(_other_shapes(pictures, others)) / 255
        beside = np.clip(along + 0.5, 0, 1)
        over = rng.uniform(0.35, 0.65, (n, 1, 1))
        weight = np.where(rng.random((n, 1, 1)) < 0.5, beside, over)[..., None]
        return _to_bytes(weight * first + (1 - weight) * second)
    else:
        cut = np.clip(along + rng.uniform(-0.12, 0.12, (n, 1, 1)) * world.SIZE / 4 + 0.5, 0, 1)[..., None]
        return _to_bytes(cut * world.draw(pictures) / 255 + (1 - cut) * backdrop)
    cover = np.broadcast_to(cover, (n, world.SIZE, world.SIZE))[..., None]
    return _to_bytes(cover * foreground + (1 - cover) * backdrop)


def _other_shapes(pictures, others):
    """The others in turn, each beside a picture of another shape than its own."""
    pool = {shape: [p for p in others if p.shape != shape] for shape in world.SHAPES}
    return [pool[p.shape][i % len(pool[p.shape])] for i, p in enumerate(pictures)]


def _enlarged(coarse: np.ndarray, factor: int) -> np.ndarray:
    """Linearly interpolated between the rows and columns."""
    for axis in (0, 1):
        places = np.arange((coarse.shape[axis] - 1) * factor) / factor
        low = places.astype(int)
        weight = np.expand_dims(places - low, 1 - axis)
        coarse = coarse.take(low, axis) * (1 - weight) + coarse.take(low + 1, axis) * weight
    return coarse


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def to_tensor(pictures: np.ndarray):
    """uint8 [N, H, W, 3] -> uint8 [N, 3, H, W]"""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def degrade(images, generator):
    """float32 [B, 3, H, W] in [0, 1] of uint8: some blurred, some shrunk and enlarged, some noisy, some with other
    contrast, as pictures that a decoder made may be."""
    import torch
    from torch.nn.functional import avg_pool2d, interpolate

    def draw(low, high, share):
        values = low + (high - low) * torch.rand((len(images), 1, 1, 1), generator=generator)
        return torch.where(torch.rand(values.shape, generator=generator) < share, values, 0)

    x = images / 255
    shrunk = interpolate(avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.lerp(x, shrunk, draw(0.3, 0.9, 0.2))
    x = blur(x, draw(0.3, 1.0, 0.5).flatten())
    x = 0.5 + (x - 0.5) * (1 + draw(-0.1, 0.1, 0.5)) + draw(-0.05, 0.05, 0.5)
    return (x + draw(0, 0.08, 0.5) * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def blur(images, sigmas):
    """Gaussian blur of float32 [B, C, H, W], each picture by its own sigma in px (0: not at all), cut at 3 px."""
    import torch
    from torch.nn.functional import conv2d, pad

    steps = torch.arange(-3, 4, dtype=torch.float32)
    kernels = (-0.5 * (steps / sigmas[:, None].clamp_min(0.05)).square()).exp()
    kernels = kernels / kernels.sum(1, keepdim=True)
    batch, channels, height, width = images.shape
    x = pad(images, (3, 3, 3, 3), mode="replicate").reshape(1, batch * channels, height + 6, width + 6)
    kernels = kernels.repeat_interleave(channels, 0)
    x = conv2d(x, kernels[:, None, :, None], groups=batch * channels)
    return conv2d(x, kernels[:, None, None, :], groups=batch * channels).reshape(images.shape)


def blur_and_noise(images, sigma: float, noise: float, seed: int):
    """float32 [B, 3, H, W] of uint8: blurred by sigma px, then with Gaussian noise of that deviation, clipped."""
    import torch

    x = blur(images / 255, torch.full((len(images),), sigma))
    return (x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


# training


def initialise(model: Any, generator: Any) -> Any:
    """The model with all weights drawn anew from the generator: normal, of deviation sqrt(2 / fan in) before a ReLU."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def learning_rate(step: int, steps: int, warm: int = 100) -> float:
    """Factor of the learning rate: up over the first `warm` steps, then down to zero as half a cosine wave."""
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _update(optimizer: Any, loss: Any, lr: float) -> None:
    import torch

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _save_half(model: Any, path: Path) -> None:
    """Weights in half precision, which is half the file; they are loaded as float32."""
    from safetensors.torch import save_file

    weights = {name: w.half() if w.is_floating_point() else w for name, w in model.state_dict().items()}
    save_file({name: w.contiguous().cpu() for name, w in weights.items()}, path)


def _positive(recipe: Recipe, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) <= 0:
            raise UsageError(f"{recipe.name}: {name} must be positive, not {getattr(recipe, name)}")
