"""Measuring side by side: calls take turns, the median of each counts, CPU seconds because machines are shared."""

import csv
import io
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import door, provenance

OUT = Path(__file__).parents[2] / "reports" / "perf"


@dataclass(frozen=True)
class Row:
    """One line of a table: ours against a peer's, in `unit`; `ratio` is peer / ours, so that more is better."""

    what: str
    peer: str
    ours: float
    peers: float | None  # None: the peer failed here
    unit: str
    goal: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.peers is None else self.peers / self.ours


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


def write(name: str, title: str, rows: list[Row]) -> None:
    """reports/perf/<name>.md and .csv, and the table on stdout."""
    made = provenance.machine()
    versions = {k: v for k, v in provenance.packages().items() if v}
    lines = [
        f"# {title}",
        "",
        "| what | peer | ours | peer's | unit | peer / ours | goal | note |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | --- |",
    ]
    for row in rows:
        peers, ratio = (f"{row.peers:.4g}", f"{row.ratio:.3g}") if row.peers is not None else ("failed", "")
        cells = [row.what, row.peer, f"{row.ours:.4g}", peers, row.unit, ratio, row.goal, row.note]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{made['cpu']}, {made['cores']} cores, load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}; "
        + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
    ]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*Row.__dataclass_fields__, "ratio"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "ratio": row.ratio})
    door.make_folder(OUT)
    door.replace(OUT / f"{name}.md", "\n".join(lines).encode())
    door.replace(OUT / f"{name}.csv", table.getvalue().encode())
    print("\n".join(lines), flush=True)
