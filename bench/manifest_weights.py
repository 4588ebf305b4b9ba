"""Weights that a manifest names: judges and feature networks are data, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.identity import FileDigests
from bench.manifest import how_to_get, package_file
from bench.manifest_format import read_text, read_weights, suggest
from bench.manifest_places import data_folder, find, known_names
from bench.types import Error, UsageError

_digests = FileDigests()  # metrics ask for their weights with every batch, and a file may have a gigabyte


def weights_path(name: str, data_root: Path | None = None) -> Path:
    """The file of `data_manifests/weights/<name>.toml` whose SHA-256 was checked; raises Error with the fetch line."""
    header = read_weights(find(f"weights/{name}"))
    target = data_folder(data_root) / "weights" / header["file"]
    for path in (target, *map(package_file, header.get("packaged", []))):
        if header["locked"] and path.is_file() and _digests.of(path) == header["sha256"]:
            return path
    if header["locked"] and target.is_file():
        raise Error(f"{target} is not the locked file", hint=f"remove it; then bench data fetch weights/{name}")
    state = "missing" if header["locked"] else "not locked"
    raise Error(f"weights {name} are {state}", hint=how_to_get(f"weights/{name}", header))


def extractor_table(name: str) -> Mapping[str, Any]:
    """The checked table `[extractor]` of a weights manifest; raises UsageError where there is none of that name."""
    header = read_weights(find(f"weights/{name}")) if name in known_names("weights") else {}
    if "extractor" in header:
        return header["extractor"]
    known = [n for n in known_names("weights") if "[extractor]" in read_text(find(f"weights/{n}"))]
    own = "embedded, mini-classifier, mini-clip, inception-RESIZE"
    hint = f"{own}, {', '.join(known)}; or write data_manifests/weights/NAME.toml with a table [extractor]"
    raise UsageError(f"no feature network is called {name!r}{suggest(name, known)}", hint=hint)
