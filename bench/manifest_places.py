"""Where manifests and data lie."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.manifest_format import suggest
from bench.types import UsageError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


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


def known_names(folder: str) -> list[str]:
    return sorted({p.stem for place in folders() for p in (place / folder).glob("*.toml")})


def find(name: str) -> Path:
    """The TOML file of a manifest, `weights/<name>` included. Raises UsageError with suggestions."""
    folder, _, stem = name.rpartition("/")
    if folder in ("", "weights") and NAME.fullmatch(stem):
        for place in folders():
            path = place / f"{name}.toml"
            if path.is_file():
                return path
    known = [f"weights/{n}" for n in known_names("weights")] if folder == "weights" else known_names(".")
    where = "data_manifests/weights" if folder == "weights" else "data_manifests"
    hint = f"known: {', '.join(known)}; or image-folder:PATH; or write {where}/NAME.toml"
    raise UsageError(f"no data manifest is called {name!r}{suggest(name, known)}", hint=hint)


def data_folder(data_root: Path | None = None) -> Path:
    """Where fetched data lies: the argument, or BENCH_DATA, or ~/.cache/touchstone."""
    return Path(os.path.expanduser(data_root or os.environ.get("BENCH_DATA") or "~/.cache/touchstone"))


def root_of(header: Mapping[str, Any], data_root: Path | None) -> Path:
    return data_folder(data_root) / header.get("root", "")
