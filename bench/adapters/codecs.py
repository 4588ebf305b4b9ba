"""JPEG, WebP, AVIF and JPEG 2000 through Pillow: autoencoders that need no weights, with their real file sizes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from bench.capabilities import Latents
from bench.types import Error, UsageError

if TYPE_CHECKING:
    from torch import Tensor

#       format: (Pillow's name, its feature, default quality, lowest, highest)
FORMATS = {
    "jpeg": ("JPEG", "jpg", 75, 1, 100),
    "webp": ("WEBP", "webp", 75, 0, 100),
    "avif": ("AVIF", "avif", 75, 0, 100),
    "jpeg2000": ("JPEG2000", "jpg_2000", 40, 20, 60),
}
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")  # of jpeg and avif; webp is always 4:2:0, jpeg2000 always 4:4:4


class Codec:
    """An image codec at one quality, as an Autoencoder whose latents are files.

    `quality` is the codec's own scale, so it can be compared within a format only; bits can be compared between them.
    jpeg 1..100, webp and avif 0..100: higher is better, default 75. jpeg2000: the peak signal-to-noise ratio that the
    encoder aims at, 20..60 dB, default 40 (rounding to 8 bits keeps it from passing 52 dB).

    Encoders run at Pillow's default effort: the standard's Huffman tables (jpeg), method 4 (webp), speed 6 of libaom
    on one thread (avif), the irreversible 9/7 wavelet (jpeg2000).

    Raises UsageError for an unknown format, a quality out of range or a subsampling that the format lacks, and Error
    where this Pillow was built without the format.
    """

    def __init__(
        self,
        format: Literal["jpeg", "webp", "avif", "jpeg2000"] = "jpeg",
        quality: int | None = None,
        subsampling: Literal["4:4:4", "4:2:2", "4:2:0"]
        | None = None,  # of chroma: 4:4:4, 4:2:2, 4:2:0 (default); jpeg and avif
        *,
        device: str = "cpu",  # where decoded images go; the codecs themselves run on the CPU
    ):
        from PIL import features

        if format not in FORMATS:
            raise UsageError(f"codec: format {format!r} is not known", hint=f"formats: {', '.join(FORMATS)}")
        self.pillow_format, feature, default, low, high = FORMATS[format]
        quality = default if quality is None else quality
        if not low <= quality <= high:
            raise UsageError(f"codec: {format} quality {quality} must lie in {low}..{high}")
        if subsampling is not None and (format not in ("jpeg", "avif") or subsampling not in SUBSAMPLINGS):
            raise UsageError(
                f"codec: subsampling {subsampling!r} does not go with {format}",
                hint=f"jpeg and avif take {', '.join(SUBSAMPLINGS)}; webp is always 4:2:0, jpeg2000 always 4:4:4",
            )
        if not features.check(feature) or (format == "avif" and not _libaom()):
            raise Error(
                f"codec: this Pillow cannot write {format}",
                hint="pip install --force-reinstall --only-binary :all: 'pillow>=12.2'",
            )
        self.device = device
        self.options = {
            "jpeg": {"quality": quality, "subsampling": subsampling or "4:2:0"},
            "webp": {"quality": quality},
            "avif": {"quality": quality, "subsampling": subsampling or "4:2:0", "codec": "aom", "max_threads": 1},
            "jpeg2000": {"quality_mode": "dB", "quality_layers": [quality], "irreversible": True, "mct": 1},
        }[format]

    def encode(self, images: Tensor) -> Latents:
        """float32 [B, 3, H, W] in [-1, 1], rounded half up to 8 bits -> one file (bytes) per image, 8 bits a byte."""
        from PIL import Image

        pixels = (images.float() * 127.5 + 128.0).clamp(0, 255.5).floor().byte()  # u = floor((x + 1) * 127.5 + 0.5)
        files = []
        for picture in pixels.permute(0, 2, 3, 1).cpu().numpy():
            buffer = BytesIO()
            Image.fromarray(picture).save(buffer, self.pillow_format, **self.options)
            files.append(buffer.getvalue())
        return Latents(files, [8.0 * len(file) for file in files])

    def decode(self, latents: Latents, seeds: Sequence[int] | None = None) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1], whole numbers of 1/127.5; seeds change nothing."""
        import numpy as np
        import torch
        from PIL import Image

        pictures = []
        for file in latents.data:
            with Image.open(BytesIO(file), formats=[self.pillow_format]) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return (pixels.float() / 127.5 - 1).contiguous().to(self.device)


def _libaom() -> bool:
    """Can Pillow write AVIF with libaom? Another encoder would give other files under the same name."""
    from PIL import _avif

    return _avif.encoder_codec_available("aom")
