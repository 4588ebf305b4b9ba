"""The one door through which the harness writes: append, replace, exclusive lock. Durable, or an Error that says so."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.types import Error, Stop


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> Path:
    """Creates a folder and its parents, durably."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    with _explained("create", missing[0] if missing else folder):
        with contextlib.suppress(PermissionError):
            if _is_empty(folder):  # a process that was killed may have made it, but not yet durable
                sync_folder(folder.parent)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            sync_folder(path.parent)
    return missing[0] if missing else folder


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def settle(path: Path) -> None:
    """Makes a file that was found whole durable, and its name: who wrote it may have been killed before that."""
    with _explained("write", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """Writes every byte: a short write is continued, so that it never counts as whole."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a whole file or leaves the old one: temporary file beside it, fsync, rename, fsync of the folder."""
    with _explained("write", path):
        temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def rename(path: Path, target: Path) -> None:
    """Gives a file or folder another name beside it, durably."""
    with _explained("rename", path):
        os.rename(path, target)
        sync_folder(target.parent)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into an empty folder beside `path`, makes that durable and puts it in place of `path`."""
    with _explained("write", path):
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
        old = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.old")
        os.mkdir(temporary)
        try:
            fill(temporary)
            for folder, _, files in os.walk(temporary):
                for name in files:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_folder(Path(folder))
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def sweep(path: Path) -> None:
    """Removes what a `replace` or `replace_folder` of `path` left beside it when it was killed. Hold its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.*"):
        if left.suffix in (".tmp", ".old"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def truncate(path: Path, size: int) -> None:
    """Cuts a file to its first `size` bytes, durably."""
    with _explained("cut", path):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)


class Appender:
    """A file that only grows. An `append` is durable when it returns; after a failure the file is not touched again."""

    def __init__(self, path: Path):
        import fcntl

        self.path = path
        with _explained("open", path):
            self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                with contextlib.suppress(OSError):
                    # NFS v4 forgets the locks of a host that was cut off, and refuses its writes under a lock that is
                    # lost; `lock` is on another file, and so would not stop it from writing beside its successor
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self.fd).st_size == 0:  # new, or made by a process killed before its name was durable
                    sync_folder(path.parent)
            except BaseException:
                self.close()
                raise

    def append(self, data: bytes) -> None:
        if self.fd < 0:
            raise Stop(f"{self.path} is closed after a failed write", hint="run the same command again")
        try:
            with _explained("append to", self.path):
                write_all(self.fd, data)
                os.fsync(self.fd)
        except BaseException:
            self.close()  # a second fsync may lie: what is on disk is found out by reading it again
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_held() -> Iterator[list[int]]:
    """Signals that end the process are noted in the list instead, until what must be whole is whole. A second one acts.

    Handlers are exchanged, not signals blocked: a signal may reach any thread of the process; the handler runs here.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def note(number: int, frame: Any) -> None:
        arrived.append(number)
        signal.signal(number, before[number])

    before = {n: h for n in ENDING if (h := signal.getsignal(n)) not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, note)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds `path` for this process alone; the kernel lets go when the process dies. `what` is named to the loser."""
    import fcntl

    owner = f"{socket.gethostname()} pid {os.getpid()}"
    with _explained("lock", path):  # O_SYNC: other hosts that share the folder see at once who holds it
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_SYNC, 0o666)
    exclusive = None
    until = time.monotonic() + PATIENCE
    try:
        by_name = _only_here(fd)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as e:
                if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    by_name = True
                    break
            holder, _, started = _text(path).partition("\n")
            if _runs(holder, started) or time.monotonic() > until:
                raise Error(
                    f"{what} is being written by {holder or 'another process'}",
                    hint="wait for it, or stop it; nothing was changed",
                )
            time.sleep(0.01)
        if by_name:
            exclusive = _lock_by_name(path, what, owner)
        with _explained("lock", path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{owner}\n{_started(os.getpid())}\n".encode(), 0)
        yield
    finally:
        if exclusive:
            with contextlib.suppress(OSError):
                os.unlink(exclusive)
        os.close(fd)


PATIENCE = 0.5  # seconds for one that is just ending, or has the lock and has not yet written who it is
ONLY_HERE = {"local_lock=all", "local_lock=flock", "localflock"}  # options of mounts, of NFS and Lustre


def _only_here(fd: int) -> bool:
    """Are the locks of its file system known to this host alone, though others may write there?"""
    device = os.fstat(fd).st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    options = [m.split()[-1] for m in mounts if m.split()[2] == f"{os.major(device)}:{os.minor(device)}"]
    return any(ONLY_HERE & set(o.split(",")) for o in options)


def _text(path: Path) -> str:
    """What a lock file says. It is opened anew: that is when NFS asks the server."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.read(fd, 400).decode("utf-8", "replace").strip()
        finally:
            os.close(fd)
    except OSError:  # it was just removed
        return ""


def _runs(holder: str, started: str) -> bool:
    """Is that a process of this host that runs now? The text may still be of one that had the lock before."""
    host, _, pid = holder.partition(" pid ")
    return host == socket.gethostname() and pid.isdigit() and started != "" and _started(int(pid)) == started


def _lock_by_name(path: Path, what: str, owner: str) -> Path:
    """For file systems where flock holds off nobody, or not the other hosts: an exclusively created file; a stale one
    of this host is taken over."""
    name = path.with_suffix(".exclusive")
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            holder = _text(name)  # empty: it is just being written or was just removed
            host, _, rest = holder.partition(" pid ")
            pid, _, started = rest.partition(" ")
            stale = host == socket.gethostname() and pid.isdigit() and _started(int(pid)) != started
            if stale:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            if (holder and not stale) or time.monotonic() > until:
                raise Error(
                    f"{what} is being written by {f'{host} pid {pid}' if pid else holder or 'another process'}",
                    hint=f"if that process is gone, remove {name}",
                ) from None
            time.sleep(0.01)
            continue
        with os.fdopen(fd, "w") as file:
            file.write(f"{owner} {_started(os.getpid())}")
        return name


def _started(pid: int) -> str:
    """Boot id and start time of a process: a pid that was reused differs; empty when it does not run."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[19]}"
    except OSError:
        return ""


@contextlib.contextmanager
def _explained(verb: str, path: Path) -> Iterator[None]:
    """Turns an OSError into a Stop that names the file and the reason: nothing is downgraded to a warning."""
    try:
        yield
    except OSError as e:
        hint = "what was saved before is still there; make room or mend the folder, then run the same command again"
        named = e.filename if e.filename and not str(e.filename).endswith(".tmp") else path  # no name that nobody knows
        raise Stop(f"cannot {verb} {named}: {e.strerror or e}", hint=hint) from e
