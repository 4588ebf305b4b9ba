"""Files that were made to do harm, built here from their parts, none of them stored; and a child that reads them."""

import copy
import io
import json
import os
import pickle
import random
import resource
import select
import signal
import struct
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

# -- a child with limits


@dataclass(frozen=True)
class Outcome:
    """What a limited child gave back, or how it died; `peak` is its memory above the start in bytes."""

    value: object = None
    died: str = ""
    seconds: float = 0.0  # of the processor
    peak: int = 0


def limited(work, memory: int = 2**30, seconds: int = 5, patience: float = 60.0) -> Outcome:
    """work() in a forked child that may map `memory` bytes more than it has and compute for `seconds`.

    `patience` is for what waits instead of computing, such as a pipe that nobody writes to.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            mapped, resident = (
                int(n) * resource.getpagesize() for n in Path("/proc/self/statm").read_text().split()[:2]
            )
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            begin = time.process_time()
            end = int(begin) + seconds + 1
            resource.setrlimit(resource.RLIMIT_CPU, (end, end + 5))
            value = work()
            spent = time.process_time() - begin
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump((value, spent, peak), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        if select.select([pipe], [], [], patience)[0]:
            data = pipe.read()
        else:
            os.kill(pid, signal.SIGKILL)
            data = b""
    _, status = os.waitpid(pid, 0)
    if status or not data:
        code = os.waitstatus_to_exitcode(status)
        return Outcome(died=f"signal {-code}" if code < 0 else f"exit {code}")
    value, spent, peak = pickle.loads(data)
    return Outcome(value, seconds=spent, peak=peak)


# -- pictures

RAMP = np.add.outer(np.arange(24), 5 * np.arange(31)).astype(np.uint8)
COLOUR = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=2)
GREY = np.repeat(RAMP[..., None], 3, axis=2)
WIDE = np.linspace(0, 65535, 24 * 31).astype(np.uint16).reshape(24, 31)
WIDE3 = np.stack([WIDE, WIDE[::-1], WIDE.T.reshape(24, 31)], axis=2)
BITS = (RAMP > 60).astype(np.uint8) * 255
NOISE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG", mode=None, **options) -> bytes:
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


def sixteen_bit(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, grey or colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 2 if values.ndim == 3 else 0, zlib.compress(rows))


def rgba(alpha: int) -> np.ndarray:
    return np.dstack([COLOUR, np.full(RAMP.shape, alpha, np.uint8)])


def with_orientation() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(COLOUR, exif=exif)


def bomb(width: int, height: int) -> bytes:
    """A black PNG that is a thousandth of its pixels."""
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
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * 70_000_000))
    return png(4, 4, 8, 0, zlib.compress(b"\0\0\0\0\0" * 4), text)


def frames(kind: str, **options) -> bytes:
    other = Image.fromarray(255 - COLOUR)
    return encoded(COLOUR, kind, save_all=True, append_images=[other], **options)


def many_scans(side: int, more: int) -> bytes:
    """A progressive JPEG whose last pass is repeated: a few bytes each, a pass over all pixels each."""
    data = encoded(Image.new("RGB", (side, side), (90, 10, 200)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * more + b"\xff\xd9"


def large(mode: str, kind: str, **options) -> bytes:
    """64 megapixels of one colour."""
    opaque = {"RGBA": (1, 2, 3, 255), "LA": (1, 255)}
    return encoded(Image.new(mode, (8000, 8000), opaque.get(mode, 0)), kind, **options)


def pictures_read() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> bytes, and the pixels that must come out."""
    strip = np.repeat(COLOUR[:1, :1], 9000, axis=1)
    high = np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return {
        "colour PNG": (encoded(COLOUR), COLOUR),
        "grey PNG": (encoded(RAMP), GREY),
        "BMP": (encoded(COLOUR, "BMP"), COLOUR),
        "PPM": (encoded(COLOUR, "PPM"), COLOUR),
        "TIFF": (encoded(COLOUR, "TIFF"), COLOUR),
        "lossless WebP": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
        "lossless JPEG 2000": (encoded(COLOUR, "JPEG2000"), COLOUR),
        "GIF of one frame": (encoded(RAMP, "GIF"), GREY),
        "opaque alpha": (encoded(rgba(255)), COLOUR),
        "grey with opaque alpha": (encoded(np.dstack([RAMP, np.full_like(RAMP, 255)])), GREY),
        "palette": (encoded(Image.fromarray(RAMP).convert("P")), GREY),
        "one bit": (encoded(BITS, mode="1"), np.repeat(BITS[..., None], 3, axis=2)),
        "16-bit grey": (sixteen_bit(WIDE), high),
        "16-bit grey TIFF": (encoded(WIDE, "TIFF"), high),
        "16-bit colour": (sixteen_bit(WIDE3), (WIDE3 >> 8).astype(np.uint8)),
        "orientation tag": (with_orientation(), COLOUR),
        "colour profile": (encoded(COLOUR, icc_profile=b"not a profile" * 20), COLOUR),
        "one pixel": (encoded(COLOUR[:1, :1]), COLOUR[:1, :1]),
        "strip": (encoded(strip), strip),
        "bytes after the end": (encoded(COLOUR) + b"<script>" * 50, COLOUR),
        "key colour that no pixel has": (encoded(COLOUR, transparency=(1, 2, 3)), COLOUR),
    }


def pictures_refused() -> dict[str, tuple[bytes, str]]:
    """Name -> bytes, and a word of the reason that must be given."""
    nan = np.full((8, 8), np.nan, np.float32)
    palette = Image.fromarray(RAMP).convert("P")
    return {
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
        "5,000 passes": (many_scans(2000, 5000), "more than 64 scans"),
        "transparent": (encoded(rgba(0)), "transparent"),
        "half transparent": (encoded(rgba(128)), "transparent"),
        "palette with a transparent entry": (encoded(palette, transparency=3), "transparent"),
        "key colour": (encoded(COLOUR, transparency=tuple(COLOUR[0, 0].tolist())), "transparent"),
        "float": (encoded(RAMP.astype(np.float32), "TIFF"), "mode F"),
        "float NaN": (encoded(nan, "TIFF"), "mode F"),
        "32-bit": (encoded(RAMP.astype(np.int32), "TIFF"), "mode I"),
        "LAB": (encoded(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB"),
        "animated GIF": (frames("GIF"), "more than one frame"),
        "animated PNG": (frames("PNG"), "more than one frame"),
        "animated WebP": (frames("WEBP"), "more than one frame"),
        "TIFF of two pages": (frames("TIFF"), "more than one frame"),
    }


# name -> how to make 64 megapixels in few bytes, and a word of the reason where the decoder is too greedy to be let in
PICTURES_LARGE = {
    "large GIF": (lambda: large("P", "GIF"), ""),
    "large WebP": (lambda: large("RGB", "WEBP", lossless=True, method=0, quality=0), "more than 32,000,000 pixels"),
    "large RGBA PNG": (lambda: large("RGBA", "PNG", compress_level=1), ""),
    "large CMYK JPEG": (lambda: large("CMYK", "JPEG"), ""),
    "large TIFF": (lambda: large("RGBA", "TIFF", compression="tiff_lzw"), ""),
    "large AVIF": (lambda: large("RGB", "AVIF", speed=10), ""),
    "large JPEG 2000": (lambda: large("RGB", "JPEG2000"), "more than 32,000,000 pixels"),
    "50 passes over a large JPEG": (lambda: many_scans(8000, 40), ""),
}


def picture_mutants(count: int, rng: random.Random) -> list[tuple[str, bytes, bytes]]:
    """(kind, original, mutant) of six good files in turn: bits flipped, numbers of headers made extreme, parts cut
    out, repeated, moved from one file into another, ends cut off."""
    good = {
        "PNG": encoded(COLOUR),
        "JPEG": encoded(COLOUR, "JPEG"),
        "WebP": encoded(COLOUR, "WEBP"),
        "GIF": encoded(RAMP, "GIF"),
        "TIFF": encoded(COLOUR, "TIFF", compression="tiff_lzw"),
        "AVIF": encoded(COLOUR, "AVIF"),
    }
    extremes = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x80\0", b"\xff\x7f"]
    found = []
    while len(found) < count:
        kind = list(good)[len(found) % len(good)]
        other = bytearray(good[kind])
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(other) or 1)
            action = rng.randrange(6)
            if action == 0 and other:
                other[place] ^= 1 << rng.randrange(8)
            elif action == 1:
                value = rng.choice(extremes)
                place = rng.randrange(80)  # where headers are
                other[place : place + len(value)] = value
            elif action == 2:
                del other[place : place + rng.randint(1, 40)]
            elif action == 3:
                other[place:place] = other[: rng.randint(1, 40)]
            elif action == 4:
                donor = good[rng.choice(list(good))]
                start = rng.randrange(len(donor))
                other[place : place + 30] = donor[start : start + 30]
            elif rng.random() < 0.3:
                del other[place:]
        if bytes(other) != good[kind]:
            found.append((kind, good[kind], bytes(other)))
    return found


# -- weights

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def header_mutant(data: bytes, rng: random.Random) -> bytes:
    """One damage to a good safetensors file: to its bytes, its length, or its header's meaning."""
    n = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + n], data[8 + n :]
    kind = rng.randrange(9)
    if kind == 0:
        i = rng.randrange(8 + n)
        return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        return data + bytes(rng.randrange(1, 40))
    if kind == 3:
        return rng.choice([0, 1, n - 1, n + 1, 10**8 + 1, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    entries = json.loads(header)
    name = rng.choice(["a", "b"])
    entry = entries[name]
    if kind == 4:
        entry["shape"] = rng.choice([[2**62, 4], [-2, -3], [6], [3, 2], [2, 3, 0], [], "23", [2.0, 3], [True, 6], None])
    elif kind == 5:
        begin, end = entry["data_offsets"]
        shift = rng.choice([-8, -1, 1, 8, 16])
        entry["data_offsets"] = rng.choice(
            [[begin + shift, end + shift], [begin, end + shift], [end, begin], [begin], 3, [begin, True], [0, 24]]
        )
    elif kind == 6:
        entry["dtype"] = rng.choice(["F64", "U8", "F4", "f32", "", None, "I32", "U64", "C64", 32])
    elif kind == 7:
        twin = rng.choice(['"a"', '"b"', '"\\u0061"', '"__metadata__"', '"c"'])
        text = header.decode().rstrip()[:-1] + f",{twin}:{json.dumps(entry)}}}"
        return len(text).to_bytes(8, "little") + text.encode() + body
    else:
        rng.choice(
            [
                lambda: entries.update(__metadata__=rng.choice([{"x": 1}, [], None, {"x": "y"}])),
                lambda: entry.update(extra=1),
                lambda: entry.pop(rng.choice(["dtype", "shape", "data_offsets"])),
                lambda: entries.update(empty={"dtype": "F32", "shape": [0], "data_offsets": [24, 24]}),
                lambda: entries.pop(name),
            ]
        )()
    text = json.dumps(entries, indent=rng.choice([None, 1]))
    return len(text).to_bytes(8, "little") + text.encode() + body


class Mkdir:
    """Harmless, but it shows that it ran."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Exec(Mkdir):
    def __reduce__(self):
        return exec, (f"import os; os.mkdir({self.marker!r})",)


def carriers(folder: Path, marker: Path) -> dict[str, Path]:
    """Eight ways to bring a payload along that makes the folder `marker`, each a file or a folder."""
    raw = pickle.dumps(Mkdir(marker))
    torch.save(Mkdir(marker), folder / "zip.pt")
    torch.save(Mkdir(marker), folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    with tarfile.open(folder / "tar.pth", "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    (folder / "renamed.safetensors").write_bytes(raw)
    indirect = f"cpkgutil\nresolve_name\n(S'os:mkdir'\ntR(S{str(marker)!r}\ntR."
    (folder / "indirect.pt").write_bytes(indirect.encode())
    (folder / "exec.bin").write_bytes(pickle.dumps(Exec(marker)))
    torch.save({"a": torch.zeros(3), "z": [1, {"deep": Mkdir(marker)}]}, folder / "late.pt")
    side = folder / "sidecar"
    side.mkdir()
    save_file(TENSORS, side / "model.safetensors")
    (side / "scheduler.PKL").write_bytes(raw)
    return {p.stem: p for p in sorted(folder.iterdir())}


def fire(path: Path) -> None:
    """Reads a carrier as a careless program would."""
    if path.is_dir():
        path = path / "scheduler.PKL"
    if zipfile.is_zipfile(path) or path.name == "legacy.ckpt":
        torch.load(path, weights_only=False)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            pickle.load(tar.extractfile("pickle"))
    else:
        pickle.loads(path.read_bytes())


def doubling(path: Path, times: int = 60) -> Path:
    """A small pickle of one mapping with two equal keys, each of which holds itself twice, `times` deep: hashing them
    never ends; where tuples remember their hash (Python 3.14), comparing them does not."""

    def entry(first: int) -> bytes:  # (1, 1), ((1, 1), (1, 1)), ... by reference
        pairs = (b"h%c\x86q%c" % (i, i + 1) for i in range(first, first + times))
        return b"K\x01q%c" % first + b"".join(pairs) + b"K\x01s"

    path.write_bytes(b"\x80\x02}" + entry(0) + entry(100) + b".")
    return path


def memory_bomb(path: Path, size: int = 700_000_000) -> Path:
    """A checkpoint of a few megabytes in torch's own format that unpacks to `size` zeros."""
    small = path.with_suffix(".small")
    torch.save({"a": torch.zeros(70_000, dtype=torch.uint8)}, small)
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(path, "w", 8, compresslevel=1) as target:
        for entry in source.namelist():
            with target.open(entry, "w") as out:
                if entry.endswith("data/0"):
                    for _ in range(size // 10_000_000):
                        out.write(bytes(10_000_000))
                else:
                    old, new = (b"J" + n.to_bytes(4, "little") for n in (70_000, size))
                    out.write(source.read(entry).replace(old, new))
    small.unlink()
    return path


# keys of a configuration that name code, as libraries and their relatives spell them
CODE_KEYS = [
    "auto_map",
    "autoMap",
    "AUTO_MAP",
    "auto-map",
    "custom_pipeline",
    "customPipeline",
    "Custom-Pipelines",
    "trust_remote_code",
    "trustRemoteCode",
    "code_revision",
    "custom_generate",
    "_target_",
]


# -- text: TOML and CSV

# as TOML writes them
HUGE = [
    "9" * 5000,
    "0x" + "f" * 5000,
    "-1e400",
    "nan",
    "inf",
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "9223372036854775808",
]


class Raw(str):
    """Written into a file as it is."""


TEXTS = [
    "",
    " ",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "a/b",
    "true",
    "0",
    "x.py:Y",
    "{seed.__class__}",
    "{x}",
    "{seed:>9}",
    "{",
    "*[!",
    "\x1b[2J\x07",
    "\x00",
    "\u202eevil\u2066",
    "\ud800",
    "\ufeff",
    "\u2028",
    "=1+1",
    "a\nb\rc",
    "é漢\U0001f600",
    "x" * 5000,
    "'\"\\",
    "0" * 64,
    "sha256:" + "0" * 64,
    "world",
    "images",
    "prompts",
    "package-crops",
    "nan",
    "store",
]


def toml_of(value) -> str:
    """A value as TOML; JSON's texts and numbers are almost TOML's, and where they are not, that is one more case."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_of(k)} = {toml_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    if isinstance(value, str) and not isinstance(value, Raw):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


def toml_file(tree: dict) -> str:
    """A whole file; tables and lists of tables are written inline."""
    return "".join(f"{toml_of(key)} = {toml_of(value)}\n" for key, value in tree.items())


def near_miss(word: str, rng: random.Random) -> str:
    """A word with one slip of the finger."""
    i = rng.randrange(len(word) or 1)
    return rng.choice(
        [word[:i] + word[i + 1 :], word[:i] + word[i : i + 1] * 2 + word[i + 1 :], word.upper(), word + "s", word[::-1]]
    )


def leaf(rng: random.Random):
    """A value of any type, extreme where it can be."""
    numbers = [0, -1, 1, 2**31, 2**63 - 1, -(2**63), 10**30, 0.0, -0.5, 1e308, 5e-324, 65536, 3]
    return rng.choice([rng.choice(TEXTS), rng.choice(numbers), rng.random() < 0.5, Raw(rng.choice(HUGE)), [], {}])


def branch(rng: random.Random, words, depth: int = 0):
    """A value, a list or a table of them, with keys that are known, nearly known, or anything."""
    kind = rng.randrange(4) if depth < 3 else 0
    if kind <= 1:
        return leaf(rng)
    if kind == 2:
        return [branch(rng, words, depth + 1) for _ in range(rng.randrange(4))]
    return {key(rng, words): branch(rng, words, depth + 1) for _ in range(rng.randrange(4))}


def key(rng: random.Random, words) -> str:
    word = rng.choice(words)
    return rng.choice([word, word, near_miss(word, rng), rng.choice(TEXTS)])


def places(tree, path=()):
    """The paths to all values of a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in inner:
        yield (*path, name)
        yield from places(value, (*path, name))


def tree_mutant(good: dict, words, rng: random.Random) -> dict:
    """A good tree with up to four changes: a value of another type or size, a key gone, misspelt or new."""
    tree = copy.deepcopy(good)
    for _ in range(rng.randint(0, 4)):
        found = list(places(tree))
        if not found:
            break
        *path, name = rng.choice(found)
        inside = tree
        for step in path:
            inside = inside[step]
        action = rng.randrange(6)
        if action <= 1:
            inside[name] = branch(rng, words)
        elif action == 2:
            inside[name] = rng.choice([[inside[name]], {"x": inside[name]}, str(inside[name]), leaf(rng)])
        elif action == 3:
            del inside[name]
        elif isinstance(inside, dict) and action == 4:
            inside[near_miss(str(name), rng)] = inside.pop(name)
        elif isinstance(inside, dict):
            inside[key(rng, words)] = branch(rng, words)
    return tree


def byte_mutant(data: bytes, rng: random.Random, few: int = 3) -> bytes:
    """Up to `few` changes to the bytes: other ones, marks of the format, parts doubled, cut out or cut off."""
    marks = [b'"', b"'", b",", b"\n", b"\r", b"=", b"[[", b"]", b"{", b"#", b"\0", b"\xff", b"\xef\xbb\xbf", b"\\u"]
    other = bytearray(data)
    for _ in range(rng.randint(0, few)):
        place = rng.randrange(len(other) + 1)
        action = rng.randrange(6)
        if action == 0:
            other[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            other[place:place] = rng.choice(marks)
        elif action == 2:
            del other[place : place + rng.randint(1, 30)]
        elif action == 3:
            other[place:place] = other[place : place + rng.randint(1, 60)]
        elif action == 4:
            other[place:place] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif rng.random() < 0.2:
            del other[place:]
    return bytes(other)
