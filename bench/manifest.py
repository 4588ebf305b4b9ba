"""Manifests: exactly which data, by whom, under which licence; items by id, verified against their SHA-256."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
import shutil
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import door, images
from bench.identity import FileDigests, digest, file_digest
from bench.manifest_format import (
    SHA256,
    check_name,
    content_digest,
    crop_boxes,
    prepare_of,
    read_header,
    read_rows,
    read_text,
    read_weights,
    suggest,
)
from bench.manifest_world import FIRST, WorldItems
from bench.types import Error, Item, UsageError

if TYPE_CHECKING:
    from bench.fetch import Progress

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
FOLDER = "image-folder:"
UNVERIFIED = ".unverified"
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
        return _how_to_get(self.name, self._header)


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
    found = f"sha256:{_world_digest(header)}"
    if header["locked"] and header.get("digest") != found:
        message = f"{path}: digest is {header.get('digest', 'missing')}, but the content has {found}"
        raise Error(message, hint=f"it was edited; if that is meant: bench data lock {name}")
    drawn = WorldItems(header["world"])
    return Manifest(name, header, _DrawnEntries(drawn), found, drawn)


def _lock_world(path: Path, header: dict[str, Any]) -> Path:
    drawn = WorldItems(header["world"])
    pixels = {"pixels": drawn.digest(), "first_pixels": drawn.digest(FIRST)}
    fields = {**pixels, "digest": f"sha256:{_world_digest({**header, **pixels})}"}
    text = _set_fields(read_text(path), {**{k: f'"{v}"' for k, v in fields.items()}, "locked": "true"})
    folder = _own_folder(path)
    door.replace(folder / path.name, text.encode())
    return folder / path.name


def _world_digest(header: Mapping[str, Any]) -> str:
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


def fetch(name: str, progress: Progress | None = None, data_root: Path | None = None, loopback: bool = False) -> str:
    """Brings the files of a manifest, of `weights/<name>`, or of `hf:owner/name@commit` onto this machine.

    What no SHA-256 vouches for stays under `<file>.unverified` until `bench data lock` accepts it. Returns a sentence
    to print. Raises Error; for data behind a licence it says where to get it and how to lay it out.
    """
    from bench.fetch import download, hub

    if name.startswith("hf:"):
        return f"{name} is in {hub(name)}"
    path = find(name)
    if name.startswith("weights/"):
        header = read_weights(path)
        parts, folder = [header], data_folder(data_root) / "weights"
    else:
        header = read_header(path)
        parts, folder = header.get("fetch", []), root_of(header, data_root)
    if not parts:
        raise Error(f"{name} cannot be fetched for you", hint=_how_to_get(name, header))
    waiting = []
    for part in parts:
        target = _target(part, folder)
        sha256 = part.get("sha256", "")
        if "unpack" in part and any(_pictures(folder)):  # archives are unpacked as a whole or not at all
            continue
        if sha256 or header["locked"]:  # of locked data each item has a hash
            download(part["url"], target, sha256, part.get("bytes", 0), progress, loopback)
            if "unpack" in part:
                _unpack(part, folder)
        else:
            target = target.with_name(target.name + UNVERIFIED)
            found = download(part["url"], target, "", part.get("bytes", 0), progress, loopback)
            waiting.append(f"{target.name} has sha256 {found}")
    if waiting:
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        listed = "; ".join(waiting[:3]) + more
        return f"{target.parent}: {listed}. Nobody vouches for it: if it is what you expect, bench data lock {name}"
    return f"{name} is in {folder}" + ("" if header["locked"] else f"; next: bench data lock {name}")


def lock(name: str, data_root: Path | None = None) -> Path:
    """Accepts what lies there: decodes every item once, writes what pins it (SHA-256, width, height) into the items CSV
    and the digest into the TOML; of weights the SHA-256 and size. Returns the TOML's path.

    Without a CSV the items are the pictures below `root`. Raises Error for the first item that cannot be read; then
    the manifest is not changed.
    """
    path = find(name)
    if name.startswith("weights/"):
        return _lock_weights(name, path, data_root)
    header = read_header(path)
    if header["kind"] == "world":
        return _lock_world(path, header)
    root = root_of(header, data_root)
    _accept(header.get("fetch", []), root)
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
    fields = {"digest": f'"sha256:{content_digest(header, rows)}"', "locked": "true"}
    text = _set_fields(read_text(path), fields)
    folder = _own_folder(path)
    door.replace(folder / items.name, _csv_bytes(rows))
    door.replace(folder / path.name, text.encode())
    return folder / path.name


def verify(name: str, data_root: Path | None = None, digests: FileDigests | None = None) -> str:
    """Reads and decodes every item, or hashes the weights; returns a sentence to print. Raises Error naming what is
    missing or changed."""
    if name.startswith("weights/"):
        return f"{weights_path(name.removeprefix('weights/'), data_root)} is as locked"
    manifest = load(name, data_root, digests)
    manifest.check()
    if manifest._drawn is not None:
        manifest._compare_drawn("pixels", manifest._drawn.digest())
        return f"{name}: {len(manifest):,} items, all drawn as locked"
    for id in manifest.ids():
        if manifest.item(id).path is not None:
            manifest.read(id)
    return f"{name}: {len(manifest):,} items in {manifest.num_clusters():,} clusters, all as locked"


_digests = FileDigests()  # metrics ask for their weights with every batch, and a file may have a gigabyte


def weights_path(name: str, data_root: Path | None = None) -> Path:
    """The file of `data_manifests/weights/<name>.toml` whose SHA-256 was checked; raises Error with the fetch line."""
    header = read_weights(find(f"weights/{name}"))
    target = data_folder(data_root) / "weights" / header["file"]
    for path in (target, *map(_package_file, header.get("packaged", []))):
        if header["locked"] and path.is_file() and _digests.of(path) == header["sha256"]:
            return path
    if header["locked"] and target.is_file():
        raise Error(f"{target} is not the locked file", hint=f"remove it; then bench data fetch weights/{name}")
    state = "missing" if header["locked"] else "not locked"
    raise Error(f"weights {name} are {state}", hint=_how_to_get(f"weights/{name}", header))


def extractor_table(name: str) -> Mapping[str, Any]:
    """The checked table `[extractor]` of a weights manifest; raises UsageError where there is none of that name."""
    header = read_weights(find(f"weights/{name}")) if name in _known("weights") else {}
    if "extractor" in header:
        return header["extractor"]
    known = [n for n in _known("weights") if "[extractor]" in read_text(find(f"weights/{n}"))]
    own = "embedded, mini-classifier, mini-clip, inception-RESIZE"
    hint = f"{own}, {', '.join(known)}; or write data_manifests/weights/NAME.toml with a table [extractor]"
    raise UsageError(f"no feature network is called {name!r}{suggest(name, known)}", hint=hint)


def _lock_weights(name: str, path: Path, data_root: Path | None) -> Path:
    header = read_weights(path)
    folder = data_folder(data_root) / "weights"
    _accept([header], folder)
    target = folder / header["file"]
    if not target.is_file():
        raise Error(f"{target} is missing", hint=f"bench data fetch {name}")
    fields = {"sha256": f'"{file_digest(target)}"', "bytes": str(target.stat().st_size), "locked": "true"}
    place = _own_folder(path)
    door.replace(place / path.name, _set_fields(read_text(path), fields).encode())
    return place / path.name


def _weights_state(name: str) -> dict[str, str]:
    header = read_weights(find(name))
    there = (data_folder() / "weights" / header["file"]).is_file()
    there = there or any(_package_file(p).is_file() for p in header.get("packaged", []))
    state = "not locked" if not header["locked"] else "ready" if there else "not fetched"
    return {"items": "1", "state": state, "license": _short(header["license"])}


def _accept(parts: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Gives unverified downloads their names, and unpacks archives among them."""
    for part in parts:
        target = _target(part, folder)
        waiting = target.with_name(target.name + UNVERIFIED)
        if waiting.is_file():
            os.replace(waiting, target)
            if "unpack" in part:
                _unpack(part, folder)


def _target(part: Mapping[str, Any], folder: Path) -> Path:
    """Where a download goes: an archive beside the folder whose place its content takes."""
    return (folder.with_name(f"{folder.name}.download") if "unpack" in part else folder) / part["file"]


def _unpack(part: Mapping[str, Any], folder: Path) -> None:
    from bench.fetch import unpack

    archive = _target(part, folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise Error(f"{folder} is not empty, so {archive} was not unpacked", hint="move what is there, then try again")
    unpack(archive, folder, part["unpack"]["files"], part["unpack"]["bytes"])
    shutil.rmtree(archive.parent)


def _own_folder(path: Path) -> Path:
    """Where a manifest may be written: beside itself, or below the working folder if it came with the package."""
    folder = path.parent
    if "_data" not in path.parts:
        return folder
    own = Path.cwd() / "data_manifests" / ("weights" if folder.name == "weights" else "")
    door.make_folder(own)
    return own


def names() -> list[tuple[str, dict[str, str]]]:
    """The manifests by name, weights too, with what a list shows of them: items, state, license."""
    rows = []
    for name in [*_known("."), *(f"weights/{n}" for n in _known("weights"))]:
        try:
            rows.append((name, _weights_state(name) if name.startswith("weights/") else _data_state(name)))
        except Error as e:
            rows.append((name, {"items": "", "state": f"broken: {e}", "license": ""}))
    return rows


def _known(folder: str) -> list[str]:
    return sorted({p.stem for place in folders() for p in (place / folder).glob("*.toml")})


def _data_state(name: str) -> dict[str, str]:
    manifest = load(name)
    first = next(iter(manifest._entries.values()), None)
    there = first is None or first.item.path is None or first.item.path.is_file()
    state = "not locked" if not manifest.locked else "ready" if there else "not fetched"
    items = f"{len(manifest):,}" if manifest.locked else ""
    return {"items": items, "state": state, "license": _short(manifest.license)}


def _short(text: str) -> str:
    return textwrap.shorten(text, 60, placeholder="...")


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
    known = [f"weights/{n}" for n in _known("weights")] if folder == "weights" else _known(".")
    where = "data_manifests/weights" if folder == "weights" else "data_manifests"
    hint = f"known: {', '.join(known)}; or image-folder:PATH; or write {where}/NAME.toml"
    raise UsageError(f"no data manifest is called {name!r}{suggest(name, known)}", hint=hint)


def data_folder(data_root: Path | None = None) -> Path:
    """Where fetched data lies: the argument, or BENCH_DATA, or ~/.cache/touchstone."""
    return Path(data_root or os.environ.get("BENCH_DATA") or "~/.cache/touchstone").expanduser()


# weights


def root_of(header: Mapping[str, Any], data_root: Path | None) -> Path:
    return data_folder(data_root) / header.get("root", "")


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
            if len(entries) > MOST_CROPS:
                raise Error(f"{at}: more than {MOST_CROPS:,} crops", hint="a lower crops.limit, or a wider stride")
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
    if name == FOLDER or not root.is_dir():
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
        head, count = re.subn(rf"(?m)^([\"']?){key}\1[ \t]*=.*$", lambda _, line=line: line, head, count=1)
        if not count:
            head = head.rstrip("\n") + f"\n{line}\n" + ("\n" if table else "")
    changed = head + table + tail
    expected = {**tomllib.loads(text), **tomllib.loads("\n".join(f"{k} = {v}" for k, v in values.items()))}
    try:
        found = tomllib.loads(changed)
    except ValueError:
        found = {}
    if found != expected:  # fields where this does not look for them, as behind a text of several lines
        lines = "; ".join(f"{k} = {v}" for k, v in values.items())
        raise Error(f"the manifest has {', '.join(values)} where they cannot be replaced", hint=f"write there: {lines}")
    return changed


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
