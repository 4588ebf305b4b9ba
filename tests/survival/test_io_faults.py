"""The disk refuses: at every operation, in every way, for real; and folders that cannot be written at all.

A run stops with exit 1 and says which file, why, how much is saved and how to go on; the same command completes it.
"""

import contextlib
import ctypes
import errno
import io
import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
from faults import Failing, Recorder, as_builtin, in_child, lines_of, outcome, the_run, truth

from bench import cli, door, execution

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EINTR)
SHORT = (errno.ENOSPC, errno.EFBIG)  # a disk that fills takes a part of a write first
HOW = ("--keep", "none", "--devices", "cpu", "--threads", "1")
COMMAND = ("score", "wordy", "--model", "painter", "-p", "num=8", *HOW)


def bench(folder, *argv, disk=None, before=lambda: None):
    """`bench …` in a child, over a disk that fails: (exit code, stdout, stderr, what the disk did)."""
    folder.mkdir(exist_ok=True)
    pipes = os.pipe(), os.pipe()  # what is printed fits into them; a file would obey the limits that are tested

    def work(ack):
        os.chdir(folder)
        for fd, (_, writer) in zip((1, 2), pipes, strict=True):
            os.dup2(writer, fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
        before()
        sys.argv = ["bench", *map(str, argv)]
        with as_builtin(), disk.at_work() if disk else contextlib.nullcontext():
            code = cli.main(sys.argv[1:])
        sys.stderr.flush()
        if disk:
            for operation in disk.fired:
                ack(f"fired {operation.kind} {operation.path}")
            for operation in disk.touched_again:
                ack(f"again {operation.kind} {operation.path}")
        return code

    code, told = outcome(*in_child(work))
    texts = []
    for reader, writer in pipes:
        os.close(writer)
        with os.fdopen(reader, errors="replace") as file:
            texts.append(file.read())
    return code, *texts, told


def bench_here(folder, *argv):
    """The same in this process, without faults: (exit code, stderr)."""
    folder.mkdir(exist_ok=True)
    err = io.StringIO()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err)
        with as_builtin(), contextlib.chdir(folder), streams[0], streams[1]:
            return cli.main(list(argv)), err.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def says(err, *texts):
    """The form of an error: few lines, no trace, no control character; what, where, next."""
    assert "Traceback" not in err and len(err.splitlines()) <= 12, err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err), err
    assert re.search(r"^error: .+", err, re.M) and re.search(r"^hint: .+", err, re.M), err
    for text in texts:
        assert text in err, (text, err)


def scores_of(folder):
    run = the_run(folder / ".bench")
    return truth(run), (run.path / "scores.csv").read_bytes()


def test_every_operation_fails_in_every_way(memory, tally, size):
    with Recorder().at_work() as disk:
        code, err = bench_here(memory / "whole", *COMMAND)
    assert code == 0 and "complete." in err
    expected = scores_of(memory / "whole")
    made = [o for o in disk.log if not isinstance(o, str)]
    cases = [(o, code, once) for o in made for code in ERRORS for once in (True, False)]
    cases = cases[:: size(1, 25)]
    passed = false = lost = traces = 0
    problems = []
    for i, (operation, error, once) in enumerate(cases):
        folder = memory / f"case-{i}"
        try:
            disk = Failing(operation.number, error, once, short=error in SHORT)
            code, out, err, told = bench(folder, *COMMAND, disk=disk)
            assert told and told[0].startswith("fired"), "the fault was not met"
            where = told[0].split(" ")[-1]
            assert code == 1, f"exit {code}"
            assert "complete." not in err and not out
            named = Path(where).name
            says(err, os.strerror(error), "same command")
            assert re.sub(r"^\.(.*)\.[0-9a-f]{8}\.tmp$", r"\1", named) in err and ".tmp" not in err, (named, err)
            assert not [t for t in told if t.startswith("again")], told  # what fsync refused is not touched again
            run = the_run(folder / ".bench")
            saved = len(run.records()) if run else 0
            count = re.search(r"^stopped\. (?:(\d+) units? saved|nothing was measured yet)", err, re.M)
            if count:
                assert int(count[1] or 0) <= saved and saved - int(count[1] or 0) <= 1
                assert "continue with:\n  bench score wordy --model painter" in err
            else:
                assert saved == 0
            before = truth(run) if run else {}
            lost += sum(expected[0][k] != v for k, v in before.items())
            code, err = bench_here(folder, *COMMAND)
            assert code == 0 and "complete." in err, err
            assert len(lines_of(the_run(folder / ".bench"))) == 4
            same = scores_of(folder) == expected
            false += not same
            assert same, "other bytes"
            passed += 1
        except AssertionError as e:
            problems.append((operation.kind, operation.path, errno.errorcode[error], once, str(e)[:1500]))
        traces += "Traceback" in err
    tally("I/O faults", passed, len(cases), lost=lost, false=false, tracebacks=traces)
    print(f"{len(made)} operations, {len(cases)} faults")
    assert not problems, f"{len(problems)} of {len(cases)}: {problems[:3]}"
    assert len(made) >= 40


# -- for real


def limited(count):
    """No file may grow beyond `count` bytes: what a quota does, without being root."""

    def before():
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))

    return before


@pytest.mark.parametrize("count", [100, 4_000, 7_000])
def test_a_file_that_may_not_grow_further_stops_the_run(memory, tally, count):
    """The kernel itself takes a part of a write and refuses the rest."""
    code, out, err, _ = bench(memory / "limited", *COMMAND, before=limited(count))
    run = the_run(memory / "limited" / ".bench")
    saved = len(run.records()) if run else 0
    whole = code == 1 and "complete." not in err and not out and saved == {100: 0, 4_000: 1, 7_000: 2}[count]
    says(err, os.strerror(errno.EFBIG), "units.jsonl" if saved else "cannot write", "same command")
    code, _, err, _ = bench(memory / "limited", *COMMAND)
    bench(memory / "whole", *COMMAND)
    whole = whole and code == 0 and scores_of(memory / "limited") == scores_of(memory / "whole")
    tally("full disks", int(whole), 1)
    assert whole, err


@pytest.mark.parametrize("verb", [COMMAND, ("list", "runs"), ("show", "wordy", "--json")])
def test_a_full_disk_behind_stdout_is_exit_1_and_the_records_stay(memory, tally, verb):
    assert bench(memory / "one", *COMMAND)[0] == 0
    before = scores_of(memory / "one")

    def full():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    code, _, err, _ = bench(memory / "one", *verb, before=full)
    whole = code == 1 and "cannot write: No space left on device" in err and scores_of(memory / "one") == before
    tally("full disks", int(whole), 1)
    assert whole and "Traceback" not in err, (code, err)


def test_a_file_system_of_64_kilobytes(tmp_path, tally):
    """A small disk of its own, in a name space of its own; where this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(size):
        def before():
            new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
            if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private | recursive, None):
                os._exit(77)
            if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, f"size={size}k".encode()):
                os._exit(77)
            execution.FREE_BYTES = 0  # else the run is refused before it begins
            kept.append(os.open(disk, os.O_RDONLY))

        return before

    kept = []
    argv = ("score", "wordy", "--model", "painter", "-p", "num=60", *HOW, "--store", str(disk / "store"))
    code, out, err, _ = bench(tmp_path / "run", *argv, before=mount(64))
    if code == 77:
        pytest.skip("this user may not mount")
    count = re.search(r"stopped\. (\d+) units? saved", err)
    whole = code == 1 and count and 0 < int(count[1]) < 30 and "complete." not in err and not out
    tally("full disks", int(bool(whole)), 1)
    says(err, "No space left on device", "same command")
    assert whole, err


# -- folders that cannot be written


def without_rights():
    """Even root obeys the modes of files once it has given away the right not to."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()
        libc.capget(header, sets)
        for i in range(3):
            sets[i] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        assert libc.capset(header, sets) == 0


@pytest.mark.parametrize(
    "case",
    [
        *("a file", "below a file", "a link to nothing", "a folder that may not be written"),
        *("below a folder that may not be written", "a path of 4096 bytes", "a loop of links", "below /proc"),
    ],
)
def test_a_store_that_cannot_be_written_is_refused_by_name_before_any_unit(memory, tally, case):
    (memory / "file").write_text("a file")
    (memory / "nowhere").symlink_to(memory / "missing" / "deep")
    (memory / "loop").symlink_to(memory / "loop")
    (memory / "locked").mkdir(mode=0o500)
    store = {
        "a file": memory / "file",
        "below a file": memory / "file" / "store",
        "a link to nothing": memory / "nowhere",
        "a folder that may not be written": memory / "locked",
        "below a folder that may not be written": memory / "locked" / "store",
        "a path of 4096 bytes": memory.joinpath(*["y" * 200] * 20),
        "a loop of links": memory / "loop",
        "below /proc": Path("/proc/self/store"),
    }[case]
    journal = memory / "journal"
    argv = ("score", "journal", "--model", "painter", "-p", f"journal={journal}", "--devices", "cpu", "--store", store)
    code, out, err, _ = bench(memory / "here", *argv, before=without_rights)
    passed = code == 1 and not out and not journal.exists()
    tally("folders that cannot be written", int(passed), 1, tracebacks=int("Traceback" in err))
    says(err, str(store)[:200])
    assert passed, err


def test_a_store_behind_a_link_is_a_store_like_another(memory, tally):
    (memory / "real").mkdir()
    (memory / "link").symlink_to(memory / "real")
    (memory / "whole").mkdir()
    assert bench(memory / "here", *COMMAND, "--store", memory / "link" / "deep" / "store")[0] == 0
    assert bench(memory / "whole", *COMMAND)[0] == 0
    run, other = the_run(memory / "real" / "deep" / "store"), the_run(memory / "whole" / ".bench")
    tables = [(r.path / "scores.csv").read_bytes() for r in (run, other)]
    same = truth(run) == truth(other) and tables[0] == tables[1]
    tally("folders that cannot be written", int(same), 1)
    assert same


# -- one door


def test_a_run_writes_through_the_door_alone(memory, size):
    """What opens a file for writing, makes, renames or removes a name while a run is done is a line of bench/door.py.

    Beside it stand: the removal of a unit's scratch folder, and the devices that the command line opens.
    """
    changing = {f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "link", "symlink", "truncate")}
    plain = [a for a in COMMAND if a not in ("--keep", "none")]
    rescore = [("rescore", "wordy", "--metric", "toys:Doubled")] if size(True, False) else []  # it imports torch
    for argv in (plain, (*plain, "--fresh"), ("show", "wordy"), *rescore):

        def watch():
            def hook(event, args):
                if event == "open":
                    path, _, flags = args
                    if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                        return
                    if str(path).startswith("/dev/"):
                        return
                elif event not in changing:
                    return
                frame, callers = sys._getframe(1), []
                while frame and len(callers) < 40:
                    callers.append(frame.f_code.co_filename)
                    frame = frame.f_back
                mine = [c for c in callers if "/bench/" in c or "/suites/" in c]
                clears = event in ("os.remove", "os.rmdir") and mine and mine[0].endswith("bench/worker.py")
                if mine and not clears and not mine[0].endswith("bench/door.py"):
                    os.write(2, f"writes beside the door: {event} {args} from {mine[0]}\n".encode())

            sys.dont_write_bytecode = True
            sys.addaudithook(hook)

        code, _, err, _ = bench(memory / "here", *argv, before=watch)
        assert code == 0 and "beside the door" not in err, err


def test_the_watch_over_the_door_sees_a_writer(memory):
    seen = []

    def hook(event, args):
        if event == "open" and args[2] & os.O_CREAT:
            seen.append(args[0])

    def work(ack):
        sys.addaudithook(hook)
        door.replace(memory / "x", b"data")
        ack(len(seen))

    assert outcome(*in_child(work)) == (0, ["1"])
