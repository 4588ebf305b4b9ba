"""The power goes, below the file system: of what was reported as saved nothing is lost, on ext4, xfs and btrfs.

A disk logs what a file system asks of it while runs are measured there, killed and continued. From the log the disk is
built as it was at each flush, and between two flushes with any of the writes since the last one lost or torn. It is
mounted, which repairs the file system; what lies on it is checked, healed and finished.
"""

import contextlib
import os
import random
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from blocks import FLUSH, FUA, PACKAGES, LoggedDisk, Replay, call, mounted, own_mounts
from faults import Acks, Disk, Dying, InGroups, in_child, measure, outcome
from test_crash import SUITE, check_state, operations, whole
from test_resumes import deterministic, files, latents, recipes, run, states  # noqa: F401  (fixtures, too)

from bench import door
from bench.types import Error

pytestmark = pytest.mark.nightly


@dataclass(frozen=True)
class FileSystem:
    """How one is made, mounted and checked; `head`: its superblock, which it expects a disk to write whole or not."""

    make: tuple
    check: tuple
    package: str
    head: range = range(0)
    options: str = "defaults"


MEGABYTES = 512
EXT4 = ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0")
FILE_SYSTEMS = {
    "ext4": FileSystem(EXT4, ("e2fsck", "-fn"), "e2fsprogs", range(1024, 2048)),
    "ext4-writeback": FileSystem(
        EXT4, ("e2fsck", "-fn"), "e2fsprogs", range(1024, 2048), "data=writeback,noauto_da_alloc"
    ),
    "xfs": FileSystem(("mkfs.xfs", "-q"), ("xfs_repair", "-n"), "xfsprogs"),
    "btrfs": FileSystem(("mkfs.btrfs", "-q"), ("btrfs", "check"), "btrfs-progs", range(1 << 16, (1 << 16) + 4096)),
}


@pytest.fixture(params=FILE_SYSTEMS)
def system(request):
    """Each file system that this machine has and whose tools are installed."""
    found = FILE_SYSTEMS[request.param]
    if os.geteuid():
        pytest.skip("power cuts need root, to mount what they leave")
    packages = {**PACKAGES, found.make[0]: found.package, found.check[0]: found.package}
    missing = [package for program, package in packages.items() if not shutil.which(program)]
    if missing:
        pytest.skip(f"power cuts need Debian's {', '.join(dict.fromkeys(missing))}")
    for path in ("/dev/loop-control", "/dev/fuse"):
        if not os.path.exists(path):
            pytest.skip(f"power cuts need {path}")
    name = found.make[0].removeprefix("mkfs.")
    subprocess.run(f"modprobe -q {name}", shell=True, capture_output=True)  # where it is a module
    if name not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"this kernel has no {name}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(own_mounts())
        except PermissionError:
            pytest.skip("power cuts need the right to mount")
        yield found


class World:
    """A file system on a logged disk, and what was reported as saved there: {folder: [(position in the log, what)]}."""

    def __init__(self, system, folder):
        self.system, self.folder, self.said = system, folder, {}
        self.mnt, self.fresh, self.left = folder / "mnt", folder / "fresh", folder / "left"
        self.mnt.mkdir(parents=True)
        with open(self.fresh, "wb") as file:
            file.truncate(MEGABYTES << 20)
        call(*system.make, self.fresh)

    @contextlib.contextmanager
    def at_work(self):
        self.disk = LoggedDisk(self.folder, self.fresh)
        with self.disk, mounted(self.disk.shown, self.mnt, self.system.options):
            self.begun = self.disk.position()
            yield
        self.requests = self.disk.requests()

    def note(self, name, what):
        self.said.setdefault(name, []).append((self.disk.position(), what))

    def live(self, name, death=(0, ""), **more):
        """A run in a child, which dies at one operation if it gets there; did it?"""

        def work(ack):
            with Dying(*death).at_work():
                measure(self.mnt / name, SUITE, Acks(lambda key: ack(f"{self.disk.position()} {key}")), **more)
            ack(f"{self.disk.position()} scores.csv")

        code, lines = outcome(*in_child(work))
        assert code in (0, 86)
        told = (line.split() for line in lines)
        self.said.setdefault(name, []).extend((int(position), what) for position, what in told)
        return code == 86

    def moments(self):
        """Numbers of requests done: at each flush since the work began, and where writes wait for the next one."""
        flushes, waiting, pending = [], [], False
        for count, request in enumerate(self.requests, 1):
            flush = bool(request.flags & FLUSH)
            pending = (pending and not flush) or (request.size > 0 and not request.flags & FUA)
            if request.end > self.begun:
                flushes += [count] * flush
                waiting += [count] * pending
        return flushes, waiting

    @contextlib.contextmanager
    def cut(self, replay, count, rng):
        """The power goes after so many requests, with what the disk had in its cache where `rng` says so.

        Gives what had been told by then, with the file system mounted again; checks it in the end.
        """
        while not replay.cut(count, self.left, rng) and rng:
            pass  # by chance nothing was lost
        position = self.requests[count - 1].end
        with mounted(self.left, self.mnt, self.system.options):
            yield {name: [what for at, what in told if at <= position] for name, told in self.said.items()}
        call(*self.system.check, self.left)


def examine(folder, told, true, scores):
    """Checks and finishes one run: (lost, false, what else is wrong)."""
    lost = false = 0
    if not told and not folder.exists():
        return lost, false, []
    if "scores.csv" in told:
        lost += [p.read_bytes() for p in folder.glob("runs/*/scores.csv")] != [scores]
    try:
        a, false, wrong = check_state(folder, told, true, scores)
    except Error as e:
        a, wrong = 1, [str(e)]
    return lost + a, false, wrong


def examine_training(out, told, recipe, trained):
    """The same for a training: it goes on where it said that it had saved, and ends with the same files."""
    begun = []
    found = files(run(recipe, out, save_every=1e9, progress=lambda done, _: begun.append(done)))
    first = begun[0] - 1 if begun else recipe.total
    return int(first < max(told, default=0)), 0, ["other files"] if found != trained else []


def test_the_power_goes_below_the_file_system(memory, quick, tally, size, trials, recipes, system):  # noqa: F811
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    true, scores, _ = whole(memory / "whole")
    recipe = replace(recipes["dit"], steps=6)
    trained = files(run(recipe, memory / "trained", save_every=1e9))
    made = operations(memory / "recorded", lambda folder: measure(folder, SUITE))
    appends = [o.number for o in made if o.kind == "write" and o.path.endswith("units.jsonl")]

    world, died = World(system, memory / "world"), 0
    with world.at_work():
        world.live("undisturbed")
        world.live("together", engine=InGroups())
        for i in range(size(3, 2)):
            died += world.live(f"killed-{i}", (rng.choice(appends), 0.5))  # inside a record
            for _ in range(i % 3):
                died += world.live(f"killed-{i}", (rng.randrange(1, len(made)), rng.choice(("before", "after"))))
            world.live(f"killed-{i}")
        out = world.mnt / "training"
        run(recipe, out, save_every=0.0, progress=lambda done, _: world.note("training", done))
        world.note("training", recipe.total)
    assert died >= size(3, 2)

    flushes, waiting = world.moments()
    flushes = flushes[:: size(1, 1 + len(flushes) // 8)]
    chosen = [(count, None) for count in flushes]
    chosen += [(rng.choice(waiting), rng) for _ in range(trials(100, 8))]
    replay = Replay(world.disk, system.head)
    passed = lost = false = held = 0
    problems = Counter()
    for count, chance in sorted(chosen, key=lambda c: c[0]):
        wrong, harm = [], Counter()
        try:
            with world.cut(replay, count, chance) as told:
                for name, what in told.items():
                    held += len(what)
                    if name == "training":
                        a, b, more = examine_training(out, what, recipe, trained)
                    else:
                        a, b, more = examine(world.mnt / name, what, true, scores)
                    lost, false, wrong = lost + a, false + b, wrong + more
                    harm.update(lost=a, false=b)
        except (AssertionError, Error, OSError) as e:  # not to be mounted or read, or damaged
            wrong.append(str(e))
        passed += not wrong and not harm.total()
        problems.update(wrong)
    tally("power cuts", passed, len(chosen), lost=lost, false=false)
    print(f"{len(flushes)} at a flush, {len(chosen) - len(flushes)} between two, of {len(world.requests)} requests")
    print(f"{held} times something reported as saved was looked for; {died} runs killed, {problems.total()} problems")
    assert passed == len(chosen), problems
    assert held > len(chosen)


class Forgetful(Disk):
    """Says that it has made durable what it has not."""

    def open(self, path, flags, mode=0o777):
        return super().open(path, flags & ~os.O_SYNC, mode)

    def fsync(self, fd):
        self.fired.append(fd)


def test_without_fsync_the_power_takes_what_was_reported(memory, quick, system):
    """So the cuts bite, and the checks see it."""
    true, scores, _ = whole(memory / "whole")
    world = World(system, memory / "world")
    with world.at_work(), Forgetful().at_work() as forgetful:
        for name in ("first", "second"):
            measure(world.mnt / name, SUITE, Acks(lambda key, name=name: world.note(name, key)))
    assert forgetful.fired
    flushes, waiting = world.moments()
    some = waiting[:: 1 + len(waiting) // 16]
    moments = [(count, None) for count in flushes] + [(count, random.Random(count)) for count in some]
    replay = Replay(world.disk, system.head)
    lost = []
    for count, chance in sorted(moments, key=lambda m: m[0]):
        with world.cut(replay, count, chance) as told:
            assert all(len(what) == len(true) for what in told.values())
            lost.append(sum(examine(world.mnt / name, what, true, scores)[0] for name, what in told.items()))
    print(f"records lost at {sum(map(bool, lost))} of {len(lost)} cuts, in all {sum(lost)}")
    assert any(lost)


def test_what_the_door_made_durable_has_gone_through_a_flush(memory, system):
    """Where the log would miss a flush or a byte, it would prove nothing."""
    world, spans = World(system, memory / "world"), []
    with world.at_work():
        appender = door.Appender(world.mnt / "log")
        for i in range(20):
            token, before = f"token {i:03d} ".encode() * 500, world.disk.position()
            if i % 2:
                appender.append(token)
            else:
                door.replace(world.mnt / f"file-{i}", token)
            spans.append((token[:512], before, world.disk.position()))
        appender.close()
    log = world.disk.log.read_bytes()
    for token, before, after in spans:
        holds = [r.at for r in world.requests if before < r.end <= after and token in log[r.at : r.end]]
        flushed = [r.end for r in world.requests if r.flags & FLUSH and r.end <= after]
        assert holds and flushed and min(holds) < max(flushed)
    Replay(world.disk, system.head).cut(len(world.requests), world.left)
    call("cmp", world.left, world.disk.image)
