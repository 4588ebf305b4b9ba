"""A disk below a file system that logs each request, and what is on that disk when the power goes.

`qemu-storage-daemon` shows a file as another file, through FUSE, and logs every write and flush in between (driver
blklogwrites, in the format of the kernel's dm-log-writes); a loop device makes the shown file a disk.
"""

import contextlib
import ctypes
import mmap
import os
import struct
import subprocess
import time
from dataclasses import dataclass

SECTOR = 512
FLUSH, FUA, DISCARD = 1, 2, 4
MAGIC = 0x6A736677736872
NEW_MOUNTS = 0x20000  # CLONE_NEWNS
PACKAGES = {"qemu-storage-daemon": "qemu-system-common", "setpriv": "util-linux"}  # Debian's, of the programs used here


def call(*argv):
    """What a program printed; AssertionError with its complaint where it failed."""
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(map(str, argv))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def own_mounts():
    """What is mounted in here only this thread and its children see, and it goes with them, however they end.

    Else a process elsewhere that copies all mounts (`unshare --mount`) would keep a disk in use after its unmounting.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.getcwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        if libc.unshare(NEW_MOUNTS):
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            call("mount", "--make-rprivate", "/")
            yield
        finally:
            if libc.setns(before, NEW_MOUNTS):
                raise OSError(ctypes.get_errno(), "setns")
            os.chdir(here)
    finally:
        os.close(before)


@contextlib.contextmanager
def mounted(image, folder, options):
    """The file system in the file `image`, on a loop device that goes with it."""
    call("mount", "-o", f"loop,{options}", image, folder)
    try:
        yield
    finally:
        if subprocess.run(["umount", folder], capture_output=True).returncode:
            call("umount", "--lazy", folder)  # a test that failed may hold a file open


class LoggedDisk:
    """The file `shown`, a disk whose blocks lie in `image` and whose requests are in `log`."""

    def __init__(self, folder, image):
        self.image, self.log, self.shown, self.ready = (folder / n for n in ("disk", "log", "shown", "ready"))
        self.base = image
        call("cp", "--sparse=always", image, self.image)

    def __enter__(self):
        self.log.touch()
        self.shown.touch()
        self.daemon = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "TERM", "qemu-storage-daemon", "--pidfile", self.ready),
                *("--blockdev", f"file,node-name=disk,discard=unmap,filename={self.image}"),
                *("--blockdev", f"file,node-name=log,filename={self.log}"),
                *("--blockdev", "blklogwrites,node-name=logged,discard=unmap,file=disk,log=log"),
                *("--export", f"fuse,id=shown,node-name=logged,writable=on,mountpoint={self.shown}"),
            ],
            start_new_session=True,  # Ctrl-C is for the tests: they unmount before the disk goes
        )
        try:
            until = time.monotonic() + 20
            while not self.ready.exists():
                assert self.daemon.poll() is None and time.monotonic() < until, "qemu-storage-daemon shows nothing"
                time.sleep(0.01)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.daemon.terminate()
        try:
            self.daemon.wait(20)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()

    def position(self):
        """Where the next request will be logged."""
        return os.stat(self.log).st_size

    def requests(self):
        """What was logged, in order."""
        found, at, end = [], SECTOR, self.position()
        with open(self.log, "rb") as file:
            assert struct.unpack("<Q", file.read(8)) == (MAGIC,), "another format"
            while at < end:
                file.seek(at)
                sector, count, flags, _ = struct.unpack("<QQQQ", file.read(32))
                data = 0 if flags & DISCARD else count * SECTOR
                found.append(Request(flags, sector * SECTOR, count * SECTOR, at + SECTOR, at + SECTOR + data))
                at = found[-1].end
        assert at == end, "the log is cut"
        return found


@dataclass(frozen=True)
class Request:
    """One request that the disk has answered."""

    flags: int
    offset: int
    size: int
    at: int  # its data in the log
    end: int  # the position in the log after it


class Replay:
    """Builds, for moments in their order, the disk that a power cut leaves; bytes in `head` are not torn apart."""

    def __init__(self, disk, head):
        self.requests, self.head, self.done = disk.requests(), head, 0
        self.durable = disk.image.with_name("durable")
        call("cp", "--sparse=always", disk.base, self.durable)
        with open(disk.log, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def cut(self, count, target, rng=None):
        """Writes to `target` what is there after `count` requests; the number of those that are not there as a whole.

        Without `rng` all are. With it each since the last flush is kept, lost or torn, as a cache that is volatile
        does it; what came before the flush is kept, and what was to go around the cache.
        """
        flushes = [i for i in range(self.done, count) if self.requests[i].flags & FLUSH]
        flushed = flushes[-1] if flushes else self.done
        with open(self.durable, "r+b") as file:
            for request in self.requests[self.done : flushed]:
                self._write(file, request)
        self.done = flushed
        call("cp", "--sparse=always", self.durable, target)
        harmed = 0
        with open(target, "r+b") as file:
            for request in self.requests[flushed:count]:
                fate = rng.choice(self._fates(request)) if rng else "kept"
                if fate == "kept":
                    self._write(file, request)
                elif fate == "torn":
                    for start in rng.sample(range(0, request.size, SECTOR), rng.randrange(1, request.size // SECTOR)):
                        self._write(file, request, start, SECTOR)
                harmed += fate != "kept"
        return harmed

    def _fates(self, request):
        if not request.size or request.flags & FUA:
            return ("kept",)
        apart = request.size > SECTOR and not request.flags & DISCARD
        if apart and (request.offset >= self.head.stop or request.offset + request.size <= self.head.start):
            return "kept", "lost", "torn"
        return "kept", "lost"

    def _write(self, file, request, start=0, size=None):
        size = size or request.size
        file.seek(request.offset + start)
        at = request.at + start
        file.write(bytes(size) if request.flags & DISCARD else self.data[at : at + size])
