"""Measuring side by side: calls take turns in one process, CPU seconds because machines are shared."""

import csv
import io
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from bench import door, provenance

ROOT = Path(__file__).parents[2]
QUICK = "--quick" in sys.argv  # tiny input, to see that every call works; nothing that is kept changes
OUT = ROOT / "build" / "perf" if QUICK else ROOT / "reports" / "perf"
# What a peer may raise when it does not go with the versions installed here; then its row says so.
FAILURES = (TypeError, ValueError, AttributeError, RuntimeError, ImportError, AssertionError, OSError)
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One line of a table: ours against a peer's, in `unit`; `ratio` is peer / ours, so that more is better."""

    what: str
    peer: str
    ours: float | None  # None: it failed here, and the note says why
    peers: float | None
    unit: str
    goal: str | float = ""  # a number: the least ratio
    note: str = ""
    most: float | None = None  # another goal: what ours may take, in `unit`

    @property
    def ratio(self) -> float | None:
        if self.peers is None or self.ours is None:
            return None
        return self.peers / max(self.ours, 1.0 if self.unit == "MB" else 1e-9)

    @property
    def met(self) -> bool | None:
        """None where there is no goal in numbers, or nothing was measured that it could be held against."""
        held = []
        if not isinstance(self.goal, str) and self.ratio is not None:
            held.append(self.ratio >= self.goal)
        if self.most is not None and self.ours is not None:
            held.append(self.ours <= self.most)
        return all(held) if held else None

    @property
    def wanted(self) -> str:
        parts = [self.goal if isinstance(self.goal, str) else f"at least {self.goal:g}"]
        parts.append("" if self.most is None else f"at most {self.most:g} {self.unit}")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Race:
    """One thing that we and peers do: `build(size)` makes the input and gives the calls by peer, ours under "".

    Each is called once at `small`, which imports and warms up and where a peer that fails is found out; the least of
    `rounds` at `size` counts. `goals`: the least ratio to a peer, or to the "fastest". With `memory` only the peak that
    a call adds to a process of its own is measured, in MB.
    """

    what: str
    build: Callable[[int], Calls]
    size: int
    small: int
    rounds: int = 3
    goals: Mapping[str, float] = field(default_factory=dict)
    agree: Callable[[Any, Any], str] | None = None  # (our result, a peer's): how far they differ, for the note
    note: str = ""
    memory: bool = False
    most: float | None = None  # what ours may take
    each: bool = False  # the time of one of `size` is reported
    scale: float = 1.0  # 1000: milliseconds
    unit: str = "CPU s"

    def run(self, module: str) -> list[Row]:
        size, rounds = (self.small, 1) if QUICK else (self.size, self.rounds)
        started = time.perf_counter()
        failed, working = {}, {}
        for name, call in self.build(self.small).items():
            reason = _failure(call)
            (working if reason is None else failed)[name] = reason
        names = list(working) + list(failed)
        if self.memory:
            measured = _added_here if QUICK else added_memory
            spent = {name: measured(module, self.what, name, size) for name in working}
            results = {}
        else:
            calls = {name: call for name, call in self.build(size).items() if name in working}
            spent, results = fastest(calls, rounds)
            spent = {name: seconds * self.scale / (size if self.each else 1) for name, seconds in spent.items()}
        peers = {name: spent[name] for name in working if name}
        best = min(peers, key=peers.get, default="")
        rows = []
        for name in names:
            if not name:
                continue
            notes = [failed.get(name) or failed.get("") or "", self.note]
            if self.agree and name in results and "" in results:
                notes.insert(0, self.agree(results[""], results[name]))
            goal = self.goals.get(name, self.goals.get("fastest", "") if name == best else "")
            note = "; ".join(n for n in notes if n)
            unit = "MB" if self.memory else self.unit
            rows.append(Row(self.what, name, spent.get(""), spent.get(name), unit, goal, note, self.most))
        print(f"{self.what}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return rows


def _failure(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except FAILURES as e:
        text = str(e).splitlines()[0] if str(e) else ""
        missing = isinstance(e, ImportError)
        return "not installed" if missing else f"failed: {type(e).__name__}: {text}"[:90]
    return None


def peer(path: str) -> Any:
    """`package.module.name`, imported when it is called for, so that a peer may be absent."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def fastest(calls: Calls, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Least CPU seconds of each call, all threads counted, and what each gave; they take turns."""
    spent: dict[str, float] = {}
    results = {}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            results[name] = call()
            spent[name] = min(time.process_time() - begin, spent.get(name, float("inf")))
    return spent, results


def side_by_side(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each call, after one call each to warm up: CPU of all threads, or of another clock."""
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = clock()
            call()
            spent[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in spent.items()}


def processes(call: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of the processes that a call waits for, after one call to warm up."""
    call()
    spent = []
    for _ in range(repeats):
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        call()
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)
    return statistics.median(spent)


def resident_peak() -> float:
    """MB of this process; what getrusage says survives exec and would be the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def added_memory(module: str, what: str, name: str, size: int) -> float | None:
    """MB that a call of a race of tests/perf/<module>.py adds to its peak, in a process of its own; None if it fails.

    The input is there before, and so is what the libraries keep from one call at the small size.
    """
    command = [sys.executable, __file__, module, what, name, str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _added_here(module: str, what: str, name: str, size: int) -> float:
    race = next(race for race in import_module(module).RACES if race.what == what)
    race.build(race.small)[name]()
    call = race.build(size)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident_peak()
    call()
    return resident_peak() - before


def versions(names: list[str]) -> list[str]:
    """`name version` of those that are installed."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, title: str, rows: list[Row], about: str = "", peers: list[str] | None = None) -> None:
    """reports/perf/<name>.md and .csv, and the table on stdout."""
    made = provenance.machine()
    packages = [f"{k} {v}" for k, v in provenance.packages().items() if v] + versions(peers or [])
    lines = [
        f"# {title}",
        "",
        *([about, ""] if about else []),
        "| what | peer | ours | peer's | unit | peer / ours | goal | met | note |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | --- | --- |",
    ]
    for row in rows:
        ours, peers_ = ("" if value is None else f"{value:.4g}" for value in (row.ours, row.peers))
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        met = {True: "yes", False: "**no**", None: ""}[row.met]
        cells = [row.what, row.peer, ours, peers_, row.unit, ratio, row.wanted, met, row.note.replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{made['cpu']}, {made['cores']} cores, load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}; "
        + ", ".join(dict.fromkeys(packages)),
        "",
    ]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*Row.__dataclass_fields__, "ratio", "met"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "ratio": row.ratio, "met": row.met})
    save(f"{name}.md", "\n".join(lines).encode())
    save(f"{name}.csv", table.getvalue().encode())
    print("\n".join(lines), flush=True)


def save(name: str, content: bytes) -> None:
    door.make_folder(OUT)
    door.replace(OUT / name, content)


if __name__ == "__main__":
    print(_added_here(*sys.argv[1:4], int(sys.argv[4])))
