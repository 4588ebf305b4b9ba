"""`check` finds each broken promise of a model, and nothing in models that keep them."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from bench.adapters.codecs import FORMATS, Codec
from bench.adapters.toy import Toy
from bench.capabilities import Answer, Completion, Condition, Latents
from bench.check import check, second_worker
from bench.models import open_model
from bench.types import Error


def failed(findings, status="fail"):
    return {f.name: f.detail for f in findings if f.status == status}


# --- models that keep their promises


@pytest.mark.parametrize(
    "make", [Toy, lambda: Toy(noise=0.2, bits=0, factor=8), *(lambda f=f: Codec(f) for f in FORMATS)]
)
def test_our_own_adapters_conform(make):
    findings = check(make(), size=32)
    assert not failed(findings) and not failed(findings, "warn"), findings
    assert sum("batch 1 against batch 4" in f.name and "difference" in f.detail for f in findings) >= 1


def test_findings_are_the_same_twice():
    assert check(Toy(), size=32, seed=3) == check(Toy(), size=32, seed=3)


# --- autoencoders that break one promise each


class Plain:
    """Keeps its promises: block means of 4 px."""

    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images, 4)

    def decode(self, latents, seeds=None):
        z = latents.data if isinstance(latents, Latents) else latents
        return z.repeat_interleave(4, -1).repeat_interleave(4, -2)


def decodes(change):
    """Plain, with `change` applied to what it decodes."""
    return type("Broken", (Plain,), {"decode": lambda self, z, seeds=None: change(Plain.decode(self, z))})()


def encodes(change):
    return type("Broken", (Plain,), {"encode": lambda self, x: change(Plain.encode(self, x))})()


def with_value(y, value):
    y = y.clone()
    y[0, 0, 0, 0] = value
    return y


class Buffer(Plain):
    """The same buffer at each call, whatever is asked for."""

    def __init__(self):
        self.buffer = torch.empty(4, 3, 64, 64)

    def decode(self, latents, seeds=None):
        y = super().decode(latents)
        return self.buffer[: len(y), :, : y.shape[2], : y.shape[3]].copy_(y)


class InPlace(Plain):
    def encode(self, images):
        return super().encode(images.mul_(0.9))


class Unseeded(Plain):
    """Draws from the generator that everybody shares."""

    def decode(self, latents, seeds=None):
        return super().decode(latents + 0.1 * torch.randn(latents.shape))


class Normalised(Plain):
    """A batch normalisation left in training mode."""

    def decode(self, latents, seeds=None):
        y = super().decode(latents)
        return y - 0.5 * y.mean((0, 2, 3), keepdim=True)


class SharedSeed(Plain):
    """One generator for the whole batch, seeded with its first seed."""

    def decode(self, latents, seeds=None):
        if seeds is not None:
            latents = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(seeds[0]))
        return super().decode(latents)


class Reseeding(Plain):
    def decode(self, latents, seeds=None):
        np.random.seed(0)
        random.seed(0)
        return super().decode(latents)


class Refusing(Plain):
    def decode(self, latents, seeds=None):
        raise RuntimeError("out of paint")


BROKEN = {
    "nan": (decodes(lambda y: with_value(y, float("nan"))), "finite", "1 NaN"),
    "inf": (decodes(lambda y: with_value(y, float("inf"))), "finite", "1 inf"),
    "float16": (decodes(lambda y: y.half()), "dtype", "float16 instead"),
    "float64": (decodes(lambda y: y.double()), "dtype", "float64 instead"),
    "uint8": (decodes(lambda y: ((y + 1) * 127.5).byte()), "dtype", "uint8 instead"),
    "numpy": (decodes(lambda y: y.numpy()), "type", "ndarray"),
    "nothing": (decodes(lambda y: (y,)), "type", "tuple"),
    "shape": (decodes(lambda y: y[..., :-1]), "shape", "[4, 3, 64, 63] instead of [4, 3, 64, 64]"),
    "channels last": (decodes(lambda y: y.permute(0, 2, 3, 1)), "shape", "[4, 64, 64, 3]"),
    "batch of other length": (decodes(lambda y: y[:-1]), "shape", "[3, 3, 64, 64]"),
    "empty": (decodes(lambda y: y[:0]), "shape", "[0, 3, 64, 64]"),
    "device": (decodes(lambda y: y.to("meta")), "device", "meta instead of cpu"),
    "range 255": (decodes(lambda y: (y + 1) * 127.5), "range", "instead of -10 to 10"),
    "range 0 to 1": (decodes(lambda y: (y + 1) / 2), "range and channels", "[0, 1]"),
    "range half": (decodes(lambda y: y / 2), "range and channels", "[-0.5, 0.5]"),
    "blue first": (decodes(lambda y: y.flip(1)), "range and channels", "BGR"),
    "uint8 overflow": (
        decodes(lambda y: ((y + 1) * 128).floor().to(torch.int64).remainder(256).float() / 127.5 - 1),
        "white is brighter than black",
        "white -1",
    ),
    "nan for white": (decodes(lambda y: torch.where(y >= 1, torch.nan, y)), "black and white: finite", "NaN"),
    "always the same": (decodes(lambda y: torch.linspace(-1, 1, 64).expand(y.shape)), "input matters", "every input"),
    "aliasing its buffer": (Buffer(), "decoded pictures stay as returned", "buffer"),
    "input changed": (InPlace(), "encode leaves its input alone", "in place"),
    "without a seed": (Unseeded(), "twice", "deterministic"),
    "batch statistics": (Normalised(), "batch 1 against batch 4", "largest difference"),
    "one seed for all": (SharedSeed(), "seed of one item", "its own seed"),
    "raises": (Refusing(), "decode", "RuntimeError: out of paint"),
    "latents nan": (encodes(lambda z: with_value(z, float("nan"))), "latents", "1 values"),
    "latents of other length": (encodes(lambda z: z[:3]), "latents", "for 4 items"),
    "latents of another type": (encodes(lambda z: z.numpy()), "latents", "ndarray"),
    "too few bits": (encodes(lambda z: Latents(z, [8.0])), "bits", "1 numbers for 4 items"),
    "no bits": (encodes(lambda z: Latents(z, [0.0] * len(z))), "bits", "positive"),
    "endless bits": (encodes(lambda z: Latents(z, [float("nan")] * len(z))), "bits", "finite"),
    "negative side bits": (encodes(lambda z: Latents(z, [8.0] * len(z), [-1.0] * len(z))), "side_bits", "positive"),
    "float codes": (encodes(lambda z: Latents(z, [8.0] * len(z), indices=z)), "indices", "int64"),
}


def test_the_plain_autoencoder_conforms():
    findings = check(Plain())
    assert not failed(findings) and not failed(findings, "warn"), findings


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_autoencoder_is_found_out(kind):
    model, name, detail = BROKEN[kind]
    found = failed(check(model))
    matching = [d for n, d in found.items() if n.startswith("Autoencoder: ") and n.endswith(name)]
    assert matching and detail in matching[0], found


def test_a_constant_picture_is_flagged_but_not_failed():
    findings = check(decodes(lambda y: y.mean((1, 2, 3), keepdim=True).expand(y.shape).clone()))
    assert "4 of 4 pictures" in failed(findings, "warn")["Autoencoder: decode: content"]
    assert "Autoencoder: decode: content" not in failed(findings)


def test_a_model_that_meddles_with_the_shared_generators_is_named():
    random.seed(1)
    assert "changed" in failed(check(Reseeding()), "warn")["global random state"]
    assert "changed" in failed(check(Unseeded()), "warn")["global random state"]


def test_a_model_may_say_that_its_batch_matters():
    model = Normalised()
    model.batch_matters = True
    findings = check(model)
    assert not failed(findings)
    assert "largest difference" in failed(findings, "warn")["Autoencoder: batch 1 against batch 4"]


# --- generators


class Painter:
    """Keeps its promises: noise around a grey that the prompt decides."""

    num_classes = 3

    def generate(self, prompts, seeds):
        def one(prompt, seed):
            noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))
            return (0.3 + 0.02 * (len(prompt) % 20) + 0.05 * noise).clamp(0, 1)

        return torch.stack([one(p, s) for p, s in zip(prompts, seeds, strict=True)])

    def generate_classes(self, labels, seeds):
        return self.generate(["x" * (label + 1) for label in labels], seeds)


def paints(change):
    return type("Broken", (Painter,), {"generate": lambda self, p, s: change(Painter.generate(self, p, s), p, s)})()


GENERATORS = {
    "minus one to one": (paints(lambda y, p, s: y * 2 - 1), "range", "instead of 0 to 1"),
    "uint8": (paints(lambda y, p, s: (y * 255).byte()), "dtype", "uint8"),
    "nan": (paints(lambda y, p, s: with_value(y, float("nan"))), "finite", "1 NaN"),
    "grey": (paints(lambda y, p, s: y[:, :1]), "shape", "[8, 1, 16, 16]"),
    "list of pictures": (paints(lambda y, p, s: list(y)), "type", "list"),
    "ignores its seeds": (paints(lambda y, p, s: Painter().generate(p, [0] * len(s))), "seeds matter", "same picture"),
    "no seed at all": (paints(lambda y, p, s: torch.rand(y.shape)), "same seed twice", "largest difference"),
    "first seed for all": (
        paints(lambda y, p, s: torch.rand(y.shape, generator=torch.Generator().manual_seed(s[0]))),
        "batch 1 against batch 8",
        "largest difference",
    ),
    "by its place": (
        paints(lambda y, p, s: (y + 0.02 * torch.arange(len(y)).reshape(-1, 1, 1, 1)).clamp(0, 1)),
        "other order",
        "not on its place",
    ),
    "always eight": (paints(lambda y, p, s: y[:1].expand(8, -1, -1, -1)), "batch 1", "[8, 3, 16, 16]"),
}


def test_the_painter_conforms():
    findings = check(Painter())
    assert not failed(findings) and not failed(findings, "warn"), findings


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_broken_generator_is_found_out(kind):
    model, name, detail = GENERATORS[kind]
    found = failed(check(model))
    for capability in ("TextToImage", "ClassToImage"):
        matching = [d for n, d in found.items() if n.startswith(capability) and n.endswith(name)]
        assert matching and detail in matching[0], found


def test_a_generator_that_does_not_listen_is_flagged():
    deaf = paints(lambda y, p, s: Painter().generate(["x"] * len(p), s))
    assert "whatever is asked" in failed(check(deaf), "warn")["TextToImage: prompts matter"]


def test_the_number_of_classes_is_checked():
    model = Painter()
    model.num_classes = "many"
    assert "ClassToImage: num_classes" in failed(check(model))


# --- video


class Causal:
    """Means of groups of frames, the first alone."""

    temporal_factor = 4
    legal = staticmethod(lambda frames: frames % 4 == 1)

    def encode_video(self, clips):
        if not self.legal(clips.shape[2]):
            raise Error(f"{clips.shape[2]} frames are not 1 + k * 4")
        rest = clips[:, :, 1:].unflatten(2, (-1, 4)).mean(3) if clips.shape[2] > 1 else clips[:, :, 1:]
        return torch.cat([clips[:, :, :1], rest], 2)

    def decode_video(self, latents, seeds=None):
        return torch.cat([latents[:, :, :1], latents[:, :, 1:].repeat_interleave(4, 2)], 2)


class Silent(Causal):
    """Cuts off what does not fit, as some networks do."""

    temporal_factor = None

    def encode_video(self, clips):
        return super().encode_video(clips[:, :, : 1 + (clips.shape[2] - 1) // 4 * 4])


def test_video_lengths_are_tried():
    findings = check(Causal(), size=16)
    assert not failed(findings) and not failed(findings, "warn"), findings
    assert {f"VideoAutoencoder: {n} frames" for n in (1, 5, 9)} <= {f.name for f in findings}
    unnamed = Causal()
    unnamed.temporal_factor = None
    findings = check(unnamed, size=16)
    assert not failed(findings)
    assert {f.name for f in findings if "refused" in f.detail} == {
        "VideoAutoencoder: 4 frames",
        "VideoAutoencoder: 8 frames",
    }
    found = failed(check(Silent(), size=16))
    assert set(found) == {"VideoAutoencoder: 4 frames", "VideoAutoencoder: 8 frames"}
    assert "[1, 3, 5, 16, 16] for [1, 3, 8, 16, 16]" in found["VideoAutoencoder: 8 frames"]


# --- white box


class Denoiser:
    """A latent diffusion model in miniature: block means, a bag of words, two small layers."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.words = torch.nn.Embedding(256, 6)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3 + 6, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 1)
        )
        for p in [*self.words.parameters(), *self.net.parameters()]:
            p.data = 0.4 * torch.randn(p.shape, generator=generator)

    def tokenize(self, prompts):
        return torch.tensor([list(p.encode()[:8].ljust(8)) for p in prompts])

    def detokenize(self, ids):
        return [bytes(row).decode("latin-1") for row in ids.tolist()]

    def token_embeddings(self):
        return self.words.weight

    def condition(self, ids, embeddings=None):
        return Condition(self.words(ids) if embeddings is None else embeddings)

    def latent_shape(self, size):
        return 3, size // 4, size // 4

    def to_latent(self, images):
        return torch.nn.functional.avg_pool2d(images, 4)

    def from_latent(self, z):
        return z.repeat_interleave(4, -1).repeat_interleave(4, -2)

    def add_noise(self, z, t, noise):
        a = (1 - t / 1000).reshape(-1, 1, 1, 1)
        return a * z + (1 - a**2).sqrt() * noise

    def target(self, z0, noise, t):
        return noise

    def predict(self, z_t, t, condition):
        bag = torch.tanh(condition.hidden).mean(1)[:, :, None, None].expand(-1, -1, *z_t.shape[2:])
        return self.net(torch.cat([z_t, bag], 1)) * (1 + t.reshape(-1, 1, 1, 1) / 1000)

    def sample(self, condition, seeds, guidance, steps, stop_at=None):
        noise = [torch.randn(self.latent_shape(64), generator=torch.Generator().manual_seed(s)) for s in seeds]
        z = torch.stack(noise)
        with torch.no_grad():
            for step in range(stop_at or steps):
                z = z - 0.3 * self.predict(z, torch.full((len(z),), 1000 - step), condition)
        return z

    def modules(self):
        return {"unet": self.net, "text_encoder": self.words}

    def clone(self):
        twin = copy.deepcopy(self)
        for part in twin.modules().values():
            part.requires_grad_(False)
        return twin


def test_a_white_box_conforms_and_its_derivative_is_printed():
    findings = check(Denoiser())
    assert not failed(findings) and not failed(findings, "warn"), findings
    detail = {f.name: f.detail for f in findings}
    assert "autograd" in detail["DenoiserAccess: gradient to embeddings"]
    assert "autograd" in detail["DenoiserAccess: gradient to latents"]
    assert detail["DenoiserAccess: target is known"] == "noise"
    assert detail["DenoiserAccess: gradient to unet"] == "4 of 4 parameters"
    assert all(p.requires_grad for m in Denoiser().modules().values() for p in m.parameters())


def test_trying_a_white_box_leaves_its_weights_and_flags_as_they_were():
    model = Denoiser()
    model.net.requires_grad_(False)
    before = copy.deepcopy([m.state_dict() for m in model.modules().values()])
    check(model)
    for old, part in zip(before, model.modules().values(), strict=True):
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in old.items())
    assert [p.requires_grad for p in model.net.parameters()] == [False] * 4 and model.words.weight.requires_grad


class Velocity(Denoiser):
    def target(self, z0, noise, t):
        a = (1 - t / 1000).reshape(-1, 1, 1, 1)
        return a * noise - (1 - a**2).sqrt() * z0


class Flow(Denoiser):
    def add_noise(self, z, t, noise):
        a = (1 - t / 1000).reshape(-1, 1, 1, 1)
        return a * z + (1 - a) * noise

    def target(self, z0, noise, t):
        return noise - z0


@pytest.mark.parametrize("model, name", [(Velocity, "velocity"), (Flow, "flow")])
def test_the_kind_of_target_is_found_out(model, name):
    findings = check(model())
    assert not failed(findings) and not failed(findings, "warn"), findings
    assert {f.name: f.detail for f in findings}["DenoiserAccess: target is known"] == name


class Detached(Denoiser):
    def condition(self, ids, embeddings=None):
        return super().condition(ids, None if embeddings is None else embeddings.detach())


class NoGrad(Denoiser):
    @torch.no_grad()
    def predict(self, z_t, t, condition):
        return super().predict(z_t, t, condition)


class WrongGradient(Denoiser):
    """A straight-through trick: the value of one function, the gradient of another."""

    def predict(self, z_t, t, condition):
        y = super().predict(z_t, t, condition)
        return 2 * y + (y - 2 * y).detach()


class SharedTeacher(Denoiser):
    def clone(self):
        return copy.copy(self)


class TrainableTeacher(Denoiser):
    def clone(self):
        return copy.deepcopy(self)


class MovingTeacher(Denoiser):
    """Its clone has weights of its own and still asks the original."""

    def clone(self):
        twin = super().clone()
        twin.predict = self.predict
        return twin


class DeadEncoder(Denoiser):
    def condition(self, ids, embeddings=None):
        return super().condition(ids, self.words(ids).detach() if embeddings is None else embeddings)


class NoiseOfTheFirst(Denoiser):
    """Every latent of a batch begins with the noise of the first seed and of the number of seeds."""

    def sample(self, condition, seeds, guidance, steps, stop_at=None):
        return super().sample(condition, [seeds[0] + len(seeds)] * len(seeds), guidance, steps, stop_at)


class OneStepMore(Denoiser):
    def sample(self, condition, seeds, guidance, steps, stop_at=None):
        return super().sample(condition, seeds, guidance, steps, stop_at and stop_at + 1)


class CurvedNoise(Denoiser):
    def add_noise(self, z, t, noise):
        return super().add_noise(z, t, noise) + 0.3 * z * noise


class BackwardNoise(Denoiser):
    def add_noise(self, z, t, noise):
        return super().add_noise(z, 1000 - t, noise)


class FirstTime(Denoiser):
    """The timestep of the first item for all."""

    def predict(self, z_t, t, condition):
        return super().predict(z_t, t[:1].expand(len(t)), condition)


class Stopless(Denoiser):
    def sample(self, condition, seeds, guidance, steps, stop_at=None):
        return super().sample(condition, seeds, guidance, steps)


class ForgetsEmbeddings(Denoiser):
    def condition(self, ids, embeddings=None):
        return super().condition(ids, None if embeddings is None else 0.5 * embeddings)


def test_a_target_of_no_known_kind_is_flagged():
    class Odd(Denoiser):
        def target(self, z0, noise, t):
            return 2 * noise

    assert "the closest is noise" in failed(check(Odd()), "warn")["DenoiserAccess: target is known"]


@pytest.mark.parametrize(
    "model, name, detail",
    [
        (Detached, "gradient to embeddings", "no gradient arrives"),
        (NoGrad, "gradient to latents", "no gradient flows"),
        (WrongGradient, "gradient to embeddings", "off by 50 %"),
        (WrongGradient, "gradient to latents", "off by 50 %"),
        (SharedTeacher, "clone", "shared"),
        (Stopless, "stop_at", "another latent"),
        (ForgetsEmbeddings, "condition with embeddings", "largest difference"),
        (TrainableTeacher, "clone is frozen", "ask for gradients"),
        (MovingTeacher, "clone after training unet", "moves its teacher"),
        (DeadEncoder, "gradient to text_encoder", "cannot be trained"),
        (NoiseOfTheFirst, "sample of one prompt", "own condition and seed"),
        (OneStepMore, "stop_at the end", "change nothing"),
        (CurvedNoise, "add_noise is linear", "weighted sum"),
        (BackwardNoise, "noise grows with t", "at 0"),
        (FirstTime, "batch 1 against batch 2", "largest difference"),
    ],
)
def test_a_broken_white_box_is_found_out(model, name, detail):
    found = failed(check(model()))
    assert detail in found.get(f"DenoiserAccess: {name}", ""), found


# --- models that talk


class Talker:
    def complete(self, messages, *, schema=None, choices=None, seed=0, max_tokens=512):
        return Completion("yes", choices=self.said(choices) if choices else None)

    def said(self, choices):
        return dict.fromkeys(choices, 1 / len(choices))

    def answer(self, image, question, choices):
        assert image.shape == (3, 64, 64) and image.min() >= 0 and image.max() <= 1
        return Answer(list(self.said(choices).values()))


class Overconfident(Talker):
    def said(self, choices):
        return dict.fromkeys(choices, 1.0)


class Mute(Talker):
    def complete(self, messages, **options):
        return "yes"

    def answer(self, image, question, choices):
        return Answer([1.0])


def test_models_that_talk_are_tried():
    findings = check(Talker())
    assert not failed(findings) and not failed(findings, "warn"), findings
    assert set(failed(check(Overconfident()))) == {"ChatModel: choices", "VQAModel: answer"}
    assert set(failed(check(Mute()))) == {"ChatModel: complete", "VQAModel: answer"}


# --- what is no model


def test_an_object_without_capabilities_is_told_what_it_lacks():
    class Half:
        def encode(self, images):
            return images

    found = check(Half())
    assert "Autoencoder" in failed(found)["capabilities"]
    assert "encode but no decode" in failed(found, "warn")["Autoencoder"]


# --- another worker


WORKER = """
import os

import torch


class Drawer:
    def __init__(self, own: bool = False):
        self.own = own

    def generate(self, prompts, seeds):
        shift = os.getpid() if self.own else 0
        rows = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(s + len(p) + shift))
                for p, s in zip(prompts, seeds)]
        return torch.stack(rows)
"""


@pytest.mark.parametrize("own", [False, True])
def test_a_second_worker_must_draw_the_same_pictures(tmp_path, own):
    (tmp_path / "drawer.py").write_text(WORKER)
    name = f"{tmp_path / 'drawer.py'}:Drawer"
    with second_worker(name, {"own": own}, {}, "cpu") as elsewhere:
        findings = check(open_model(name, {"own": own}, {}, "cpu"), elsewhere=elsewhere)
    faults = failed(findings)
    assert [f.status for f in findings if f.name == "TextToImage: another worker"] == ["fail" if own else "ok"]
    assert set(faults) == ({"TextToImage: another worker"} if own else set())
