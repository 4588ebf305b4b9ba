"""Workers in processes: the same records as in this process, and nothing a model does to its process ends the run."""

import os
import time
from pathlib import Path

import pytest
import toys
from toys import Done

from bench import Store
from bench.config import How
from bench.engine import LocalEngine
from bench.types import Error, Record, Unit
from bench.worker import Work

TOYS = str(Path(toys.__file__).resolve())


def score(fault=None, *more, at="item-003", num=8):
    model = ["--model", f"{TOYS}:Faulty", "-m", f"fault={fault}", "-m", f"at={at}"]
    return [
        "score",
        f"{TOYS}:Drawing",
        *(model if fault else ["--model", f"{TOYS}:Painter"]),
        "-p",
        f"num={num}",
        *more,
    ]


def the_run(folder):
    return next(Store(Path(folder) / ".bench").runs())


def children(pid):
    """The processes of a session that still run: workers have process groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def check_nothing_is_left(pid):
    """The resource tracker of multiprocessing ends a moment after its pipe closes."""
    deadline = time.monotonic() + 5
    while children(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children(pid) == []


def run_to_the_end(folder, *argv) -> Done:
    pid = toys.start(folder, *argv)
    done = toys.finish(folder, pid)
    check_nothing_is_left(pid)
    return done


def outcome(run):
    return {r.key: (r.unit, r.status, r.rows, dict(r.blobs)) for r in run.records().values()}


def test_two_processes_measure_what_one_does(tmp_path):
    folders = {}
    for name, more in {"one": (), "two": ("--devices", "cpu,cpu"), "alone": ("--isolate", "--batch", "1")}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        done = run_to_the_end(folders[name], *score(None, *more))
        assert done.code == 0, done.err
    runs = [the_run(f) for f in folders.values()]
    assert outcome(runs[0]) == outcome(runs[1]) == outcome(runs[2])
    assert len({(r.path / "scores.csv").read_bytes() for r in runs}) == 1
    assert len({r.code for run in runs for r in run.records().values()}) == 1


@pytest.mark.parametrize(
    "fault, says", [("exits", "exit 7"), ("killed", "signal 9"), ("segfault", "signal 11")], ids=lambda v: v
)
def test_a_worker_that_dies_is_replaced_its_unit_tried_twice_and_the_others_completed(tmp_path, fault, says):
    done = run_to_the_end(tmp_path, *score(fault))
    assert done.code == 3 and "Traceback" not in done.err
    run = the_run(tmp_path)
    (failure,) = run.failures()
    assert failure.unit == "u/001" and failure.attempt == 2
    assert failure.error["kind"] == "WorkerLost" and failure.error["message"] == f"the worker died ({says}) 2 times"
    assert len(run.table()) == 6 and "1 of 4 units failed" in done.err


def test_two_workers_that_die_in_turn_lose_only_their_units(tmp_path):
    more = ("--devices", "cpu,cpu", "--max-failures", "1", "-p", "chunk=5")
    done = run_to_the_end(tmp_path, *score("exits", *more, at="item-00", num=15))
    run = the_run(tmp_path)
    assert done.code == 3 and {r.unit for r in run.failures()} == {"u/000", "u/001"}
    assert {r.unit for r in run.records().values() if r.status == "ok"} == {"u/002"}


def test_a_unit_that_hangs_is_recorded_as_timeout_and_the_others_are_completed(tmp_path):
    done = run_to_the_end(tmp_path, *score("hangs", "--unit-timeout", "1.5"))
    assert done.code == 3, done.err
    (failure,) = the_run(tmp_path).failures()
    assert (failure.unit, failure.error["kind"], failure.attempt) == ("u/001", "Timeout", 1)
    assert failure.error["message"] == "took longer than 1.5 s" and len(the_run(tmp_path).table()) == 6


def test_a_model_that_cannot_be_opened_stops_the_run_and_blames_no_unit(tmp_path):
    for name, says in {
        "broken_factory": "cannot be opened: OSError: weights are on another planet",
        "dead_factory": "the worker died while it opened the model (exit 9)",
        "wordless_factory": f"suite `drawing` needs TextToImage; `{TOYS}:wordless_factory` has no capability",
    }.items():
        done = run_to_the_end(tmp_path, "score", f"{TOYS}:Drawing", "--model", f"{TOYS}:{name}")
        assert done.code == 1 and says in done.err and "Traceback" not in done.err
        assert not list((tmp_path / ".bench" / "runs").iterdir())


def test_what_a_model_prints_does_not_reach_stdout(tmp_path):
    import json

    done = run_to_the_end(tmp_path, *score("talks", "--json"))
    assert done.code == 0 and "chatter on stdout" in done.err and "chatter on descriptor 1" in done.err
    assert {r["metric"] for r in json.loads(done.out)["rows"]} == {"mean"}


def test_an_adapter_from_a_file_lives_in_a_process_of_its_own_and_a_plain_one_here(tmp_path):
    done = run_to_the_end(tmp_path, *score("stops"))  # sys.exit(0) in the model
    assert done.code == 3 and the_run(tmp_path).failures()[0].error["kind"] == "SystemExit"
    work = Work(f"{TOYS}:Drawing", {}, f"{TOYS}:Painter", how=How(store=str(tmp_path), devices="cpu", threads=1))
    with LocalEngine().open(work) as measure:
        ((record,),) = measure([Unit("u", ("item-001",))])
    assert isinstance(record, Record) and record.status == "ok"


def test_an_engine_with_processes_takes_no_live_model(tmp_path):
    work = Work("x", {}, "x", how=How(store=str(tmp_path), devices="cpu", threads=1))
    with pytest.raises(Error, match="this process only"), LocalEngine(processes=True).open(work, model=object()):
        pass


def test_a_killed_driver_takes_its_workers_along(tmp_path):
    pid = toys.start(tmp_path, *score("hangs", "--devices", "cpu,cpu"))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not list((tmp_path / ".bench").glob("runs/*/units.jsonl")):
        time.sleep(0.05)
    assert len(children(pid)) >= 3
    os.kill(pid, 9)
    toys.finish(tmp_path, pid)
    check_nothing_is_left(pid)
