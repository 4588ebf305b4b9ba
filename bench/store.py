"""The store: runs as folders of append-only records, blobs by content, scores derived from them.

<root>/runs/<run id>/run.json          what was asked for and what made it; written once
                     units.jsonl       one record a line, each with its checksum (units.<k>of<n>.jsonl for shards)
                     extra/*.jsonl     what was measured later
                     scores.csv        derived; may be deleted
<root>/blobs/ab/cdef....png            media and features, by SHA-256
<root>/shared/ab/cdef....json          what units without a model gave, by all that decides it; may be deleted
<root>/fingerprints.json               digests of weights and pictures, remembered
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import door
from bench.identity import FileDigests, digest, slug, unit_key
from bench.records import are, heal, is_later, line, parse_line, parse_record, read_lines, uncollected
from bench.scores import dump_scores, parse_scores
from bench.types import Error, Json, Record, Score, Table, Unit

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
SUFFIXES = frozenset({".png", ".npy", ".json", ".bin", ".txt"})
ADDRESS = re.compile(r"([0-9a-f]{64})(\.[a-z]{3,4})")


class Store:
    """A folder of runs and blobs. Nothing in it is ever deleted by the harness."""

    def __init__(self, root: str | Path):
        self.root = Path(os.path.expanduser(root))
        try:
            is_folder = stat.S_ISDIR(os.stat(self.root).st_mode)
        except (OSError, ValueError) as e:
            if getattr(e, "errno", None) == errno.ENAMETOOLONG:  # what is missing is made
                raise
        else:
            if not is_folder:
                raise Error(f"store {self.root} is not a folder", hint="name another one with --store")

    # -- runs

    def open(self, spec: Mapping[str, Json], meta: Mapping[str, Json], *, fresh: bool = False) -> Run:
        """The run of a specification: the same specification is the same run.

        `meta` is written to run.json when the run is new. `fresh` moves an old folder aside first.
        """
        path = self.root / "runs" / run_id(spec, str(meta["model"]))
        if fresh and path.exists():
            self._move_aside(path)
        if not (path / "run.json").exists():
            door.make_folder(path)
            body = {"format": FORMAT, "spec": spec, **meta}
            door.replace(path / "run.json", (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
        run = Run(self, path)
        if digest(run.spec) != digest(spec):
            raise Error(
                f"{path} holds another run", hint="move that folder aside; its run.json names another specification"
            )
        return run

    def _move_aside(self, path: Path) -> None:
        """Renames the folder of a run that nobody is writing."""
        with contextlib.ExitStack() as locks:
            for held in sorted(path.glob("*.lock")):
                locks.enter_context(door.lock(held, f"run {path.name}"))
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            names = (f"{path.name}.{stamp}{f'.{i}' if i else ''}.old" for i in itertools.count())
            door.rename(path, next(p for n in names if not (p := path.with_name(n)).exists()))

    def runs(
        self, suite: str | None = None, model: str | None = None, broken: Callable[[str, Error], None] | None = None
    ) -> Iterator[Run]:
        """Every run, by id; those of a suite or of a model's label, where given.

        One that cannot be read raises Error, or is passed to `broken` with its folder's name.
        """
        for path in self._folders():
            try:
                run = Run(self, path)
            except Error as e:
                if broken is None:
                    raise
                broken(path.name, e)
                continue
            if suite in (None, run.spec["suite"]) and model in (None, run.meta["model"]):
                yield run

    def _folders(self) -> list[Path]:
        found = (self.root / "runs").glob("*/run.json")
        return sorted(p.parent for p in found if p.parent.suffix != ".old")

    def run(self, name: str) -> Run:
        """One run by its id, or by an unambiguous beginning or part of it."""
        names = [p.name for p in self._folders()]
        found = [n for n in names if n == name] or [n for n in names if name in n]
        if len(found) == 1:
            return Run(self, self.root / "runs" / found[0])
        if found:
            raise Error(f"run {name!r} is ambiguous: {', '.join(found[:6])}", hint="give more of its id")
        from bench.text import closest

        raise Error(f"no run {name!r} in {self.root}", hint=closest(name, names) or "bench list shows the runs")

    # -- blobs

    def put(self, data: bytes, suffix: str) -> str:
        """Keeps bytes under their SHA-256, durably; returns the content address `<hex><suffix>`."""
        if suffix not in SUFFIXES:
            raise ValueError(f"suffix {suffix!r} is not one of {sorted(SUFFIXES)}")
        address = digest(data) + suffix
        path = self.path(address)
        if self.has(address) and path.read_bytes() == data:
            door.settle(path)
        else:  # new, or damaged
            door.make_folder(path.parent)
            door.replace(path, data)
        return address

    def path(self, address: str) -> Path:
        """Where a content address lives."""
        match = ADDRESS.fullmatch(address)
        if match is None:
            raise Error(f"{address!r} is no content address", hint="the record that names it is damaged")
        return self.root / "blobs" / address[:2] / address[2:]

    def has(self, address: str) -> bool:
        """Is there a regular file of that address? Its content is checked when it is read."""
        try:
            return stat.S_ISREG(self.path(address).lstat().st_mode)
        except (OSError, Error):
            return False

    def get(self, address: str) -> bytes:
        """The bytes of a content address, checked; raises Error when they are missing or not what was kept."""
        path = self.path(address)
        try:
            if not self.has(address):
                path.lstat()
                raise Error(f"blob {address} is no regular file", hint=f"remove {path} and measure its unit again")
            data = path.read_bytes()
        except OSError as e:
            raise Error(f"blob {address} cannot be read: {e.strerror}", hint="measure its unit again") from None
        if digest(data) != address[:64]:
            raise Error(f"blob {address} is damaged", hint=f"remove {path} and measure its unit again")
        return data

    # -- what no model takes part in

    def recall(self, address: str) -> dict[str, Any] | None:
        """The rows and blobs that `remember` kept; None where they are missing or damaged."""
        try:
            value = parse_line(self._shared(address).read_bytes().rstrip(b"\n"))
        except OSError:
            return None
        whole = value is not None and are(value.get("rows"), list, dict) and are(value.get("blobs"), dict, str)
        return value if whole and all(map(self.has, value["blobs"].values())) else None

    def remember(self, address: str, rows: Sequence[Mapping[str, Json]], blobs: Mapping[str, str]) -> None:
        """Keeps what a unit gave under a digest of all that decides it."""
        path = self._shared(address)
        door.make_folder(path.parent)
        door.replace(path, line({"rows": list(rows), "blobs": dict(blobs)}))

    def _shared(self, address: str) -> Path:
        return self.root / "shared" / address[:2] / f"{address[2:]}.json"

    # -- digests of files, remembered

    @contextlib.contextmanager
    def digests(self) -> Iterator[FileDigests]:
        """Digests of files, remembered from earlier runs; saved on leaving when there are new ones."""
        path = self.root / "fingerprints.json"
        try:
            entries = parse_line(path.read_bytes().rstrip(b"\n")) or {}
        except OSError:
            entries = {}  # a cache: what is missing or damaged is computed again
        whole = {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 5}
        known = FileDigests(whole)
        yield known
        if known.changed:
            from bench.text import mask

            door.make_folder(self.root)
            door.replace(path, line({name: e for name, e in known.entries.items() if mask(name) == name}))


def run_id(spec: Mapping[str, Json], label: str) -> str:
    """`reconstruction-sd-vae-ft-mse-7f3a91c2`: suite, model, 8 hex digits of the specification. No clock in it."""
    return f"{slug(str(spec['suite']))}-{slug(label)}-{digest(spec)[:8]}"


def _read_meta(path: Path) -> dict[str, Any]:
    """run.json, checked as far as the harness relies on it; raises Error naming the file and what is wrong."""
    aside = "move that folder aside and score again"
    try:
        meta = json.loads(path.read_bytes())
    except OSError as e:
        raise Error(f"{path} cannot be read: {e.strerror}", hint=aside) from None
    except (ValueError, RecursionError) as e:
        raise Error(f"{path} is damaged: {e}", hint=aside) from None
    written = meta.get("format") if isinstance(meta, dict) else None
    if written is not None and (type(written) is not int or written != FORMAT):
        message = f"{path} has format {str(written)[:60]}; this version reads {FORMAT}"
        raise Error(message, hint="use the version that wrote it")
    needed = {"format": int, "spec": dict, "model": str, "units": int, "items": int, "manifests": list}
    inner = {"suite": str, "suite_version": int, "fields": dict, "seed": int}
    for where, kinds in ((meta, needed), (meta.get("spec") if isinstance(meta, dict) else {}, inner)):
        wrong = [n for n, kind in kinds.items() if not (isinstance(where, dict) and isinstance(where.get(n), kind))]
        if wrong:
            raise Error(f"{path} is damaged: it has no {wrong[0]}", hint=aside)
    if not are(meta["manifests"], list, dict):
        raise Error(f"{path} is damaged: its manifests are no tables", hint=aside)
    return meta


class Run:
    """One run: its specification, its records, its scores."""

    def __init__(self, store: Store, path: Path):
        self.store, self.path, self.id = store, path, path.name
        self.meta = _read_meta(path / "run.json")
        self.spec: dict[str, Any] = self.meta["spec"]
        self.spec_digest = digest(self.spec)

    # -- writing

    def check_free(self, shard: str = "") -> None:
        """Raises Error, naming host and pid, while another process writes this shard."""
        path = self.log(shard).with_suffix(".lock")
        if path.exists():
            with door.lock(path, self._name(shard)):
                pass

    def _name(self, shard: str) -> str:
        return f"run {self.id}" + (f" shard {shard}" if shard else "")

    @contextlib.contextmanager
    def writer(self, shard: str = "", say: Callable[[str], None] = lambda _: None) -> Iterator[door.Appender]:
        """The only way to append: holds the lock of the shard's file and heals it first."""
        path = self.log(shard)
        with door.lock(path.with_suffix(".lock"), self._name(shard)):
            damage = heal(path)
            if damage.torn:
                say(f"{path.name}: cut an unfinished last line of {damage.torn} bytes")
            if damage.bad:
                many = "1 damaged line" if len(damage.bad) == 1 else f"{len(damage.bad)} damaged lines"
                say(f"{path.name}: {many} set aside in {path.name}.bad; units that were lost are measured again")
            appender = door.Appender(path)
            try:
                yield appender
            finally:
                appender.close()

    def log(self, shard: str = "") -> Path:
        """`units.jsonl`, or `units.3of16.jsonl` for shard 3/16."""
        return self.path / (f"units.{shard.replace('/', 'of')}.jsonl" if shard else "units.jsonl")

    # -- reading

    def key(self, unit: Unit) -> str:
        return unit_key(self.spec_digest, unit.id, unit.items, unit.params)

    def records(self) -> dict[str, Record]:
        """Per key: ok beats failed, later beats earlier. Damaged lines are passed over."""
        found: dict[str, Record] = {}
        with uncollected():
            for path in sorted(self.path.glob("units*.jsonl")):
                for value in read_lines(path)[0]:
                    record = parse_record(value)
                    if record is None:
                        continue
                    old = found.get(record.key)
                    if old is None or record.status == "ok" or old.status == "failed":
                        found[record.key] = record
        return found

    def pending(self, units: Iterable[Unit], records: Mapping[str, Record] | None = None) -> list[Unit]:
        """Those without an ok record whose blobs are there; failed ones are tried again."""
        records = self.records() if records is None else records
        return [u for u in units if not self._whole(records.get(self.key(u)))]

    def _whole(self, record: Record | None) -> bool:
        return record is not None and record.status == "ok" and all(map(self.store.has, record.blobs.values()))

    def failures(self) -> list[Record]:
        """Records of units that have no ok record."""
        return sorted((r for r in self.records().values() if r.status == "failed"), key=lambda r: r.unit)

    def table(self) -> Table:
        """The rows of all ok units, in the order of unit ids, with what was measured later."""
        records = sorted((r for r in self.records().values() if r.status == "ok"), key=lambda r: r.unit)
        extra = self.extra()
        rows = []
        for record in records:
            later = extra.get(record.key, {}).get("columns", {})
            columns = {name: values for name, values in later.items() if len(values) == len(record.rows)}
            for i, row in enumerate(record.rows):
                rows.append({**row, "unit": record.unit, **{name: values[i] for name, values in columns.items()}})

        @lru_cache(4)  # several metrics and slices ask for the same
        def load(name: str) -> np.ndarray:
            import numpy as np

            parts = []
            for record in records:
                address = {**record.blobs, **extra.get(record.key, {}).get("blobs", {})}.get(f"features/{name}")
                if address is None:
                    raise KeyError(name)
                parts.append(np.load(io.BytesIO(self.store.get(address)), allow_pickle=False))
            whole = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
            whole.flags.writeable = False  # several tables hand out the same array
            return whole

        return Table(rows, self.meta.get("items", len(rows)), self.spec.get("seed", 0), load)

    def extra(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Per key the columns, blobs and metrics that `rescore` added; later beats earlier."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for path in sorted((self.path / "extra").glob("*.jsonl")):
            for value in filter(is_later, read_lines(path)[0]):
                into = found.setdefault(value["key"], {"columns": {}, "blobs": {}, "metrics": {}})
                into["columns"].update(value["columns"])
                into["blobs"].update(value["blobs"])
                into["metrics"][value["metric"]] = True
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of each log: they grow when something was measured."""
        return {
            str(p): p.stat().st_size for pattern in ("units*.jsonl", "extra/*.jsonl") for p in self.path.glob(pattern)
        }

    def codes(self) -> set[str]:
        """Digests of the suite's code among the ok records; more than one means that versions were mixed."""
        return {r.code for r in self.records().values() if r.status == "ok"}

    # -- scores

    def scores(self) -> list[Score]:
        """The scores as last derived; none when they never were."""
        path = self.path / "scores.csv"
        return parse_scores(path.read_bytes(), path) if path.is_file() else []

    def save_scores(self, scores: Sequence[Score]) -> None:
        for path in self.sizes():  # the last record of a process that was killed was perhaps only written
            door.settle(Path(path))
        door.replace(self.path / "scores.csv", dump_scores(scores))

    def complete(self) -> bool:
        """Were all units measured, and every score over all items?"""
        scores = self.scores()
        return bool(scores) and all(s.complete for s in scores) and not self.failures()
