"""How far the driver reaches: simulated workers that do nothing, through the real loop, the real log and the reduction.

python tests/perf/scale.py

Simulated are the workers alone: each has its record at once. Real are the listing of units, the loop that hands them
out, one line a record with its checksum, write and fsync, the observer, healing, reading, reduction and the board. A
worker of a model takes seconds for a unit, so what is measured here is what the driver could follow.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from measure import QUICK, Row, resident_peak, write

from bench import Estimate, Suite, Unit, execute
from bench.config import How
from bench.engine import Crew, Handle
from bench.execution import Observer
from bench.identity import unit_key
from bench.records import heal
from bench.store import Store
from bench.types import Record

WORKERS = 1000
FEW, MANY = (200, 2000) if QUICK else (100_000, 1_000_000)
ALONE = 200 if QUICK else 2000  # units where each record waits for a disk by itself


@dataclass(frozen=True)
class MeanValue:
    """The mean of a column."""

    name: ClassVar[str] = "value"
    version: ClassVar[int] = 1
    unit: ClassVar[str] = ""
    better: ClassVar[str] = "higher"

    def measure(self, media, ctx):
        return {}

    def reduce(self, table):
        values = table.values("value")
        return Estimate(float(np.mean(values)), n=len(values))

    def signature(self, table):
        return "value|v:1"


@dataclass(frozen=True)
class Nothing(Suite):
    """Units of one item that no model is asked about."""

    num: int = 1000

    name: ClassVar[str] = "perf-nothing"
    version: ClassVar[int] = 1
    metrics: ClassVar[tuple[MeanValue, ...]] = (MeanValue(),)

    def units(self, data):
        for i in range(self.num):
            yield Unit(f"{i:07d}", (f"item-{i:07d}",))

    def run(self, unit, model, ctx):
        raise NotImplementedError


class Idler(Handle):
    """A worker that has its record as soon as it is given a unit."""

    def start(self):
        self.said = ("ready", None)

    def send(self, unit, attempt):
        key = unit_key(self.work.spec_digest, unit.id, unit.items, unit.params)
        rows = [{"item": item, "value": len(key) / 64, "psnr": 24.51, "ssim": 0.9311} for item in unit.items]
        blobs = {"features/inception": 64 * "0" + ".npy"}
        self.said = (
            "record",
            Record(key, unit.id, "ok", tuple(rows), blobs, None, attempt, 16, 12.5, "cpu", "", "now"),
        )

    def hear(self):
        return self.said

    def again(self):
        return Idler(self.work, self.device)

    def dismiss(self):
        pass

    def kill(self, grace=0.0):
        pass


@dataclass(frozen=True)
class Simulation:
    """An engine of idlers; `together` of them are ready at a time."""

    together: int

    @contextlib.contextmanager
    def open(self, work, **live):
        with Crew(work, lambda handles, seconds: handles[: self.together]) as crew:
            for _ in range(WORKERS):
                crew.add(Idler(work, "cpu"))
            crew.gather(WORKERS if self.together > 1 else 1)
            yield crew.measure


class Watch(Observer):
    """When the loop began and ended, and the memory at each tenth of it."""

    def begin(self, run, units, pending):
        self.every, self.count = max(1, len(pending) // 10), 0
        self.megabytes = [resident()]
        self.begun, self.began = time.process_time(), time.perf_counter()

    def done(self, unit, record):
        self.count += 1
        self.ended = time.process_time()
        self.took = time.perf_counter() - self.began
        if self.count % self.every == 0:
            self.megabytes.append(resident())

    def say(self, text):
        pass


def resident() -> float:
    """MB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def run(num: int, together: int, folder: str) -> dict[str, float]:
    """One run from its beginning to its scores, in CPU seconds and MB; then it is healed, read and shown."""
    watch, begin = Watch(), time.process_time()
    how = How(store=folder, devices="cpu")
    options = {"how": how, "observer": watch, "engine": Simulation(together)}
    made = execute(Nothing(num=num), object(), store=Store(folder), identity={"name": "idler"}, **options)
    end = time.process_time()
    found = {
        "list": watch.begun - begin,
        "rate": num / (watch.ended - watch.begun),
        "wall_rate": num / watch.took,
        "reduce": end - watch.ended,
        "first_mb": watch.megabytes[1],
        "last_mb": watch.megabytes[-1],
        "peak_mb": resident_peak(),
        "log_mb": made.log().stat().st_size / 1e6,
    }
    assert made.complete() and made.scores()[0].n == num
    for name, call in {
        "heal": lambda: heal(made.log()),
        "read": made.records,
        "pending": lambda: made.pending([Unit(f"{i:07d}", (f"item-{i:07d}",)) for i in range(num)]),
        "board": lambda: board(folder),
    }.items():
        begin = time.process_time()
        call()
        found[name] = time.process_time() - begin
    return found


def board(folder: str) -> None:
    """A page over the runs of the store."""
    from bench.report import render

    path = Path(folder) / "scale.toml"
    path.write_text(
        'title = "Scale"\nsources = ["store"]\n[select]\nsuite = ["perf-nothing"]\n'
        '[[column]]\nsuite = "perf-nothing"\nmetric = "value"\n[rank]\nby = "perf-nothing:value"\n'
    )
    render(path, Store(folder), Path(folder) / "page")


def apart(num: int, together: int, place: str | None) -> dict[str, float]:
    """The same in a process of its own, its store below `place`: None is where temporary files lie."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command = [sys.executable, __file__, "run", str(num), str(together), folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def limits(many: dict[str, float], single: dict[str, float]) -> str:
    """What gives out first, from what was measured."""
    each = many["peak_mb"] / MANY / 1000  # GB
    rate = single["wall_rate"]
    return (
        f"The first to give out is a disk to whose fsync records come one by one: {rate:.0f} a second here, so "
        f"{WORKERS:,} workers whose units take less than {WORKERS / rate:.0f} s begin to wait, and then share one. "
        f"The next is memory while scores are reduced: 16 GB hold about {16 / each / 1e6:.0f} million units."
    )


def main() -> None:
    memory = "/dev/shm"
    many, few = apart(MANY, WORKERS, memory), apart(FEW, WORKERS, memory)
    alone, disk, single = apart(FEW, 1, memory), apart(FEW, WORKERS, None), apart(ALONE, 1, None)
    goal = 2000.0
    rows = []

    def rate(what: str, found: dict[str, float], clock: str, note: str) -> None:
        per_second = found["wall_rate" if clock == "wall" else "rate"]
        note = f"{per_second:,.0f} units/s; {note}"
        rows.append(Row(what, "goal", 1000 / per_second, 1000 / goal, f"{clock} ms a unit", 1.0, note))

    together, each = "one fsync for all that are ready", "one fsync each"
    rate(f"{MANY:,} units, {WORKERS:,} workers ready at once, tmpfs", many, "CPU", together)
    rate(f"{FEW:,} units, ready one by one, tmpfs", alone, "CPU", each)
    rate(f"{FEW:,} units, {WORKERS:,} workers ready at once, this disk", disk, "wall", together)
    rate(f"{ALONE:,} units, ready one by one, this disk", single, "wall", f"{each}: the speed of the disk")
    growth = many["last_mb"] - many["first_mb"]
    rows += [
        Row(
            f"memory that {MANY:,} records add in the loop",
            "",
            growth,
            None,
            "MB",
            most=50.0,
            note=f"{many['first_mb']:.0f} MB hold the units; {many['peak_mb']:,.0f} MB at the peak, in the reduction",
        ),
        Row(f"heal {FEW:,} records", "", few["heal"], None, "CPU s", most=1.0, note=f"{few['log_mb']:.0f} MB of log"),
        Row(f"heal {MANY:,} records", "", many["heal"], None, "CPU s", note=f"{many['log_mb']:.0f} MB of log"),
        *(
            Row(f"{what}, {n:,} units", "", found[name], None, "CPU s")
            for n, found in ((FEW, few), (MANY, many))
            for name, what in (
                ("list", "list units, take keys, begin"),
                ("pending", "what is pending, as a restart asks"),
                ("reduce", "reduce to scores.csv"),
                ("board", "a board of the run"),
            )
        ),
    ]
    write(
        "scale",
        "How far the driver reaches",
        rows,
        " ".join([*__doc__.split("\n\n")[2].split(), limits(many, single)]),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(run(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    else:
        main()
