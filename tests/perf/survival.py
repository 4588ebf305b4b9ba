"""What it costs that records survive: checking and reading a long log, and saving a record durably.

python tests/perf/survival.py [--quick]
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from measure import QUICK, Row, write

from bench.door import Appender
from bench.records import heal, record_line
from bench.store import Run, Store
from bench.types import Record, Unit

RECORDS = 2_000 if QUICK else 100_000
SAVED = 20 if QUICK else 200
SPEC = {"suite": "long", "suite_version": 1, "fields": {}, "data": None, "seed": 0, "limit": None}
META = {"model": "toy", "units": RECORDS, "items": 4 * RECORDS, "manifests": [], "suite_ref": "", "suite_fields": {}}
TEXT = "a prompt of some length, as people write them"
ABOUT = (
    "A log whose records have four rows with three numbers and a prompt each and name one file of features. Healing is "
    "what a command does to it first: every line is held against its checksum, an unfinished one is cut, damaged ones "
    "are set aside. Reading makes records of all lines. The disk decides what a durable append takes; the same "
    "bytes without fsync stand beside it."
)


def record(run: Run, number: int) -> Record:
    unit = Unit(f"u/{number:06d}", tuple(f"item-{number:06d}-{i}" for i in range(4)))
    rows = [
        {"item": item, "psnr": 20 + number / 7, "ssim": 0.5 + i / 99, "lpips": 0.1234567 * i, "text": TEXT}
        for i, item in enumerate(unit.items)
    ]
    address = f"{number:064x}.npy"
    return Record(run.key(unit), unit.id, "ok", tuple(rows), {"features/inception": address}, batch=16, seconds=1.5)


def spent(call, repeats: int = 3) -> float:
    """The least CPU seconds of a call."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def logs(place: Path) -> list[Row]:
    run = Store(place / "store").open(SPEC, META)
    path = run.log("")
    whole = b"".join(record_line(record(run, i)) for i in range(RECORDS))
    damages = {
        "": whole,
        ", its last line unfinished": whole[:-300],
        ", one line damaged": whole.replace(b"u/001000", b"u/00100x", 1),
    }
    rows = []
    for name, data in damages.items():
        taken = []
        for _ in range(3):
            path.write_bytes(data)
            begin = time.process_time()
            heal(path)
            taken.append(time.process_time() - begin)
        note = f"{len(whole) / RECORDS:.0f} bytes a record" if not name else ""
        rows.append(Row(f"healing {RECORDS:,} records{name}", "", min(taken), None, "CPU s", most=1, note=note))
    path.write_bytes(whole)
    rows.append(Row(f"reading {RECORDS:,} records", "", spent(run.records), None, "CPU s"))
    return rows


def appends(place: Path) -> Row:
    """Seconds by the clock: a disk is waited for."""
    run = Store(place / "append").open(SPEC, META)
    lines = [record_line(record(run, i)) for i in range(SAVED)]
    durable, plain = [], []
    log = Appender(place / "durable.jsonl")
    with open(place / "plain.jsonl", "ab", buffering=0) as file:
        for line in lines:
            begin = time.perf_counter()
            log.append(line)
            durable.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            file.write(line)
            plain.append(time.perf_counter() - begin)
    log.close()
    ours, theirs = (1000 * statistics.median(times) for times in (durable, plain))
    return Row("one durable append", "without fsync", ours, theirs, "ms", note=f"median of {SAVED}")


def main() -> None:
    os.sync()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*logs(Path(folder)), appends(Path(folder))]
    write("survival", "What it costs that records survive", rows, ABOUT)


if __name__ == "__main__":
    main()
