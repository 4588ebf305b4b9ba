"""Workers that die, hang, flood, come twice or differ, in processes and on a Ray cluster: only their units are lost."""

import contextlib
import importlib.util
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toys
from test_engine import children, outcome, run_to_the_end, the_run
from toys import Drawing, Painter

from bench import Store, execute
from bench.config import How
from bench.execution import LEAST_FAILURES, Observer
from bench.types import Error
from bench.worker import Worker

TOYS = str(Path(toys.__file__).resolve())
DEADLY = {
    "exits": "exit 7",
    "killed": "signal 9",
    "segfault": "signal 11",
    "overflows": "signal 11",
    "orphans": "exit 7",
}
FAULTS = [*DEADLY, "hangs", "floods"]


def storm(folder, *more, times):
    """One command in which every second unit meets another fault, on two processes; and the marks of the faults."""
    (folder / "marks").mkdir()
    faults = ",".join(f"item-{4 * i + 1:03d}:{fault}" for i, fault in enumerate(FAULTS))
    model = ["--model", f"{TOYS}:Storm", "-m", f"faults={faults}", "-m", f"marks={folder / 'marks'}"]
    num = ["-p", f"num={4 * len(FAULTS)}", "-m", f"times={times}", "--max-failures", "1", "--unit-timeout", "4"]
    return ["score", f"{TOYS}:Drawing", *model, *num, *more]


def shared_memory():
    """Semaphores and segments of multiprocessing that have names."""
    return {p.name for p in Path("/dev/shm").glob("*") if re.match(r"sem\.mp-|psm_|mp-", p.name)}


@pytest.mark.parametrize("times", [0, 1], ids=["every time", "once"])
def test_seven_faults_in_one_run_cost_their_units_alone(tmp_path, tally, times):
    before = shared_memory()
    done = run_to_the_end(tmp_path, *storm(tmp_path, "--devices", "cpu*2", times=times))  # checks that none is left
    seen = {fault: (tmp_path / "marks" / f"item-{4 * i + 1:03d}") for i, fault in enumerate(FAULTS)}
    seen = {fault: path.stat().st_size if path.exists() else 0 for fault, path in seen.items()}
    units = {fault: f"u/{2 * i:03d}" for i, fault in enumerate(FAULTS)}
    run = the_run(tmp_path)
    records = {r.unit: r for r in run.records().values()}
    passed = 0
    for fault, unit in units.items():
        record = records[unit]
        if fault in DEADLY and not times:
            ok = record.error and record.error["kind"] == "WorkerLost" and DEADLY[fault] in record.error["message"]
            passed += bool(ok) and record.attempt == 2 and seen[fault] == 2
        elif fault == "hangs":
            passed += bool(record.error) and record.error["kind"] == "Timeout" and seen[fault] == 1
            assert record.error["message"] == "took longer than 4 s" and record.attempt == 1
        else:
            passed += record.status == "ok" and seen[fault] >= 1
    innocent = [r for u, r in records.items() if u not in units.values()]
    tally("workers lost", passed, sum(map(bool, seen.values())), lost=sum(r.status != "ok" for r in innocent))
    assert passed == len(FAULTS) and len(innocent) == len(FAULTS) and all(r.status == "ok" for r in innocent)
    assert done.code == 3 and "Traceback" not in done.err
    deadline = time.monotonic() + 5
    while shared_memory() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not shared_memory() - before


class Quiet(Observer):
    def say(self, text):
        pass


@pytest.mark.parametrize("devices", ["cpu", "cpu*2"])
def test_failures_beyond_the_limit_stop_the_run_with_both_counts(tmp_path, tally, size, devices):
    """(items that fail, share allowed) -> failures at which it stops; 0: it goes to its end."""
    cases = {("item-0", 0.05): LEAST_FAILURES + 1, ("item-00", 0.2): 9, ("item-00", 0.25): 0}
    chosen = list(cases.items())[: size(3, 3 if devices == "cpu" else 1)]
    passed = 0
    for i, ((at, share), stops) in enumerate(chosen):
        folder = tmp_path / str(i)
        folder.mkdir()
        more = ("-p", "num=40", "-p", "chunk=1", "--max-failures", share, "--devices", devices)
        model = ("--model", f"{TOYS}:Faulty", "-m", "fault=raises", "-m", f"at={at}")
        done = run_to_the_end(folder, "score", f"{TOYS}:Drawing", *model, *more)
        records = list(the_run(folder).records().values())
        failed = sum(r.status == "failed" for r in records)
        if stops:
            says = f"stopped: {failed} of {len(records)} units failed" in done.err
            # what the other process measured meanwhile may be written with it
            passed += done.code == 1 and says and stops <= failed <= stops + 1 and len(records) < 40
        else:
            passed += done.code == 3 and failed == 10 and len(records) == 40
    tally("failures beyond the limit", passed, len(chosen))
    assert passed == len(chosen)


class Replayed:
    """An engine that measures in this process, and delivers what `deliver` makes of the records."""

    def __init__(self, deliver):
        self.deliver = deliver

    @contextlib.contextmanager
    def open(self, work, **live):
        worker = Worker(work, "cpu", **live)

        def measure(units):
            if len(units) == 1:  # nothing to try first
                yield [worker(units[0])]
                return
            yield from self.deliver([worker(unit) for unit in units])

        yield measure


def lost(record):
    error = {"kind": "WorkerLost", "message": "came after all", "trace": ""}
    return replace(record, status="failed", rows=(), blobs={}, error=error)


DELIVERIES = {
    "twice at once": lambda records: [[r, r] for r in records],
    "twice in a row": lambda records: [[r] for r in records for _ in range(2)],
    "late, after all others": lambda records: [records[1:], [records[0]], [records[1]]],
    "as lost, after it had come": lambda records: [records, [lost(records[0])]],
    "of a unit that nobody asked for": lambda records: [[replace(records[0], key="f" * 32)], records],
}


def measured(folder, deliver=None):
    engine = Replayed(deliver) if deliver else None
    how = How(store=str(folder), devices="cpu", threads=1)
    options = {"store": Store(folder), "how": how, "observer": Quiet(), "engine": engine}
    return execute(Drawing(num=6), Painter(), identity={"name": "painter"}, suite_ref=f"{TOYS}:Drawing", **options)


def test_what_comes_twice_late_or_unasked_is_one_record(tmp_path, tally):
    expected = outcome(measured(tmp_path / "plain"))
    passed = 0
    for i, deliver in enumerate(DELIVERIES.values()):
        run = measured(tmp_path / str(i), deliver)
        lines = run.log().read_bytes().count(b"\n")
        passed += outcome(run) == expected and lines == len(expected) and run.complete()
    tally("deliveries", passed, len(DELIVERIES), false=len(DELIVERIES) - passed)
    assert passed == len(DELIVERIES)


def test_what_other_code_measured_is_refused(tmp_path, tally):
    with pytest.raises(Error, match="was measured with code 0123456789abcdef"):
        measured(tmp_path, lambda records: [records[:1], [replace(records[1], code="0123456789abcdef")]])
    (run,) = Store(tmp_path).runs()
    refused = len(run.records()) == 1
    tally("deliveries", int(refused), 1, false=int(not refused))
    assert refused
    assert measured(tmp_path).complete()


# -- Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: the extra [ray]")
HERE = Path(__file__).parent


@pytest.fixture
def ray_environment(monkeypatch):
    """Ray's files in a folder of their own with a short name, its token not in the user's home, its workers on our
    path; nothing is sent anywhere."""
    folder = tempfile.mkdtemp(prefix="ray")
    settings = {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "BENCH_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    shutil.rmtree(folder, ignore_errors=True)


def python(folder, code, *arguments, **more):
    """Starts Python in a folder and a session of its own; its stdout and stderr go to `.out` and `.err`."""
    with open(folder / ".out", "w") as out, open(folder / ".err", "w") as err:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, start_new_session=True, **more)


def on_ray(folder, ray, *more, model=("Painter",), num=40):
    """The command of one run over two actors, without its end."""
    name, *arguments = model
    given = [part for argument in arguments for part in ("-m", argument)]
    command = ["score", f"{TOYS}:Drawing", "--model", f"{TOYS}:{name}", *given, "-p", f"num={num}", *more]
    code = "import sys; from bench.cli import main; sys.exit(main(sys.argv[1:]))"
    return python(folder, code, *command, "--engine", "ray", "--ray", ray, "--devices", "cpu*2", "--max-failures", "1")


def ended(folder, process, seconds=300):
    code = process.wait(seconds)
    return toys.Done(code, (folder / ".out").read_text(), (folder / ".err").read_text())


def in_one_process(folder, num):
    """What the run gives with one worker of this machine."""
    folder.mkdir()
    done = run_to_the_end(folder, "score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Painter", "-p", f"num={num}")
    assert done.code == 0, done.err
    return the_run(folder)


def whole(run):
    """Unit -> all that its record says, but for the times, the tries, and the key, which holds the model's name."""
    found = {}
    for record in run.records().values():
        assert record.status == "ok", record.error
        found[record.unit] = replace(record, seconds=0.0, started="", attempt=1, key="")
    return found


BOTH_WAYS = f"""
import sys
import ray
from bench import Store, execute
from bench.cli import main
from bench.config import How
from bench.ray_engine import RayEngine
sys.path.insert(0, {str(Path(TOYS).parent)!r})
from toys import Drawing
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
store, *command = sys.argv[1:]
code = main(command)
options = dict(suite_ref={TOYS!r} + ":Drawing", store=Store(store), how=How(store=store, threads=1))
execute(Drawing(num=40), {TOYS!r} + ":Painter", engine=RayEngine(("cpu", "cpu"), shared=False), **options)
sys.exit(code)
"""


@needs_ray
def test_two_ray_workers_give_the_records_of_one_process(tmp_path, ray_environment, tally):
    """Where they write blobs themselves, one being killed on the way, and where blobs come through Ray."""
    expected = in_one_process(tmp_path / "one", 40)
    (tmp_path / "marks").mkdir()
    model = ["--model", f"{TOYS}:Storm", "-m", "faults=item-013:killed", "-m", f"marks={tmp_path / 'marks'}"]
    score = [
        "score",
        f"{TOYS}:Drawing",
        *model,
        "-m",
        "times=1",
        "-p",
        "num=40",
        "--engine",
        "ray",
        "--devices",
        "cpu*2",
    ]
    done = ended(tmp_path, python(tmp_path, BOTH_WAYS, "carried", *score))
    assert done.code == 0, done.err
    killed, (carried,) = the_run(tmp_path), Store(tmp_path / "carried").runs()
    fired = (tmp_path / "marks" / "item-013").stat().st_size == 1
    same = whole(killed) == whole(expected) == whole(carried)
    tally("workers lost on Ray", int(same), int(fired), false=int(not same))
    assert fired and same and "attempt=2" in str(killed.records())
    assert carried.records().keys() == expected.records().keys()
    assert (carried.path / "scores.csv").read_bytes() == (expected.path / "scores.csv").read_bytes()
    for record in carried.records().values():
        for address in record.blobs.values():
            assert carried.store.get(address) == expected.store.get(address)
    assert "Traceback" not in done.err and "\x1b" not in done.err and "raylet" not in done.out


@contextlib.contextmanager
def cluster(nodes, megabytes):
    """The address of a cluster of this machine, and a function that says what is to happen to it."""
    command = [sys.executable, str(HERE / "ray_cluster.py"), str(nodes), str(megabytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    for _ in range(5):  # Ray gives a node 30 s to start, which a busy machine does not always keep
        process = subprocess.Popen(command, **pipes)
        address = process.stdout.readline().strip()
        if address:
            break
        end(process)
    assert address, "the cluster did not start"

    def tell(word):
        process.stdin.write(word + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        yield address, tell
    finally:
        process.stdin.close()
        end(process)


def end(process):
    """Waits a while, then kills all that is left of the session of a process."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    for pid in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lines_of(folder):
    return sum(p.read_bytes().count(b"\n") for p in folder.glob(".bench/runs/*/units.jsonl"))


def wait_for_lines(folder, count, process, seconds=300):
    deadline = time.monotonic() + seconds
    while lines_of(folder) < count:
        assert process.poll() is None and time.monotonic() < deadline, (folder / ".err").read_text()
        time.sleep(0.02)


@needs_ray
@pytest.mark.full
def test_actors_drivers_and_raylets_that_die(tmp_path, ray_environment, tally, size):
    """Five of each: an actor is killed by what it draws, the driver is killed, the raylet under an actor is killed."""
    expected = whole(in_one_process(tmp_path / "one", 40))
    seed = 0
    print("seed", seed)
    rng = random.Random(seed)
    passed = fired = 0
    with cluster(2, 80) as (address, tell):
        for i, kind in enumerate(k for k in ("actor", "driver", "raylet") for _ in range(size(5, 1))):
            folder = tmp_path / str(i)
            folder.mkdir()
            if kind == "actor":
                (folder / "marks").mkdir()
                faults = f"faults=item-{rng.randrange(40):03d}:{('killed', 'segfault', 'exits')[i % 3]}"
                done = ended(
                    folder, on_ray(folder, address, model=("Storm", faults, f"marks={folder}/marks", "times=1"))
                )
                fired += any((folder / "marks").iterdir())
            else:
                slow = ("-p", "pause=0.2")
                process = on_ray(folder, address, *slow)
                wait_for_lines(folder, rng.randrange(1, 12), process)
                if kind == "raylet":
                    fired += tell("kill") == "killed"
                    done = ended(folder, process)
                    tell("add")
                else:
                    process.kill()
                    process.wait()
                    fired += 1
                    before = lines_of(folder)
                    done = ended(folder, on_ray(folder, address, *slow))
                    assert lines_of(folder) == 20 >= before > 0
            found = whole(the_run(folder))
            passed += done.code == 0 and found == expected
            print(i, kind, done.code, found == expected)
    tally("workers lost on Ray", passed, fired, false=fired - passed)
    assert passed == fired == 3 * size(5, 1)


BIG = f"""
import sys
from bench import Store, execute
from bench.config import How
from bench.ray_engine import RayEngine
sys.path.insert(0, {str(Path(TOYS).parent)!r})
from toys import Drawing
address, store, chunk, num = sys.argv[1:]
how = How(store=store, threads=1, batch=1)
options = dict(suite_ref={TOYS!r} + ":Drawing", store=Store(store), how=how)
engine = RayEngine(("cpu", "cpu"), address, shared=False)
execute(Drawing(num=int(num), chunk=int(chunk)), {TOYS!r} + ":Large", engine=engine, **options)
"""


@needs_ray
@pytest.mark.full
def test_blobs_that_overflow_the_object_store_arrive(tmp_path, ray_environment, tally, size):
    """Units of 28 to 140 MB of pictures, two at a time, through stores of 80 MB."""
    passed = 0
    sizes = [8, 2, 4, 6, 10][: size(5, 1)]
    with cluster(2, 80) as (address, _):
        for chunk in sizes:
            store = tmp_path / str(chunk)
            done = ended(tmp_path, python(tmp_path, BIG, address, store, chunk, 2 * chunk), 300)
            assert done.code == 0, done.err
            (run,) = Store(store).runs()
            addresses = {a for r in run.records().values() for a in r.blobs.values()}
            megabytes = sum(len(run.store.get(a)) for a in addresses) / 1e6
            print(chunk, round(megabytes), "MB")
            passed += run.complete() and len(addresses) >= 2 * chunk and megabytes > 13 * 2 * chunk
    tally("workers lost on Ray", passed, len(sizes), lost=len(sizes) - passed)
    assert passed == len(sizes)
