"""What `bench data` does: fetch, lock and verify what a manifest names, and list what there is."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import door, images
from bench.identity import FileDigests, digest, file_digest
from bench.manifest import how_to_get, load, package_file, path_of, pictures, world_digest
from bench.manifest_format import content_digest, read_header, read_rows, read_text, read_weights
from bench.manifest_places import data_folder, find, known_names, root_of
from bench.manifest_weights import weights_path
from bench.manifest_world import FIRST, WorldItems
from bench.types import Error

if TYPE_CHECKING:
    from bench.fetch import Progress

UNVERIFIED = ".unverified"


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
        raise Error(f"{name} cannot be fetched for you", hint=how_to_get(name, header))
    waiting = []
    for part in parts:
        target = _target(part, folder)
        sha256 = part.get("sha256", "")
        if "unpack" in part and any(pictures(folder)):  # archives are unpacked as a whole or not at all
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
        raise Error(f"{name}: there is nothing to lock in {root}", hint=how_to_get(name, header))
    if header["kind"] != "prompts":
        for row in rows:
            file = path_of(f"{items}: item {row['id']}", header["kind"], row, root)
            data = images.read_bytes(file)
            height, width = images.read(data, name=str(file)).shape[:2]
            row.update(sha256=digest(data), width=str(width), height=str(height))
    fields = {"digest": f'"sha256:{content_digest(header, rows)}"', "locked": "true"}
    text = _set_fields(read_text(path), fields)
    folder = _own_folder(path)
    door.replace(folder / items.name, csv_bytes(rows))
    door.replace(folder / path.name, text.encode())
    return folder / path.name


def _lock_world(path: Path, header: dict[str, Any]) -> Path:
    drawn = WorldItems(header["world"])
    pixels = {"pixels": drawn.digest(), "first_pixels": drawn.digest(FIRST)}
    fields = {**pixels, "digest": f"sha256:{world_digest({**header, **pixels})}"}
    text = _set_fields(read_text(path), {**{k: f'"{v}"' for k, v in fields.items()}, "locked": "true"})
    folder = _own_folder(path)
    door.replace(folder / path.name, text.encode())
    return folder / path.name


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


def names() -> list[tuple[str, dict[str, str]]]:
    """The manifests by name, weights too, with what a list shows of them: items, state, license."""
    rows = []
    for name in [*known_names("."), *(f"weights/{n}" for n in known_names("weights"))]:
        try:
            rows.append((name, _weights_state(name) if name.startswith("weights/") else _data_state(name)))
        except Error as e:
            rows.append((name, {"items": "", "state": f"broken: {e}", "license": ""}))
    return rows


def _data_state(name: str) -> dict[str, str]:
    manifest = load(name)
    first = next(iter(manifest._entries.values()), None)
    there = first is None or first.item.path is None or first.item.path.is_file()
    state = "not locked" if not manifest.locked else "ready" if there else "not fetched"
    items = f"{len(manifest):,}" if manifest.locked else ""
    return {"items": items, "state": state, "license": _short(manifest.license)}


def _weights_state(name: str) -> dict[str, str]:
    header = read_weights(find(name))
    there = (data_folder() / "weights" / header["file"]).is_file()
    there = there or any(package_file(p).is_file() for p in header.get("packaged", []))
    state = "not locked" if not header["locked"] else "ready" if there else "not fetched"
    return {"items": "1", "state": state, "license": _short(header["license"])}


def _short(text: str) -> str:
    return textwrap.shorten(text, 60, placeholder="...")


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


def csv_bytes(rows: Sequence[Mapping[str, str]]) -> bytes:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _relative_pictures(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in pictures(root))
