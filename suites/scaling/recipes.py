"""Training of the transformers that laws are measured on, and the adapter `dit`: one design at any size.

They learn latents of the small world (bench/mini/world.py), or of a file of one's own, under a class or a sentence.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from bench.identity import fingerprint
from bench.mini import world
from bench.recipe import Recipe, TrainContext
from bench.types import Error, Json, UsageError, Weights
from bench.weights import load_weights, open_folder, resolve
from suites.scaling import measure
from suites.scaling.flops import Shape

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["in_context", "cross_attention", "adaln_zero", "mm_dit"]
Condition = Literal["class", "text"]

TRAIN, VALIDATION = 20260001, 20260002  # seeds of the manifests world-train and world-val
WORDS = 16  # tokens of a sentence; the longest of the world has 16 words
QUESTIONS = 1  # seed of the noise and times of the validation
CELL = ("channels", "side", "vocabulary", "text")  # fields of Shape that follow from the data
DATA = ("latents", "vae", "condition", "pictures", "validation")  # fields of a training that name them


@dataclass(frozen=True)
class DiTTraining(Recipe):
    """A diffusion transformer with rectified flow on latents; its figures are losses on a fixed validation set."""

    name: ClassVar[str] = "dit"
    version: ClassVar[int] = 1

    kind: Kind = "adaln_zero"
    width: int = 32
    layers: int = 4
    heads: int = 2
    patch: int = 2
    swiglu: bool = False
    rms_norm: bool = False
    rope: bool = False
    qk_norm: bool = False
    latents: Weights = ""  # safetensors: train and validation [n, c, s, s], train_text and validation_text [n, m] (ids)
    vae: Weights = "mini-sd"  # the autoencoder of the small world's pictures, where there is no file of latents
    condition: Condition = "class"  # of the small world: shape and colour, or the words of a caption
    pictures: int = 40000  # of the small world to learn from
    validation: int = 2048  # pictures that the loss is measured on
    steps: int = 1000
    batch: int = 32
    lr: float = 3e-3
    warm: float = 0.02  # share of the steps over which the learning rate rises; then it falls to zero in a line
    ema: float = 0.05  # the moving average's memory, as a share of the steps
    drop: float = 0.1  # share of conditions left out, for guidance
    direction: float = 0.0  # weight of the velocity-direction loss

    def __post_init__(self):
        for name in ("steps", "batch", "lr", "pictures", "validation", "ema"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{self.name}: {name} must be positive, not {getattr(self, name)}")
        for name in ("warm", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{self.name}: {name} must lie between 0 and 1, not {getattr(self, name)}")

    @property
    def total(self) -> int:
        return self.steps

    def shape(self, cell: Mapping[str, int]) -> Shape:
        """The network, for data of these CELL facts. Raises UsageError where sizes do not go together."""
        own = ("kind", "width", "layers", "heads", "patch", "swiglu", "rms_norm", "rope", "qk_norm")
        try:
            return Shape(**{name: getattr(self, name) for name in own}, **{name: cell[name] for name in CELL})
        except ValueError as e:
            raise UsageError(f"{self.name}: {e}") from None

    def facts(self, cell: Mapping[str, int]) -> dict[str, Json]:
        """What a table of trainings says of this one, but for its loss. FLOPs are counted, not 6 N D."""
        shape = self.shape(cell)
        counted, seen = shape.count(), self.steps * self.batch
        return {
            "params": shape.params()["backbone"],
            "tokens": seen * shape.tokens,
            "flops": seen * counted.train,
            "params_conditioning": shape.params()["conditioning"],
            "attention_share": counted.attention_share,
            "kind": self.kind,
            "width": self.width,
            "layers": self.layers,
            "lr": self.lr,
            "batch": self.batch,
            "steps": self.steps,
            "ema_decay": self.decay,
        }

    @property
    def decay(self) -> float:
        """Of the moving average, at each step."""
        return math.exp(-1 / (self.ema * self.steps))

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch

        from suites.scaling import dit

        data = open_data({name: getattr(self, name) for name in DATA}, str(ctx.device))
        net = dit.initialise(dit.DiT(self.shape(data.cell)), ctx.generator(0, "weights")).to(ctx.device)
        average = copy.deepcopy(net).requires_grad_(False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0)
        parameters, averages = list(net.parameters()), list(average.parameters())
        first = ctx.restore(model=net, average=average, optimizer=optimizer)
        for step in range(first, self.steps):
            generator = ctx.generator(step, "batch")
            at = (step * self.batch + torch.arange(self.batch)) % len(data.train)  # each once before any comes again
            clean = data.train[at]
            noise = torch.randn(clean.shape, generator=generator).to(ctx.device)
            times = dit.logit_normal(self.batch, generator).to(ctx.device)
            dropped = torch.rand(self.batch, generator=generator) < self.drop
            text = data.train_text[at].masked_fill(dropped[:, None].to(ctx.device), data.cell["vocabulary"])
            predicted, velocity = net(dit.mix(clean, noise, times), times, text), clean - noise
            mse = dit.velocity_errors(predicted, velocity).mean()
            loss = mse
            if self.direction:
                loss = mse + self.direction * dit.direction_errors(predicted, velocity).mean()
            for group in optimizer.param_groups:
                group["lr"] = self.lr * learning_rate(step, self.steps, self.warm)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, (1 + step) / (10 + step)))
            yield {"loss": float(loss.detach()), "mse": float(mse.detach())}
        return torch.nn.ModuleDict({"model": net, "average": average})

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        """`loss` is of the averaged weights, `loss_raw` of the last ones, `loss_sd` the standard error of the first;
        `loss_t0` to `loss_t9` are parts of the times, from the noisiest."""
        data = open_data({name: getattr(self, name) for name in DATA}, str(ctx.device))
        averaged, raw = (measure.measure(model[name], data.questions) for name in ("average", "model"))
        yield "loss", averaged.mean
        yield "loss_sd", averaged.se
        yield "loss_raw", raw.mean
        yield "loss_gain", measure.difference(raw, averaged)[0]
        yield "loss_gain_sd", measure.difference(raw, averaged)[1]
        for number, value in enumerate(averaged.bins):
            yield f"loss_t{number}", value

    def export(self, model: Any, folder: Path) -> None:
        """The averaged weights as safetensors, and config.json, the fields of suites.scaling.flops.Shape."""
        from safetensors.torch import save_file

        tensors = {name: value.detach().cpu().contiguous() for name, value in model["average"].state_dict().items()}
        save_file(tensors, folder / "dit.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(model["average"].shape), indent=2) + "\n")


def learning_rate(step: int, steps: int, warm: float) -> float:
    """Factor of the learning rate: up over the share `warm` of the steps, then down to zero with the last one."""
    rise = max(1.0, warm * steps)
    return min((step + 1) / rise, (steps - step) / max(1.0, steps - rise), 1.0)


# data


@dataclass(frozen=True)
class LatentData:
    """What is learnt from and measured on, and the facts of it that a network's shape needs."""

    train: Tensor  # float32 [n, c, s, s], about unit variance
    train_text: Tensor  # int64 [n, m]
    questions: measure.Questions
    cell: Mapping[str, int]
    signature: str


def open_data(fields: Mapping[str, Any], device: str = "cpu") -> LatentData:
    """The data that a training's DATA fields name, encoded once in a process. Raises Error where a file is missing or
    its tensors do not go together."""
    return _opened(*(fields[name] for name in DATA), device)


@lru_cache(maxsize=1)
def _opened(latents: str, vae: str, condition: str, pictures: int, validation: int, device: str) -> LatentData:
    if latents:
        parts = _of_file(latents, validation)
        source, autoencoder = fingerprint(resolve(latents)), "as in the file"
        vocabulary = 1 + int(max(parts[1].max(), parts[3].max()))
    else:
        folder = open_folder(vae)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        vocabulary = len(world.SHAPES) * len(world.COLOURS) if condition == "class" else len(world.WORDS)
        parts = _of_world(folder, condition, pictures, validation, device)
        source, autoencoder = f"world {TRAIN} {VALIDATION}", fingerprint(str(folder))
    train, train_text, asked, asked_text = (part.to(device) for part in parts)
    cell = {
        "channels": train.shape[1],
        "side": train.shape[2],
        "vocabulary": vocabulary,
        "text": train_text.shape[1],
    }
    signature = measure.loss_signature(
        {
            "data": source,
            "autoencoder": autoencoder,
            "latents": list(train.shape[1:]),
            "condition": condition if not latents else "as in the file",
            "target": "v",
            "density": "logit-normal(0,1)",
            "weighting": "1",
            "samples": len(asked),
            "seed": QUESTIONS,
        }
    )
    return LatentData(train, train_text, measure.questions(asked, asked_text, QUESTIONS), cell, signature)


def _of_file(path: str, validation: int) -> tuple[Tensor, ...]:
    tensors = load_weights(path)
    names = ("train", "train_text", "validation", "validation_text")
    if missing := [name for name in names if name not in tensors]:
        raise Error(f"latents {path}: there is no tensor {missing[0]!r}", hint=f"it must hold {', '.join(names)}")
    train, text, asked, asked_text = (tensors[name] for name in names)
    for name, values, ids in (("train", train, text), ("validation", asked, asked_text)):
        if values.dim() != 4 or values.shape[2] != values.shape[3] or len(values) < 4:
            raise Error(f"latents {path}: {name} is {list(values.shape)}, not [n, c, s, s] with n of 4 or more")
        if ids.shape[:1] != values.shape[:1] or ids.dim() != 2 or ids.is_floating_point() or ids.min() < 0:
            raise Error(f"latents {path}: {name}_text is {list(ids.shape)} {ids.dtype}, not ids [{len(values)}, m]")
    if train.shape[1:] != asked.shape[1:] or text.shape[1] != asked_text.shape[1]:
        raise Error(f"latents {path}: train and validation differ in shape")
    return train.float(), text.long(), asked[:validation].float(), asked_text[:validation].long()


def _of_world(folder: Path, condition: str, pictures: int, validation: int, device: str) -> tuple[Tensor, ...]:
    """Latents of the small world's pictures, scaled as the autoencoder says, and their conditions."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).float().eval().to(device)
    parts = []
    for seed, count in ((TRAIN, pictures), (VALIDATION, validation)):
        encoded = []
        for first in range(0, count, 256):
            drawn = world.draw(world.sample(min(256, count - first), seed, first=first))
            images = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
            with torch.no_grad():
                encoded.append(vae.encode(images).latent_dist.mean.cpu())
        found = world.sample(count, seed)
        parts += [torch.cat(encoded) * vae.config.scaling_factor, torch.tensor(_said(found, condition, seed))]
    return tuple(parts)


def _said(pictures: Sequence[world.Picture], condition: str, seed: int) -> list[list[int]]:
    """Ids [n, 1] of shape and colour, or [n, 16] of a caption's words; what follows the last word says nothing."""
    if condition == "class":
        colours = list(world.COLOURS)
        return [[world.SHAPES.index(p.shape) * len(colours) + colours.index(p.colour)] for p in pictures]
    number = {word: i for i, word in enumerate(world.WORDS)}
    captions = [world.caption(p, np.random.default_rng([seed, i])).split() for i, p in enumerate(pictures)]
    return [[number[w] for w in words] + [len(number)] * (WORDS - len(words)) for words in captions]


# one design at any size


class DiT:
    """Diffusion transformers of one design. Depth follows width, the learning rate falls with it; sizes are widths in
    steps of 4 (or of the heads)."""

    def __init__(
        self,
        kind: Kind = "adaln_zero",
        heads: int = 2,
        patch: int = 2,
        swiglu: bool = False,
        rms_norm: bool = False,
        rope: bool = False,
        qk_norm: bool = False,
        direction: float = 0.0,
        aspect: float = 8.0,  # width over depth
        batch: int = 32,
        lr: float = 3e-3,  # at width 32
        lr_falls: float = 0.5,  # exponent of its fall with width
        *,
        device: str = "cpu",
    ):
        if aspect <= 0 or heads < 1:
            raise UsageError(f"dit: aspect is {aspect:g} and heads are {heads}; both must be positive")
        self.device, self.aspect, self.lr, self.lr_falls = device, aspect, lr, lr_falls
        self.step = math.lcm(4, heads * 4 if rope else heads)
        self.design = DiTTraining(
            kind=kind,
            heads=heads,
            patch=patch,
            swiglu=swiglu,
            rms_norm=rms_norm,
            rope=rope,
            qk_norm=qk_norm,
            direction=direction,
            batch=batch,
            lr=lr,
        )

    def member(self, width: int) -> DiTTraining:
        """The design at a width; its steps are yet to be said."""
        layers = max(1, math.floor(width / self.aspect + 0.5))
        return replace(self.design, width=width, layers=layers, lr=self.lr * (32 / width) ** self.lr_falls)

    def trainings(
        self, budget: float, sizes: Sequence[float], cell: Mapping[str, int], data: Mapping[str, Any]
    ) -> list[DiTTraining]:
        """For each of the sizes (parameters of the backbone, rising) a training of `budget` FLOPs whose size is nearest
        and not taken yet. Its schedule ends with its last step.

        `cell` are facts of the data, as in CELL, and `data` the fields that name them. Raises Error for a budget of
        fewer than 8 steps.
        """
        candidates = [self.member(self.step * k) for k in range(1, 257)]
        known = {one: one.shape(cell).params()["backbone"] for one in candidates}
        chosen = []
        for size in sizes:
            free = [one for one in candidates if one not in chosen]
            chosen.append(min(free, key=lambda one: abs(math.log(known[one] / size))))
        found = []
        for one in sorted(chosen, key=known.__getitem__):
            each = one.shape(cell).count().train * one.batch
            steps = round(budget / each)
            if steps < 8:
                raise Error(
                    f"{budget:.3g} FLOPs are {steps} steps of {known[one]:,} parameters",
                    hint="larger budgets, smaller sizes (-p centre) or a smaller batch (-m batch)",
                )
            found.append(replace(one, steps=steps, **data))
        return found
