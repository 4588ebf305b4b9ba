"""Adapters against the libraries that they wrap, called directly."""

from __future__ import annotations

import inspect
import json
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from bench import registry
from bench.adapters.autoencoders import IMAGE_CLASSES, VAE, VideoVAE
from bench.adapters.codecs import FORMATS, Codec
from bench.adapters.toy import Toy, colour
from bench.capabilities import held
from bench.check import check
from bench.types import Error, UsageError
from bench.weights import EMBEDDED


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


# --- autoencoders of diffusers: random networks of the real classes, saved and read back


def networks() -> dict:
    from diffusers import (
        AutoencoderDC,
        AutoencoderKL,
        AutoencoderKLCosmos,
        AutoencoderKLHunyuanVideo,
        AutoencoderKLWan,
        AutoencoderTiny,
        VQModel,
    )

    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    blocks = {"block_out_channels": (8, 8, 16), "down_block_types": down, "up_block_types": up, "norm_num_groups": 4}
    return {
        "AutoencoderKL": lambda: AutoencoderKL(**blocks, latent_channels=4),
        "AutoencoderTiny": lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ),
        "VQModel": lambda: VQModel(**blocks, latent_channels=3, num_vq_embeddings=50),
        "VQModel-lookup": lambda: VQModel(**blocks, latent_channels=3, num_vq_embeddings=50, lookup_from_codebook=True),
        "AutoencoderDC": lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        ),
        "AutoencoderKLCosmos": lambda: AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=32,
            num_layers=1,
            latents_mean=None,
            latents_std=None,
        ),
        "AutoencoderKLWan": lambda: AutoencoderKLWan(
            base_dim=4,
            z_dim=2,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0, 0.0],
            latents_std=[1.0, 1.0],
        ),
        "AutoencoderKLHunyuanVideo": lambda: AutoencoderKLHunyuanVideo(
            latent_channels=2, block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
    }


FACTORS = {"AutoencoderKLCosmos": 8}  # the others: 4
NETWORKS = ["AutoencoderKL", "AutoencoderTiny", "VQModel", "VQModel-lookup", "AutoencoderDC", "AutoencoderKLCosmos"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (network, folder), made once."""
    made = {}

    def get(name):
        if name not in made:
            net = networks()[name]().eval()
            generator = torch.Generator().manual_seed(1)
            for key, value in net.named_parameters():  # the same network in every run of the tests
                noise = torch.randn(value.shape, generator=generator)
                if value.dim() > 1:
                    value.data = 0.7 * noise / math.sqrt(value[0].numel())
                elif key.endswith("bias"):
                    value.data = 0.05 * noise
            folder = tmp_path_factory.mktemp("networks") / name
            net.save_pretrained(folder)
            made[name] = net, folder
        return made[name]

    return get


def direct(net, x: torch.Tensor) -> torch.Tensor:
    """Reconstruction by the class itself, through its own `forward` where that means the deterministic one."""
    with torch.no_grad():
        if type(net).__name__ == "AutoencoderTiny":  # its forward also rounds the latents to 8 bits
            return net.decode(net.encode(x).latents).sample
        if type(net).__name__ == "AutoencoderKLCosmos":
            return net(x.unsqueeze(2)).sample.squeeze(2)
        return net(x).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_a_vae_is_what_its_class_computes(saved, name):
    net, folder = saved(name)
    x = tensor(*[picture(seed, 32) for seed in range(4)])
    vae = VAE(folder)
    factor = FACTORS.get(name, 4)
    latents = vae.encode(x)
    decoded = vae.decode(latents)

    assert vae.factor == factor and latents.data.shape[2:] == (32 // factor, 32 // factor)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    # 1e-5: the codebook's straight-through sum z + (q - z) rounds; the others are the same operations
    torch.testing.assert_close(decoded, direct(net, x), atol=1e-5, rtol=0)
    alone = torch.cat([vae.decode(vae.encode(image[None])) for image in x])
    torch.testing.assert_close(decoded, alone, atol=1e-4, rtol=0)  # other batch: other order of float32 sums
    if name.startswith("VQModel"):
        assert latents.indices.shape == (4, 8, 8) and latents.indices.dtype == torch.int64
        assert list(latents.bits) == [64 * math.log2(50)] * 4
        assert len(latents.indices.unique()) > 10
        assert torch.equal(vae.decode(latents.indices), decoded)  # the codes are all that it needs
    else:
        assert list(latents.bits) == [32 * latents.data[0].numel()] * 4
        assert torch.equal(vae.decode(latents.data), decoded)
    with pytest.raises(Error, match=f"factor {factor}"):
        vae.encode(x[..., :30])


def test_a_sample_of_the_posterior_belongs_to_its_seed(saved):
    net, folder = saved("AutoencoderKL")
    vae = VAE(folder)
    x = tensor(*[picture(seed, 32) for seed in range(3)])
    latents = vae.encode(x)
    seeds = [3, 2**63 - 1, 5]
    sampled = vae.decode(latents, seeds)

    with torch.no_grad():
        posterior = net.encode(x).latent_dist
        noise = [torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        expected = net.decode(posterior.mean + posterior.std * torch.stack(noise)).sample
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=0)
    assert torch.equal(sampled, vae.decode(latents, seeds))
    assert (sampled - vae.decode(latents)).abs().amax((1, 2, 3)).min() > 1e-3
    swapped = vae.decode(vae.encode(x.flip(0)), seeds[::-1]).flip(0)
    torch.testing.assert_close(sampled, swapped, atol=1e-4, rtol=0)


def test_half_precision_counts_half_the_bits(saved):
    net, folder = saved("AutoencoderKL")
    x = tensor(picture(size=32))
    half = VAE(folder, "bfloat16")
    assert half.encode(x).bits == [16 * 4 * 8 * 8]
    decoded = half.decode(half.encode(x))
    assert decoded.dtype == torch.float32
    half = net.__class__.from_pretrained(folder, torch_dtype=torch.bfloat16)
    half.to(memory_format=torch.channels_last)  # as the adapter has it: torch 2.6 rounds otherwise in the other order
    expected = direct(half, x.bfloat16().contiguous(memory_format=torch.channels_last))
    assert torch.equal(decoded, expected.float())


@pytest.mark.parametrize(
    "name, frames, shape, illegal",
    [
        ("AutoencoderKLCosmos", 9, (4, 2, 4, 4), 8),
        ("AutoencoderKLWan", 9, (2, 3, 4, 4), 8),
        ("AutoencoderKLHunyuanVideo", 17, (2, 5, 4, 4), 8),  # 17: more than its own window of 16
    ],
)
def test_a_video_goes_through_in_legal_lengths(saved, name, frames, shape, illegal):
    net, folder = saved(name)
    vae = VideoVAE(folder)
    clips = tensor(*[picture(seed, 32) for seed in range(frames)]).transpose(0, 1)[None]
    latents = vae.encode_video(clips)
    assert vae.temporal_factor == (frames - 1) // (shape[1] - 1) and latents.data.shape == (1, *shape)
    assert list(latents.bits) == [32 * math.prod(shape)]
    decoded = vae.decode_video(latents)
    net.use_framewise_encoding = net.use_framewise_decoding = False
    with torch.no_grad():
        torch.testing.assert_close(decoded, net(clips).sample, atol=1e-5, rtol=0)
        assert net(clips[:, :, :illegal]).sample.shape[2] != illegal  # why other lengths are refused
    with pytest.raises(Error, match="8 frames are not"):
        vae.encode_video(clips[:, :, :illegal])
    assert torch.equal(vae.decode_video(latents, [5]), decoded) == (name == "AutoencoderKLCosmos")
    assert torch.equal(vae.decode_video(latents, [5]), vae.decode_video(latents, [5]))


def test_a_folder_that_is_not_a_whole_autoencoder_is_refused(saved, tmp_path):
    from diffusers import UNet2DModel
    from safetensors.torch import load_file, save_file

    with pytest.raises(Error, match="not a folder"):
        VAE("nothing/here")
    with pytest.raises(Error, match="not on this machine") as caught:
        VAE("hf:nobody/nothing@0123456789")
    assert "bench data fetch hf:nobody/nothing@0123456789" in caught.value.hint
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    with pytest.raises(Error, match=r"no config\.json") as caught:
        VAE(str(tmp_path / "pipeline"))
    assert "folder vae" in caught.value.hint

    _, folder = saved("AutoencoderTiny")
    with pytest.raises(UsageError, match="dtype"):
        VAE(folder, "int8")
    with pytest.raises(Error, match="AutoencoderTiny"):
        VideoVAE(folder)
    other = tmp_path / "unet"
    down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
    unet = UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=down, up_block_types=up)
    unet.save_pretrained(other)
    with pytest.raises(Error, match="UNet2DModel"):
        VAE(other)

    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    lost = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != lost}, part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(Error, match=lost.replace(".", r"\.")):  # diffusers would make numbers up
        VAE(part)
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.VAE"}}))
    with pytest.raises(Error, match="names code"):
        VAE(part)


# --- all of them


@pytest.mark.parametrize("name", [*NETWORKS, "AutoencoderKLWan", "AutoencoderKLHunyuanVideo"])
def test_saved_networks_conform(saved, name):
    """No finding but those about pictures: these networks were never trained."""
    _, folder = saved(name)
    video = name in ("AutoencoderKLWan", "AutoencoderKLHunyuanVideo")
    findings = check(VideoVAE(folder) if video else VAE(folder), size=32)
    assert len(findings) > 10
    assert not [f for f in findings if f.status == "fail"], findings


def openable() -> list:
    """Our registered adapters that open without arguments, and the embedded autoencoders."""
    names = [e.name for e in registry.entries("adapters") if e.builtin]
    embedded = [p.parent.name for p in sorted(EMBEDDED.glob("*/config.json"))]
    made = []
    for name in names:
        parameters = inspect.signature(registry.find("adapters", name)).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if not needed:
            few = {"steps": 4} if any(p.name == "steps" for p in parameters) else {}  # enough for what is tried
            made.append((name, few))
        elif name == "vae":
            made += [(name, {"weights": w}) for w in embedded if class_of(w) in IMAGE_CLASSES]
    return made


def class_of(weights: str) -> str | None:
    return json.loads((EMBEDDED / weights / "config.json").read_text()).get("_class_name")


@pytest.mark.parametrize("name, arguments", openable())
def test_registered_adapters_conform(name, arguments):
    findings = check(registry.find("adapters", name)(**arguments), size=64)
    assert not [f for f in findings if f.status == "fail"], findings


def test_capabilities_are_read_from_the_class():
    assert held(Codec) == held(VAE) == ("Autoencoder",)
    assert held(VideoVAE) == ("VideoAutoencoder",)
    assert held(Toy) == ("TextToImage", "ClassToImage", "Autoencoder")
