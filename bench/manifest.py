"""Manifests: exactly which data, by whom, under which licence; items by id, verified against their SHA-256."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import images
from bench.identity import FileDigests, digest
from bench.manifest_format import (
    SHA256,
    check_name,
    content_digest,
    crop_boxes,
    prepare_of,
    read_header,
    read_rows,
    suggest,
)
from bench.manifest_places import find, root_of
from bench.manifest_world import FIRST, WorldItems
from bench.types import Error, Item, UsageError

if TYPE_CHECKING:
    pass

FOLDER = "image-folder:"
MOST_CROPS = 1_000_000  # of a manifest

OWN_COLUMNS = ("id", "path", "sha256", "width", "height", "cluster", "text", "label")  # the others are attributes


@dataclass(frozen=True)
class Entry:
    """An item, what pins its file, and for crops where it lies in the picture."""

    item: Item
    sha256: str = ""
    box: tuple[int, int, int] | None = None  # left, top, size in px


class Manifest:
    """Items by id. `digest` stands for all that decides what they are: kind, `prepare`, ids, hashes, columns."""

    def __init__(
        self,
        name: str,
        header: Mapping[str, Any],
        entries: Mapping[str, Entry],
        digest: str,
        drawn: WorldItems | None = None,
    ):
        self.name = name
        self.kind: str = header["kind"]
        self.source: str = header["source"]
        self.license: str = header["license"]
        self.redistribute: bool = header["redistribute"]
        self.sensitive: bool = header.get("sensitive", False)
        self.locked: bool = header["locked"]
        self.prepare: str = prepare_of(header)
        self.digest = digest
        self.digests = FileDigests()
        self._header = header
        self._entries = entries
        self._drawn = drawn
        self._verified: set[Path] = set()
        self._last: tuple[Path | None, np.ndarray | None] = (None, None)  # crops of one picture follow each other

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: str) -> bool:
        return id in self._entries

    def ids(self) -> tuple[str, ...]:
        """In manifest order. Raises Error with the next command where the manifest was never locked."""
        if not self.locked:
            raise Error(f"data {self.name} was never locked, so nobody knows what it is", hint=self._next_step())
        return tuple(self._entries)

    def num_clusters(self) -> int:
        """How many groups of items are independent of each other; what intervals count."""
        if self._drawn is not None:
            return len(self)
        return len({entry.item.cluster or id for id, entry in self._entries.items()})

    def chunks(self, size: int) -> Iterator[tuple[str, ...]]:
        """The ids in order, `size` at a time; the last chunk may be shorter."""
        if size < 1:
            raise UsageError(f"chunk is {size}; it must be 1 or more")
        ids = self.ids()
        for start in range(0, len(ids), size):
            yield ids[start : start + size]

    def item(self, id: str) -> Item:
        """`path` is its file, of a crop the whole picture's; compared with its SHA-256 the first time.

        Raises Error where the file is absent or another one.
        """
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
        if self._drawn is not None:
            return self._drawn.picture(id)
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
        entries = {id: self._entries[id] for id in self._entries if id in chosen}
        found = f"sha256:{digest([self.digest, list(entries)])}"
        part = Manifest(self.name, self._header, entries, found, self._drawn)
        part.digests = self.digests
        return part

    def check(self) -> None:
        """Every file is there and has its SHA-256, as far as `digests` does not remember it; nothing is decoded. Of
        drawn pictures the first ones are drawn.

        Raises Error with the next command: never locked, missing or changed.
        """
        if self._drawn is not None:
            self.ids()
            self._compare_drawn("first_pixels", self._drawn.digest(FIRST))
            return
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
            close = suggest(id, self._entries) if len(self) <= 1000 else ""  # the comparison takes long
            raise Error(f"data {self.name} has no item {id!r}{close}") from None

    def _compare(self, path: Path, expected: str, found: str) -> None:
        if found != expected:
            hint = "put the original back" if not self._header.get("pinned") else self._next_step()
            raise Error(f"data {self.name}: {path} changed: sha256 {found}, expected {expected}", hint=hint)
        self._verified.add(path)

    def _compare_drawn(self, field: str, found: str) -> None:
        if found != self._header.get(field):
            message = f"data {self.name}: {field} are not what was locked: this release draws other pictures"
            raise Error(message, hint=f"use the release that it came with; or bench data lock {self.name}")

    def _absent(self, path: Path, count: int = 1) -> Error:
        more = f" and {count - 1:,} more" if count > 1 else ""
        return Error(f"data {self.name}: {path} is missing{more}", hint=self._next_step())

    def _next_step(self) -> str:
        return how_to_get(self.name, self._header)


def load(name: str, data_root: Path | None = None, digests: FileDigests | None = None) -> Manifest:
    """The manifest of that name, or `image-folder:PATH` for the pictures in a folder of one's own.

    `digests` remembers hashes of files between processes. Raises Error with file and key where the manifest is wrong.
    """
    if name.startswith(FOLDER):
        return _folder(name, digests or FileDigests())
    path = find(name)
    header = read_header(path)
    if header["kind"] == "world":
        return _world(name, path, header)
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


def _world(name: str, path: Path, header: Mapping[str, Any]) -> Manifest:
    """Items that are drawn: nothing lies on disk but the seed, the count and the hashes of what comes out."""
    found = f"sha256:{world_digest(header)}"
    if header["locked"] and header.get("digest") != found:
        message = f"{path}: digest is {header.get('digest', 'missing')}, but the content has {found}"
        raise Error(message, hint=f"it was edited; if that is meant: bench data lock {name}")
    drawn = WorldItems(header["world"])
    return Manifest(name, header, _DrawnEntries(drawn), found, drawn)


def world_digest(header: Mapping[str, Any]) -> str:
    return content_digest(header, [{"pixels": header.get("pixels", ""), "items": str(header["world"]["items"])}])


class _DrawnEntries(Mapping[str, Entry]):
    """Entries that are made when asked for."""

    def __init__(self, items: WorldItems):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __getitem__(self, id: str) -> Entry:
        return Entry(self._items[id])


def _entries(header: Mapping[str, Any], rows: Sequence[Mapping[str, str]], root: Path, items: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for line, row in enumerate(rows, 2):
        at = f"{items}: item {row['id']}"
        path = None
        if header["kind"] != "prompts":
            path = path_of(at, header["kind"], row, root)
            if header["locked"] and not SHA256.fullmatch(row.get("sha256", "")):
                raise Error(f"{at}: sha256 must be 64 hex digits", hint=f"line {line}; bench data lock writes it")
        entry = Entry(_item(at, row, path), row.get("sha256", ""))
        if header["kind"] == "package-crops":
            width, height = (_whole_number(at, key, row.get(key, "")) for key in ("width", "height"))
            for left, top, size in crop_boxes(width, height, **header["crops"]):
                id = f"{row['id']}-x{left:04d}-y{top:04d}"
                entries[id] = replace(entry, item=replace(entry.item, id=id), box=(left, top, size))
            if len(entries) > MOST_CROPS:
                raise Error(f"{at}: more than {MOST_CROPS:,} crops", hint="a lower crops.limit, or a wider stride")
        else:
            entries[row["id"]] = entry
    return entries


def path_of(at: str, kind: str, row: Mapping[str, str], root: Path) -> Path:
    name = row.get("path") or row["id"]
    check_name(at, "path", name)
    return package_file(name) if kind == "package-crops" else root / name


def _item(at: str, row: Mapping[str, str], path: Path | None) -> Item:
    label = _whole_number(at, "label", row["label"]) if row.get("label") else None
    attributes = {key: value for key, value in row.items() if key not in OWN_COLUMNS and value}
    return Item(row["id"], path, row.get("text") or None, label, row.get("cluster", ""), attributes)


def _whole_number(at: str, key: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Error(f"{at}: {key} must be a whole number, got {text[:60]!r}")
    return int(text)


def package_file(name: str) -> Path:
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
    root = Path(os.path.expanduser(name.removeprefix(FOLDER)))
    if name == FOLDER or not root.is_dir():
        raise UsageError(f"{name}: {root} is not a folder", hint="image-folder:PATH names a folder of pictures")
    rows, refused = [], []
    for path in sorted(pictures(root), key=lambda p: p.relative_to(root).as_posix()):
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


def how_to_get(name: str, header: Mapping[str, Any]) -> str:
    if header.get("pinned"):
        return "the pictures come with: pip install " + " ".join(f"'{p}'" for p in header["pinned"])
    if name.startswith(FOLDER):
        return "put it back, or run on the folder as it is now"
    get = header["manual"].strip() if header.get("manual") else f"bench data fetch {name}"
    return get if header["locked"] else f"{get}; then bench data lock {name}"


def pictures(root: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(root):
        inside[:] = [d for d in inside if not d.startswith(".")]
        for file in files:
            if not file.startswith(".") and file.lower().endswith(images.SUFFIXES):
                yield Path(folder, file)
