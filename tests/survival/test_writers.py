"""Several processes want to write one run: on one shard exactly one does, and the others say who; on several all do."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from faults import Acks, Wordy, in_child, lines_of, measure, outcome, the_run, truth

from bench import door
from bench.store import Run
from bench.types import Error

SUITE = Wordy(num=8)
HOST = socket.gethostname()


def writer(folder, gate, release, **more):
    """A child that waits at a gate, then measures; with the first record saved it waits until it is released."""

    def work(ack):
        os.read(gate, 1)

        def hold(key):
            ack(key)
            os.read(release, 1)

        try:
            measure(folder, SUITE, Acks(hold), **more)
        except Error as e:
            ack(f"refused {e} | {e.hint}")
            return e.exit_code
        return 0

    return in_child(work)


@contextlib.contextmanager
def gates(count):
    """`count` pipes as (what is read, what is closed to open it)."""
    pipes = [os.pipe() for _ in range(count)]
    try:
        yield pipes
    finally:
        for pipe in pipes:
            for fd in pipe:
                with contextlib.suppress(OSError):
                    os.close(fd)


def test_two_processes_start_on_one_shard(memory, quick, tally, trials):
    true = truth(measure(memory / "whole", SUITE))
    goal, failures, waits = trials(100, 8), [], []
    for i in range(goal):
        folder = memory / f"pair-{i}"
        if i % 2:  # the run is there already: what is left is wanted by both
            measure(folder, SUITE, shard="0/2")
        with gates(2) as ((gate, open_gate), (release, let_go)):
            children = {}
            for _ in range(2):
                pid, reader = writer(folder, gate, release)
                children[pid] = reader
            # a child inherits the ends that are closed here: it cannot see the gate open while another holds it
            os.write(open_gate, b"gg")
            begin = time.monotonic()
            first = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid
            waits.append(time.monotonic() - begin)
            os.write(let_go, b"r" * 20)
            (winner,) = children.keys() - {first}
            code, said = outcome(first, children[first])
            other, saved = outcome(winner, children[winner])
        run = the_run(folder)
        told = [text for text in said if text.startswith("refused")]
        good = code == 1 and other == 0 and len(told) == 1
        good = good and f"is being written by {HOST} pid {winner}" in told[0] and "nothing was changed" in told[0]
        good = good and truth(run) == true and len(lines_of(run)) == len(true) and len(saved) == len(true) - i % 2 * 2
        if not good:
            failures.append((i, code, other, said, saved, winner))
    tally("two writers", goal - len(failures), goal)
    print(f"the one that is refused knows it after {sorted(waits)[goal // 2]:.3f} s, at most {max(waits):.3f} s")
    assert not failures, failures[:3]


def test_what_another_finished_before_the_lock_is_not_measured_again(memory, quick, tally, monkeypatch):
    calm = measure(memory / "whole", SUITE)
    measure(memory / "store", SUITE, shard="0/2")
    check_free, begun = Run.check_free, []

    def overtaken(run, shard):
        check_free(run, shard)
        if not begun:
            begun.append(run)
            measure(memory / "store", SUITE)

    monkeypatch.setattr(Run, "check_free", overtaken)
    run = measure(memory / "store", SUITE)
    same = truth(run) == truth(calm) and len(lines_of(run)) == len(truth(calm))
    same = same and (run.path / "scores.csv").read_bytes() == (calm.path / "scores.csv").read_bytes()
    tally("two writers", int(same), 1)
    assert begun and same


def test_eight_processes_on_eight_shards(memory, quick, tally):
    suite = Wordy(num=32)
    calm = measure(memory / "whole", suite)

    def part(k):
        return in_child(lambda ack: measure(memory / "eight", suite, Acks(ack), shard=f"{k}/8") and 0)

    ended = [outcome(*child) for child in [part(k) for k in range(8)]]
    run = the_run(memory / "eight")
    same = [code for code, _ in ended] == [0] * 8 and truth(run) == truth(calm)
    same = same and (run.path / "scores.csv").read_bytes() == (calm.path / "scores.csv").read_bytes()
    same = same and sorted(lines_of(run)) == sorted(k for _, keys in ended for k in keys)
    tally("two writers", int(same), 1)
    assert same, ended


def test_a_holder_that_is_killed_lets_go(memory, quick, tally):
    true = truth(measure(memory / "whole", SUITE))
    with gates(2) as ((gate, open_gate), (release, _)):
        pid, reader = writer(memory / "store", gate, release)
        os.write(open_gate, b"g")
        while not os.path.exists(memory / "store" / "runs") or not (the_run(memory / "store") or 0):
            time.sleep(0.01)
        run = the_run(memory / "store")
        while not run.records():
            time.sleep(0.01)
        with pytest.raises(Error, match=f"{HOST} pid {pid}"):
            measure(memory / "store", SUITE)
        os.kill(pid, signal.SIGKILL)
        code, saved = outcome(pid, reader)
    assert f"{HOST} pid {pid}" in run.log("").with_suffix(".lock").read_text()  # left over, and no hindrance
    passed = code == -signal.SIGKILL and len(saved) == 1 and truth(measure(memory / "store", SUITE)) == true
    tally("two writers", int(passed), 1)
    assert passed


@pytest.mark.parametrize("left", ["", "junk", "pid", "{host} pid 1\n", "{host} pid {pid}\n", "\xff" * 500, "\n"])
def test_what_is_left_in_a_lock_file_hinders_nobody(memory, quick, tally, left):
    """Only a lock that is held counts, not the text: its pid may belong to another process by now."""
    run = measure(memory / "store", SUITE, shard="0/2")
    run.log("").with_suffix(".lock").write_bytes(left.format(host=HOST, pid=os.getpid()).encode("latin-1"))
    passed = measure(memory / "store", SUITE).complete()
    tally("two writers", int(passed), 1)
    assert passed


@pytest.mark.parametrize("host", [HOST, "elsewhere"])
def test_the_one_that_is_named_holds_the_lock_now(memory, tally, host):
    """A process took the lock and has not yet written its name: the one before it is not named in its stead."""
    path = memory / "units.lock"
    with door.lock(path, "run x"):
        stale = path.read_text()
    with gates(1) as ((gate, open_gate),):

        def work(ack):
            import fcntl

            fd = os.open(path, os.O_RDWR)
            fcntl.flock(fd, fcntl.LOCK_EX)
            ack("locked")
            os.read(gate, 1)
            time.sleep(0.1)  # the other looks before the name is there
            os.ftruncate(fd, 0)
            started = door._started(os.getpid())
            os.write(fd, f"{HOST} pid {os.getpid()}\n{started}\n".encode())
            os.read(gate, 1)

        # the lock is held under the text of a process that has ended
        ended, ended_reader = in_child(lambda ack: 0)
        outcome(ended, ended_reader)
        path.write_text(stale.replace(str(os.getpid()), str(ended)).replace(HOST, host))
        pid, reader = in_child(work)
        os.read(reader, len("locked\n"))
        os.write(open_gate, b"g")
        with pytest.raises(Error, match=f"run x is being written by {HOST} pid {pid}"), door.lock(path, "run x"):
            pass
        os.write(open_gate, b"g")
        outcome(pid, reader)
    with door.lock(path, "run x"):
        pass
    tally("two writers", 1, 1)


@pytest.mark.parametrize("options", ["rw,vers=3,local_lock=all", "rw,vers=4.2,local_lock=none"])
def test_where_a_mount_says_that_locks_are_of_this_host_alone_a_name_is_the_lock(memory, monkeypatch, tally, options):
    path, mounts = memory / "units.lock", memory / "mountinfo"
    device = os.stat(memory).st_dev
    mounts.write_text(f"65 40 {os.major(device)}:{os.minor(device)} / /mnt/disk rw,relatime - nfs server:/ {options}\n")
    monkeypatch.setattr(door, "Path", lambda name: mounts if name == "/proc/self/mountinfo" else Path(name))
    with door.lock(path, "run x"):
        made = path.with_suffix(".exclusive").exists()
    passed = made == options.endswith("all") and not path.with_suffix(".exclusive").exists()
    tally("two writers", int(passed), 1)
    assert passed


@pytest.mark.parametrize("text", ["", "elsewhere pid 7 boot/1"])
def test_who_holds_a_lock_by_name_is_named_as_far_as_it_is_known(memory, monkeypatch, tally, text):
    monkeypatch.setattr(door, "_only_here", lambda fd: True)
    (memory / "units.exclusive").write_text(text)
    named = r"is being written by (another process|elsewhere pid 7)$"
    with pytest.raises(Error, match=named) as caught, door.lock(memory / "units.lock", "run x"):
        pass
    tally("two writers", int("units.exclusive" in caught.value.hint), 1)
    assert "units.exclusive" in caught.value.hint


def test_a_log_is_locked_while_it_is_written(memory, tally):
    """So NFS refuses what a host writes that was cut off, when its locks were given to another meanwhile."""
    import fcntl

    log = door.Appender(memory / "units.jsonl")
    with open(memory / "units.jsonl", "rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    tally("two writers", 1, 1)


@pytest.mark.parametrize("what", ["a folder", "a link", "a pipe"])
def test_a_lock_that_cannot_be_taken_is_refused_by_name(memory, quick, tally, what):
    run = measure(memory / "store", SUITE, shard="0/2")
    path = run.log("").with_suffix(".lock")
    if what == "a folder":
        path.mkdir()
    elif what == "a link":
        path.symlink_to(memory / "victim")
    else:
        os.mkfifo(path)
    before = run.log("0/2").read_bytes()
    try:
        measure(memory / "store", SUITE)
        refused = what == "a pipe" and the_run(memory / "store").complete()  # it can be locked like a file
    except Error as e:
        refused = str(path) in str(e) and bool(e.hint)
    passed = refused and run.log("0/2").read_bytes() == before and not Path(memory / "victim").exists()
    tally("two writers", int(passed), 1)
    assert passed
