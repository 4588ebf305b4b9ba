"""Killed at any moment, or the power gone: what was reported as saved is there, and the same command ends with the same
bytes as an undisturbed run."""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import faults
import pytest
import toys
from faults import (
    Acks,
    Dead,
    Disk,
    Dying,
    InGroups,
    Recorder,
    Replay,
    Wordy,
    crash_states,
    in_child,
    lay_out,
    lines_of,
    measure,
    outcome,
    the_run,
    truth,
)

from bench import Store
from bench.records import heal, record_line
from bench.reduction import derive
from bench.types import Error

TOYS = str(Path(toys.__file__).resolve())
SUITE = Wordy(num=8)


def whole(folder, suite=SUITE):
    """An undisturbed run: (what its records say, its scores.csv, its records in the order of their units)."""
    run = measure(folder, suite)
    assert run.complete()
    return truth(run), (run.path / "scores.csv").read_bytes(), sorted(run.records().values(), key=lambda r: r.unit)


def harm(folder, acked, true):
    """What a restart must not find: (records lost that were acknowledged, records that nobody measured)."""
    run = the_run(folder)
    found = truth(run) if run else {}
    lost = sum(key not in found for key in acked)
    false = sum(true.get(key) != value for key, value in found.items())
    if run:
        counted = Counter(lines_of(run))
        false += sum(n - 1 for n in counted.values())  # measured twice though it was there
    return lost, false


# -- killed at random moments


class InPieces(Disk):
    """Writes at most 512 bytes at a time, as a slow disk may: a kill falls between two pieces."""

    def meet(self, operation, act):
        return act(512) if operation.kind == "write" else act()


def kill_while_appending(folder, goal, rng):
    """Kills `goal` writers at random moments. Gives (broken, lost, false, torn): trials, records, records, lines."""
    suite = Wordy(num=120, chunk=2)
    true, scores, records = whole(folder / "whole", suite)
    calm = the_run(folder / "whole")
    features = {a: calm.store.get(a) for r in records for a in r.blobs.values()}

    def save(run, log, record):
        for address in record.blobs.values():
            run.store.put(features[address], ".npy")
        log.append(record_line(record))

    per_run = 25
    kills = lost = false = broken = torn = 0
    names = (folder / f"run-{i}" for i in range(10 * goal))
    while kills < goal:
        place = next(names)
        run = Store(place).open(calm.spec, {k: v for k, v in calm.meta.items() if k not in ("format", "spec")})
        here, acked = 0, []
        while here < per_run and kills < goal:
            have = run.records()
            waiting = [r for r in records if r.key not in have]
            if not waiting:
                break

            def append(ack, waiting=waiting, run=run):
                with InPieces().at_work(), run.writer() as log:
                    ack("ready")
                    for record in waiting:
                        save(run, log, record)
                        ack(record.key)

            pid, reader = in_child(append)
            os.read(reader, len(b"ready\n"))
            time.sleep(rng.uniform(0, 0.004))
            os.kill(pid, signal.SIGKILL)
            code, said = outcome(pid, reader)
            acked += said
            if code != -signal.SIGKILL:
                continue
            here, kills = here + 1, kills + 1
            torn += run.log("").exists() and not run.log("").read_bytes().endswith(b"\n")
            a, b = harm(place, acked, true)
            lost, false, broken = lost + a, false + b, broken + bool(a or b)
        with run.writer() as log:
            have = run.records()
            for record in records:
                if record.key not in have:
                    save(run, log, record)
        derive(run, suite)
        broken += (run.path / "scores.csv").read_bytes() != scores or truth(run) != true
        shutil.rmtree(place)
    return broken, lost, false, torn


@pytest.mark.parametrize("part", range(2))
def test_killed_at_random_while_records_are_appended(memory, quick, tally, trials, part):
    seed = 20261201 + part
    print("seed", seed)
    kills = trials(500, 50)
    broken, lost, false, torn = kill_while_appending(memory, kills, random.Random(seed))
    tally("kills", kills - broken, kills, lost=lost, false=false)
    print(f"{kills} kills, {torn} of them inside a record")
    assert broken == lost == false == 0
    assert torn > kills // 50  # the kills fell where they hurt


def kill_the_command(folder, goal, units, longest, rng):
    """Kills `goal` commands, each after at most `longest` seconds, and lets each run end. Gives (broken, lost, false):
    runs, records, runs."""
    journal = folder / "journal"

    def argv(where):
        fields = ("-p", f"num={2 * units}", "-p", "pause=0.02", "-p", f"journal={where}")
        names = ("score", f"{faults.HERE}:Journal", "--model", f"{TOYS}:Painter")
        return [sys.executable, "-m", "bench", *names, *fields, "--devices", "cpu", "--keep", "none"]

    rough, calm = folder / "rough", folder / "calm"
    kills = lost = false = broken = 0
    names = (rough / str(i) for i in itertools.count())
    while kills < goal:
        place = next(names)
        place.mkdir(parents=True)
        journal.unlink(missing_ok=True)
        here = saved = 0
        while True:
            process = subprocess.Popen(
                argv(journal), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                code = process.wait(None if here >= 6 or kills >= goal else rng.uniform(0.4, longest))
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                if process.wait() != -signal.SIGKILL:
                    continue
                here, kills = here + 1, kills + 1
                run = the_run(place / ".bench")
                now = len(run.records()) if run else 0
                lost += max(0, saved - now)
                saved = now
        run = the_run(place / ".bench")
        begun = journal.read_text().splitlines()
        if not calm.exists():
            calm.mkdir()
            done = subprocess.run(argv(journal), cwd=calm, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        calm_run = the_run(calm / ".bench")
        again = len(begun) - len(set(begun))  # a trial of two items, and one unit in hand at each kill
        same = (run.path / "scores.csv").read_bytes() == (calm_run.path / "scores.csv").read_bytes()
        same = same and truth(run) == truth(calm_run)
        false += not same
        broken += code != 0 or not same or again > 2 * here + 1
        shutil.rmtree(place)
    return broken, lost, false


def test_the_command_killed_until_it_is_complete(tmp_path, tally, size, trials):
    """The real command in its own process group; the work of a kill that is lost is the unit in hand."""
    seed = 20261203
    print("seed", seed)
    kills = trials(25, 1)
    broken, lost, false = kill_the_command(tmp_path, kills, size(80, 30), size(2.5, 1.4), random.Random(seed))
    tally("kills", kills - min(kills, broken), kills, lost=lost, false=false)
    assert broken == lost == 0


# -- dead at every operation


def dying(folder, number, when):
    """A run in a child that dies at one operation; (exit code, keys that were reported as saved)."""

    def work(ack):
        with Dying(number, when).at_work():
            measure(folder, SUITE, Acks(ack))

    return outcome(*in_child(work))


def operations(folder, run):
    """The operations that a run makes."""
    with Recorder().at_work() as disk:
        run(folder)
    return [o for o in disk.log if not isinstance(o, str)]


def test_dead_at_every_operation(memory, quick, tally, size):
    true, scores, _ = whole(memory / "whole")
    made = operations(memory / "recorded", lambda folder: measure(folder, SUITE))
    deaths = [(o, when) for o in made for when in ("before", "after")]
    deaths += [(o, part) for o in made if o.kind == "write" for part in (0.01, 0.5, 0.99)]
    deaths = deaths[:: size(1, 4)]
    died = passed = lost = false = 0
    for i, (operation, when) in enumerate(deaths):
        folder = memory / f"death-{i}"
        code, acked = dying(folder, operation.number, when)
        assert code == 86, (operation, when)  # it died there and nowhere else
        a, b = harm(folder, acked, true)
        code, more = dying(folder, i * 7 % 23 + 1, "before")  # the restart dies, too, early: where it heals
        here = 1 + (code == 86)
        if here == 2:
            a, b = map(sum, zip((a, b), harm(folder, acked + more, true), strict=True))
        run = measure(folder, SUITE)
        same = (run.path / "scores.csv").read_bytes() == scores and truth(run) == true
        lost, false, died, passed = lost + a, false + b, died + here, passed + here * (same and a == b == 0)
        shutil.rmtree(folder)
    tally("crash states", passed, died, lost=lost, false=false)
    print(f"{len(made)} operations, {died} deaths")
    assert passed == died and len(made) >= 40


# -- the power gone


def check_state(folder, notes, true, scores):
    """Heals what a power cut left, checks it, and finishes the run. Gives (lost, false, what else is wrong)."""
    wrong = []
    acked = [n for n in notes if n in true]
    lost, false = harm(folder, acked, true)
    run = the_run(folder)
    if run:
        said = []
        before = run.log("").read_bytes() if run.log("").exists() else b""
        with run.writer("", said.append):
            pass
        healed = {p.name: p.read_bytes() for p in run.path.glob("units.*")}
        if before != healed.get("units.jsonl", b"") and not said and before + b"\n" != healed["units.jsonl"]:
            wrong.append("cut and not told")
        with run.writer("", said.append):
            pass
        if healed != {p.name: p.read_bytes() for p in run.path.glob("units.*")}:
            wrong.append("healed twice is not healed once")
        again = harm(folder, acked, true)
        if again != (lost, false):
            wrong.append("healing lost records")
        for key in acked:
            for address in true[key][3].values():
                if run.store.path(address).is_file() is False or not run.store.get(address):
                    lost += 1
    run = measure(folder, SUITE)
    if (run.path / "scores.csv").read_bytes() != scores or truth(run) != true:
        wrong.append("other bytes")
    return lost, false, wrong


def scenarios(base, rng, true, records, count):
    """(what is on the disk, the log of operations from there, with a note of each record that was acknowledged)."""

    def recorded(name, fill=lambda folder: None, lives=(None,), **more):
        folder = base / name / "store"
        folder.mkdir(parents=True)
        fill(folder)
        before = base / name / "before"
        shutil.copytree(folder, before)
        log = []
        for dies_at in lives:
            disk = Recorder(dies_at)
            with disk.at_work(), contextlib.suppress(Dead):
                measure(folder, SUITE, Acks(disk.note), **more)
            log += disk.log
        shift = Replay(before)  # the log names paths below `folder`: read them as below `before`
        return before, [moved(o, str(folder), shift.root) for o in log]

    def begun(damage):
        def fill(folder):
            calm = the_run(base.parent / "whole")
            run = Store(folder).open(calm.spec, {k: v for k, v in calm.meta.items() if k not in ("format", "spec")})
            with run.writer() as log:
                for record in records[:2]:
                    for address in record.blobs.values():
                        run.store.put(calm.store.get(address), ".npy")
                    log.append(record_line(record))
            data = run.log("").read_bytes()
            run.log("").write_bytes(damage(data))

        return fill

    yield recorded("from nothing")
    yield recorded("records that come together", engine=InGroups())
    yield recorded("records that come together, killed", lives=(45, None), engine=InGroups())
    yield recorded("after a torn line", begun(lambda data: data[:-700]))
    yield recorded(
        "after a damaged line", begun(lambda data: data.replace(b"psn", b"PSN").replace(b"item-001", b"X", 1))
    )
    yield recorded("without the last newline", begun(lambda data: data[:-1]))
    yield recorded("with zeros at the end", begun(lambda data: data + bytes(4096)))
    length = len(operations(base / "counted", lambda folder: measure(folder, SUITE)))
    for i in range(count):  # killed once or more, continued, and then the power goes
        lives = (*(rng.randrange(1, length + 1) for _ in range(1 + i % 3)), None)
        yield recorded(f"killed at {lives} {i}", lives=lives)


def moved(step, old, new):
    if isinstance(step, str):
        return step
    target = new + step.target[len(old) :] if step.target else ""
    return replace(step, path=new + step.path[len(old) :], target=target)


def test_the_power_goes_at_every_moment(memory, quick, tally, size, trials):
    seed = 20261204
    print("seed", seed)
    rng = random.Random(seed)
    true, scores, records = whole(memory / "whole")
    goal = trials(2000, 200)
    states = []
    for base, log in scenarios(memory / "recorded", rng, true, records, size(24, 6)):
        found = list(crash_states(base, log, rng, 64))
        print(f"{len(found)} states, {base.parent.name}")
        states += found
    rng.shuffle(states)
    assert len(states) >= goal
    passed = lost = false = 0
    problems = Counter()
    for i, (tree, notes) in enumerate(states[:goal]):
        folder = memory / f"state-{i}"
        lay_out(tree, folder)
        a, b, wrong = check_state(folder, notes, true, scores)
        lost, false, passed = lost + a, false + b, passed + (not wrong and a == b == 0)
        problems.update(wrong)
        shutil.rmtree(folder)
    tally("crash states", passed, goal, lost=lost, false=false)
    assert passed == goal, problems


def role(step, root):
    """What is made durable: a path with its random parts left out."""
    path = os.path.relpath(step.path, root)
    path = re.sub(r"^\.(.*)\.[0-9a-f]{8}\.tmp$", r"\1", path.replace("/.", "/", 1) if ".tmp" in path else path)
    return step.kind, re.sub(r"\.?[0-9a-f]{8}\.tmp$|(?<=blobs/)..|[0-9a-f]{62}", "", path)


def test_each_fsync_is_needed(memory, quick, tally):
    """Without it the power may take what was acknowledged, a record or a file it names, or leave a part of a table.

    So the states are not harmless, and no fsync is there in vain.
    """
    true, scores, _ = whole(memory / "whole")
    folder, base = memory / "store", memory / "base"
    folder.mkdir()
    base.mkdir()
    with Recorder().at_work() as disk:
        measure(folder, SUITE, Acks(disk.note))
    log = [moved(step, str(folder), str(base)) for step in disk.log]
    roles = {role(step, base) for step in log if not isinstance(step, str) and step.kind.startswith("sync")}
    harmful = set()
    for number, skipped in enumerate(sorted(roles)):
        kept = [step for step in log if isinstance(step, str) or role(step, base) != skipped]
        for i, (tree, notes) in enumerate(crash_states(base, kept, random.Random(1), 8)):
            acked = [n for n in notes if n in true]
            tables = {data for path, data in tree.items() if path.endswith("scores.csv")}
            if tables - {scores}:
                harmful.add(skipped)
                break
            if not acked:
                continue
            state = memory / f"{number}-{i}"
            lay_out(tree, state)
            try:
                run = the_run(state)
                found = truth(run) if run else {}
                whole_ones = [k for k in acked if k in found and all(_held(run, a) for a in found[k][3].values())]
                if len(whole_ones) < len(acked):
                    harmful.add(skipped)
            except Error:  # run.json is damaged
                harmful.add(skipped)
            shutil.rmtree(state)
            if skipped in harmful:
                break
    print(*sorted(roles), sep="\n")
    tally("fsyncs needed", len(harmful), len(roles))
    assert harmful == roles, roles - harmful


def test_what_a_killed_process_had_not_made_durable_the_next_one_makes(memory, quick, tally, size):
    """Killed at any operation, continued to the end, and then the power goes and takes all that it may."""
    true, _, _ = whole(memory / "whole")
    count = len(operations(memory / "counted", lambda folder: measure(folder, SUITE)))
    base, lost, trials = memory / "base", 0, 0
    base.mkdir()
    for number in range(1, count + 1, size(1, 2)):
        folder = memory / f"store-{number}"
        folder.mkdir()
        replay = Replay(base)
        for dies_at in (number, None):
            disk = Recorder(dies_at)
            with disk.at_work(), contextlib.suppress(Dead):
                measure(folder, SUITE)
            for step in disk.log:
                replay.take(moved(step, str(folder), str(base)))
        lay_out(replay.least(), memory / f"left-{number}")
        run = the_run(memory / f"left-{number}")
        found = truth(run) if run else {}
        kept = [k for k in true if k in found and all(_held(run, a) for a in found[k][3].values())]
        lost += len(true) - len(kept)
        trials += 1
    tally("crash states", trials - (lost > 0), trials, lost=lost)
    assert not lost


def _held(run, address):
    try:
        return bool(run.store.get(address))
    except Error:
        return False


def test_a_healing_that_dies_anywhere_is_done_again_with_the_same_result(memory, quick, tally):
    whole(memory / "whole")
    calm = the_run(memory / "whole")
    lines = calm.log("").read_bytes().splitlines(keepends=True)
    damaged = {
        "torn": b"".join(lines)[:-300],
        "middle": lines[0] + lines[1].replace(b"item", b"itam", 1) + lines[2],
        "both": lines[0].replace(b"text", b"texd", 1) + lines[1] + lines[2][:1000],
        "unended": b"".join(lines)[:-1],
        "joined": lines[0][:-1] + lines[1] + lines[2],
    }
    trials = passed = 0
    for name, data in damaged.items():
        once = memory / name / "once" / "units.jsonl"
        once.parent.mkdir(parents=True)
        once.write_bytes(data)
        heal(once)
        result = {p.name: p.read_bytes() for p in once.parent.iterdir()}
        for number in range(1, 100):
            path = memory / name / str(number) / "units.jsonl"
            path.parent.mkdir()
            path.write_bytes(data)
            disk = Recorder(dies_at=number)
            with disk.at_work(), contextlib.suppress(Dead):
                heal(path)
            if not disk.fired:
                break
            heal(path)
            found = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.suffix != ".tmp"}
            trials, passed = trials + 1, passed + (found == result)
    tally("healings killed", passed, trials)
    assert passed == trials > 20
