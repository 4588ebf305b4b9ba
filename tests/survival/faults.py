"""Faults for the door: its operations on the disk are counted, failed, cut, recorded; and what a power cut leaves.

`bench.door` reaches the disk through the module `os` alone, so that a `Disk` in its place sees every operation. The
suites here are what the tests of survival run: small, with rows of some kilobytes, in this process or by name.
"""

import contextlib
import hashlib
import itertools
import os
import stat
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # named as a file, this module has no test run around it

from toys import Drawing, Painter

from bench import Store, door, execute, execution, registry
from bench.config import How
from bench.engine import LocalEngine
from bench.execution import Observer

HERE = Path(__file__).resolve()
TEXT = "A line of three kilobytes is written in several pieces when the disk has it so. "


@dataclass(frozen=True)
class Wordy(Drawing):
    """Drawing, with a text of `width` characters in each row."""

    width: int = 1500
    name = "wordy"

    def run(self, unit, model, ctx):
        for ids, media in super().run(unit, model, ctx):
            yield (
                ids,
                {**media, "text": [(f"{id} " + TEXT * (1 + self.width // len(TEXT)))[: self.width] for id in ids]},
            )


@dataclass(frozen=True)
class Journal(Drawing):
    """Drawing that notes each unit in the file `journal` when it begins it."""

    journal: str = ""
    name = "journal"

    def run(self, unit, model, ctx):
        fd = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{unit.id}\n".encode())
        os.close(fd)
        yield from super().run(unit, model, ctx)


class InGroups(LocalEngine):
    """A worker in this process whose records come three together, as those of many workers may."""

    @contextlib.contextmanager
    def open(self, work, **live):
        with super().open(work, **live) as measure:
            yield lambda units: (
                [record for group in measure(units[i : i + 3]) for record in group] for i in range(0, len(units), 3)
            )


class Acks(Observer):
    """Calls `ack(key)` for a record once it was reported as saved; keeps what was said."""

    def __init__(self, ack=lambda key: None):
        self.ack, self.said = ack, []

    def done(self, unit, record):
        self.ack(record.key)

    def say(self, text):
        self.said.append(text)


CPU = How(devices="cpu", threads=1, keep="none")


def measure(folder, suite=None, observer=None, **more):
    """A run of a live toy in this process, over the real door."""
    store, observer = Store(folder), observer or Acks()
    how = more.pop("how", CPU)
    suite = suite or Wordy()
    return execute(suite, Painter(), store=store, identity={"name": "painter"}, how=how, observer=observer, **more)


def the_run(folder):
    """The only run of a store; None before there is one."""
    found = list(Store(folder).runs())
    assert len(found) <= 1
    return found[0] if found else None


def truth(run):
    """What a run's records say, without how long they took: {key: (unit, status, rows, blobs)}."""
    return {r.key: (r.unit, r.status, r.rows, dict(r.blobs)) for r in run.records().values()}


def lines_of(run):
    """The keys on all whole lines of a run's logs, repeats included."""
    from bench.records import read_lines

    return [v["key"] for path in sorted(run.path.glob("units*.jsonl")) for v in read_lines(path)[0]]


@contextlib.contextmanager
def as_builtin():
    """`drawing`, `wordy`, `journal` and `painter` as names that come with the harness: they run in this process.

    Provenance is empty meanwhile: git and the list of packages take most of the time of so small a run.
    """
    found = {
        "suites": {"drawing": "toys:Drawing", "wordy": "faults:Wordy", "journal": "faults:Journal"},
        "adapters": {"painter": "toys:Painter", "faulty": "toys:Faulty"},
    }

    def entries(kind):
        return tuple(registry.Entry(kind, n, v, registry.OWN, True) for n, v in found.get(kind, {}).items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entries", entries)
        patch.setattr(execution, "_provenance", dict)
        yield


@pytest.fixture
def quick(monkeypatch):
    """Runs without provenance, which asks git."""
    monkeypatch.setattr(execution, "_provenance", dict)


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: on a disk fsync takes most of the time, and few kills land elsewhere."""
    root = Path("/dev/shm")
    if not (root.is_dir() and os.access(root, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=root, prefix="survival-") as folder:
        yield Path(folder)


def in_child(work, ack=None):
    """Forks; the child calls `work(ack)` and ends with what it returns. Gives (exit code or -signal, acked, seconds).

    `ack(text)` in the child is a line in a pipe, written after the event that it stands for.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(reader)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            code = work(lambda text: os.write(writer, f"{text}\n".encode())) or 0
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def outcome(pid, reader):
    """Waits for a child of `in_child`: (exit code, or the signal as a negative number; the lines it acknowledged)."""
    with os.fdopen(reader, "rb") as file:
        acked = file.read().decode().split("\n")[:-1]  # a line that was cut was not told
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), acked


# -- the disk


@dataclass(frozen=True)
class Operation:
    """One change, or one request to make changes durable."""

    number: int
    kind: str  # create, write, truncate, sync, sync folder, mkdir, rename, unlink
    path: str
    data: bytes = b""
    target: str = ""
    offset: int = 0  # of a write; the size of a truncate


class Disk:
    """Stands in for `os` in bench.door: `meet(operation, act)` is called for every operation and decides what happens.

    `act()` does it; `act(n)` does the first n bytes of a write. Here it is counted and done.
    """

    def __init__(self):
        self.count = 0
        self.fired = []  # the operations that were interfered with

    def __getattr__(self, name):
        return getattr(os, name)

    def meet(self, operation, act):
        return act()

    def _meet(self, kind, path, act, **more):
        self.count += 1
        return self.meet(Operation(self.count, kind, os.path.abspath(os.fspath(path)), **more), act)

    @staticmethod
    def _path(fd):
        return os.readlink(f"/proc/self/fd/{fd}")

    def open(self, path, flags, mode=0o777):
        if flags & os.O_CREAT and not os.path.lexists(path):
            return self._meet("create", path, lambda: os.open(path, flags, mode))
        return os.open(path, flags, mode)

    def write(self, fd, data):
        return self._write(fd, data, os.fstat(fd).st_size, lambda part: os.write(fd, part))

    def pwrite(self, fd, data, offset):
        return self._write(fd, data, offset, lambda part: os.pwrite(fd, part, offset))

    def _write(self, fd, data, offset, write):
        data = bytes(data)
        return self._meet(
            "write", self._path(fd), lambda n=None: write(data if n is None else data[:n]), data=data, offset=offset
        )

    def fsync(self, fd):
        kind = "sync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync"
        return self._meet(kind, self._path(fd), lambda: os.fsync(fd))

    def ftruncate(self, fd, size):
        return self._meet("truncate", self._path(fd), lambda: os.ftruncate(fd, size), offset=size)

    def mkdir(self, path):
        return self._meet("mkdir", path, lambda: os.mkdir(path))

    def rename(self, path, target):
        target = os.path.abspath(os.fspath(target))
        return self._meet("rename", path, lambda: os.rename(path, target), target=target)

    def unlink(self, path):
        return self._meet("unlink", path, lambda: os.unlink(path))

    @contextlib.contextmanager
    def at_work(self):
        """The door uses this disk."""
        door.os = self
        try:
            yield self
        finally:
            door.os = os


class Dying(Disk):
    """The process dies at operation `number`: before it, after `part` of the bytes of a write (negative: all but), or
    after it."""

    def __init__(self, number, when):
        super().__init__()
        self.number, self.when = number, when

    def meet(self, operation, act):
        if operation.number != self.number:
            return act()
        if self.when == "after":
            act()
        elif self.when != "before":
            act(max(1, int(len(operation.data) * self.when)))
        os._exit(86)


class Failing(Disk):
    """Operation `number` fails with `code`, once or from then on; after a short write where `short`."""

    def __init__(self, number, code, once=True, short=False):
        super().__init__()
        self.number, self.code, self.once, self.short = number, code, once, short
        self.failed_syncs, self.touched_again = set(), []

    def fsync(self, fd):
        try:
            return super().fsync(fd)
        except OSError:
            self.failed_syncs.add(fd)
            raise

    def close(self, fd):
        self.failed_syncs.discard(fd)
        os.close(fd)

    def open(self, path, flags, mode=0o777):
        fd = super().open(path, flags, mode)
        self.failed_syncs.discard(fd)
        return fd

    def meet(self, operation, act):
        if any(self._path(fd) == operation.path for fd in self.failed_syncs):
            self.touched_again.append(operation)
        if operation.number == self.number and self.short and len(operation.data) > 1:
            self.number += 1  # the disk took a part; the rest fails
            return act(len(operation.data) // 2)
        if operation.number == self.number or (operation.number > self.number and not self.once):
            self.fired.append(operation)
            raise OSError(self.code, os.strerror(self.code), operation.path)
        return act()


class Dead(BaseException):
    """What a process that was killed in thought raises at every further operation."""


class Recorder(Disk):
    """Keeps the operations, with notes between them; from operation `dies_at` on the process is dead, in thought."""

    def __init__(self, dies_at=None):
        super().__init__()
        self.log, self.dies_at = [], dies_at

    def note(self, text):
        self.log.append(text)

    def meet(self, operation, act):
        if self.dies_at is not None and operation.number >= self.dies_at:
            self.fired.append(operation)
            raise Dead
        result = act()
        self.log.append(operation)
        return result


# -- what a power cut leaves


@dataclass
class File:
    """A file's durable bytes, and the writes and cuts since then: (offset, data), or (size, None) for a cut."""

    durable: bytes = b""
    since: list = field(default_factory=list)


@dataclass
class Entry:
    """A change of a name in a folder: it means `inode` from now on, or nothing."""

    folder: int
    name: str
    inode: int | None
    durable: bool = False
    gone: tuple = ()  # (folder, name) that a rename takes away

    @property
    def names(self):
        return {(self.folder, self.name), *([self.gone] if self.gone else [])}


class Replay:
    """What may be on a disk if the power fails now, as the operations of a log are taken one after another.

    A write since the last fsync of its file may be kept, be lost, be cut at each 512 bytes, or be zeros; a name that
    was made, changed or taken away since the last fsync of its folder may be so or not, where what it builds on is so.
    """

    SECTOR = 512

    def __init__(self, root):
        self.root = os.path.abspath(root)
        self.inodes = {0: None}  # number -> File, or None for a folder
        self.live = {}  # (folder, name) -> inode
        self.changes = []  # Entry, in order
        for folder, folders, files in os.walk(self.root):
            for name in sorted(folders + files):
                path = os.path.join(folder, name)
                self._name(path, None if os.path.isdir(path) else File(Path(path).read_bytes())).durable = True

    def _find(self, path):
        """(inode of the folder, name) of a path below the root."""
        at = 0
        *folders, name = os.path.relpath(path, self.root).split(os.sep)
        for part in folders:
            at = self.live[at, part]
        return at, name

    def _name(self, path, content):
        number = len(self.inodes)
        self.inodes[number] = content
        return self._set(path, number)

    def _set(self, path, number, gone=()):
        where = self._find(path)
        change = Entry(*where, number, gone=gone)
        self.changes.append(change)
        if number is None:
            del self.live[where]
        else:
            self.live[where] = number
        return change

    def take(self, operation):
        match operation.kind:
            case "mkdir":
                self._name(operation.path, None)
            case "create":
                self._name(operation.path, File())
            case "write":
                self._file(operation.path).since.append((operation.offset, operation.data))
            case "truncate":
                self._file(operation.path).since.append((operation.offset, None))
            case "sync":
                file = self._file(operation.path)
                file.durable, file.since = written(file.durable, file.since), []
            case "sync folder":
                folder = 0 if operation.path == self.root else self.live.get(self._find(operation.path))
                for change in self.changes:
                    change.durable |= change.folder == folder
            case "rename":
                gone = self._find(operation.path)
                self._set(operation.target, self.live.pop(gone), gone)
            case "unlink":
                self._set(operation.path, None)

    def _file(self, path):
        return self.inodes[self.live[self._find(path)]]

    def states(self, rng, most=96):
        """Trees {path: bytes, or None for a folder}: every way in which the pending changes may have ended, or `most`
        of them by chance."""
        names = [i for i, c in enumerate(self.changes) if not c.durable]
        writes = [(n, i) for n, f in self.inodes.items() if f for i in range(len(f.since))]
        choices = [(True, False)] * len(names)
        for number, i in writes:
            data = self.inodes[number].since[i][1]
            cuts = range(self.SECTOR, len(data), self.SECTOR) if data else ()
            choices.append(("kept", "lost", *(("zeros",) if data else ()), *cuts))
        ways = 1
        for choice in choices:
            ways *= len(choice)
        if ways <= most:
            chosen = itertools.product(*choices)
        else:
            chosen = [[rng.choice(choice) for choice in choices] for _ in range(most)]
        for outcomes in chosen:
            done = dict(zip(names, outcomes, strict=False))
            files = dict(zip(writes, outcomes[len(names) :], strict=True))
            yield self._tree(done, files)

    def least(self):
        """The tree with nothing in it that was not made durable."""
        names = {i: False for i, change in enumerate(self.changes) if not change.durable}
        return self._tree(names, {(n, i): "lost" for n, f in self.inodes.items() if f for i in range(len(f.since))})

    def _tree(self, done, files):
        present, missing = {}, set()
        for i, change in enumerate(self.changes):
            if not done.get(i, True) or change.names & missing:
                missing |= change.names  # what builds on it is not there either
                continue
            if change.gone:
                present.pop(change.gone, None)
            present[change.folder, change.name] = change.inode
        tree = {}

        def descend(folder, path):
            for (parent, name), number in present.items():
                if parent != folder or number is None:
                    continue
                file, inner = self.inodes[number], f"{path}/{name}" if path else name
                if file is None:
                    tree[inner] = None
                    descend(number, inner)
                else:
                    tree[inner] = written(file.durable, [(*w, files[number, i]) for i, w in enumerate(file.since)])

        descend(0, "")
        return tree


def written(data, changes):
    """The bytes of a file after writes (offset, data, outcome) and cuts (size, None, outcome)."""
    for offset, new, *outcome in changes:
        how = outcome[0] if outcome else "kept"
        if how == "lost":
            continue
        if new is None:
            data = data[:offset].ljust(offset, b"\0")
            continue
        new = new if how == "kept" else bytes(len(new)) if how == "zeros" else new[:how]
        data = data[:offset].ljust(offset, b"\0") + new + data[offset + len(new) :]
    return data


def crash_states(base, log, rng, most=96):
    """Distinct (tree, notes so far) of every moment of a log; `base` holds what was on the disk when it began."""
    replay, notes, seen = Replay(base), [], set()
    for step in [None, *log]:
        if isinstance(step, str):
            notes.append(step)
            continue
        if step is not None:
            replay.take(step)
        for tree in replay.states(rng, most):
            mark = hashlib.sha256(repr((sorted(tree.items()), notes)).encode()).digest()
            if mark not in seen:
                seen.add(mark)
                yield tree, tuple(notes)


def lay_out(tree, folder):
    """Writes a tree into an empty folder."""
    folder.mkdir()
    for path, data in tree.items():
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
