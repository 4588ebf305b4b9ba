"""The format of manifests: TOML and CSV read strictly, with the file, the line and the field in every refusal."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import images
from bench.identity import digest
from bench.manifest_world import check_world
from bench.text import brief, read_toml
from bench.types import Error

MAX_TEXT = 16 * 2**20  # bytes of a CSV file
HINT = "mend the TOML"
SHA256 = re.compile(r"[0-9a-f]{64}")
# field -> (type, required)
HEADER: Mapping[str, tuple[type, bool]] = {
    "kind": (str, True),  # one of KINDS
    "source": (str, True),
    "license": (str, True),
    "redistribute": (bool, True),  # may pages show the pictures?
    "locked": (bool, True),
    "sensitive": (bool, False),
    "root": (str, False),  # folder below BENCH_DATA
    "prepare": (str, False),  # how an item is made; goes before images.RULES
    "digest": (str, False),  # written by `bench data lock`
    "manual": (str, False),  # how to get what cannot be fetched
    "pinned": (list, False),  # requirements whose wheels hold the pictures
    "crops": (dict, False),
    "world": (dict, False),
    "pixels": (str, False),  # SHA-256 of all drawn pictures and captions; written by `bench data lock`
    "first_pixels": (str, False),  # of the first ones, compared before each run
    "fetch": (list, False),
}
KINDS = ("images", "package-crops", "prompts", "world")
CROPS: Mapping[str, tuple[type, bool]] = {"size": (int, True), "stride": (int, True), "limit": (int, True)}
WORLD: Mapping[str, tuple[type, bool]] = {  # drawn by bench.mini.world: items 0 to `items` - 1 of a seed
    "seed": (int, True),
    "items": (int, True),
    "held_out": (str, True),  # "exclude", "only" or "any": what becomes of world.HELD_OUT
}
FETCH: Mapping[str, tuple[type, bool]] = {
    "url": (str, True),
    "file": (str, True),  # its name below `root`
    "sha256": (str, False),
    "bytes": (int, False),
    "unpack": (dict, False),  # an archive, unpacked into `root` if it stays below these limits
}
WEIGHTS: Mapping[str, tuple[type, bool]] = {
    "what": (str, True),
    "source": (str, True),
    "license": (str, True),
    "locked": (bool, True),
    "url": (str, True),
    "file": (str, True),  # its name below BENCH_DATA/weights
    "sha256": (str, False),
    "bytes": (int, False),
    "packaged": (list, False),  # files of installed packages that may be the same: "torchmetrics/.../alex.pth"
    "extractor": (dict, False),  # the weights are a feature network's
}
# what its pictures and features are; read by bench.metrics.extractors
EXTRACTOR: Mapping[str, tuple[type, bool]] = {
    "network": (str, True),  # "torchvision:resnet50", "timm:...", "open_clip:...", "transformers", "inception", "i3d"
    "size": (int, True),  # px
    "dim": (int, True),  # of a feature vector
    "classes": (int, False),  # of the logits, where they are wanted
    "layer": (str, False),  # torchvision: the submodule whose output is taken
    "pooling": (str, False),  # transformers: "cls", "mean", "pooler" or "projection"
    "config": (dict, False),  # transformers: the fields of config.json
    "resize": (str, False),
    "crop": (str, False),
    "mean": (list, False),
    "std": (list, False),
    "dtype": (str, False),
}
UNPACK: Mapping[str, tuple[type, bool]] = {"files": (int, True), "bytes": (int, True)}


def read_weights(path: Path) -> dict[str, Any]:
    """The checked fields of a weights manifest."""
    header = read_toml(path, HINT)
    check_fields(str(path), header, WEIGHTS)
    check_name(str(path), "file", header["file"])
    if "/" in header["file"]:
        raise Error(f"{path}: file {header['file']!r} must be a plain name")
    if not SHA256.fullmatch(header.get("sha256", "" if header["locked"] else "0" * 64)):
        raise Error(f"{path}: sha256 must be 64 hex digits", hint=f"bench data lock weights/{path.stem} writes it")
    for name in header.get("packaged", ()):
        if not isinstance(name, str):
            raise Error(f"{path}: packaged must be a list of strings")
        check_name(str(path), "packaged", name)
    if "extractor" in header:
        check_fields(f"{path}: extractor", header["extractor"], EXTRACTOR)
    return header


def check_fields(where: str, table: Mapping[str, Any], fields: Mapping[str, tuple[type, bool]]) -> None:
    """Raises Error for a field that is unknown, missing or of another type; a quoted "false" is no false."""
    for key, value in table.items():
        if key not in fields:
            raise Error(
                f"{where}: unknown field {brief(key)!r}{suggest(key, fields)}", hint=f"fields: {', '.join(fields)}"
            )
        kind = fields[key][0]
        if type(value) is not kind:
            raise Error(f"{where}: {key} must be {_type(kind)}, got {_type(type(value))} {_brief(value)}")
    for key, (kind, required) in fields.items():
        if required and key not in table:
            raise Error(f"{where}: {key} is missing", hint=f"add {key} = {_type(kind)}")


def read_header(path: Path) -> dict[str, Any]:
    """The checked fields of a manifest's TOML."""
    header = read_toml(path, HINT)
    where = str(path)
    check_fields(where, header, HEADER)
    if header["kind"] not in KINDS:
        raise Error(
            f"{where}: kind is {brief(header['kind'])!r}{suggest(header['kind'], KINDS)}",
            hint=f"one of {', '.join(KINDS)}",
        )
    if "root" in header:
        check_name(where, "root", header["root"])
    if "digest" in header and not re.fullmatch(r"sha256:[0-9a-f]{64}", header["digest"]):
        raise Error(f"{where}: digest must be sha256: and 64 hex digits", hint=f"bench data lock {path.stem}")
    if not all(isinstance(p, str) for p in header.get("pinned", ())):
        raise Error(f"{where}: pinned must be a list of strings")
    if (header["kind"] == "package-crops") != ("crops" in header):
        raise Error(f"{where}: a table [crops] belongs to kind package-crops, and only there")
    if "crops" in header:
        check_fields(f"{where}: crops", header["crops"], CROPS)
        for key, value in header["crops"].items():
            if not 1 <= value <= 65536:
                raise Error(f"{where}: crops.{key} is {_brief(value)}; it must lie between 1 and 65536")
    if (header["kind"] == "world") != ("world" in header):
        raise Error(f"{where}: a table [world] belongs to kind world, and only there")
    if "world" in header:
        check_fields(f"{where}: world", header["world"], WORLD)
        check_world(where, header["world"])
    for i, part in enumerate(header.get("fetch", ())):
        at = f"{where}: fetch[{i}]"
        if not isinstance(part, dict):
            raise Error(f"{at} must be a table")
        check_fields(at, part, FETCH)
        check_name(at, "file", part["file"])
        if "sha256" in part and not SHA256.fullmatch(part["sha256"]):
            raise Error(f"{at}: sha256 must be 64 hex digits")
        if "unpack" in part and (len(header["fetch"]) > 1 or "root" not in header):
            raise Error(f"{at}: an archive takes the place of root, so it needs one, and is the only entry of fetch")
        check_fields(f"{at}: unpack", part.get("unpack", {"files": 0, "bytes": 0}), UNPACK)
    return header


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an items CSV as text; raises Error with file and line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    seen: set[str] = set()
    try:
        for cells in reader:
            at = f"{path}:{reader.line_num}"
            if not columns:
                columns = cells
                if "id" not in columns or len(set(columns)) != len(columns) or not all(columns):
                    raise Error(f"{at}: the first line must name the columns, each once, one of them id")
                continue
            if len(cells) != len(columns):
                raise Error(f"{at}: {len(cells)} cells, expected {len(columns)}")
            row = dict(zip(columns, cells, strict=True))
            check_name(at, "id", row["id"])
            if row["id"] in seen:
                raise Error(f"{at}: id {row['id']!r} appears twice")
            seen.add(row["id"])
            rows.append(row)
    except csv.Error as e:
        raise Error(f"{path}:{reader.line_num}: {e}", hint="mend the CSV") from None
    return rows


def check_name(where: str, key: str, text: str) -> None:
    """Raises Error unless text is a plain relative path: printable, no empty, `.` or `..` part, no backslash."""
    parts = text.split("/")
    if not text.isprintable() or "\\" in text or any(p in ("", ".", "..") or len(p) > 255 for p in parts):
        raise Error(f"{where}: {key} {text[:100]!r} must be a plain path below the root", hint="no .., no leading /")


def content_digest(header: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """What makes two manifests the same data: kind, preparation, crops and every row; not the licence's wording."""
    return digest([header["kind"], prepare_of(header), header.get("crops"), [dict(row) for row in rows]])


def crop_boxes(width: int, height: int, size: int, stride: int, limit: int) -> list[tuple[int, int, int]]:
    """(left, top, size) of square crops, spread evenly from edge to edge, at least `stride` px apart, at most `limit`:
    where a grid has more, its stride grows until it has not. Empty where the picture is smaller than a crop."""
    if min(width, height) < size:
        return []
    least, stride = stride, max(stride, width, height)
    while least < stride:  # halving the range: counting up would take as long as a picture said to be a billion wide
        middle = (least + stride) // 2
        if ((width - size) // middle + 1) * ((height - size) // middle + 1) > limit:
            least = middle + 1
        else:
            stride = middle
    return [(x, y, size) for y in _spread(height - size, stride) for x in _spread(width - size, stride)]


def _spread(room: int, stride: int) -> list[int]:
    steps = room // stride
    return [room * i // steps for i in range(steps + 1)] if steps else [room // 2]


def prepare_of(header: Mapping[str, Any]) -> str:
    if header["kind"] in ("prompts", "world"):
        return header.get("prepare", "")
    return "; ".join(part for part in (header.get("prepare", "").strip(), images.RULES) if part)


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT:
            raise Error(f"{path} is larger than {MAX_TEXT:,} bytes")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise Error(f"{path} is not UTF-8 at byte {e.start}", hint="save it as UTF-8") from None
    except OSError as e:
        raise Error(f"cannot read {path}: {e.strerror or e}") from None


def suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1) if len(name) < 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _brief(value: Any) -> str:
    """A value in a message; Python refuses to print whole numbers of more than 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "too large to print"
    return repr(value)[:60] if isinstance(value, str | int | float | bool) else ""


def _type(kind: type) -> str:
    known = {str: "a text in quotes", bool: "true or false", int: "a whole number", list: "a list", dict: "a table"}
    return known.get(kind, kind.__name__)
