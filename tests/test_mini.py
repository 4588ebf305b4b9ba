"""Drawn pictures, the networks trained on them, and their recipes."""

import io
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageFilter
from skimage.metrics import peak_signal_noise_ratio

from bench import Error
from bench.metrics.frechet import frechet_from_features
from bench.mini import features
from bench.mini.drawn import blur, draw
from bench.train import train
from suites.reconstruction.recipes import (
    DEGRADATIONS,
    MiniAE,
    MiniFeatures,
    begin_as_resampler,
    degrade,
    feature_loss,
    initialise,
    kl_autoencoder_loss,
    learning_rate,
    statistics,
)

CHECKPOINTS = Path(features.__file__).parent / "checkpoints"
RECIPES = {
    "mini-ae-16": MiniAE(),
    "mini-ae-32": MiniAE(width=32, latent_channels=8, steps=2600, lr=8e-4),
    "mini-features": MiniFeatures(),
}
GOLDEN = [
    [116.45, 139.85, 166.55, 157.19],
    [137.13, 114.39, 97.09, 112.96],
    [155.36, 102.04, 55.08, 49.46],
    [139.1, 72.86, 59.09, 60.0],
]
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photograph(name, size):
    """uint8 [size, size, 3]: the middle square, shrunk."""
    image = Image.fromarray(getattr(skimage.data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS))


def tensor(pictures):
    """uint8 [B, H, W, 3] -> uint8 [B, 3, H, W]"""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# -- drawn pictures


def test_a_picture_depends_on_its_seed_alone():
    together = draw([5, 2**62 + 1, 5], 64)
    assert together.shape == (3, 64, 64, 3) and together.dtype == np.uint8
    assert np.array_equal(together[0], together[2]) and not np.array_equal(together[0], together[1])
    assert np.array_equal(draw([2**62 + 1], 64)[0], together[1])
    assert draw([1], 40).shape == (1, 40, 40, 3)


def test_golden_picture():
    """Means over 16 x 16 px of picture 7, green; another CPU may round a pixel otherwise: 0.05 levels."""
    means = draw([7], 64)[0, ..., 1].astype(np.float64).reshape(4, 16, 4, 16).mean((1, 3))
    assert np.abs(means - GOLDEN).max() < 0.05


def test_statistics_of_photographs():
    """What dead leaves and photographs share, and white noise (kurtosis 3, slope 0) does not: heavy-tailed gradients
    and a power spectrum near frequency^-2 (Ruderman 1994; here -1.5 to -3). Contrasts are those of photographs +-35 %.
    """
    drawn = draw(range(150), 64) / 255
    photos = [photograph(n, 256) for n in (*PHOTOGRAPHS, "rocket")]
    photos = np.stack([p[y : y + 64, x : x + 64] for p in photos for y in range(0, 256, 64) for x in range(0, 256, 64)])
    measured = []
    for pictures in (drawn, photos / 255):
        grey = pictures.mean(3)
        step = np.diff(grey, axis=2)
        kurtosis = (step**4).mean() / (step**2).mean() ** 2
        window = np.hanning(64)[:, None] * np.hanning(64)
        power = (np.abs(np.fft.rfft2((grey - grey.mean((1, 2), keepdims=True)) * window)) ** 2).mean(0)
        frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64))
        band = (frequency > 0.05) & (frequency < 0.35)
        slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
        assert kurtosis > 10 and -3 < slope < -1.5
        measured.append([pictures.std(), pictures.std((1, 2)).mean(), np.abs(step).mean()])
    assert np.allclose(measured[0], measured[1], rtol=0.35)


def test_blur_is_gaussian_filter():
    """Against scipy with the same cut-off and border: 1e-6."""
    from scipy.ndimage import gaussian_filter

    pixels = np.random.default_rng(0).random((20, 30, 3))
    theirs = gaussian_filter(pixels, (1.3, 1.3, 0), mode="nearest", radius=(4, 4, 0))
    assert np.abs(blur(pixels, 1.3) - theirs).max() < 1e-6


# -- the shipped networks


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_folder_is_what_its_recipe_makes(name):
    """The command of the README finds it finished: same recipe, version, parameters and seed."""
    recipe = RECIPES[name]
    parameters = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    spec = {"recipe": recipe.name, "version": recipe.version, "fields": parameters, "seed": 0}
    folder = CHECKPOINTS / name
    facts = json.loads((folder / "recipe.json").read_text())
    assert facts["spec"] == spec and facts["steps"] == recipe.total
    assert train(recipe, folder, spec=spec) == folder
    with pytest.raises(Error, match="another specification"):
        train(replace(recipe, lr=1.0), folder, spec=spec | {"fields": parameters | {"lr": 1.0}})


def test_shipped_files_are_small():
    total = sum(p.stat().st_size for name in RECIPES for p in (CHECKPOINTS / name).iterdir())
    assert total < 10e6 and features.path().stat().st_size < 1e6


@pytest.fixture(scope="module")
def psnrs():
    """name of model -> PSNR in dB of each photograph at 256 px, by scikit-image on rounded pixels."""
    from diffusers import AutoencoderKL

    found = {}
    for name in ("mini-ae-16", "mini-ae-32"):
        model, loading = AutoencoderKL.from_pretrained(CHECKPOINTS / name, output_loading_info=True)
        assert not any(loading.values()), loading
        model.eval()
        assert model.dtype == torch.float32
        found[name] = []
        for photo in (photograph(n, 256) for n in PHOTOGRAPHS):
            with torch.no_grad():
                latents = model.encode(tensor([photo]) / 127.5 - 1).latent_dist.mode()
                decoded = model.decode(latents).sample
            assert latents.shape == (1, model.config.latent_channels, 64, 64)
            pixels = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            found[name].append(peak_signal_noise_ratio(photo, pixels))
    return found


FLOORS = {"mini-ae-16": (26.94, 28.52, 30.99), "mini-ae-32": (29.12, 30.49, 32.62)}  # dB, as measured


def test_autoencoders_reconstruct_photographs_they_never_saw(psnrs):
    """At most 0.1 dB below what the README states; shrinking and enlarging bilinearly reaches 21 to 28 dB."""
    for name, floors in FLOORS.items():
        assert (np.array(psnrs[name]) > np.array(floors) - 0.1).all(), psnrs


def test_the_larger_autoencoder_is_better_on_every_photograph(psnrs):
    assert (np.array(psnrs["mini-ae-32"]) > np.array(psnrs["mini-ae-16"]) + 1.0).all(), psnrs


# -- the feature network


@pytest.fixture(scope="module")
def network():
    return features.load()


@pytest.fixture(scope="module")
def crops():
    """206 crops of 64 px of four photographs: n / d > 6."""
    photos = [getattr(skimage.data, n)() for n in (*PHOTOGRAPHS, "rocket")]
    return [
        p[y : y + 64, x : x + 64]
        for p in photos
        for y in range(0, p.shape[0] - 63, 64)
        for x in range(0, p.shape[1] - 63, 64)
    ]


def encode(network, pictures):
    with torch.no_grad():
        return network(tensor(pictures)).numpy()


def test_features_of_a_picture_are_its_own(network, crops):
    """float32 [B, 32], alike alone and in a batch (1e-5; features have unit scale), for any size from 64 px."""
    together = encode(network, crops[:7])
    assert together.shape == (7, features.DIM) and together.dtype == np.float32
    assert np.abs(np.concatenate([encode(network, [c]) for c in crops[:7]]) - together).max() < 1e-5
    assert encode(network, [photograph("coffee", 200)[:150]]).shape == (1, features.DIM)
    assert not any(p.requires_grad for p in network.parameters())


def test_features_have_unit_variance_on_drawn_pictures(network):
    """As the recipe folds it in; 300 other pictures: means within 0.3, deviations within 30 %."""
    codes = encode(network, list(draw(range(10_000, 10_300), 64)))
    assert np.abs(codes.mean(0)).max() < 0.3 and np.abs(codes.std(0) - 1).max() < 0.3


def jpeg(picture, quality):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def noisy(picture, sigma):
    noise = np.random.default_rng(int(picture.sum())).normal(0, sigma, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def blurred(picture, radius):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def shrunk(picture, factor):
    image = Image.fromarray(picture)
    small = image.resize((round(64 / factor), round(64 / factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((64, 64), Image.Resampling.BILINEAR))


WORSE = {
    "jpeg": (jpeg, (90, 70, 50, 30, 10)),
    "blur": (blurred, (0.5, 1.0, 1.5, 2.0, 3.0)),
    "noise": (noisy, (2, 5, 10, 20, 40)),
    "shrink": (shrunk, (1.5, 2, 3, 4)),
}


@pytest.mark.parametrize("kind", WORSE)
def test_frechet_distance_grows_as_photographs_degrade(network, crops, kind):
    """Strictly, on photographs, with degradations made by Pillow and NumPy rather than by the recipe."""
    how, strengths = WORSE[kind]
    clean = encode(network, crops)
    distances = [frechet_from_features(clean, encode(network, [how(c, s) for c in crops])) for s in strengths]
    assert distances[0] > 0 and (np.diff(distances) > 0).all(), distances


def test_a_better_autoencoder_has_a_smaller_frechet_distance(network, crops):
    from diffusers import AutoencoderKL

    clean, distances = encode(network, crops), []
    for name in ("mini-ae-32", "mini-ae-16"):
        model = AutoencoderKL.from_pretrained(CHECKPOINTS / name).eval()
        with torch.no_grad():
            images = tensor(crops) / 127.5 - 1
            decoded = [model.decode(model.encode(b).latent_dist.mode()).sample for b in images.split(16)]
            pixels = ((torch.cat(decoded) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            distances.append(frechet_from_features(clean, network(pixels).numpy()))
    assert 0 < distances[0] < distances[1], distances


# -- the recipes


def autoencoder(width=8, channels=4):
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(width, 2 * width, 3 * width),
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=1,
            mid_block_add_attention=False,
        )


def test_an_autoencoder_begins_as_a_resampler():
    """Its first latents are torch's average pooling (rms error 0.03 of [-1, 1]); its pictures are within 2 dB of
    bilinear enlarging."""
    from torch.nn.functional import avg_pool2d, interpolate

    model = begin_as_resampler(initialise(autoencoder(16), torch.Generator().manual_seed(1)))
    images = tensor([photograph("coffee", 128)]) / 127.5 - 1
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mode()
        decoded = model.decode(latents).sample
    pooled = avg_pool2d(images, 4)
    assert (latents[:, :3] - pooled).square().mean().sqrt() < 0.03
    error = [(x - images).square().mean() for x in (decoded, interpolate(pooled, scale_factor=4, mode="bilinear"))]
    assert 10 * torch.log10(error[0] / error[1]) < 2


def test_initial_weights_are_torchs_own_in_law():
    """Bounds and deviation of a layer that torch initialised (5 %), from the generator alone."""
    theirs = torch.nn.Conv2d(16, 32, 3)
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with torch.device("meta"):
            layer = torch.nn.Conv2d(16, 32, 3)
        drawn.append(initialise(layer, torch.Generator().manual_seed(seed)).weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)
    weights = theirs.weight.detach()
    assert abs(float(drawn[0].detach().std() / weights.std()) - 1) < 0.05
    assert abs(float(drawn[0].detach().abs().max() / weights.abs().max()) - 1) < 0.05


def test_kl_autoencoder_loss():
    """The KL term against torch.distributions (relative 1e-5); errors against hand-made pictures."""
    from torch.distributions import Normal, kl_divergence

    mean, logvar = torch.linspace(-2, 2, 24).view(2, 3, 2, 2), torch.linspace(-4, 1, 24).view(2, 3, 2, 2)
    images = torch.zeros(2, 3, 4, 4)
    decoded = images.clone()
    decoded[..., 1] = 0.5  # one column of four: two of three differences between columns
    losses = kl_autoencoder_loss(images, decoded, mean, logvar, 1e-3)
    theirs = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum() / 2
    assert torch.isclose(losses["kl"], theirs, rtol=1e-5)
    assert float(losses["mse"]) == 0.25 / 4 and float(losses["l1"]) == 0.5 / 4
    expected = 4 * 0.0625 + 0.2 * 0.125 + 0.1 * (2 / 3 * 0.5) + 1e-3 * theirs
    assert torch.isclose(losses["loss"], expected, rtol=1e-6)


def test_feature_loss():
    """Zero for right answers and codes whose covariance is the identity; the covariance is NumPy's (1e-6)."""
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((20, 4))
    white = (codes - codes.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(codes.T))).T
    target = torch.zeros(20, 3, dtype=torch.float64)
    assert abs(float(feature_loss(torch.from_numpy(white), target, target)["loss"])) < 1e-12
    spread = float(feature_loss(torch.from_numpy(codes), target, target)["spread"])
    assert abs(spread - ((np.cov(codes.T) - np.eye(4)) ** 2).sum() / 4) < 1e-6


def test_statistics_are_the_pictures():
    """Means and deviations are NumPy's (1e-6); energy in an octave is what a checkerboard of that period has."""
    picture = photograph("chelsea", 64)
    found = statistics(tensor([picture]))[0].numpy()
    scaled = (picture / 127.5 - 1).reshape(-1, 3)
    assert np.abs(found[:3] - scaled.mean(0)).max() < 1e-6
    assert np.abs(found[3:6] - 2 * scaled.std(0, ddof=1)).max() < 1e-6
    for octave in range(4):
        row = (np.arange(64) // 2**octave) % 2
        board = ((row[:, None] + row) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
        energies = statistics(tensor([board]))[0, 6:]
        assert int(energies.argmax()) == octave and torch.isclose(energies[octave], torch.tensor(1.0), atol=1e-5)


def test_degradations():
    """None leaves the picture; each alone changes it, more when stronger; the result stays uint8 of the same shape."""
    picture = photograph("coffee", 72)
    for kind in DEGRADATIONS:
        errors = []
        for strength in (0.0, 0.3, 0.9):
            amounts = dict.fromkeys(DEGRADATIONS, 0.0) | {kind: strength}
            worse = degrade(picture, amounts, np.random.default_rng(0))
            assert worse.dtype == np.uint8 and worse.shape == picture.shape
            errors.append(np.square(worse.astype(float) - picture).mean())
        assert errors[0] == 0 and errors[0] < errors[1] < errors[2], (kind, errors)


def test_learning_rate():
    factors = [learning_rate(step, 1000) for step in range(1000)]
    assert factors[0] == 0.01 and factors[99:600] == [1.0] * 501 and factors[800] == 0.5 and 0 < factors[-1] < 0.01


class Stop(Exception):
    pass


def stop(done, losses):
    if done == 2:
        raise Stop


@pytest.mark.parametrize(
    "recipe",
    [MiniAE(width=8, steps=3, batch=1, size=32), MiniFeatures(steps=3, pictures=2, variants=1)],
    ids=lambda recipe: recipe.name,
)
def test_a_recipe_that_is_stopped_ends_byte_equal(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.train._plot", lambda run, path: None)
    spec = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    whole = train(recipe, tmp_path / "whole", spec=spec)
    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", spec=spec, progress=stop, save_every=0.0)
    stopped = train(recipe, tmp_path / "stopped", spec=spec)
    names = {p.name for p in whole.iterdir()} - {"recipe.json"}
    assert {p.name for p in stopped.iterdir()} - {"recipe.json"} == names and len(names) > 1
    assert all((stopped / n).read_bytes() == (whole / n).read_bytes() for n in names)
    for name in ("psnr_drawn",) if recipe.name == "mini-ae" else ():
        assert json.loads((whole / "recipe.json").read_text())["figures"][name] > 10


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        (MiniAE, {"width": 12}),
        (MiniAE, {"width": 0}),
        (MiniAE, {"size": 30}),
        (MiniAE, {"steps": 0}),
        (MiniAE, {"lr": -1.0}),
        (MiniAE, {"latent_channels": 2}),
        (MiniFeatures, {"size": 32}),
        (MiniFeatures, {"variants": 0}),
        (MiniFeatures, {"pictures": 1, "variants": 1}),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(recipe, wrong):
    with pytest.raises(Error, match=next(iter(wrong))):
        recipe(**wrong)
