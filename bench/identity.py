"""Who is who: canonical JSON, digests, fingerprints of weights, and seeds with addresses."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.types import Error, UsageError

HUB = re.compile(r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)@(?P<revision>[0-9a-f]{7,40})(?::(?P<subfolder>[\w./-]+))?")


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces, no NaN; what cannot be written cannot be keyed and raises Error."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise Error(f"cannot be written as JSON: {e}") from None


def digest(value: Any) -> str:
    """64 hex digits of SHA-256 over bytes, or over the canonical JSON of anything else."""
    data = value if isinstance(value, bytes) else canonical(value).encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()


def seed_for(root: int, suite: str, version: int, item: str, stream: str) -> int:
    """The first 63 bits of SHA-256 over the address: no rank, batch, order, attempt or model in it."""
    return int(digest([root, suite, version, item, stream])[:16], 16) >> 1


def unit_key(spec_digest: str, unit_id: str, items: tuple[str, ...], params: Mapping[str, Any]) -> str:
    """32 hex digits: what a record is found by. Specification, unit, items and params decide the outcome."""
    return digest([spec_digest, unit_id, list(items), dict(params)])[:32]


def without_copy(id: str) -> str:
    """`id` of `id#k`, the k-th of several rows that come from one item; other names as they are."""
    item, _, number = id.rpartition("#")
    return item if item and number.isdecimal() else id


def slug(text: str, limit: int = 40) -> str:
    """A name that is safe in a path: [a-z0-9._-], not starting with a dot. Different texts may share a slug."""
    text = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.")
    return text[:limit].strip("-.") or "x"


def hub_id(text: str) -> re.Match[str] | None:
    """The parts of `hf:owner/name@revision[:subfolder]`; raises for a hub id without a commit, as it may move."""
    if not text.startswith("hf:"):
        return None
    match = HUB.fullmatch(text)
    if match is None:
        raise UsageError(
            f"hub id {text!r} must name a commit: hf:owner/name@<7 to 40 hex digits>[:subfolder]",
            hint="a branch or tag can move; copy the commit from the repository's history",
        )
    return match


def fingerprint(weights: str, remember: FileDigests | None = None) -> str:
    """`sha256:…` of a file or of a folder's listing of files; `commit:…` for a pinned hub id.

    Raises Error where the path does not exist.
    """
    match = hub_id(weights)
    if match:
        return f"commit:{match['repo']}@{match['revision']}" + (f":{match['subfolder']}" if match["subfolder"] else "")
    if not weights:
        raise Error("weights are named by nothing", hint="give a file, a folder, or hf:owner/name@commit")
    path = Path(os.path.expanduser(weights))
    hash_file = remember.of if remember else file_digest
    if path.is_file():
        return f"sha256:{hash_file(path)}"
    if path.is_dir():
        hidden = (p for p in path.rglob("*") if any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted({p for p in path.rglob("*") if p.is_file()} - set(hidden))
        if not files:
            raise Error(f"weights folder {weights} is empty")
        return f"sha256:{digest([[p.relative_to(path).as_posix(), hash_file(p)] for p in files])}"
    raise Error(f"weights {weights} do not exist", hint="give a file, a folder, or hf:owner/name@commit")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """Digests remembered by path, size, times and inode. An entry younger than two seconds is not believed: a file
    may change twice within one tick of its clock."""

    YOUNG_NS = 2_000_000_000

    def __init__(self, entries: dict[str, list[Any]] | None = None):
        self.entries = entries if entries is not None else {}
        self.changed = False

    def of(self, path: Path) -> str:
        import time

        name = str(path.resolve())
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self.entries.get(name)
        if known and known[:4] == stamp:
            return known[4]
        found = file_digest(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > self.YOUNG_NS:
            self.entries[name] = [*stamp, found]
            self.changed = True
        return found
