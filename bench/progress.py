"""Progress on stderr: a bar where there is a terminal, a line at the ends where there is none."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process
from typing import Any

from bench.execution import Observer
from bench.show import counted
from bench.store import Run
from bench.text import duration, plain, say
from bench.types import Record, Stop, Unit


class Bar(Observer):
    """The observer of a run: what is pending, how fast it goes, what failed, what continues it after an interrupt."""

    def __init__(self, again: str):
        self.again = again
        self.progress: Any = None
        self.run: Run | None = None
        self.items = self.failed = self.saved = 0

    def __enter__(self) -> Bar:
        return self

    def begin(self, run: Run, units: Sequence[Unit], pending: Sequence[Unit]) -> None:
        self.run, self.begun = run, time.monotonic()
        failed = len(run.failures())
        items = sum(len(u.items) for u in units)
        clusters = next(
            (f" in {counted(m['clusters'], 'cluster')}" for m in run.meta["manifests"] if m["clusters"] < m["items"]),
            "",
        )
        done = len(units) - len(pending)
        again = f", {failed} to retry" if failed else ""
        self.say(f"{run.id}   {counted(len(units), 'unit')}, {counted(items, 'item')}{clusters}, {done:,} done{again}")
        if pending and sys.stderr.isatty() and parent_process() is None:  # processes would draw over each other
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            text = "{task.completed}/{task.total} units   {task.fields[note]}"
            self.progress = Progress(BarColumn(), TextColumn(text), console=Console(stderr=True), transient=True)
            self.task = self.progress.add_task("", total=len(pending), note="")
            self.cost_left = sum(u.cost for u in pending)
            self.cost_done = 0.0
            self.progress.start()

    def done(self, unit: Unit, record: Record) -> None:
        self.items += len(unit.items)
        self.saved += record.status == "ok"
        self.failed += record.status == "failed"
        if record.status == "failed" and record.error:
            hint = f"; {record.error['hint']}" if record.error.get("hint") else ""
            self.say(f"{unit.id} failed: {record.error['kind']}: {record.error['message'][:200]}{hint}")
        if self.progress:
            spent = time.monotonic() - self.begun
            self.cost_done += unit.cost
            left = max(0.0, self.cost_left - self.cost_done) * spent / self.cost_done
            failed = f"   {self.failed} failed" if self.failed else ""
            note = f"{self.items:,} items   {self.items / max(spent, 1e-9):.1f}/s{failed}   left {duration(left)}"
            self.progress.update(self.task, advance=1, note=note)

    def say(self, text: str) -> None:
        say(text)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self.progress:
            self.progress.stop()
        if kind is None or (issubclass(kind, Exception) and not issubclass(kind, Stop)):
            return
        saved = f"{counted(self.saved, 'unit')} saved" if self.run else "nothing was measured yet"
        self.say(f"{'stopped' if issubclass(kind, Stop) else 'interrupted'}. {saved}")
        self.say(f"continue with:\n  {self.again}")


class TrainingBar:
    """The bar of a training: steps, the loss, the time left."""

    def __init__(self, recipe: Any, out: str):
        self.total, self.out, self.progress = recipe.total, out, None
        self.first: int | None = None
        self.said = time.monotonic()

    def __enter__(self) -> TrainingBar:
        self.begun = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            text = TextColumn("{task.completed}/{task.total} steps   {task.fields[note]}", markup=False)
            self.progress = Progress(BarColumn(), text, console=Console(stderr=True), transient=True)
            self.task = self.progress.add_task("", total=self.total, note="")
            self.progress.start()
        return self

    def step(self, step: int, losses: Any) -> None:
        """Told after each step: the number of steps done and the losses of the last."""
        self.first = step - 1 if self.first is None else self.first
        spent = time.monotonic() - self.begun
        left = duration((self.total - step) * spent / max(1, step - self.first))
        note = "   ".join(f"{plain(k)} {v:.4g}" for k, v in losses.items() if v is not None) + f"   left {left}"
        if self.progress:
            self.progress.update(self.task, completed=step, note=note)
        elif time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            print(f"{step}/{self.total} steps   {note}", file=sys.stderr)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self.progress:
            self.progress.stop()
        if kind is not None and not issubclass(kind, Exception):
            print("interrupted. The same command continues.", file=sys.stderr)


@contextlib.contextmanager
def transfer(name: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A callback (bytes done, bytes in all or None) that draws a bar; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    text = TextColumn("{task.description}", markup=False)
    bar = Progress(text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True))
    with bar:
        task = bar.add_task(plain(name), total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)
