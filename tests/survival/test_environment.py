"""Clocks that jump, other locales, closed streams, no home, signals: the same records, or words that say why not."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
from faults import Acks, as_builtin, in_child, lines_of, measure, outcome, the_run, truth
from toys import Drawing, finish, start

from bench import progress
from bench.identity import FileDigests, file_digest
from bench.text import duration
from bench.types import Record, Unit

TOYS = str(Path(toys.__file__).resolve())
DAY, YEARS = 86_400.0, 3.2e8
SCORE = ("score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Painter")
HOW = ("--devices", "cpu", "--threads", "1")
GMTIME = time.gmtime


# -- clocks


def clock(shift):
    """Clocks that run as `shift(true seconds)` says, both of the day and of waiting."""
    real, origin = time.time, time.time()
    return lambda: origin + shift(real() - origin)


@pytest.mark.parametrize(
    "name, shift",
    [
        ("a day back", lambda t: t - DAY),
        ("ten years ahead", lambda t: t + YEARS),
        ("stands still", lambda t: 0.0),
        ("runs backwards", lambda t: -t),
        ("jumps", lambda t: t + (DAY if int(t * 1000) % 2 else -DAY)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_clock_that_is_wrong_changes_no_record_and_no_score(memory, quick, tally, monkeypatch, name, shift):
    calm = measure(memory / "calm", Drawing(num=6))
    now = clock(shift)
    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now() * 1e9))
    monkeypatch.setattr(time, "gmtime", lambda *given: GMTIME(*(given or (now(),))))
    run = measure(memory / "wrong", Drawing(num=6))
    measure(memory / "wrong", Drawing(num=6), fresh=True)
    run = the_run(memory / "wrong")
    same = run.id == calm.id and truth(run) == truth(calm)
    same = same and (run.path / "scores.csv").read_bytes() == (calm.path / "scores.csv").read_bytes()
    same = same and len(list((memory / "wrong" / "runs").glob("*.old"))) == 1
    tally("clocks", int(same), 1, false=int(not same))
    assert same


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/New_York", "Asia/Kathmandu", "nonsense"])
def test_the_time_zone_is_in_no_record_and_no_score(memory, quick, tally, monkeypatch, zone):
    calm = measure(memory / "calm", Drawing(num=6))
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        run = measure(memory / "zone", Drawing(num=6))
    finally:
        monkeypatch.undo()
        time.tzset()
    stamps = [r.started for r in run.records().values()]
    same = truth(run) == truth(calm) and run.id == calm.id
    same = same and (run.path / "scores.csv").read_bytes() == (calm.path / "scores.csv").read_bytes()
    same = same and all(abs(_seconds(s) - time.time()) < 600 for s in stamps)  # UTC, wherever the machine stands
    tally("clocks", int(same), 1, false=int(not same))
    assert same


def _seconds(stamp):
    import calendar

    return calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ"))


@pytest.mark.parametrize("when", ["as it is", "in the future", "of the other", "1970"])
def test_a_file_swapped_for_one_of_the_same_size_and_time_is_another(tmp_path, tally, when):
    """The fingerprint of weights is remembered; a swap is seen by its inode and the time of its change."""
    one, other = tmp_path / "weights", tmp_path / "other"
    one.write_bytes(b"a" * 100)
    other.write_bytes(b"b" * 100)
    stamp = {"in the future": time.time() + YEARS, "1970": 1}.get(when)
    for path in (one, other):
        if stamp:
            os.utime(path, (stamp, stamp))
        elif when == "of the other":
            os.utime(path, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    digests = FileDigests()
    digests.YOUNG_NS = -(10**18)  # believe it at once
    first = digests.of(one)
    os.replace(other, one)
    swapped = digests.of(one) == file_digest(one) != first
    with open(one, "r+b") as file:  # in place, and the time set back
        before = one.stat()
        file.write(b"c")
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = digests.of(one) == file_digest(one)
    tally("clocks", int(swapped and changed), 1, false=int(not (swapped and changed)))
    assert swapped and changed


def test_a_time_left_is_never_negative_and_never_nan(memory, quick, monkeypatch, tally):
    """The bar of a run under a waiting clock that stands still, and jumps."""
    said = []
    run = measure(memory / "store", Drawing(num=6))

    class Screen:
        def update(self, task, advance, note):
            said.append(note)

        def stop(self): ...

    for steps in ([5.0] * 99, [5.0, 4.0, 3.0, 9e9, 1.0] * 20, [0.0] * 99):
        ticks = iter(steps)
        monkeypatch.setattr(progress.time, "monotonic", lambda ticks=ticks: next(ticks))

        class Begun(progress.Bar):
            def begin(self, run, units, pending):
                super().begin(run, units, pending)
                self.progress, self.task = Screen(), 0
                self.cost_left, self.cost_done = sum(u.cost for u in pending), 0.0

        bar = Begun("bench")
        units = [Unit(f"u{i}", (f"i{i}",)) for i in range(5)]
        bar.begin(run, units, units)
        for unit in units:
            bar.done(unit, Record("k", unit.id, "ok"))
    monkeypatch.undo()
    lefts = [re.search(r"left (.+)$", note)[1] for note in said]
    good = len(lefts) == 15 and all(re.fullmatch(r"\?|(\d+:)?\d+:\d\d", left) for left in lefts)
    tally("clocks", int(good), 1)
    assert good, said
    assert [duration(x) for x in (-1.0, math.nan, math.inf, -math.inf)] == ["?"] * 4


# -- environments


def bench(folder, *argv, prefix="", env=None, python=(), shell="{}"):
    """The real command in a shell: (exit code, stdout, stderr)."""
    import shlex

    folder.mkdir(exist_ok=True)
    words = shlex.join([sys.executable, *python, "-m", "bench", *map(str, argv)])
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "BENCH_"))}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    for name, value in (env or {}).items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    line = prefix + shell.format(words)
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environ, capture_output=True, timeout=600)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


CASES = {
    "locale C": {"env": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}},
    "latin-1": {"env": {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"}},
    "asserts stripped": {"python": ("-OO",), "env": {"PYTHONOPTIMIZE": "2"}},
    "umask 077": {"prefix": "umask 077; "},
    "stdin closed": {"shell": "{} <&-"},
    "stdout closed": {"shell": "{} >&-"},
    "stderr closed": {"shell": "{} 2>&-"},
    "all closed": {"shell": "{} <&- >&- 2>&-"},
    "no home": {"env": {"HOME": "/nonexistent", "XDG_CACHE_HOME": None}},
    "home unset": {"env": {"HOME": None}},
    "hash seed 0": {"env": {"PYTHONHASHSEED": "0"}},
    "hash seed 1": {"env": {"PYTHONHASHSEED": "1"}},
    "no temporary folder": {"env": {"TMPDIR": "/nonexistent"}},
    "warnings are errors": {"env": {"PYTHONWARNINGS": "error"}},
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    code, out, err = bench(folder, *SCORE, *HOW)
    assert code == 0, err
    return the_run(folder / ".bench"), out


@pytest.mark.parametrize("name", CASES)
def test_another_environment_gives_the_same_records(memory, calm, tally, size, name):
    if name not in list(CASES)[:: size(1, 3)]:
        pytest.skip("at full size")
    run, printed = calm
    code, out, err = bench(memory / "here", *SCORE, *HOW, **CASES[name])
    found = the_run(memory / "here" / ".bench")
    assert code == 0, err
    same = found.id == run.id and truth(found) == truth(run)
    same = same and (found.path / "scores.csv").read_bytes() == (run.path / "scores.csv").read_bytes()
    same = same and (out == printed or "closed" in name)
    tally("environments", int(same), 1, false=int(not same), tracebacks=int("Traceback" in err))
    assert same and "Traceback" not in err
    if name == "umask 077":
        assert not any(p.stat().st_mode & 0o077 for p in (memory / "here" / ".bench").rglob("*"))


def test_a_working_folder_that_was_deleted_is_said_in_words(memory, tally):
    prefix = "mkdir gone && cd gone && rmdir ../gone && "
    code, out, err = bench(memory / "here", *SCORE, *HOW, prefix=prefix, python=("-P",))
    passed = code == 1 and not out and "error: " in err and len(err.splitlines()) <= 12
    tally("environments", int(passed), 1, tracebacks=int("Traceback" in err))
    assert passed and "Traceback" not in err, err


def test_no_check_is_an_assert(tally):
    """Optimised mode strips them: what a user's data can trip must be raised. Those that stand are ours to hold."""
    import ast

    root = Path(__file__).parents[2] / "bench"
    found = {}
    for name in ("door.py", "store.py", "identity.py", "config.py", "manifest.py", "manifest_format.py", "fetch.py"):
        tree = ast.parse((root / name).read_text())
        found[name] = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    tally("environments", 1, 1)
    assert not any(found.values()), found


# -- signals


def waiting_for(folder, count, name=".bench"):
    """Waits until a run has `count` records."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):
            run = the_run(folder / name)
            if run and len(run.records()) >= count:
                return run
        time.sleep(0.02)
    raise AssertionError("nothing was measured")


def told(done, folder, code):
    """A command that was ended says what it saved and what continues it, without a trace. Gives what is wrong."""
    saved = len(the_run(folder / ".bench").records())
    count = re.search(r"^(?:interrupted|stopped)\. (\d+) units? saved$", done.err, re.M)
    wrong = [] if done.code == code else [f"exit {done.code}"]
    wrong += [] if count and int(count[1]) == saved else [f"{saved} saved, but says {done.err!r}"]
    wrong += ["a trace"] if "Traceback" in done.err else []
    wrong += ["output"] if done.out else []
    wrong += [] if re.search(r"^continue with:\n  bench score .+Drawing", done.err, re.M) else ["no way to go on"]
    return wrong


@pytest.mark.parametrize(
    "numbers, code",
    [((signal.SIGINT,), 130), ((signal.SIGTERM,), 143), ((signal.SIGHUP,), 129), ((signal.SIGINT, signal.SIGINT), 130)],
    ids=["interrupt", "terminate", "hang up", "interrupt twice"],
)
def test_a_signal_saves_says_how_to_go_on_and_gives_its_exit_code(tmp_path, tally, numbers, code):
    pid = start(tmp_path, *SCORE, "-p", "num=200", "-p", "pause=0.05")
    waiting_for(tmp_path, 2)
    for number in numbers:
        os.kill(pid, number)
    done = finish(tmp_path, pid)
    wrong = told(done, tmp_path, code)
    tally("signals", int(not wrong), 1, tracebacks=int("Traceback" in done.err))
    assert not wrong and f"continue with:\n  bench score {TOYS}:Drawing --model {TOYS}:Painter -p num=200" in done.err


def in_this_process(folder, argv, patch):
    """`bench …` in a child whose model works in it, after `patch()`; (exit code, stderr)."""
    folder.mkdir(exist_ok=True)
    reader, write = os.pipe()

    def work(ack):
        os.chdir(folder)
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from bench import cli

        with as_builtin():
            patch()
            sys.argv = ["bench", *argv]
            code = cli.main(list(argv))
        sys.stderr.flush()
        return code

    code, _ = outcome(*in_child(work))
    os.close(write)
    with os.fdopen(reader) as file:
        return toys.Done(code, "", file.read())


BUILTIN = ("score", "drawing", "--model", "painter", "-p", "num=8", "--keep", "none", *HOW)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_scores_are_reduced_loses_nothing(memory, tally, number, code):
    def patch():
        from bench import execution

        real = execution.Run.save_scores

        def interrupted(run, scores):
            os.kill(os.getpid(), number)
            real(run, scores)

        execution.Run.save_scores = interrupted

    done = in_this_process(memory / "here", BUILTIN, patch)
    run = the_run(memory / "here" / ".bench")
    passed = (
        done.code == code and len(run.records()) == 4 and "4 units saved" in done.err and "continue with" in done.err
    )
    again = in_this_process(memory / "here", BUILTIN, lambda: None)
    calm = measure_named(memory / "calm")
    passed = passed and again.code == 0 and (run.path / "scores.csv").read_bytes() == calm
    tally("signals", int(passed), 1, tracebacks=int("Traceback" in done.err))
    assert passed, done.err


def measure_named(folder):
    assert in_this_process(folder, BUILTIN, lambda: None).code == 0
    return (the_run(folder / ".bench").path / "scores.csv").read_bytes()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_a_record(memory, tally, number, code, twice):
    """One waits until the record is whole and counted; a second one acts at once, and the torn line is healed."""

    def patch():
        from bench import door

        class Interrupting:
            sent = 0

            def __getattr__(self, name):
                return getattr(os, name)

            def write(self, fd, data):
                if "units.jsonl" in os.readlink(f"/proc/self/fd/{fd}") and not self.sent:
                    done = os.write(fd, bytes(data)[:20])
                    for _ in range(1 + twice):
                        self.sent += 1
                        os.kill(os.getpid(), number)
                    return done
                return os.write(fd, data)

        door.os = Interrupting()

    done = in_this_process(memory / "here", BUILTIN, patch)
    run = the_run(memory / "here" / ".bench")
    log = run.log("").read_bytes()
    saved = len(lines_of(run))
    passed = done.code == code and "Traceback" not in done.err
    passed = passed and (
        log == log[:20] if twice else log.endswith(b"}\n") and saved == 1 and "1 unit saved" in done.err
    )
    again = in_this_process(memory / "here", BUILTIN, lambda: None)
    passed = passed and again.code == 0 and ("cut an unfinished" in again.err) == twice
    passed = passed and (run.path / "scores.csv").read_bytes() == measure_named(memory / "calm")
    tally("signals", int(passed), 1, tracebacks=int("Traceback" in done.err))
    assert passed, (done, log[:100], again)


@pytest.mark.parametrize("verb", [("list",), ("list", "--json"), ("show", "drawing", "--unit", "u/000", "--json")])
def test_a_reader_that_closes_the_pipe_is_no_error(memory, tally, verb):
    measure(memory / "here" / ".bench", Drawing(num=200, chunk=200), Acks())
    code, out, err = bench(memory / "here", *verb, shell="{} | head -1; exit ${{PIPESTATUS[0]}}")
    passed = code == 0 and not err and len(out.splitlines()) == 1
    tally("signals", int(passed), 1, tracebacks=int("Traceback" in err))
    assert passed, err
