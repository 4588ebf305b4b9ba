"""Engines: where workers live, and the one loop that hands units to them and takes their records.

LocalEngine is a worker in this process, or one spawned process per device; bench/ray_engine.py has actors of a Ray
cluster. Both serve the same loop, so time-outs, second tries and what a death costs are the same.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any, Protocol, TypeAlias

from bench.identity import unit_key
from bench.models import settings
from bench.text import say
from bench.types import Error, Record, Stop, Unit
from bench.worker import Work, Worker, utc

TRIES = 2  # of a unit whose worker died
MEDIANS = 10
RECENT = 101  # units whose median decides a time limit
OPEN_TIMEOUT = 1800.0  # seconds in which a model must be open
LONGEST_WAIT = 3600.0  # seconds
GRACE = 0.5  # seconds in which idle workers may end by themselves

Measure: TypeAlias = Callable[[Sequence[Unit]], Iterator[list[Record]]]


class Engine(Protocol):
    def open(self, work: Work, **live: Any) -> AbstractContextManager[Measure]:
        """Workers with their model open. What they measure comes in any order, in groups that were ready together."""


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
                yield lambda units: ([worker(unit)] for unit in units)
            return
        if live.get("model") is not None:
            raise Error("a live model runs in this process only", hint="name the model instead, or use one device")
        with Crew(work, _wait_for_processes) as crew:
            for device in self.devices:
                crew.add(_Process(work, device))
            crew.gather(len(self.devices))
            yield crew.measure


class Gone(Exception):
    """A worker is no more; says why."""


class Handle(ABC):
    """The driver's end of one worker, wherever that lives, and the unit in its hands."""

    unit: Unit | None = None
    attempt = 0

    def __init__(self, work: Work, device: str):
        self.work, self.device, self.since = work, device, time.monotonic()

    def give(self, unit: Unit, attempt: int) -> None:
        self.unit, self.attempt, self.since = unit, attempt, time.monotonic()
        self.send(unit, attempt)

    @abstractmethod
    def start(self) -> None:
        """Makes the worker; it opens the model and says ("ready", None) or ("error", (text, hint))."""

    @abstractmethod
    def send(self, unit: Unit, attempt: int) -> None: ...

    @abstractmethod
    def hear(self) -> tuple[str, Any] | None:
        """What it said, after a unit ("record", Record) or ("stop", (text, hint)); None: nothing yet. Raises Gone."""

    @abstractmethod
    def again(self) -> Handle:
        """Another worker to take its place, not yet started."""

    @abstractmethod
    def dismiss(self) -> None:
        """Asks an idle worker to end by itself."""

    @abstractmethod
    def kill(self, grace: float = 0.0) -> None:
        """Ends it and what it started, at the latest after so many seconds; harmless when it has ended."""


class Crew:
    """The workers of a run by what they are doing, and the loop over them."""

    def __init__(self, work: Work, wait: Callable[[Sequence[Handle], float], Iterable[Handle]]):
        self.work, self.wait = work, wait
        self.opening: dict[Handle, None] = {}
        self.idle: list[Handle] = []
        self.busy: dict[Handle, None] = {}
        self.vacant: list[Handle] = []  # gone; replaced when there is something to do
        self.again: deque[tuple[Unit, int]] = deque()  # units whose worker died
        self.rates: deque[float] = deque(maxlen=RECENT)  # seconds of a unit by its cost
        self.rate = 0.0  # their median
        self.refused: Error | None = None  # why a worker was left out
        self.look = math.inf  # when the first of them may be overdue

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for handle in self.idle:
            handle.dismiss()
        until = time.monotonic() + (GRACE if kind is None else 0.0)
        for handle in self.idle:
            handle.kill(max(0.0, until - time.monotonic()))
        for handle in [*self.opening, *self.busy]:
            handle.kill()

    def add(self, handle: Handle) -> None:
        self.opening[handle] = None
        self.look = min(self.look, handle.since + OPEN_TIMEOUT)
        handle.start()

    def gather(self, count: int) -> None:
        """Waits until so many workers have the model open; raises Error with the reason of the first that cannot."""
        while len(self.idle) < count:
            for handle in self.wait(list(self.opening), self._patience()):
                self._hear(handle)
            self._overdue()
            if self.refused and len(self.idle) + len(self.opening) < count:
                raise self.refused

    def measure(self, units: Sequence[Unit]) -> Iterator[list[Record]]:
        """The records of units, in groups that were ready together. A group is taken before new units are given out."""
        fresh = iter(units)
        left = len(units)
        while left:
            waiting = left - len(self.busy)
            while self.idle and waiting:
                handle = self.idle.pop()
                handle.give(*(self.again.popleft() if self.again else (next(fresh), 1)))
                self.busy[handle] = None
                self.look = min(self.look, handle.since + self._limit(handle.unit))
                waiting -= 1
            while self.vacant and waiting > len(self.opening):
                self.add(self.vacant.pop().again())
            heard = [self._hear(h) for h in self.wait([*self.opening, *self.busy], self._patience())]
            records = [r for r in [*heard, *self._overdue()] if r is not None]
            left -= len(records)
            if records:
                self.rate = statistics.median(self.rates or [0.0])
                yield records

    def _hear(self, handle: Handle) -> Record | None:
        """The record of the unit in hand, if that is what has come."""
        try:
            said = handle.hear()
        except Gone as e:
            return self._bury(handle, str(e))
        if said is None:
            return None
        kind, payload = said
        if kind == "stop":
            raise Stop(*payload)
        if kind == "error":
            self._leave_out(handle, Error(*payload))
            return None
        self.opening.pop(handle, None)
        self.busy.pop(handle, None)
        self.idle.append(handle)
        if kind == "ready":
            return None
        if payload.status == "ok":
            self.rates.append(payload.seconds / max(handle.unit.cost, 1e-9))
        handle.unit = None
        return payload

    def _bury(self, handle: Handle, why: str) -> Record | None:
        """A worker died: its unit is tried again, or recorded as lost with it."""
        if handle in self.opening:
            self._leave_out(handle, Error(f"the worker died while it opened the model ({why})"))
            return None
        self._vacate(handle)
        if handle.attempt < TRIES:
            self.again.append((handle.unit, handle.attempt + 1))
            return None
        return self._lost(handle, "WorkerLost", f"the worker died ({why}) {handle.attempt} times")

    def _vacate(self, handle: Handle) -> None:
        handle.kill()
        del self.busy[handle]
        self.vacant.append(handle)

    def _leave_out(self, handle: Handle, error: Error) -> None:
        """A worker that cannot open the model: the run goes on without it where others can."""
        handle.kill()
        del self.opening[handle]
        self.refused = error
        if not (self.idle or self.busy):
            raise error
        say(f"one worker less: {error}")

    def _overdue(self) -> list[Record]:
        """Kills the workers that have outlived their time; the records of their units."""
        now = time.monotonic()
        if now < self.look:
            return []
        records = []
        for handle in [h for h in self.opening if now - h.since > OPEN_TIMEOUT]:
            self._hear(handle)  # the driver itself may have been held up: what was said in time counts
            if handle in self.opening:
                self._leave_out(handle, Error(f"a worker did not open the model in {OPEN_TIMEOUT:g} s"))
        for handle in [h for h in self.busy if now - h.since > self._limit(h.unit)]:
            record = self._hear(handle)
            if handle not in self.busy:
                records += [record] if record else []
                continue
            limit = self._limit(handle.unit)
            self._vacate(handle)
            hint = f"--unit-timeout {4 * limit:.0f} allows more" if not self.work.how.unit_timeout else ""
            records.append(self._lost(handle, "Timeout", f"took longer than {limit:g} s", hint))
        ends = [h.since + OPEN_TIMEOUT for h in self.opening]
        ends += [h.since + self._limit(h.unit) for h in self.busy]
        self.look = min(ends, default=math.inf)
        return records

    def _patience(self) -> float:
        """Seconds in which no worker is overdue."""
        return min(max(0.0, self.look - time.monotonic()), LONGEST_WAIT)

    def _limit(self, unit: Unit) -> float:
        if self.work.how.unit_timeout:
            return self.work.how.unit_timeout
        return max(self.work.patience, MEDIANS * self.rate * unit.cost)

    def _lost(self, handle: Handle, kind: str, message: str, hint: str = "") -> Record:
        unit = handle.unit
        return Record(
            key=unit_key(self.work.spec_digest, unit.id, unit.items, unit.params),
            unit=unit.id,
            status="failed",
            error={"kind": kind, "message": message, "trace": "", **({"hint": hint} if hint else {})},
            attempt=handle.attempt,
            seconds=round(time.monotonic() - handle.since, 3),
            device=handle.device,
            started=utc(),
        )


class _Process(Handle):
    """A spawned process, our end of its pipe, and a descriptor that tells its end.

    The pipe alone would not: what the worker itself started may hold the other end open.
    """

    pipe: Any = None

    def start(self) -> None:
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(self.work, self.device, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.ended = os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):
            self.ended = self.process.sentinel

    def send(self, unit: Unit, attempt: int) -> None:
        with contextlib.suppress(OSError):  # found dead when its answer is awaited
            self.pipe.send((unit, attempt))

    def hear(self) -> tuple[str, Any] | None:
        try:
            if self.pipe.poll():
                return self.pipe.recv()
            if not connection.wait([self.ended], 0):
                return None
        except (EOFError, OSError):
            pass
        self._wait(5)
        code = self.process.exitcode
        raise Gone(f"signal {-code}" if code is not None and code < 0 else f"exit {code}")

    def _wait(self, seconds: float) -> None:
        """Until it has ended. `join` would wait for all that holds a descriptor of it, which a grandchild may do."""
        connection.wait([self.ended], seconds)
        _ = self.process.exitcode  # takes note of it, so that no zombie stays

    def again(self) -> _Process:
        return _Process(self.work, self.device)

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)

    def kill(self, grace: float = 0.0) -> None:
        if self.pipe.closed:
            return
        self._wait(grace)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it started
        self.process.kill()
        self._wait(10)
        self.pipe.close()
        if self.ended != self.process.sentinel:
            os.close(self.ended)


def _wait_for_processes(handles: Sequence[_Process], seconds: float) -> Iterable[_Process]:
    """Those that have something to say, or have ended."""
    of = {thing: handle for handle in handles for thing in (handle.pipe, handle.ended)}
    return dict.fromkeys(of[thing] for thing in connection.wait(list(of), seconds))


def _serve(work: Work, device: str, pipe: Any) -> None:
    """The worker's process: opens the model, says so, then answers units until it is told to end."""
    import threading
    from multiprocessing import current_process, parent_process

    os.setpgid(0, 0)  # a group of its own, so that what a model starts ends with it
    current_process().daemon = False  # a model may start processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what an interrupt means
    os.dup2(2, 1)  # stdout carries the driver's data only
    parent = parent_process()

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)  # a worker does not outlive its driver

    threading.Thread(target=follow, daemon=True).start()
    with contextlib.ExitStack() as stack:
        worker, answer = opened(work, device, stack)
        while True:
            sys.stderr.flush()
            try:
                pipe.send(answer)
                task = pipe.recv() if worker else None
            except (OSError, EOFError):
                return  # the driver has ended
            if task is None:
                return
            answer = answer_to(worker, *task)


def opened(work: Work, device: str, stack: contextlib.ExitStack) -> tuple[Worker | None, tuple[str, Any]]:
    """A worker in this process, and what it says of itself."""
    try:
        stack.enter_context(settings(work.how, device))
        return Worker(work, device), ("ready", None)
    except Error as e:
        return None, ("error", (str(e), e.hint))


def answer_to(worker: Worker, unit: Unit, attempt: int) -> tuple[str, Any]:
    """What a worker says after a unit."""
    try:
        return "record", worker(unit, attempt)
    except Stop as e:
        return "stop", (str(e), e.hint)
