"""Engines: where workers live. LocalEngine is a loop in this process, or one spawned process per device."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any, Protocol, TypeAlias

from bench.identity import unit_key
from bench.types import Error, Record, Stop, Unit
from bench.worker import Work, Worker, settings

TRIES = 2  # of a unit whose worker died
LEAST_TIMEOUT = 600.0  # seconds
MEDIANS = 10


Measure: TypeAlias = Callable[[Sequence[Unit]], Iterator[Record]]


class Engine(Protocol):
    def open(self, work: Work, **live: Any) -> AbstractContextManager[Measure]:
        """Workers with their model open; what they measure comes in any order."""


@dataclass(frozen=True)
class LocalEngine:
    """One worker in this process, or one process per device.

    Processes survive what a model does to them: a worker that dies is replaced and its unit tried once more, then
    recorded as WorkerLost; a unit that outlives its time limit is recorded as Timeout.
    """

    devices: tuple[str, ...] = ("cpu",)
    processes: bool = False

    @contextlib.contextmanager
    def open(self, work: Work, **live: Any) -> Iterator[Measure]:
        """Raises Error when the model cannot be opened: that stops the run and blames no unit.

        `live` objects (suite, model, manifest) stand in for names where the worker lives in this process.
        """
        if not (self.processes or len(self.devices) > 1):
            with settings(work.how, self.devices[0]):
                worker = Worker(work, self.devices[0], **live)
                yield lambda units: (worker(unit) for unit in units)
            return
        if live.get("model") is not None:
            raise Error("a live model runs in this process only", hint="name the model instead, or use one device")
        workers = [_Process(work, device) for device in self.devices]
        try:
            for worker in workers:
                worker.ready()
            yield lambda units: self._spread(work, workers, units)
        finally:
            for worker in workers:
                worker.close()

    def _spread(self, work: Work, workers: list[_Process], units: Sequence[Unit]) -> Iterator[Record]:
        waiting = deque((unit, 1) for unit in units)
        seconds: list[float] = []
        while waiting or any(w.unit for w in workers):
            for i, worker in enumerate(workers):
                if worker.unit is None and waiting:
                    if worker.dead():
                        workers[i] = worker = worker.replace()
                    worker.give(*waiting.popleft())
            limit = work.how.unit_timeout or max(LEAST_TIMEOUT, MEDIANS * statistics.median(seconds or [0.0]))
            busy = [w for w in workers if w.unit]
            left = min(w.since + limit for w in busy) - time.monotonic()
            connection.wait([w.pipe for w in busy], timeout=max(0.0, left))
            for worker in busy:
                record = worker.take()
                if record is None and worker.dead():
                    if worker.attempt < TRIES:
                        waiting.appendleft((worker.unit, worker.attempt + 1))
                        worker.unit = None
                    else:
                        died = f"the worker died ({worker.why()}) {worker.attempt} times"
                        record = worker.lost(work, "WorkerLost", died)
                elif record is None and time.monotonic() - worker.since > limit:
                    record = worker.lost(work, "Timeout", f"took longer than {limit:g} s")
                if record is not None:
                    seconds.append(record.seconds)
                    worker.unit = None
                    yield record


class _Process:
    """A spawned worker and our end of its pipe."""

    def __init__(self, work: Work, device: str):
        self.work, self.device = work, device
        self.unit: Unit | None = None
        self.attempt, self.since = 0, 0.0
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(work, device, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Waits until the model is open; raises Error with its reason when it cannot be."""
        try:
            kind, payload = self.pipe.recv()
        except EOFError:
            self.process.join(5)
            raise Error(f"the worker died while it opened the model ({self.why()})") from None
        if kind == "error":
            raise Error(*payload)

    def give(self, unit: Unit, attempt: int) -> None:
        self.unit, self.attempt, self.since = unit, attempt, time.monotonic()
        with contextlib.suppress(OSError):  # found dead when its answer is taken
            self.pipe.send((unit, attempt))

    def take(self) -> Record | None:
        """The record of the unit in hand, if it has come."""
        try:
            if not self.pipe.poll():
                return None
            kind, payload = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return None
        if kind == "stop":
            raise Stop(*payload)
        return payload

    def lost(self, work: Work, kind: str, message: str) -> Record:
        assert self.unit
        self.kill()
        return Record(
            key=unit_key(work.spec_digest, self.unit.id, self.unit.items, self.unit.params),
            unit=self.unit.id,
            status="failed",
            error={"kind": kind, "message": message, "trace": ""},
            attempt=self.attempt,
            seconds=round(time.monotonic() - self.since, 3),
            device=self.device,
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def dead(self) -> bool:
        return not self.process.is_alive()

    def why(self) -> str:
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit {code}"

    def replace(self) -> _Process:
        """A new process in the place of a dead one, its model open."""
        self.close()
        new = _Process(self.work, self.device)
        new.ready()
        return new

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.close()
        self.process.join(0.2)
        if self.process.is_alive():
            self.kill()


def _serve(work: Work, device: str, pipe: Any) -> None:
    """The worker's process: opens the model, says so, then answers units until the pipe closes."""
    import signal
    import threading
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what an interrupt means
    os.dup2(2, 1)  # stdout carries the driver's data only
    parent = parent_process()

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)  # a worker does not outlive its driver

    threading.Thread(target=follow, daemon=True).start()
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(settings(work.how, device))
        worker = Worker(work, device)
    except Error as e:
        pipe.send(("error", (str(e), e.hint)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            unit, attempt = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("record", worker(unit, attempt))
        except Stop as e:
            answer = ("stop", (str(e), e.hint))
        sys.stderr.flush()
        try:
            pipe.send(answer)
        except OSError:
            return  # the driver has ended
