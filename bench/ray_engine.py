"""RayEngine: the workers are actors of a Ray cluster. No disk has to be shared, and the driver alone appends.

Ray is an extra (`pip install 'touchstone-bench[ray]'`) and is imported when a run with this engine begins.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import door
from bench.config import bind
from bench.engine import Crew, Gone, Handle, Measure, answer_to, opened
from bench.identity import digest
from bench.store import Store
from bench.text import say
from bench.types import Error, Json, Unit
from bench.worker import Work

LONGEST_WAIT = 10.0  # seconds, in which Ray hears no signal


@dataclass(frozen=True)
class RayEngine:
    """One actor for each device: `cuda` gets a GPU of its own, `cpu` as many CPUs as a worker has threads.

    A dead actor is replaced, on another machine where its own is lost; the rest is as with the local engine. Blobs
    are written by the worker where it sees the driver's store, else they come to the driver with the record.
    """

    devices: tuple[str, ...] = ()  # none: every GPU of the cluster, else its CPUs
    address: str = ""  # "": RAY_ADDRESS, else a cluster on this machine, else one that is started and ended
    shared: bool | None = None  # do workers see the driver's store? None: each finds out

    @contextlib.contextmanager
    def open(self, work: Work, **live: Any) -> Iterator[Measure]:
        """Raises Error when no cluster answers, and when the model cannot be opened: that blames no unit."""
        if live.get("model") is not None:
            raise Error("a live model runs in this process only", hint="name the model instead, or use one device")
        work = replace(work, how=replace(work.how, store=str(Path(work.how.store).absolute())))
        store = Store(work.how.store)
        with _connected(self.address) as ray, _mark(store.root, self.shared) as mark:
            devices = self.devices or _devices_of(ray, work.how.threads)
            _tell_what_is_missing(ray, devices, work.how.threads)
            with Crew(work, _wait_for_actors) as crew:
                for device in devices:
                    crew.add(_Actor(work, device, ray, store, mark))
                crew.gather(1)  # the others join when they are ready
                yield crew.measure


class _Actor(Handle):
    """An actor, and the answer that is awaited of it."""

    actor: Any = None

    def __init__(self, work: Work, device: str, ray: ModuleType, store: Store, mark: str):
        super().__init__(work, device)
        self.ray, self.store, self.mark = ray, store, mark

    def start(self) -> None:
        gpus = int(self.device.startswith("cuda"))
        needs = {"num_gpus": gpus, "num_cpus": 0 if gpus else self.work.how.threads}
        self.actor = self.ray.remote(Actor).options(max_restarts=0, max_task_retries=0, **needs).remote()
        device = "cuda:0" if gpus else self.device  # the actor sees its own GPU alone
        settings = {k: v for k, v in os.environ.items() if k.startswith("BENCH_")}
        self.answer = self.actor.open.remote(self.work, device, self.mark, os.getcwd(), settings)

    def send(self, unit: Unit, attempt: int) -> None:
        self.answer = self.actor.measure.remote(unit, attempt)

    def hear(self) -> tuple[str, Any] | None:
        if not self.ray.wait([self.answer], timeout=0)[0]:
            return None
        try:
            kind, payload, blobs = self.ray.get(self.answer)
        except self.ray.exceptions.RayError as e:
            raise Gone(_why(e)) from None
        for address, data in blobs.items():
            if self.store.put(data, Path(address).suffix) != address:
                raise Gone(f"blob {address} was damaged on its way")
        return kind, payload

    def again(self) -> _Actor:
        return _Actor(self.work, self.device, self.ray, self.store, self.mark)

    def dismiss(self) -> None:
        pass  # it holds nothing that a kill would lose

    def kill(self, grace: float = 0.0) -> None:
        self.answer = None
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.kill(self.actor, no_restart=True)  # so that the memory of its GPU returns


def _wait_for_actors(handles: Sequence[_Actor], seconds: float) -> Iterable[_Actor]:
    """Those whose answer has come to this machine, or whose actor is gone."""
    ray = handles[0].ray
    of = {handle.answer: handle for handle in handles}
    ready, rest = ray.wait(list(of), num_returns=1, timeout=min(seconds, LONGEST_WAIT))
    if ready and rest:
        ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
    return [of[answer] for answer in ready]


class Actor:
    """What runs on the cluster: a worker, opened once. Every method returns (kind, payload, blobs)."""

    def open(
        self, work: Work, device: str, mark: str, folder: str, settings: Mapping[str, str]
    ) -> tuple[str, Any, Mapping[str, bytes]]:
        """Opens the model where this machine would measure what the driver asks for."""
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        if Path(folder).is_dir():
            os.chdir(folder)  # relative names of files mean what they mean to the driver
        try:
            _refuse_other_spec(work)
        except Error as e:
            return "error", (f"{socket.gethostname()}: {e}", e.hint), {}
        self.stack = contextlib.ExitStack()
        self.worker, (kind, payload) = opened(work, device, self.stack)
        if self.worker and not _sees(Path(work.how.store), mark):
            self.worker.store = Carried(work.how.store)
        return kind, payload, {}

    def measure(self, unit: Unit, attempt: int) -> tuple[str, Any, Mapping[str, bytes]]:
        store = self.worker.store
        blobs = {}
        if isinstance(store, Carried):
            store.blobs = blobs
        kind, payload = answer_to(self.worker, unit, attempt)
        named = set(payload.blobs.values()) if kind == "record" else set()
        return kind, payload, {address: data for address, data in blobs.items() if address in named}


class Carried(Store):
    """The store of a worker that does not see the driver's: blobs are held until they go there with the record."""

    blobs: dict[str, bytes]

    def put(self, data: bytes, suffix: str) -> str:
        address = digest(data) + suffix
        self.blobs[address] = data
        return address

    def recall(self, address: str) -> None:
        return None

    def remember(self, address: str, rows: Sequence[Mapping[str, Json]], blobs: Mapping[str, str]) -> None:
        pass


def _refuse_other_spec(work: Work) -> None:
    """Raises Error where the files of this machine make the run another one: its data, weights or judges differ."""
    from bench import registry
    from bench.execution import check_ready
    from bench.prepare import prepare

    store = Store(work.how.store)
    given = {**work.model_what, **work.model_how}
    plan = prepare(
        registry.find("suites", work.suite)(**work.fields),
        work.model,
        bind(registry.find("adapters", work.model), work.model, given, {}, "the driver"),
        store=store,
        suite_ref=work.suite,
        seed=work.seed,
        limit=work.limit,
        strict=work.how.strict,
    )
    other = [name for name, value in work.spec.items() if digest(value) != digest(plan.spec.get(name))]
    if other:
        raise Error(
            f"{', '.join(other)} of the run are not what the driver has",
            hint="the same files on every machine, then the same command again",
        )
    check_ready(plan, store)


def _sees(store: Path, mark: str) -> bool:
    """Is the store of this machine the driver's, and may we write there?"""
    return bool(mark) and (store / mark).is_file() and os.access(store, os.W_OK)


@contextlib.contextmanager
def _mark(store: Path, shared: bool | None) -> Iterator[str]:
    """The name of a file in the store by which a worker knows it; made anew, since a store may have been copied."""
    if shared is False:
        yield ""
        return
    path = door.make_folder(store) / f".driver-{secrets.token_hex(8)}"
    door.replace(path, b"")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[ModuleType]:
    """Ray, connected; a connection that this process has already is used and left."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise Error("the engine ray needs the package ray", hint="pip install 'touchstone-bench[ray]'") from None
    if ray.is_initialized():
        with _silent(ray):
            yield ray
        return
    where = address or os.environ.get("RAY_ADDRESS", "")
    handlers = {n: signal.getsignal(n) for n in door.ENDING}
    try:
        host, colon, port = where.rpartition(":")
        if colon and "/" not in host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or None, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    except Exception as e:  # a node that does not start in time is a bare Exception of Ray's
        raise Error(
            f"no Ray cluster at {where or 'this machine'}: {' '.join(str(e).split())[:200]}",
            hint="ray start --head starts one; --ray ADDRESS names it; --ray local has its own",
        ) from None
    finally:
        _restore(handlers)
    try:
        with _silent(ray):
            yield ray
    finally:
        ray.shutdown()
        _restore(handlers)


@contextlib.contextmanager
def _silent(ray: ModuleType) -> Iterator[None]:
    """Ray would tell of a worker's death in colours, on stdout; the record says it."""
    printer = ray._private.worker
    before = getattr(printer, "_worker_logs_enabled", True)
    printer._worker_logs_enabled = False
    try:
        yield
    finally:
        printer._worker_logs_enabled = before


def _restore(handlers: Mapping[int, Any]) -> None:
    """Ray takes SIGTERM for itself; here a signal ends the run as it always does."""
    with contextlib.suppress(ValueError):  # not the main thread: nothing was taken
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _devices_of(ray: ModuleType, threads: int) -> tuple[str, ...]:
    """Every GPU of the cluster; where it has none, as many workers as its CPUs have threads for."""
    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0))
    return ("cuda",) * gpus or ("cpu",) * max(1, int(has.get("CPU", 0)) // threads)


def _tell_what_is_missing(ray: ModuleType, devices: Sequence[str], threads: int) -> None:
    """Says when the cluster is smaller than what was asked for: it may grow, so that is no error."""
    has = ray.cluster_resources()
    gpus = sum(d.startswith("cuda") for d in devices)
    for name, wanted in (("GPU", gpus), ("CPU", threads * (len(devices) - gpus))):
        if wanted > has.get(name, 0):
            say(f"the Ray cluster has {has.get(name, 0):g} {name} of {wanted} asked for: workers wait for more")


def _why(error: Exception) -> str:
    """What Ray says of a worker's end, in one line."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text
    return f"{type(error).__name__}: {detail.partition('. ')[0][:200]}"
