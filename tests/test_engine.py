"""Workers in processes: the same records as in this process. What they survive is tested in survival/test_engines.py;
here are the loop that all engines share, over workers that are scripts, and which engine is chosen."""

import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toys
from toys import Done

from bench import Store, engine
from bench.config import How
from bench.engine import Crew, Gone, Handle, LocalEngine
from bench.execution import choose_engine, resolve_devices
from bench.prepare import prepare
from bench.ray_engine import RayEngine
from bench.types import Error, Record, Unit, UsageError
from bench.versions import versions_of
from bench.worker import Work, Worker

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


def test_sigterm_ends_the_driver_and_its_workers_within_two_seconds(tmp_path):
    pid = toys.start(tmp_path, *score("hangs", "--devices", "cpu*2"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / ".bench").glob("runs/*/units.jsonl")):
        time.sleep(0.05)
    begin = time.process_time(), time.monotonic()
    os.kill(pid, signal.SIGTERM)
    done = toys.finish(tmp_path, pid)
    assert done.code == 143 and "continue with" in done.err and time.monotonic() - begin[1] < 2
    check_nothing_is_left(pid)


# -- the loop, over workers that are scripts


class Scripted(Handle):
    """Says what the list `script` of its place holds, one thing after another: "ready", "ok", "dies", "silent"."""

    def __init__(self, work, device, script):
        super().__init__(work, device)
        self.script, self.ended = script, False

    def start(self):
        pass

    def send(self, unit, attempt):
        pass

    def hear(self):
        said = self.script.pop(0) if self.script else "ok"
        if said == "dies":
            raise Gone("signal 9")
        if said == "silent":
            self.script.insert(0, said)
            return None
        if said in ("ready", "refuses"):
            return ("ready", None) if said == "ready" else ("error", ("no GPU is free", ""))
        return "record", Record(self.unit.id, self.unit.id, "ok", attempt=self.attempt, seconds=100.0 * self.unit.cost)

    def again(self):
        return Scripted(self.work, self.device, self.script)

    def dismiss(self):
        pass

    def kill(self, grace=0.0):
        self.ended = True


def crew_of(*scripts, **how):
    work = Work("x", {}, "x", how=How(**how))
    crew = Crew(work, lambda handles, seconds: list(handles))
    for script in scripts:
        crew.add(Scripted(work, "cpu", list(script)))
    return crew


def measured(crew, *units):
    with crew:
        crew.gather(1)
        return {r.unit: r for group in crew.measure(units) for r in group}


def units(*costs):
    return [Unit(f"u{i}", (f"i{i}",), cost=cost) for i, cost in enumerate(costs)]


def test_a_unit_whose_worker_died_is_tried_by_another_and_then_lost(capsys):
    found = measured(crew_of(["ready", "dies", "ready"], ["ready", "ok"]), *units(1, 1, 1))
    assert {r.status for r in found.values()} == {"ok"} and sorted(r.attempt for r in found.values()) == [1, 1, 2]
    (lost,) = measured(crew_of(["ready", "dies", "ready", "dies"]), *units(1)).values()
    assert (lost.status, lost.error["kind"], lost.attempt) == ("failed", "WorkerLost", 2)
    assert lost.error["message"] == "the worker died (signal 9) 2 times"


def test_a_worker_that_cannot_be_replaced_is_left_out_and_the_last_one_ends_the_run(capsys):
    found = measured(crew_of(["ready", "dies", "refuses"], ["ready"]), *units(1, 1, 1, 1))
    assert len(found) == 4 and "one worker less: no GPU is free" in capsys.readouterr().err
    with pytest.raises(Error, match="no GPU is free"):
        measured(crew_of(["ready", "dies", "refuses"]), *units(1))
    with pytest.raises(Error, match=r"the worker died while it opened the model \(signal 9\)"):
        measured(crew_of(["dies"]), *units(1))


def test_a_model_that_does_not_open_in_time_stops_the_run(monkeypatch):
    monkeypatch.setattr(engine, "OPEN_TIMEOUT", 0.05)
    with pytest.raises(Error, match=r"a worker did not open the model in 0\.05 s"):
        measured(crew_of(["silent"]), *units(1))


def test_time_limits_follow_the_cost_of_a_unit_and_the_patience_of_the_suite():
    crew = crew_of(["ready"])
    (short, long) = units(1, 60)
    assert crew._limit(long) == 600  # nothing is done yet
    with crew:
        crew.gather(1)
        list(crew.measure([short]))  # in 100 s
        assert crew._limit(short) == 1000 and crew._limit(long) == 60_000
    crew.work = replace(crew.work, patience=86_400.0)
    assert crew._limit(long) == 86_400
    crew.work = replace(crew.work, how=How(unit_timeout=7))
    assert crew._limit(long) == 7
    (late,) = measured(crew_of(["ready", "silent"], unit_timeout=0.05), *units(1)).values()
    assert late.error["kind"] == "Timeout" and late.error["message"] == "took longer than 0.05 s"


def test_an_answer_that_came_while_the_driver_was_held_up_counts():
    crew = crew_of(["ready", "ok"], unit_timeout=0.05)
    with crew:
        crew.gather(1)
        crew.wait = lambda handles, seconds: time.sleep(0.1) or []  # hears nobody until the limit has passed
        ((record,),) = crew.measure(units(1))
    assert record.status == "ok"


# -- which engine


def test_the_engine_is_the_one_that_how_names_and_ray_is_not_imported_for_it(tmp_path):
    plan = prepare(toys.Drawing(), f"{TOYS}:Painter", store=Store(tmp_path), suite_ref=f"{TOYS}:Drawing")
    assert choose_engine(plan, How(devices="cpu")) == LocalEngine(("cpu",), processes=True)  # foreign code
    assert choose_engine(plan, How(devices="cpu*2")) == LocalEngine(("cpu", "cpu"), processes=True)
    assert choose_engine(plan, How(engine="ray", ray="host:1")) == RayEngine((), "host:1")
    assert choose_engine(plan, How(engine="ray", devices="cuda*3")) == RayEngine(("cuda",) * 3)
    for text in ("cpu*", "cpu*0", "cpu*x", "cpu*99999"):
        with pytest.raises(UsageError, match=re.escape(text)):
            resolve_devices(text)


def test_without_the_extra_the_engine_ray_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    work = Work("x", {}, "x", how=How(store=str(tmp_path)))
    with pytest.raises(Error, match="needs the package ray") as caught, RayEngine().open(work):
        pass
    assert "touchstone-bench[ray]" in caught.value.hint


def test_a_worker_of_another_version_refuses(tmp_path):
    how = How(store=str(tmp_path), devices="cpu", threads=1)
    work = Work(f"{TOYS}:Drawing", {}, f"{TOYS}:Painter", how=how, versions=versions_of(toys.Drawing))
    Worker(work, "cpu")
    for name in work.versions:
        other = replace(work, versions={**work.versions, name: "0.0.1"})
        with pytest.raises(Error, match=rf"this worker has {name} .*, its driver 0\.0\.1"):
            Worker(other, "cpu")
