"""Pictures: one safe reader for files that others made, and the resizes that papers use. NumPy and Pillow only."""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.types import Error

MAX_BYTES = 64 * 2**20  # a file
MAX_PIXELS = 64 * 10**6  # a picture
GREEDY = {"WEBP": MAX_PIXELS // 2, "JPEG2000": MAX_PIXELS // 2}  # whose decoders take twice the memory of others
MAX_SCANS = 64  # passes over a progressive JPEG: encoders make about ten, and each costs as much as a whole picture
STRIP = 4 * 2**20  # pixels that are converted at a time
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")

# What `read` does where a file leaves it open. It is part of every manifest's digest.
RULES = (
    "sRGB as stored: colour profile and orientation tag ignored; palette expanded; grey repeated; "
    "16-bit: the high byte; CMYK: (255 - ink)(255 - black) / 255; opaque alpha dropped, transparency refused; "
    "float and 32-bit refused; animations refused, of a multi-picture JPEG the first; "
    "broken checksum or truncation refused"
)

_DECODING = threading.Lock()  # warnings.catch_warnings changes the whole process
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError)
_BROKEN += (EOFError, RuntimeError, struct.error, zlib.error)  # what Pillow raises on damaged files


def read(source: str | Path | bytes, name: str = "") -> np.ndarray:
    """uint8 [H, W, 3] of a picture file, or of its bytes; `RULES` says what is done where the file leaves it open.

    Raises Error with file, reason and mend: at most 64 MB and 64 megapixels, regular files only. `name` stands for
    bytes in messages.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    name = name or ("picture" if isinstance(source, bytes) else str(source))
    if len(data) > MAX_BYTES:
        raise Error(f"{name} is {len(data):,} bytes, more than {MAX_BYTES:,}", hint="make it smaller or leave it out")
    from PIL import Image, UnidentifiedImageError

    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, our limit is lower; of damage, what cannot be read is refused
            return _decode(Image, data, name)
    except Error:
        raise
    except Image.DecompressionBombError:
        raise _too_many_pixels(name, MAX_PIXELS) from None
    except MemoryError:
        raise Error(f"{name} needs more memory than there is", hint="make it smaller or leave it out") from None
    except UnidentifiedImageError:
        raise Error(f"{name} is not a picture that can be read", hint=f"formats: {', '.join(FORMATS)}") from None
    except _BROKEN as e:
        reason = str(e) or type(e).__name__
        raise Error(f"{name} cannot be decoded: {reason}", hint="replace the file or leave it out") from None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file of at most 64 MB. Links, pipes, devices and folders raise Error."""
    try:
        # not blocking: opening a pipe would wait for its other end
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as e:
        reason = "it is a link" if os.path.islink(path) else getattr(e, "strerror", None) or e
        raise Error(f"cannot read {path}: {reason}", hint="give a regular file that can be read") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Error(f"cannot read {path}: it is not a regular file", hint="give a file, not a folder or pipe")
        if status.st_size > MAX_BYTES:
            size = f"{status.st_size:,} bytes, more than {MAX_BYTES:,}"
            raise Error(f"{path} is {size}", hint="make it smaller or leave it out")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(MAX_BYTES + 1)
    except OSError as e:
        raise Error(f"cannot read {path}: {e.strerror or e}", hint="check the disk and try again") from None
    finally:
        os.close(fd)


def _too_many_pixels(name: str, limit: int) -> Error:
    return Error(f"{name} has more than {limit:,} pixels", hint="make it smaller or leave it out")


def _open(Image, data: bytes):
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _decode(Image, data: bytes, name: str) -> np.ndarray:
    image = _open(Image, data)
    limit = GREEDY.get(image.format, MAX_PIXELS)
    if image.width * image.height > limit:
        raise _too_many_pixels(name, limit)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise Error(f"{name} is a JPEG of more than {MAX_SCANS} scans", hint="save it again, or leave it out")
    if image.format == "PNG":  # Pillow checks the checksums of pixels only here
        image.verify()
        image = _open(Image, data)
    if image.format != "MPO":  # a JPEG with previews or depth beside it; any JPEG reader sees the first
        try:
            image.seek(1)
        except EOFError:
            image.seek(0)
        else:
            raise Error(f"{name} has more than one frame", hint="save the frame that is meant as a file of its own")
    image.load()
    if image.mode in ("F", "I", "LAB", "HSV") or (image.mode.startswith("I;") and not image.mode.startswith("I;16")):
        message = f"{name} has mode {image.mode}, which has no agreed range"
        raise Error(message, hint="save it as 8-bit or 16-bit RGB")
    if image.width * image.height <= STRIP:
        return _converted(image, name)
    pixels = np.empty((image.height, image.width, 3), np.uint8)  # whole copies would add up to a gigabyte
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _converted(part, name)
    return pixels


def _converted(image, name: str) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I;16"):
        values = np.asarray(image)
        if image.info.get("transparency") is not None and (values == image.info["transparency"]).any():
            raise _transparent(name)
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA"))
        if (pixels[..., 3] != 255).any():
            raise _transparent(name)
        return np.ascontiguousarray(pixels[..., :3])
    return np.array(image if mode == "RGB" else image.convert("RGB"))  # converting RGB would copy it


def _transparent(name: str) -> Error:
    return Error(f"{name} is partly transparent", hint="flatten it onto a background; which one changes the pixels")


def _shape_checked(image: np.ndarray, size: int) -> tuple[int, int]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if size < 1:
        raise Error(f"size is {size}; it must be 1 or more")
    return image.shape[0], image.shape[1]


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def adm(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3], as ADM (Dhariwal & Nichol 2021) crops ImageNet: halve with a box filter while
    the short side is at least twice the size, bicubic until it is the size, centre crop."""
    from PIL import Image

    height, width = _shape_checked(image, size)
    picture = Image.fromarray(image)
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return _centre(np.array(picture), size)


def _short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the short side = size; the long one is cut to a whole number, as torchvision does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _centre_rounded(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop with torchvision's offsets: halves are rounded to even."""
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def pil(image: np.ndarray, size: int, filter: str = "bilinear") -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: Pillow's antialiased resize of the short side, then a centre crop, as
    torchvision's `Resize` and `CenterCrop` treat a Pillow picture. `filter`: bilinear, bicubic or lanczos."""
    from PIL import Image

    target = _short_side(*_shape_checked(image, size), size)
    picture = Image.fromarray(image).resize(target[::-1], Image.Resampling[filter.upper()])
    return _centre_rounded(np.array(picture), size)


def tensor(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: as torchvision's `ToTensor`, `Resize(size)`, `CenterCrop(size)`, antialiased
    bilinear in float32, then rounded to uint8."""
    import torch

    target = _short_side(*_shape_checked(image, size), size)
    if target == image.shape[:2]:
        return _centre_rounded(image, size)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    pixels = torch.nn.functional.interpolate(pixels, target, mode="bilinear", align_corners=False, antialias=True)
    pixels = (pixels[0] * 255).round().clamp(0, 255).to(torch.uint8)
    return _centre_rounded(pixels.permute(1, 2, 0).numpy(), size)


def none(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: the centre, not resized. Raises Error where the picture is smaller."""
    height, width = _shape_checked(image, size)
    if min(height, width) < size:
        hint = f"choose a size of at most {min(height, width)}, or a resize such as adm"
        raise Error(f"a picture of {width}x{height} px has no centre of {size} px", hint=hint)
    return _centre(image, size)


RESIZES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "adm": adm,
    "pil-bilinear": partial(pil, filter="bilinear"),
    "pil-bicubic": partial(pil, filter="bicubic"),
    "pil-lanczos": partial(pil, filter="lanczos"),
    "tensor-bilinear": tensor,
    "none": none,
}


def files(folder: Path) -> list[str]:
    """The pictures below a folder by relative name, sorted; hidden names and files of other kinds are passed over."""
    found = []
    for place, inside, names in os.walk(folder):
        inside[:] = [d for d in inside if not d.startswith(".")]
        found += [Path(place, n) for n in names if not n.startswith(".") and n.lower().endswith(SUFFIXES)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def format_of(path: str | Path) -> str:
    """What a picture file is stored as, by its content: "PNG", "JPEG", ...; "MPO", a JPEG with others, is "JPEG".

    Raises Error where it is no picture. Nothing is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes; `read` has a limit of its own
            with Image.open(path, formats=FORMATS) as image:
                return "JPEG" if image.format == "MPO" else str(image.format)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise Error(f"{path} is not a picture that can be read", hint=f"formats: {', '.join(FORMATS)}") from None
    except (*_BROKEN, MemoryError) as e:
        raise Error(f"{path} cannot be read: {str(e) or type(e).__name__}", hint="replace the file") from None
