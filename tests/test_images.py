"""The safe reader against files made by hand and by mutation; the resizes against torchvision and ADM's formula."""

import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from bench import images
from bench.types import Error

RAMP = np.add.outer(np.arange(24), 5 * np.arange(31)).astype(np.uint8)
COLOUR = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)


def encoded(pixels, kind="PNG", mode=None, **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from its parts: what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rgba(alpha: int) -> np.ndarray:
    return np.dstack([COLOUR, np.full(RAMP.shape, alpha, np.uint8)])


def with_orientation() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(COLOUR, exif=exif)


def grey16(values: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 0, zlib.compress(rows))


def colour16(values: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 2, zlib.compress(rows))


GREY = np.repeat(RAMP[..., None], 3, axis=2)
WIDE = np.linspace(0, 65535, 24 * 31).astype(np.uint16).reshape(24, 31)
WIDE3 = np.stack([WIDE, WIDE[::-1], WIDE.T.reshape(24, 31)], axis=2)
BITS = (RAMP > 60).astype(np.uint8) * 255

# name -> (bytes, the pixels that must come out)
READ_AS_STATED = {
    "colour PNG": (encoded(COLOUR), COLOUR),
    "grey PNG": (encoded(RAMP), GREY),
    "BMP": (encoded(COLOUR, "BMP"), COLOUR),
    "PPM": (encoded(COLOUR, "PPM"), COLOUR),
    "TIFF": (encoded(COLOUR, "TIFF"), COLOUR),
    "lossless WebP": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
    "GIF of one frame": (encoded(RAMP, "GIF"), GREY),
    "opaque alpha": (encoded(rgba(255)), COLOUR),
    "grey with opaque alpha": (encoded(np.dstack([RAMP, np.full_like(RAMP, 255)])), GREY),
    "palette": (encoded(Image.fromarray(RAMP).convert("P")), GREY),
    "one bit": (encoded(BITS, mode="1"), np.repeat(BITS[..., None], 3, axis=2)),
    "16-bit grey": (grey16(WIDE), np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, axis=2)),
    "16-bit grey TIFF": (encoded(WIDE, "TIFF"), np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, axis=2)),
    "16-bit colour": (colour16(WIDE3), (WIDE3 >> 8).astype(np.uint8)),
    "orientation tag": (with_orientation(), COLOUR),
    "colour profile": (encoded(COLOUR, icc_profile=b"not a profile" * 20), COLOUR),
    "one pixel": (encoded(COLOUR[:1, :1]), COLOUR[:1, :1]),
    "strip": (encoded(np.repeat(COLOUR[:1, :1], 9000, axis=1)), np.repeat(COLOUR[:1, :1], 9000, axis=1)),
    "PNG named JPEG": (encoded(COLOUR), COLOUR),
    "bytes after the end": (encoded(COLOUR) + b"<script>" * 50, COLOUR),
    "key colour that no pixel has": (encoded(COLOUR, transparency=(1, 2, 3)), COLOUR),
}


def bomb(width: int, height: int) -> bytes:
    pack = zlib.compressobj(9)
    row = b"\0" * (1 + width // 8)
    return png(width, height, 1, 0, b"".join(pack.compress(row) for _ in range(height)) + pack.flush())


def broken_checksum() -> bytes:
    data = bytearray(encoded(COLOUR))
    place = data.index(b"IDAT")
    length = struct.unpack(">I", data[place - 4 : place])[0]
    data[place + 4 + length] ^= 1
    return bytes(data)


def text_bomb() -> bytes:
    return png(
        4, 4, 8, 0, zlib.compress(b"\0\0\0\0\0" * 4), chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * 70_000_000))
    )


def frames(kind: str, **options) -> bytes:
    other = Image.fromarray(255 - COLOUR)
    return encoded(COLOUR, kind, save_all=True, append_images=[other], **options)


NAN = np.full((8, 8), np.nan, np.float32)
JPEG = encoded(COLOUR, "JPEG")
NOISE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)

# name -> (bytes, a word of the reason that must be given)
REFUSED = {
    "empty": (b"", "not a picture"),
    "HTML as picture": (b"<!doctype html><html><body>404</body></html>" * 20, "not a picture"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "not a picture"),
    "FITS": (b"SIMPLE  =                    T" + b" " * 2850, "not a picture"),
    "PDF": (b"%PDF-1.4\n1 0 obj\n", "not a picture"),
    "header alone": (encoded(COLOUR)[:33], "not a picture"),
    "truncated PNG": (encoded(NOISE)[:-200], "decoded"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:-200], "truncated"),
    "truncated TIFF": (encoded(NOISE, "TIFF")[:-200], "decoded"),
    "truncated WebP": (encoded(NOISE, "WEBP")[:-200], "decoded"),
    "truncated GIF": (encoded(NOISE[..., 0], "GIF")[:-200], "truncated"),
    "truncated BMP": (encoded(NOISE, "BMP")[:-200], "truncated"),
    "truncated AVIF": (encoded(NOISE, "AVIF")[:-200], "decoded"),
    "truncated JPEG 2000": (encoded(NOISE, "JPEG2000")[:-200], "decoded"),
    "broken checksum": (broken_checksum(), "decoded"),
    "100 megapixels": (bomb(10_000, 10_000), "more than 64,000,000 pixels"),
    "400 megapixels": (bomb(20_000, 20_000), "more than 64,000,000 pixels"),
    "4 gigapixels declared": (png(65_000, 65_000, 8, 2, b"x"), "more than 64,000,000 pixels"),
    "no pixels": (png(0, 8, 8, 2, b"x"), "not a picture"),
    "text bomb": (text_bomb(), "decoded"),
    "transparent": (encoded(rgba(0)), "transparent"),
    "half transparent": (encoded(rgba(128)), "transparent"),
    "palette with a transparent entry": (encoded(Image.fromarray(RAMP).convert("P"), transparency=3), "transparent"),
    "key colour": (encoded(COLOUR, transparency=tuple(COLOUR[0, 0].tolist())), "transparent"),
    "float": (encoded(RAMP.astype(np.float32), "TIFF"), "mode F"),
    "float NaN": (encoded(NAN, "TIFF"), "mode F"),
    "32-bit": (encoded(RAMP.astype(np.int32), "TIFF"), "mode I"),
    "LAB": (encoded(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB"),
    "animated GIF": (frames("GIF"), "more than one frame"),
    "animated PNG": (frames("PNG"), "more than one frame"),
    "animated WebP": (frames("WEBP"), "more than one frame"),
    "TIFF of two pages": (frames("TIFF"), "more than one frame"),
}


def test_every_kind_is_read_as_the_rules_say_bit_for_bit():
    for name, (data, expected) in READ_AS_STATED.items():
        found = images.read(data)
        assert found.dtype == np.uint8 and found.shape == expected.shape, name
        assert np.array_equal(found, expected), name


def test_every_other_kind_is_refused_by_name_reason_and_mend():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing but the Error may reach the user
        for name, (data, reason) in REFUSED.items():
            with pytest.raises(Error) as caught:
                images.read(data, name=f"folder/{name}.png")
            message = str(caught.value)
            assert f"folder/{name}.png" in message and reason in message and caught.value.hint, (name, message)


def test_cmyk_follows_its_formula_within_one_level():
    ink = np.dstack([COLOUR, RAMP[::-1]])
    data = encoded(Image.fromarray(ink, "CMYK"), "TIFF")
    left = 255.0 - ink.astype(float)
    expected = left[..., :3] * left[..., 3:] / 255
    assert np.abs(images.read(data) - expected).max() <= 1


def test_a_multi_picture_jpeg_is_its_first_picture():
    data = frames("MPO", quality=95)
    assert np.array_equal(images.read(data), np.asarray(Image.open(io.BytesIO(encoded(COLOUR, "JPEG", quality=95)))))


def test_grey_jpeg_is_repeated_and_sixteen_bit_white_stays_white():
    decoded = np.asarray(Image.open(io.BytesIO(encoded(RAMP, "JPEG"))))
    assert np.array_equal(images.read(encoded(RAMP, "JPEG")), np.repeat(decoded[..., None], 3, axis=2))
    ramp = images.read(grey16(WIDE))
    assert ramp.min() == 0 and ramp.max() == 255 and abs(ramp.mean() - 127.5) < 0.5  # Pillow's own: 254.5


def test_paths_regular_files_only(tmp_path):
    real = tmp_path / "a.png"
    real.write_bytes(encoded(COLOUR))
    assert np.array_equal(images.read(real), COLOUR)
    assert np.array_equal(images.read(str(real)), COLOUR)
    link, pipe, folder = tmp_path / "link.png", tmp_path / "pipe.png", tmp_path / "folder.png"
    link.symlink_to(real)
    os.mkfifo(pipe)
    folder.mkdir()
    big = tmp_path / "big.png"
    big.touch()
    os.truncate(big, images.MAX_BYTES + 1)
    odd = tmp_path / "nul\n\x1b[31m.png"
    for path in (link, pipe, folder, big, odd, tmp_path / "absent.png", "nul\0.png"):
        with pytest.raises(Error):
            images.read(path)
    with pytest.raises(Error, match="link"):
        images.read(link)
    with pytest.raises(Error, match=str(images.MAX_BYTES)[:2]):
        images.read(big)


def mutants(data: bytes, rng: random.Random, count: int):
    for _ in range(count):
        other = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(other))
            action = rng.randrange(4)
            if action == 0:
                other[place] ^= 1 << rng.randrange(8)
            elif action == 1:
                other[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
            elif action == 2:
                del other[place : place + rng.randint(1, 40)]
            else:
                other[place:place] = other[: rng.randint(1, 40)]
            if not other:
                break
        yield bytes(other)


def test_mutants_are_read_or_refused_and_nothing_else():
    rng = random.Random(20)
    good = [
        encoded(COLOUR),
        JPEG,
        encoded(COLOUR, "WEBP"),
        encoded(RAMP, "GIF"),
        encoded(COLOUR, "TIFF", compression="tiff_lzw"),
        encoded(COLOUR, "BMP"),
        encoded(COLOUR, "AVIF"),
        encoded(COLOUR, "JPEG2000"),
        encoded(COLOUR, "PPM"),
    ]
    refused = read = 0
    for data in good:
        for mutant in mutants(data, rng, 60):
            try:
                pixels = images.read(mutant, name="mutant.png")
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
                read += 1
            except Error as e:
                assert "mutant.png" in str(e) and e.hint
                refused += 1
    assert refused > 100 and read > 20  # both ways were taken


def adm_formula(picture: Image.Image, size: int) -> np.ndarray:
    """The crop of ADM, written down a second time: sizes by exponent, crop by box."""
    width, height = picture.size
    halvings = 0
    while min(width >> halvings, height >> halvings) >= 2 * size:
        halvings += 1
        picture = picture.resize((width >> halvings, height >> halvings), Image.Resampling.BOX)
    factor = size / min(picture.size)
    picture = picture.resize(tuple(round(side * factor) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


SHAPES = [(48, 48), (64, 97), (203, 131), (33, 200), (500, 741), (47, 47), (20, 31)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_adm_is_the_formula_bit_for_bit(height, width):
    image = noise(height, width)
    assert np.array_equal(images.adm(image, 48), adm_formula(Image.fromarray(image), 48))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pil_resizes_are_torchvisions_bit_for_bit(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    image = noise(height, width)
    for name in ("bilinear", "bicubic", "lanczos"):
        mode = transforms.InterpolationMode(name)
        peer = transforms.Compose([transforms.Resize(48, interpolation=mode), transforms.CenterCrop(48)])
        assert np.array_equal(images.pil(image, 48, name), np.asarray(peer(Image.fromarray(image)))), name


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tensor_resize_is_torchvisions_within_rounding(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    image = noise(height, width)
    peer = transforms.Compose([transforms.ToTensor(), transforms.Resize(48, antialias=True), transforms.CenterCrop(48)])
    expected = peer(Image.fromarray(image)).permute(1, 2, 0).numpy() * 255
    found = images.tensor(image, 48)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # ours is that float picture, rounded


def test_none_is_the_centre_and_refuses_what_is_too_small():
    image = noise(50, 61)
    assert np.array_equal(images.none(image, 48), image[1:49, 6:54])
    with pytest.raises(Error, match="61x50"):
        images.none(image, 51)


def test_a_square_of_the_size_passes_unchanged_through_all():
    image = noise(48, 48)
    assert set(images.RESIZES) == {"adm", "pil-bilinear", "pil-bicubic", "pil-lanczos", "tensor-bilinear", "none"}
    for name, resize in images.RESIZES.items():
        assert np.array_equal(resize(image, 48), image), name


def test_resizes_refuse_wrong_arrays_and_sizes():
    for resize in images.RESIZES.values():
        with pytest.raises(ValueError, match="uint8"):
            resize(np.zeros((8, 8, 3), np.float32), 4)
        with pytest.raises(Error, match="size"):
            resize(noise(8, 8), 0)
