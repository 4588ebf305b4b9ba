"""PSNR, SSIM, resizing and decoding against peers."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from measure import Calls, Race, peer

HEIGHT, WIDTH = 720, 1280
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def walk(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """uint8 [..., height, width] as smooth as a photograph: a random walk in both directions, and a little noise."""
    g = np.random.default_rng(seed)
    path = g.standard_normal(shape, dtype=np.float32).cumsum(-1).cumsum(-2)
    path = (path - path.min()) / np.ptp(path) * 255 + g.normal(0, 3, shape)
    return np.clip(path, 0, 255).astype(np.uint8)


def clip(frames: int):
    """Two clips as tensors [T, 3, H, W], the second noisy, and as lists of arrays [H, W, 3]."""
    import torch

    x = walk((3, HEIGHT, WIDTH), 0)
    x = np.stack([np.roll(x, i, axis=2) for i in range(frames)])
    g = np.random.default_rng(1)
    y = np.stack([np.clip(frame + g.integers(-12, 13, frame.shape), 0, 255).astype(np.uint8) for frame in x])
    last = [[np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in v] for v in (x, y)]
    return torch.from_numpy(x), torch.from_numpy(y), *last


def psnr(frames: int) -> Calls:
    from bench.metrics.pixel import psnr

    x, y, first, second = clip(frames)
    skimage = "skimage.metrics.peak_signal_noise_ratio"
    torchmetrics = "torchmetrics.functional.image.peak_signal_noise_ratio"
    return {
        "": lambda: psnr(x, y),
        "scikit-image": lambda: [peer(skimage)(a, b, data_range=255) for a, b in zip(first, second, strict=True)],
        "torchmetrics": lambda: peer(torchmetrics)(x.float(), y.float(), 255.0, reduction="none", dim=(1, 2, 3)),
    }


def ssim_gauss(frames: int) -> Calls:
    from bench.metrics.ssim import ssim

    x, y, first, second = clip(frames)
    skimage = "skimage.metrics.structural_similarity"
    return {
        "": lambda: ssim(x, y),
        "scikit-image": lambda: [
            peer(skimage)(a, b, channel_axis=2, data_range=255, **WANG) for a, b in zip(first, second, strict=True)
        ],
        "piq": lambda: peer("piq.ssim")(x, y, data_range=255, reduction="none", downsample=False),
    }


def ssim_reflected(frames: int) -> Calls:
    from bench.metrics.ssim import ssim

    x, y, *_ = clip(frames)
    torchmetrics = "torchmetrics.functional.image.structural_similarity_index_measure"
    return {
        "": lambda: ssim(x, y, "gauss11_reflect"),
        "torchmetrics": lambda: peer(torchmetrics)(x.float(), y.float(), data_range=255.0, reduction="none"),
    }


def ssim_uniform(frames: int) -> Calls:
    from bench.metrics.ssim import ssim

    x, y, first, second = clip(frames)
    skimage = "skimage.metrics.structural_similarity"
    return {
        "": lambda: ssim(x, y, "uniform7"),
        "scikit-image": lambda: [
            peer(skimage)(a, b, channel_axis=2, data_range=255) for a, b in zip(first, second, strict=True)
        ],
    }


def ssim_pooled(frames: int) -> Calls:
    from bench.metrics.ssim import ssim

    x, y, *_ = clip(frames)
    return {
        "": lambda: ssim(x, y, "avgpool_gauss11"),
        "piq": lambda: peer("piq.ssim")(x, y, data_range=255, reduction="none"),
    }


def apart(ours: object, theirs: object) -> str:
    """The largest difference of two lists of numbers."""
    return f"differs by {np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).max():.1g}"


def levels_apart(ours: object, theirs: object) -> str:
    theirs = np.asarray(theirs, float)
    theirs = theirs.transpose(2, 0, 1)[None] if theirs.shape[-1] == 3 else theirs
    return f"differs by {np.abs(np.asarray(ours, float) - theirs).max():.1g} of 255 levels"


def equal(ours: object, theirs: object) -> str:
    return "equal" if np.array_equal(np.asarray(ours), np.asarray(theirs)) else "DIFFERENT"


@cache
def picture(size: int) -> np.ndarray:
    """uint8 [size, size, 3]."""
    return np.ascontiguousarray(walk((3, size, size), 2).transpose(1, 2, 0))


def resize(size: int) -> Calls:
    import torch

    from bench.metrics.resizes import resized

    image = picture(size)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]

    return {
        "": lambda: resized(tensor.contiguous().float(), "clean", 299),
        "clean-fid": lambda: clean_resizer()(image),
    }


@cache
def clean_resizer():
    return peer("cleanfid.resize.make_resizer")("PIL", False, "bicubic", (299, 299))


def resize_tf1(batch: int) -> Calls:
    import torch

    from bench.metrics.resizes import resized

    tensor = torch.from_numpy(np.stack([picture(512)] * batch)).permute(0, 3, 1, 2).float().contiguous()
    like = "torch_fidelity.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x"
    return {
        "": lambda: resized(tensor, "tf1", 299),
        "torch-fidelity": lambda: peer(like)(tensor, size=(299, 299), align_corners=False),
    }


@cache
def files() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def file(size: int, kind: str) -> str:
    from PIL import Image

    path = Path(files().name) / f"{size}.{kind}"
    if not path.exists():
        Image.fromarray(picture(size)).save(path, **({"quality": 95} if kind == "jpg" else {}))
    return str(path)


def opened(path: str) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def decode(kind: str):
    def build(size: int) -> Calls:
        from bench.images import read

        path = file(size, kind)
        return {"": lambda: read(path), "Pillow": lambda: opened(path)}

    return build


def jpeg_to_network(size: int) -> Calls:
    import torch

    from bench.images import read
    from bench.metrics.resizes import resized

    path = file(size, "jpg")
    return {
        "": lambda: resized(torch.from_numpy(read(path)).permute(2, 0, 1)[None].contiguous().float(), "clean", 299),
        "clean-fid": lambda: clean_resizer()(opened(path)),
    }


FRAME = {"each": True, "scale": 1000.0, "unit": "CPU ms/frame", "agree": apart}
ONE = {"scale": 1000.0, "unit": "CPU ms", "rounds": 15}
MEMORY = {"memory": True, "most": 150}
RACES = [
    Race("PSNR, 8 frames of 720p", psnr, 8, 1, 5, {"scikit-image": 5.5, "torchmetrics": 9}, **FRAME),
    Race("SSIM gauss11, 8 frames of 720p", ssim_gauss, 8, 1, 2, {"fastest": 2.7}, **FRAME),
    Race("SSIM gauss11 reflected, 8 frames of 720p", ssim_reflected, 8, 1, 2, {"torchmetrics": 6}, **FRAME),
    Race("SSIM uniform7, 8 frames of 720p", ssim_uniform, 8, 1, 3, {"fastest": 2.2}, **FRAME),
    Race("SSIM averaged down first, 8 frames of 720p", ssim_pooled, 8, 1, 3, **FRAME),
    Race("SSIM gauss11 reflected, memory beyond 8 frames of 720p", ssim_reflected, 8, 1, **MEMORY),
    Race("SSIM uniform7, memory beyond 8 frames of 720p", ssim_uniform, 8, 1, **MEMORY),
    Race("SSIM uniform7, memory beyond 32 frames of 720p", ssim_uniform, 32, 1, **MEMORY),
    Race("resize 512 to 299 px", resize, 512, 512, agree=levels_apart, goals={"clean-fid": 1.55}, **ONE),
    Race("resize like TensorFlow 1, batch of 4", resize_tf1, 4, 4, agree=levels_apart, **ONE),
    Race("JPEG of 512 px, decoding", decode("jpg"), 512, 512, agree=equal, **ONE),
    Race("PNG of 512 px, decoding", decode("png"), 512, 512, agree=equal, note="ours checks every checksum", **ONE),
    Race("JPEG of 512 px to 299 px", jpeg_to_network, 512, 512, agree=levels_apart, goals={"clean-fid": 1.55}, **ONE),
]
