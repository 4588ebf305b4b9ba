"""The array of bench/ENGINES.md on a Slurm cluster: requeued, preempted, cancelled, out of time, its node dead.

Whatever happens to its members, the run ends with the records and the scores of one process; what was saved before is
there, and not measured again.
"""

import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import slurm_cluster
import toys
from faults import lines_of, the_run, truth
from slurm_cluster import NODES, UNITS, Cluster, missing, wait_for

import bench

pytestmark = pytest.mark.nightly

PAGE = Path(bench.__file__).with_name("ENGINES.md")
SHARDS = 4  # a member for each CPU of the cluster


TOY = ["score", f"{Path(slurm_cluster.__file__).resolve()}:Slow", "--model", f"{Path(toys.__file__).resolve()}:Painter"]


def line_of_the_page():
    """The command as it is printed, over as many lines as it has there."""
    [found] = re.findall(r"^sbatch .*?'$", PAGE.read_text(), re.M | re.S)
    return found


def replaced(pattern, new, text):
    found, count = re.subn(pattern, lambda _: new, text)
    assert count == 1, (pattern, text)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if lacks := missing():
        pytest.skip(lacks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
        for name, value in {"DEVICES": "cpu", "THREADS": "1", "KEEP": "none"}.items():
            patch.setenv(f"BENCH_{name}", value)
        with Cluster(tmp_path_factory.mktemp("slurm")) as found:
            yield found


@pytest.fixture
def own_settings():
    """The tasks take theirs from the environment, as Slurm hands it on."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The same run in one process, undisturbed: (what its records say, its scores.csv)."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "pause").write_text("0")
    done = toys.command(folder, *TOY, env={"BENCH_KEEP": "none"})
    assert done.code == 0, done.err
    run = the_run(folder / ".bench")
    return truth(run), (run.path / "scores.csv").read_bytes()


class Array:
    """The page's array with a toy for suite and model, in a folder of its own."""

    def __init__(self, cluster, folder, pause, *options):
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        self.pause(pause)
        self.job = self.submit(*options)

    def pause(self, seconds):
        (self.folder / "pause").write_text(str(seconds))

    def submit(self, *options, members=f"0-{SHARDS - 1}", shards=SHARDS):
        line = replaced(r"score .* --shard", f"{' '.join(TOY)} --shard", line_of_the_page())
        line = replaced(r"--array=\S+", f"--array={members} {' '.join(options)}", line)
        line = replaced(r"_ID/\d+", f"_ID/{shards}", line)
        return self.cluster.run("bash", "-c", line, cwd=self.folder).split()[-1]

    def slurm(self, *argv):
        return self.cluster.run(*argv)

    def saved(self):
        """Unit by key, of what is saved now."""
        run = the_run(self.folder / ".bench") if (self.folder / ".bench").is_dir() else None
        return {r.key: r.unit for r in run.records().values()} if run else {}

    def begun(self):
        path = self.folder / "journal"
        return path.read_text().splitlines() if path.exists() else []

    def told(self, text):
        """How many times the tasks' output has it."""
        return sum(p.read_text(errors="replace").count(text) for p in self.folder.glob("slurm-*.out"))

    def at_work(self, goal):
        """Until so many units are saved, and every member runs."""
        wait_for(lambda: len(self.saved()) >= goal and len(self.running()) == SHARDS, 90, "work of all members")

    def running(self, job=None):
        found = self.cluster.members(job or self.job)
        return {k: m for k, m in found.items() if m["JobState"] == "RUNNING"}

    def restarts(self):
        return sum(int(m["Restarts"]) for m in self.cluster.members(self.job).values())

    def ends(self):
        wait_for(lambda: not self.slurm("squeue", "-h", "-u", "root"), 240, "end of all jobs")


# -- what happens to it: each gives how the members that were stopped ended, after the fault was seen


def requeued(array, rng):
    array.slurm("scontrol", "requeue", f"{array.job}_{rng.randrange(SHARDS)}")
    wait_for(lambda: array.restarts() == 1, 30, "restart")
    return {"143": 1}


def requeued_at_once(array, rng):
    array.slurm("scontrol", "requeue", array.job)
    wait_for(lambda: array.restarts() == SHARDS, 30, "restarts")
    return {"143": SHARDS}


def requeued_again_and_again(array, rng):
    """The same member, each time when it has saved one unit more."""
    member = rng.randrange(SHARDS)
    log = the_run(array.folder / ".bench").log(f"{member}/{SHARDS}")
    for count in (1, 2, 3):
        before = log.stat().st_size
        array.slurm("scontrol", "requeue", f"{array.job}_{member}")
        wait_for(lambda count=count: array.restarts() == count, 30, "restart")
        wait_for(lambda before=before: log.stat().st_size > before, 90, "record of the member that was requeued")
    return {"143": 3}


def preempted(array, rng, nodes=1):
    """A job of a partition with more priority takes whole nodes: SIGCONT, SIGTERM, and after a while SIGKILL."""
    array.slurm("sbatch", "-p", "high", "--exclusive", f"--nodes={nodes}", "-o", "/dev/null", "--wrap", "sleep 2")
    stopped = SHARDS * nodes // len(NODES)
    wait_for(lambda: array.restarts() == stopped, 90, "restarts")
    return {"143": stopped}


def preempted_after_a_grace(array, rng):
    """Of a partition with a grace time: members go on for some seconds, and then as above."""
    return preempted(array, rng)


def preempted_altogether(array, rng):
    return preempted(array, rng, nodes=len(NODES))


def cancelled(array, rng):
    """One member, submitted again."""
    member = rng.randrange(SHARDS)
    array.slurm("scancel", f"{array.job}_{member}")
    wait_for(lambda: array.cluster.members(array.job)[member]["JobState"] == "CANCELLED", 30, "cancelled member")
    array.submit(members=member)
    return {"143": 1}


def killed(array, rng):
    """One member, as by the memory killer; when the others are done the array is submitted again, in three shards."""
    member = rng.randrange(SHARDS)
    array.cluster.kill(array.running()[member]["JobId"])
    wait_for(lambda: member not in array.running(), 30, "killed member")
    array.ends()
    array.submit(members="0-2", shards=3)
    return {"signal 9": 1}


def cancelled_for_good(array, rng):
    """All members; one process without a shard does the rest."""
    array.slurm("scancel", array.job)
    array.ends()
    array.pause(0)
    done = toys.command(array.folder, *TOY)
    assert done.code == 0, done.err
    return {"143": SHARDS}


def out_of_time(array, rng):
    """Told so before its limit, where the job asked for that; submitted again."""
    array.pause(15)  # there is work left, whenever Slurm says so
    wait_for(lambda: not array.running(), 120, "end of time")
    assert array.cluster.warned() >= SHARDS
    array.pause(0.5)
    array.submit()
    return {"143": SHARDS}


def node_died(array, rng):
    """And is there again before anybody missed it."""
    node = rng.choice(NODES)
    array.cluster.crash(node)
    array.cluster.boot(node)
    wait_for(lambda: array.restarts() == SHARDS // 2, 120, "restarts")
    return {}


def node_lost(array, rng):
    """The other node does all, until it comes back."""
    node = rng.choice(NODES)
    array.cluster.crash(node)
    try:
        wait_for(lambda: array.cluster.state(node).startswith("down"), 120, "node that is down")
        wait_for(lambda: array.restarts() == SHARDS // 2, 60, "restarts")
    finally:
        array.cluster.boot(node)
    return {}


FAULTS = {  # with the seconds of a unit, and what the job asks for
    requeued: (0.6,),
    node_died: (0.6,),
    requeued_at_once: (0.6,),
    requeued_again_and_again: (2.5,),
    preempted: (0.6,),
    preempted_after_a_grace: (6, "-p", "graced"),
    preempted_altogether: (0.6,),
    cancelled: (0.6,),
    killed: (0.6,),
    cancelled_for_good: (0.6,),
    out_of_time: (0.6, "--time=1", "--signal=B:TERM@40"),
    node_lost: (1.0,),
}


def test_an_array_that_is_disturbed_ends_as_one_process(cluster, calm, tmp_path, tally, trials):
    seed = 20261128
    print("seed", seed)
    rng = random.Random(seed)
    goal, passed, lost, false, wrong = trials(len(FAULTS), 2), 0, 0, 0, []
    for i in range(goal):
        fault = list(FAULTS)[i % len(FAULTS)]
        pause, *options = FAULTS[fault]
        exits, began = Counter(cluster.exits()), time.monotonic()
        array = Array(cluster, tmp_path / str(i), pause, *options)
        array.at_work(SHARDS + (rng.randrange(SHARDS) if pause < 4 else 0))
        saved = array.saved()
        expected = fault(array, rng)
        array.pause(min(pause, 0.5))
        array.ends()
        ended = Counter(cluster.exits()) - exits
        run = the_run(array.folder / ".bench")
        gone = len(saved.keys() - run.records().keys())
        scores = run.path / "scores.csv"
        same = scores.exists() and (truth(run), scores.read_bytes()) == calm
        begun, lines = Counter(array.begun()), lines_of(run)
        problems = {
            "lost": gone,
            "another result": not same,
            "measured again": [u for u in saved.values() if begun[u] != 1],
            "more than what was in hand": begun.total() > UNITS + (sum(expected.values()) or SHARDS // 2),
            "recorded twice": len(lines) != len(set(lines)),
            "exits": {k: n for k, n in ended.items() if k != "0"} != expected and (ended, expected),
            "silent": array.told("interrupted. ") != expected.get("143", 0),
        }
        problems = {k: v for k, v in problems.items() if v}
        passed, lost, false = passed + (not problems), lost + gone, false + (not same)
        wrong += [(fault.__name__, problems)] if problems else []
        print(
            f"{fault.__name__}: {len(saved)} saved before, {begun.total() - UNITS} begun again, {dict(ended)}", end=" "
        )
        print(f"{time.monotonic() - began:.0f} s")
        shutil.rmtree(array.folder)
    tally("Slurm jobs disturbed", passed, goal, lost=lost, false=false)
    assert not wrong


def test_the_line_of_the_page_as_it_is_printed(cluster, tmp_path, tally, size):
    """Sixteen shards of a suite and a model that come with the harness, and the same in one process."""
    if not size(True, False):
        pytest.skip("minutes: --full-size")
    alone = replaced(r" --shard \S+$", "", re.search(r"'exec bench (.*)'", line_of_the_page())[1])
    scores = []
    for name in ("array", "alone"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "array":
            cluster.run("bash", "-c", line_of_the_page(), cwd=folder)
            wait_for(lambda: not cluster.run("squeue", "-h"), 1200, "end of the array")
        else:
            done = toys.command(folder, *alone.split())
            assert done.code == 0, done.err
        run = the_run(folder / ".bench")
        scores.append((truth(run), (run.path / "scores.csv").read_bytes()))
    same = scores[0] == scores[1]
    tally("Slurm arrays", int(same), 1, false=not same)
    assert same
