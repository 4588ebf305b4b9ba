"""Training of the judges of the small world: they learn from pictures drawn for them, and are checked on fresh ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.mini import judges, world
from bench.recipe import Recipe, TrainContext
from bench.types import UsageError
from suites.generation import tokenizer as tokens

DIM = 64  # of the space that pictures and captions share
TOKENS = 24  # of the longest caption that the text tower takes
# Kinds of pictures that show no shape, or not one, and their shares in training: what is hard comes more often.
NONSENSE = {"empty": 0.08, "blob": 0.2, "noise": 0.08, "mixture": 0.4, "half": 0.24}


@dataclass(frozen=True)
class MiniClassifier(Recipe):
    """Reads every attribute of a picture of the small world, or says that it shows no shape."""

    name: ClassVar[str] = "mini-classifier"
    version: ClassVar[int] = 1

    steps: int = 1700
    batch: int = 128
    pictures: int = 20000  # drawn once, degraded anew at each step
    nonsense: int = 12000
    lr: float = 3e-3

    def __post_init__(self):
        _positive(self, "steps", "batch", "pictures", "nonsense", "lr")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch

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
                name: labelled_cross_entropy(logits[name].float(), truth[:, i]) for i, name in enumerate(judges.HEADS)
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


@dataclass(frozen=True)
class MiniCLIP(Recipe):
    """A dual encoder in CLIP's format: pictures and captions of the small world in one space.

    Beside the contrast, both towers learn to tell the attributes, and the vision tower the features of the embedded
    classifier; it begins with large plain shapes.
    """

    name: ClassVar[str] = "mini-clip"
    version: ClassVar[int] = 1

    steps: int = 1200
    batch: int = 64
    pictures: int = 16000  # drawn once; captions are new at each step
    lr: float = 1.5e-3
    width: int = 128
    layers: int = 3  # of the vision tower; the text tower has 2
    easy: float = 0.25  # share of the steps with large plain shapes alone

    def __post_init__(self):
        _positive(self, "steps", "batch", "pictures", "lr", "width", "layers")
        if self.width % 4:
            raise UsageError(f"mini-clip: width must be a multiple of 4, not {self.width}")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch
        from torch import nn
        from torch.nn.functional import cross_entropy

        tokenizer = tokens.build(world.WORDS, TOKENS)
        model = initialise_clip(_clip(tokenizer, self.width, self.layers), ctx.generator(0, "weights")).to(ctx.device)
        sizes = [len(values) for values in world.ATTRIBUTES.values()]
        outputs = (sum(sizes), sum(sizes), judges.FEATURES)  # of pictures, of captions; the classifier's
        heads = nn.ModuleList(nn.Linear(DIM, size) for size in outputs)
        heads = initialise(heads, ctx.generator(0, "heads")).to(ctx.device)
        parameters = [*model.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.02)
        first = ctx.restore(model=model, heads=heads, optimizer=optimizer)
        pool = world.sample(self.pictures, ctx.seed(0, "pictures"), held_out="any")
        images = to_tensor(world.draw(pool))
        features = _standard_features(images, ctx.device)
        easy = torch.tensor([i for i, p in enumerate(pool) if (p.size, p.texture) == ("large", "plain")])
        model.train()
        for step in range(first, self.steps):
            generator = ctx.generator(step, "batch")
            chosen = torch.randint(len(pool), (self.batch,), generator=generator)
            chosen = (easy[chosen % len(easy)] if step < self.easy * self.steps else chosen).tolist()
            texts = caption_pairs([pool[i] for i in chosen], ctx.seed(step, "captions"))
            truth = facts([pool[i].attributes() for i in chosen]).to(ctx.device)
            claims = facts([world.said(text) for text in texts]).to(ctx.device)
            seen = degrade(images[chosen], generator).to(ctx.device)
            pictures = model.get_image_features(pixel_values=2 * seen - 1).pooler_output
            ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(ctx.device)
            captions = model.get_text_features(input_ids=ids).pooler_output
            losses = {
                "contrast": contrastive_loss(pictures, captions, model.logit_scale.exp(), truth, claims),
                "pictures": _attribute_loss(heads[0](pictures), truth, sizes),
                "captions": _attribute_loss(heads[1](captions), claims, sizes),
                "features": (heads[2](pictures) - features[chosen]).square().mean(),
            }
            loss = losses["contrast"] + losses["pictures"] + losses["captions"] + 5 * losses["features"]
            _update(optimizer, loss, self.lr * learning_rate(step, self.steps))
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))  # as CLIP does
                shape = cross_entropy(heads[0](pictures)[:, : sizes[0]], truth[:, 0])
            losses = {"loss": loss, **losses, "shape": shape}
            yield {name: float(value.detach()) for name, value in losses.items()}
        return model.eval(), tokenizer

    def export(self, model: Any, folder: Path) -> None:
        from transformers import CLIPImageProcessor

        network, tokenizer = copy.deepcopy(model[0]).half(), model[1]
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = {"height": world.SIZE, "width": world.SIZE}
        half = [0.5, 0.5, 0.5]
        CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half).save_pretrained(folder)

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        seed = ctx.seed(self.steps, "checks")
        pictures = world.sample(2000, seed, held_out="any")
        images = to_tensor(world.draw(pictures)).to(ctx.device)
        pictured = judges.embed_images(model[0], images)
        for name, values in world.ATTRIBUTES.items():
            prompts = judges.embed_texts(*model, [judges.PROMPTS[name].format(_word(v)) for v in values])
            found = (pictured @ prompts.T).argmax(1).tolist()
            right = sum(values[i] == getattr(p, name) for i, p in zip(found, pictures, strict=True))
            yield f"{name}_zero_shot", right / len(pictures)
        texts = caption_pairs(pictures, seed)
        told = judges.embed_texts(*model, texts)
        true, false = ((pictured * part).sum(1) for part in told.split(len(pictures)))
        differ = [i for i, p in enumerate(pictures) if not holds(world.said(texts[len(pictures) + i]), p)]
        yield "true_above_false_caption", float((true > false)[differ].float().mean())
        yield "cosine_matched", float(true.mean())
        yield "cosine_shuffled", float((pictured * told[: len(pictures)].roll(1, 0)).sum(1).mean())


@dataclass(frozen=True)
class MiniVQA(Recipe):
    """Answers questions about pictures of the small world from what the embedded classifier sees."""

    name: ClassVar[str] = "mini-vqa"
    version: ClassVar[int] = 1

    steps: int = 1500
    batch: int = 256
    pictures: int = 8000  # drawn and looked at once; questions are new at each step
    nonsense: int = 1000
    lr: float = 3e-3

    def __post_init__(self):
        _positive(self, "steps", "batch", "pictures", "nonsense", "lr")

    @property
    def total(self) -> int:
        return self.steps

    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        import torch
        from torch.nn.functional import cross_entropy

        model = initialise(judges.build_vqa(), ctx.generator(0, "weights")).to(ctx.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        first = ctx.restore(model=model, optimizer=optimizer)
        seed = ctx.seed(0, "pictures")
        images, _ = examples(self.pictures, self.nonsense, seed)
        pool = [*world.sample(self.pictures, seed, held_out="any"), *[None] * self.nonsense]
        seen = _evidence(degrade(images, ctx.generator(0, "degrade")), ctx.device)
        for step in range(first, self.steps):
            rng = np.random.default_rng(ctx.seed(step, "questions"))
            chosen = rng.integers(len(pool), size=self.batch).tolist()
            asked = [ask(pool[i], rng) for i in chosen]
            answers = torch.tensor([judges.ANSWERS.index(answer) for _, answer in asked]).to(ctx.device)
            logits = model(seen[chosen], judges.tokens([question for question, _ in asked]).to(ctx.device))
            loss = cross_entropy(logits, answers)
            _update(optimizer, loss, self.lr * learning_rate(step, self.steps))
            yield {"loss": float(loss.detach()), "wrong": float((logits.argmax(1) != answers).float().mean())}
        return model.eval()

    def export(self, model: Any, folder: Path) -> None:
        _save_half(model, folder / "vqa.safetensors")

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        import torch

        seed = ctx.seed(self.steps, "checks")
        pictures = world.sample(4000, seed, held_out="any")
        seen = _evidence(to_tensor(world.draw(pictures)), ctx.device)
        rng = np.random.default_rng(seed)
        asked = [ask(p, rng) for p in pictures]
        with torch.no_grad():
            found = model(seen, judges.tokens([q for q, _ in asked]).to(ctx.device)).argmax(1).tolist()
        right = [judges.ANSWERS[i] == answer for i, (_, answer) in zip(found, asked, strict=True)]
        kinds = ["yes_no" if answer in ("yes", "no") else "open" for _, answer in asked]
        for kind in ("yes_no", "open"):
            own = [r for r, k in zip(right, kinds, strict=True) if k == kind]
            yield f"{kind}_accuracy", sum(own) / len(own)
            yield f"{kind}_questions", len(own)


def _standard_features(images: Any, device: Any, batch: int = 512) -> Any:
    """float32 [N, 128] of the embedded classifier, of mean 0 and, unless they hardly vary, deviation 1."""
    import torch

    classifier = judges.load_classifier(device)
    with torch.no_grad():
        found = torch.cat([classifier.features(part.to(device)) for part in images.split(batch)])
    return (found - found.mean(0)) / found.std(0).clamp_min(0.1)


def _evidence(images: Any, device: Any, batch: int = 512) -> Any:
    """float32 [N, 35] of what the embedded classifier sees."""
    import torch

    classifier = judges.load_classifier(device)
    return torch.cat([judges.evidence(classifier, part.to(device)) for part in images.split(batch)])


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
    counts = np.diff(np.rint(num_nonsense * np.cumsum([0, *NONSENSE.values()])).astype(int)).tolist()
    others = np.concatenate([nonsense(kind, n, seed) for kind, n in zip(NONSENSE, counts, strict=True) if n])
    return to_tensor(np.concatenate([world.draw(pictures), others])), torch.from_numpy(labels)


def nonsense(kind: str, n: int, seed: int) -> np.ndarray:
    """uint8 [n, 32, 32, 3], none of which shows one shape of the world, in the colours of the world.

    "empty" backgrounds, irregular or blurred "blob"s, "noise" from fine to coarse, a "mixture" of two pictures with
    different shapes (laid over each other, or side by side), and "half" a shape, cut through the middle.
    """
    number = list(NONSENSE).index(kind)
    rng = np.random.default_rng([seed, number])
    some = world.sample(2 * n, seed ^ (number + 1), held_out="any")
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


# captions


def caption_pairs(pictures, seed: int) -> list[str]:
    """A caption of each picture, then as many false ones: each differs from the true one in one thing that it says.

    Of a caption that says nothing ("this is a shape") the second is the same.
    """
    true, false = [], []
    for i, picture in enumerate(pictures):
        text = world.caption(picture, np.random.default_rng([seed, i]))
        names = list(world.said(text))
        rng = np.random.default_rng([seed, i, 1])
        if names:
            name = names[int(rng.integers(len(names)))]
            others = [v for v in world.ATTRIBUTES[name] if v != getattr(picture, name)]
            picture = replace(picture, **{name: others[int(rng.integers(len(others)))]})
        true.append(text)
        false.append(world.caption(picture, np.random.default_rng([seed, i])))
    return true + false


def ask(picture: world.Picture | None, rng: np.random.Generator) -> tuple[str, str]:
    """A question and its answer. Half of them ask for yes or no, equally often; the others are about what is there.

    None is a picture without a shape: of that only the shape is asked for.
    """
    kind = rng.random()
    if picture is None:
        if kind < 0.5:
            return _one(judges.QUESTIONS["shape"], rng), judges.NONE
        (other,) = world.sample(1, int(rng.integers(2**62)), held_out="any")
        return _one(judges.CLAIMS, rng).format(world.phrase(other, rng)), "no"
    noun = _one((picture.shape, picture.shape, world.SYNONYMS[picture.shape], "shape"), rng)
    name = _one(tuple(world.ATTRIBUTES), rng)
    if kind < 0.5:
        return _one(judges.QUESTIONS[name], rng).format(noun), getattr(picture, name)
    yes = rng.random() < 0.5
    others = [v for v in world.ATTRIBUTES[name] if v != getattr(picture, name)]
    if kind < 0.7:
        value = getattr(picture, name) if yes else _one(others, rng)
        if not yes and name not in ("shape", "background") and rng.random() < 0.3:  # true, but of another shape
            value, noun = getattr(picture, name), _one([s for s in world.SHAPES if s != picture.shape], rng)
        return judges.STATEMENTS[name].format(noun, _word(value)), "yes" if yes else "no"
    seed = int(rng.integers(2**62))
    claim = world.phrase(picture, np.random.default_rng(seed))
    told = list(world.said(claim))
    if not yes and told:
        names = [n for n in told if rng.random() < 0.5] or [_one(told, rng)]
        false = {n: _one([v for v in world.ATTRIBUTES[n] if v != getattr(picture, n)], rng) for n in names}
        claim = world.phrase(replace(picture, **false), np.random.default_rng(seed))
    return _one(judges.CLAIMS, rng).format(claim), "yes" if yes or not told else "no"


def _one(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def facts(records):
    """int64 [N, attributes] of dicts by attribute: indices into world.ATTRIBUTES, -1 where nothing is said."""
    import torch

    rows = [[v.index(r[name]) if name in r else -1 for name, v in world.ATTRIBUTES.items()] for r in records]
    return torch.tensor(rows)


def holds(claims: Mapping[str, str], picture: world.Picture) -> bool:
    """Is all true that is said of a picture?"""
    return all(getattr(picture, name) == value for name, value in claims.items())


def contrastive_loss(pictures, captions, scale, truth, claims):
    """CLIP's loss (Radford et al. 2021) of pictures [B, d] and captions [2 B, d], the first B their own; the others
    are further candidates for a picture. Pairs that are true by chance are no negatives.

    truth int64 [B, attributes] and claims [2 B, attributes] are `facts`.
    """
    import torch
    from torch.nn.functional import cross_entropy, normalize

    logits = scale * normalize(pictures, dim=1) @ normalize(captions, dim=1).T
    true = ((claims == truth[:, None]) | (claims < 0)).all(2)
    own = torch.eye(*true.shape, dtype=torch.bool, device=true.device)
    logits = logits.masked_fill(true & ~own, -math.inf)
    target = torch.arange(len(pictures), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits[:, : len(pictures)].T, target)) / 2


def labelled_cross_entropy(logits, labels):
    """The mean over those of [B] that have a label, and are not -1; 0 where none has."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp_min(1)


def _attribute_loss(logits, labels, sizes):
    """The cross entropies of all attributes, added."""
    return sum(
        labelled_cross_entropy(part, label) for part, label in zip(logits.split(sizes, 1), labels.T, strict=True)
    )


def _word(value: str) -> str:
    """How captions put it: positions are phrases."""
    return world.PLACES.get(value, value)


# training


def _clip(tokenizer: Any, width: int, layers: int) -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "image_size": world.SIZE,
        "patch_size": 8,
    }
    shared = {"num_attention_heads": 4, "projection_dim": DIM, "hidden_act": "relu"}
    return CLIPModel(CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=DIM))


def initialise_clip(model: Any, generator: Any) -> Any:
    """The model with all weights drawn anew from the generator: normal, of deviation 1 / sqrt(fan in); the places of
    patches begin as waves, so that neighbours are alike."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan = weight.shape[1] if "embedding" in name and "patch" not in name else weight[0].numel()
                weight.normal_(0, 0.5 / math.sqrt(fan) if "embedding" in name else fan**-0.5, generator=generator)
            elif name == "logit_scale":
                weight.fill_(math.log(10))
            elif "norm" in name and name.endswith("weight"):
                weight.fill_(1)
            elif name.endswith("class_embedding"):
                weight.normal_(0, 0.05, generator=generator)
            else:
                weight.zero_()
            if name.endswith("vision_model.embeddings.position_embedding.weight"):
                weight[1:] = 0.3 * waves(round(math.sqrt(len(weight) - 1)), weight.shape[1])
    return model


def waves(side: int, width: int):
    """float32 [side * side, width]: sines and cosines of the row and of the column, slow to fast."""
    import torch

    places = torch.arange(side) / side
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    frequencies = math.pi * side / 2 * torch.arange(1, width // 4 + 1) / (width // 4)
    turns = [place.reshape(-1, 1) * frequencies for place in (rows, columns)]
    return torch.cat([f(turn) for turn in turns for f in (torch.sin, torch.cos)], 1)


def initialise(model: Any, generator: Any) -> Any:
    """The model with all weights drawn anew from the generator: normal, of deviation sqrt(2 / fan in) before a ReLU."""
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1, generator=generator)
                module.weight[0] = 0  # padding
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
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
