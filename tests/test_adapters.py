"""Adapters against the libraries that they wrap, called directly."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bench.adapters.codecs import FORMATS, Codec
from bench.adapters.toy import Toy, colour
from bench.capabilities import held
from bench.types import Error, UsageError


def picture(seed: int = 0, size: int = 48) -> np.ndarray:
    """uint8 [size, size, 3]: smooth waves of colour and a little grain."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = np.stack([np.sin(7 * x + seed) * np.cos(5 * y), np.sin(3 * (x + y)), np.cos(9 * x * y + seed)], axis=-1)
    grain = np.random.default_rng(seed).normal(0, 4, (size, size, 3))
    return np.clip(127 + 90 * waves + grain, 0, 255).astype(np.uint8)


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    """float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- codecs


@pytest.mark.parametrize("format", FORMATS)
def test_a_codec_is_what_pillow_writes_to_the_last_bit(format):
    u = picture()
    options = {
        "jpeg": {"quality": 60, "subsampling": "4:2:0"},
        "webp": {"quality": 60},
        "avif": {"quality": 60, "subsampling": "4:2:0", "codec": "aom", "max_threads": 1},
        "jpeg2000": {"quality_mode": "dB", "quality_layers": [35], "irreversible": True, "mct": 1},
    }[format]
    file = BytesIO()
    Image.fromarray(u).save(file, FORMATS[format][0], **options)
    expected = np.asarray(Image.open(file).convert("RGB"))
    psnr = 10 * np.log10(255**2 / np.mean((expected.astype(np.float64) - u) ** 2))

    codec = Codec(format, 35 if format == "jpeg2000" else 60)
    latents = codec.encode(tensor(u))
    decoded = codec.decode(latents)

    assert latents.data == [file.getvalue()]
    assert latents.bits == [8 * len(file.getvalue())]
    pixels = ((decoded.double() + 1) * 127.5).round()[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)
    assert 10 * np.log10(255**2 / np.mean((pixels - u) ** 2)) == psnr
    assert decoded.dtype == torch.float32 and decoded.min() >= -1 and decoded.max() <= 1


def test_jpeg2000_reaches_the_decibels_that_its_quality_names():
    u = picture(size=128)
    for decibels in (32, 36, 40):
        codec = Codec("jpeg2000", decibels)
        error = codec.decode(codec.encode(tensor(u))).double() - tensor(u).double()
        # Tolerance 1 dB: the encoder truncates whole coding passes and measures before its output is rounded to 8 bits.
        assert 10 * np.log10(4 / float((error**2).mean())) == pytest.approx(decibels, abs=1)


@pytest.mark.parametrize("format", FORMATS)
def test_better_quality_costs_more_bits_and_errs_less(format):
    x = tensor(picture(size=96))
    bits, errors = [], []
    for quality in (25, 40, 55):
        codec = Codec(format, quality)
        latents = codec.encode(x)
        bits.append(latents.bits[0])
        errors.append(float((codec.decode(latents) - x).square().mean()))
    assert bits == sorted(bits) and bits[0] < bits[-1]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


def test_pixels_are_rounded_half_up_and_clamped():
    steps = torch.tensor([-3.0, -1.0, 0.5 / 127.5 - 1, 1 / 127.5 - 1, 1.0, 3.0, 254.49 / 127.5 - 1, 254.5 / 127.5 - 1])
    lossless = Codec("webp")
    lossless.options = {"lossless": True}
    images = steps.reshape(1, 1, 2, 4).expand(1, 3, 2, 4)
    pixels = ((lossless.decode(lossless.encode(images)) + 1) * 127.5).round()[0, 0].flatten().tolist()
    assert pixels == [0, 0, 1, 1, 255, 255, 254, 255]


def test_chroma_subsampling_is_taken():
    x = tensor(picture())
    assert Codec("jpeg", 90, "4:4:4").encode(x).bits[0] > Codec("jpeg", 90, "4:2:0").encode(x).bits[0]
    assert Codec("avif", 90, "4:4:4").encode(x).data != Codec("avif", 90, "4:2:0").encode(x).data


@pytest.mark.parametrize("format", FORMATS)
def test_a_codec_codes_each_image_of_a_batch_alone(format):
    x = tensor(*[picture(seed) for seed in range(3)])
    codec = Codec(format)
    assert codec.encode(x).data == [codec.encode(image[None]).data[0] for image in x]
    assert torch.equal(codec.decode(codec.encode(x))[1:2], codec.decode(codec.encode(x[1:2])))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("jpg",), "jpg"),
        (("jpeg", 0), "1..100"),
        (("webp", 101), "0..100"),
        (("jpeg2000", 75), "20..60"),
        (("webp", 75, "4:4:4"), "webp"),
        (("jpeg", 75, "4:1:0"), "4:1:0"),
    ],
)
def test_a_codec_refuses_what_a_format_does_not_have(arguments, named):
    with pytest.raises(UsageError, match=named):
        Codec(*arguments)


def test_a_missing_encoder_names_the_mend(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(Error, match="cannot write avif") as caught:
        Codec("avif")
    assert "pip install" in caught.value.hint


# --- toy


def test_the_toy_autoencoder_is_block_averages():
    x = tensor(picture(), picture(1))
    toy = Toy(factor=4, bits=0)
    latents = toy.encode(x)
    blocks = x.double().numpy().reshape(2, 3, 12, 4, 12, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(latents.data.numpy(), blocks, atol=1e-6)  # float32 sums of 16 numbers
    np.testing.assert_allclose(toy.decode(latents).numpy(), np.kron(blocks, np.ones((4, 4))), atol=1e-6)
    assert list(latents.bits) == [32 * 3 * 12 * 12] * 2


def test_the_toy_rounds_to_its_bits():
    x = tensor(picture())
    latents = Toy(factor=1, bits=3).encode(x)
    assert list(latents.bits) == [3 * x.numel()]
    assert latents.indices.dtype == torch.int64 and latents.indices.min() >= 0 and latents.indices.max() <= 7
    assert float((latents.data - x).abs().max()) <= 1 / 7 + 1e-6  # half a step of 2/7
    exact = Toy(factor=1, bits=8)
    # 8 bits on 8-bit pixels lose nothing but the last place of float32
    torch.testing.assert_close(exact.decode(exact.encode(x)), x, atol=1e-6, rtol=0)


def test_toy_images_have_the_colour_and_spread_that_are_stated():
    toy = Toy(size=64)
    image = toy.generate(["a red house"], [7])[0].double()
    # 4,096 draws: the mean of a channel is known to 0.1 / 64; five of these
    assert image.mean((1, 2)).tolist() == pytest.approx(list(colour("a red house")), abs=5 * 0.1 / 64)
    assert image.std((1, 2)).tolist() == pytest.approx([0.1] * 3, rel=0.06)
    assert image.min() >= 0 and image.max() <= 1


def test_toy_items_do_not_depend_on_their_batch():
    toy = Toy(noise=0.1)
    prompts, seeds = ["a", "b", "c", "a"], [1, 2, 2**63 - 1, 4]
    together = toy.generate(prompts, seeds)
    classes = toy.generate_classes([0, 9, 3, 0], seeds)
    x = tensor(*[picture(seed, 32) for seed in range(4)])
    decoded = toy.decode(toy.encode(x), seeds)
    for i in range(4):
        assert torch.equal(together[i : i + 1], toy.generate(prompts[i : i + 1], seeds[i : i + 1]))
        assert torch.equal(classes[i : i + 1], toy.generate_classes([[0, 9, 3, 0][i]], seeds[i : i + 1]))
        assert torch.equal(decoded[i : i + 1], toy.decode(toy.encode(x[i : i + 1]), seeds[i : i + 1]))
    assert not torch.equal(decoded, toy.decode(toy.encode(x)))
    assert torch.equal(toy.decode(toy.encode(x)), toy.decode(toy.encode(x)))


def test_the_toy_says_what_it_cannot_do():
    with pytest.raises(Error, match="blocks of 4 px"):
        Toy().encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(Error, match=r"0\.\.9"):
        Toy().generate_classes([10], [0])
    with pytest.raises(Error, match="bits"):
        Toy(bits=17)


def test_capabilities_are_read_from_the_class():
    assert held(Codec) == ("Autoencoder",)
    assert held(Toy) == ("TextToImage", "ClassToImage", "Autoencoder")
