"""A run changes hands: begun by one process, killed, continued as four shards, killed, and finished by another engine.
Whoever ends it, its scores are byte for byte those of a run that nobody disturbed."""

import importlib.util
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import toys
from faults import lines_of, the_run, truth

TOYS = str(Path(toys.__file__).resolve())
UNITS = 40
SCORE = ("score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Painter", "-p", f"num={2 * UNITS}", "-p", "pause=0.05")
FINISHERS = {"two processes": ("--devices", "cpu,cpu"), "one process": (), "ray": ("--engine", "ray", "--ray", "local")}


def begin(folder, *more):
    """Starts `bench …` as a process group of its own."""
    settings = {"BENCH_THREADS": "1", "BENCH_DEVICES": "cpu", "BENCH_KEEP": "none"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[2])}
    with open(folder / f".err-{secrets.token_hex(3)}", "w+") as err:
        command = [sys.executable, "-m", "bench", *SCORE, *more]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True
        )
    process.told = Path(err.name)
    return process


def kill_when(folder, processes, count):
    """Kills them all once the run has `count` records. Gives how many were killed, and what the run then holds."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        run = the_run(folder / ".bench")
        if (run and len(run.records()) >= count) or all(p.poll() is not None for p in processes):
            break
        time.sleep(0.02)
    killed = 0
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    return killed, truth(the_run(folder / ".bench"))


@pytest.fixture
def ray_environment(monkeypatch):
    """Ray's files in a folder of their own with a short name, its token not in the user's home; nothing is sent."""
    folder = tempfile.mkdtemp(prefix="ray")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", **token}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The records and the scores.csv of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    process = begin(folder)
    assert process.wait(120) == 0, process.told.read_text()
    run = the_run(folder / ".bench")
    return truth(run), (run.path / "scores.csv").read_bytes()


@pytest.mark.parametrize("finisher", FINISHERS)
def test_a_run_that_changes_hands(tmp_path, calm, tally, size, ray_environment, finisher):
    if finisher == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: the extra [ray]")
    seed = 20261206
    print("seed", seed)
    rng = random.Random(f"{seed}{finisher}")
    true, scores = calm
    trials = {"two processes": size(5, 1), "one process": size(5, 0), "ray": size(3, 1)}[finisher]
    if not trials:
        pytest.skip("at full size")
    passed = kills = lost = 0
    for i in range(trials):
        folder = tmp_path / str(i)
        folder.mkdir()
        held = {}
        lives = [[()], [("--shard", f"{k}/4") for k in range(4)], [("--devices", "cpu,cpu")]]
        for life, count in zip(lives, sorted(rng.sample(range(2, UNITS - 12), 3)), strict=True):
            killed, found = kill_when(folder, [begin(folder, *more) for more in life], max(count, len(held) + 1))
            kills += killed
            lost += sum(found.get(key) != value for key, value in held.items())
            held = found
        assert kills >= 3 * (i + 1) and len(held) < UNITS  # nobody was done before its end
        last = begin(folder, *FINISHERS[finisher])
        code = last.wait(300)
        run = the_run(folder / ".bench")
        same = code == 0 and truth(run) == true and (run.path / "scores.csv").read_bytes() == scores
        same = same and sorted(lines_of(run)) == sorted(true)  # what was saved was never measured again
        passed += same
        assert same, (code, last.told.read_text()[-2000:])
    tally("runs that changed hands", passed, trials, lost=lost)
    print(f"{trials} runs, {kills} kills")
    assert passed == trials and not lost
