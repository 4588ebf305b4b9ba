"""A long run on a disk, disturbed all the time: memory does not grow, healing stays fast, the scores are as if nothing
had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
from faults import the_run, truth

from bench.records import heal

pytestmark = pytest.mark.nightly
TOYS = str(Path(toys.__file__).resolve())
LIFE = (20, 90)  # seconds
SETTLED = 5  # seconds after its first record in which a process may still grow


def begin(folder, units):
    folder.mkdir(exist_ok=True)
    argv = ["score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Painter", "-p", f"num={2 * units}"]
    how = ["--devices", "cpu,cpu", "--threads", "1", "--keep", "none"]
    with open(folder / "told", "wb") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "bench", *argv, *how],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=told,
            start_new_session=True,
        )


def workers_of(pid):
    """The processes that a driver's measure in; not the one that watches over them."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"resource_tracker" not in command:
            found.append(int(child))
    return found


def resident(pid):
    """MB in memory, 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


class Watch:
    """The memory of a driver and its workers while records come."""

    def __init__(self):
        self.first, self.most = {}, {}

    def look(self, pids):
        for pid in pids:
            if now := resident(pid):
                self.first.setdefault(pid, now)
                self.most[pid] = max(now, self.most.get(pid, 0))

    def growth(self):
        return max((self.most[p] - self.first[p] for p in self.first), default=0.0)


def lines(folder):
    logs = list(folder.glob(".bench/runs/*/units.jsonl"))
    return logs[0].read_bytes().count(b"\n") if logs else 0


def live(folder, units, seconds, rng):
    """One life of the command, of about `seconds`, or to its end where that is None; a worker is killed now and then.

    Gives (its exit code or None where it goes on, its growth in MB, workers killed).
    """
    process, watch = begin(folder, units), Watch()
    before, began, killed = lines(folder), None, 0
    next_kill = rng.uniform(10, 30)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if began is None:
                began = time.monotonic() if lines(folder) > before else None
                continue
            age = time.monotonic() - began
            if seconds is not None and age > seconds:
                break
            if lines(folder) >= units:
                break  # what follows is the reduction
            if age > SETTLED:
                watch.look([process.pid, *workers_of(process.pid)])
            if age > next_kill and (workers := workers_of(process.pid)):
                os.kill(rng.choice(workers), signal.SIGKILL)
                killed, next_kill = killed + 1, next_kill + rng.uniform(10, 30)
        return process, watch.growth(), killed
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def test_a_long_run_that_is_disturbed_all_the_time(memory, tmp_path, tally, size):
    seed = 20261213
    print("seed", seed)
    rng = random.Random(seed)
    units, life = size(200_000, 4_000), size(LIFE, (1, 2))
    calm = memory / "calm"
    assert begin(calm, units).wait() == 0
    true, rough = truth(the_run(calm / ".bench")), tmp_path / "rough"
    lost = false = lives = workers = 0
    grown, healed, held = [], [], {}
    while True:
        process, growth, killed = live(rough, units, rng.uniform(*life), rng)
        grown.append(growth)
        workers += killed
        if lines(rough) >= units or process.poll() is not None:
            break
        lives += 1
        if rng.random() < 0.3:
            process.terminate()
            assert process.wait(10) == 143
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        run = the_run(rough / ".bench")
        start = time.process_time()
        heal(run.log(""))
        healed.append((time.process_time() - start) / max(lines(rough), 10_000) * 100_000)
        found = truth(run)
        lost += sum(found.get(key) != value for key, value in held.items())
        false += sum(true.get(key) != value for key, value in found.items())
        held = found
        print(f"life {lives}: {len(held)} records, grown by {growth:.0f} MB, {healed[-1]:.3f} CPU s a 100,000 records")
    code = process.wait()
    run = the_run(rough / ".bench")
    same = truth(run) == true and (run.path / "scores.csv").read_bytes() == scores_of(calm)
    tally("soaked units", len(truth(run)), units, lost=lost, false=false + (not same))
    tally("lives ended", lives, lives)
    print(
        f"{lives} lives and {workers} workers ended; at most {max(grown):.0f} MB grown in a life, "
        f"healed in {max(healed):.3f} CPU s a 100,000 records"
    )
    assert code == 0 and same and not lost and not false, (rough / "told").read_text()[-2000:]
    assert lives >= 3 and workers >= size(10, 0)  # it was disturbed
    assert max(grown) < 50 and max(healed) < 1


def scores_of(folder):
    return (the_run(folder / ".bench").path / "scores.csv").read_bytes()
