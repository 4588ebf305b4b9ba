"""Logs of records: one JSON object a line, each with its checksum; what a crash or a disk did to them is found and
mended."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench import door
from bench.identity import canonical
from bench.types import Json, Record

ENDING = re.compile(rb',"crc":"[0-9a-f]{8}"\}')
LINES_AT_A_TIME = 500
STARTS = 16  # places tried for the beginning of a line that lost its newline
RECORD: Mapping[str, Any] = {  # its fields, as JSON has them
    **dict.fromkeys(("key", "unit", "status", "device", "code", "started"), str),
    **dict.fromkeys(("attempt", "batch"), int),
    "rows": list,
    "blobs": dict,
    "error": dict | None,
    "seconds": int | float,
}
NEEDED = {"key", "unit", "status"}


@dataclass(frozen=True)
class Damage:
    """What reading a log found wrong."""

    torn: int = 0  # bytes of an unfinished last line
    bad: tuple[bytes, ...] = ()  # whole lines that fail their checksum
    unended: bool = False  # the last line is whole, but for its newline


def line(value: Mapping[str, Json]) -> bytes:
    """One JSON object with the CRC-32 of what stands before it as its last member, and a newline."""
    body = canonical(value).encode("utf-8", "surrogatepass")[:-1]
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def record_line(record: Record) -> bytes:
    return line({f.name: getattr(record, f.name) for f in fields(Record)})


def parse_record(value: Mapping[str, Any]) -> Record | None:
    """The record of a line's object; None where it is no record."""
    known = {name: value[name] for name in RECORD if name in value}
    if not (known.keys() >= NEEDED and all(isinstance(v, RECORD[name]) for name, v in known.items())):
        return None
    known = {"rows": [], "blobs": {}, **known}
    whole = are(known["rows"], list, dict) and are(known["blobs"], dict, str) and known["status"] in ("ok", "failed")
    return Record(**{**known, "rows": tuple(known["rows"])}) if whole else None


def is_later(value: Mapping[str, Any]) -> bool:
    """Is a line's object what `rescore` adds to a record?"""
    named = isinstance(value.get("key"), str) and isinstance(value.get("metric"), str)
    return named and are(value.get("columns"), dict, list) and are(value.get("blobs"), dict, str)


def are(values: Any, kind: type, inner: type) -> bool:
    """Is it a list or dict of values of one type?"""
    each = values.values() if isinstance(values, dict) else values
    return isinstance(values, kind) and all(isinstance(value, inner) for value in each)


def is_whole(raw: bytes) -> bool:
    """Does a line without its newline have the checksum that it names?"""
    return raw[-2:] == b'"}' and raw[-18:-10] == b',"crc":"' and b"%08x" % zlib.crc32(raw[:-18]) == raw[-10:-2]


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """The object of a line without its newline; None when it is damaged."""
    if not is_whole(raw):
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    value.pop("crc", None)
    return value


class Lines:
    """The whole lines of a log in order, without their newlines; `damage` says, at the end, what was wrong.

    Only checksums are looked at, and one line at a time: a log of any length is checked at the speed of the disk.
    """

    def __init__(self, path: Path):
        self.path, self.damage = path, Damage()

    def __iter__(self) -> Iterator[bytes]:
        bad: list[bytes] = []
        torn, unended = 0, False
        with open(self.path, "rb") if self.path.is_file() else io.BytesIO() as file:
            for raw in file:
                line = raw.removesuffix(b"\n")
                if is_whole(line):
                    unended = line is raw
                    yield line
                elif line:
                    inside = list(_joined(line))
                    yield from inside
                    if line is raw and not inside:
                        torn = len(raw)
                    else:
                        bad.append(line)
        self.damage = Damage(torn, tuple(bad), unended)


def _joined(raw: bytes) -> Iterator[bytes]:
    """The whole lines within one that is damaged: a lost newline joins lines."""
    at = 0
    for ending in ENDING.finditer(raw):
        start = at
        for _ in range(STARTS):
            start = raw.find(b"{", start, ending.start())
            if start < 0:
                break
            if is_whole(raw[start : ending.end()]):
                yield raw[start : ending.end()]
                break
            start += 1
        at = ending.end()


def read_lines(path: Path) -> tuple[list[dict[str, Any]], Damage]:
    """All whole objects of a log in order, and what was damaged. Never raises for damage."""
    lines, values = Lines(path), []
    with uncollected():
        rest = iter(lines)
        while block := list(itertools.islice(rest, LINES_AT_A_TIME)):
            values += _parsed(block)
    return values, lines.damage


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for cycles, of which parsed JSON has none: it takes as long as the parsing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _parsed(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The objects of whole lines, parsed together where that goes: one call for many is faster.

    Each must have its own line's checksum: what is no object alone may be one together with the next line.
    """
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads((b"[" + b",".join(lines) + b"]").decode("utf-8", "surrogatepass"))
        sums = [raw[-10:-2].decode() for raw in lines]
        if [v.pop("crc", None) if isinstance(v, dict) else None for v in values] == sums:
            return values
    return [value for raw in lines if (value := parse_line(raw)) is not None]


def heal(path: Path) -> Damage:
    """Cuts an unfinished last line; sets damaged lines aside in `<name>.bad`. Doing it twice changes nothing more."""
    if not path.exists():
        return Damage()
    lines = Lines(path)
    for _ in lines:
        pass
    damage = lines.damage
    if damage.bad:
        aside = path.with_name(path.name + ".bad")
        known = aside.read_bytes().split(b"\n") if aside.exists() else []
        new = [raw for raw in dict.fromkeys(damage.bad) if raw not in known]
        door.replace(aside, b"".join(raw + b"\n" for raw in [*filter(None, known), *new]))
    if damage.bad or damage.unended:
        door.replace(path, b"".join(raw + b"\n" for raw in lines))
    elif damage.torn:
        door.truncate(path, path.stat().st_size - damage.torn)
    return damage
