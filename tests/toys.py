"""Suites, metrics and adapters small enough to know every number of; also a file that `path.py:Name` can name.

The pictures are NumPy arrays that depend on the item and its seed alone, so every batch size gives the same bytes.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import Autoencoder, DenoiserAccess, Estimate, Suite, TextToImage, Unit, Weights


@dataclass(frozen=True)
class Mean:
    """The mean of one number per item; also keeps a feature of two numbers."""

    scale: float = 1.0

    name = "mean"
    version = 1
    unit = ""
    better = "higher"

    def measure(self, media, ctx):
        flat = as_float(media["picture"]).reshape(len(media["picture"]), -1)
        return {self.name: self.scale * flat.mean(1), "pair": np.stack([flat.min(1), flat.max(1)], 1)}

    def reduce(self, table):
        values = table.values(self.name)
        values = values[~np.isnan(values)]
        spread = table.features("pair") if len(table) else np.zeros((0, 2))
        value = float(values.mean() + 0 * spread.sum()) if len(values) else None
        return Estimate(value, method="none", n=len(values))

    def signature(self, table):
        return f"{self.name}|scale:{self.scale}|v:{self.version}"


@dataclass(frozen=True)
class Doubled(Mean):
    """Another metric over the same pictures, for `rescore`."""

    name = "doubled"
    scale: float = 2.0

    def measure(self, media, ctx):
        return {"doubled": self.scale * as_float(media["picture"]).reshape(len(media["picture"]), -1).mean(1)}

    def reduce(self, table):
        values = table.values("doubled")
        return Estimate(float(np.nanmean(values)), n=int((~np.isnan(values)).sum()))


@dataclass(frozen=True)
class Judged(Mean):
    """A judge that stays silent about some items while the file that `silent` names exists."""

    name = "judged"
    silent: str = ""

    def measure(self, media, ctx):
        values = as_float(media["picture"]).reshape(len(media["picture"]), -1).mean(1)
        quiet = bool(self.silent) and Path(self.silent).exists()
        return {"judged": [None if quiet and v > 0.5 else float(v) for v in values]}

    def reduce(self, table):
        values = table.values("judged")
        return Estimate(float(np.nanmean(values)), n=int((~np.isnan(values)).sum()))


def as_float(pictures):
    """uint8 or float in [0, 1], as it was kept or as it came, to the 8-bit grid in [0, 1]."""
    pictures = np.asarray(pictures)
    return pictures / 255 if pictures.dtype == np.uint8 else np.floor(pictures * 255 + 0.5) / 255


@dataclass(frozen=True)
class Drawing(Suite):
    """`num` items, `chunk` a unit; the model draws each from its seed."""

    num: int = 6
    chunk: int = 2
    pause: float = 0.0  # seconds a batch
    colour: str = "grey"

    name = "drawing"
    version = 1
    requires = (TextToImage,)
    metrics = (Mean(),)
    slices = ("parity",)
    value_range = (0.0, 1.0)

    def units(self, data):
        ids = [f"item-{i:03d}" for i in range(self.num)]
        for i in range(0, self.num, self.chunk):
            yield Unit(f"u/{i // self.chunk:03d}", tuple(ids[i : i + self.chunk]), {"first": i}, cost=1.0 + i % 3)

    def run(self, unit, model, ctx):
        for ids in ctx.batches(unit):
            time.sleep(self.pause)
            pictures = model.generate(ids, [ctx.seed(id) for id in ids])
            yield ids, {"picture": pictures, "parity": ["even" if int(i[-3:]) % 2 == 0 else "odd" for i in ids]}


@dataclass(frozen=True)
class DrawingTwice(Drawing):
    """The same, with the second metric from the start."""

    metrics = (Mean(), Doubled())


@dataclass(frozen=True)
class DrawingJudged(Drawing):
    """With a judge that may fail."""

    silent: str = ""
    name = "drawing-judged"

    @property
    def metrics(self):
        return (Mean(), Judged(silent=self.silent))


@dataclass(frozen=True)
class WhiteBox(Drawing):
    """Needs what no toy has."""

    name = "white-box"
    requires = (DenoiserAccess,)


@dataclass(frozen=True)
class Coder(Drawing):
    """Needs an autoencoder."""

    name = "coder"
    requires = (Autoencoder,)


@dataclass(frozen=True)
class Scratching(Drawing):
    """Leaves a note in its scratch folder and fails the first time; finds the note the second time."""

    name = "scratching"

    def run(self, unit, model, ctx):
        note = ctx.scratch(unit) / "note.txt"
        if not note.exists():
            note.write_text("half way")
            raise RuntimeError("power cut")
        assert note.read_text() == "half way"
        yield from super().run(unit, model, ctx)


class Painter:
    """float64 [B, 3, 4, 4] in [0, 1] from each seed."""

    def __init__(self, bright: float = 0.0, weights: Weights | None = None, *, speed: int = 1):
        self.bright, self.weights, self.speed = bright, weights, speed

    def generate(self, prompts, seeds):
        return np.stack([self.paint(p, s) for p, s in zip(prompts, seeds, strict=True)])

    def paint(self, prompt, seed):
        return np.clip(np.random.default_rng(seed).random((3, 4, 4)) + self.bright, 0, 1)


class Faulty(Painter):
    """Does what `fault` says at the items that `at` is part of, as long as the file `until` does not exist."""

    def __init__(self, fault: str = "", at: str = "item-", until: str = "", *, speed: int = 1):
        super().__init__()
        self.fault, self.at, self.until = fault, at, until

    def generate(self, prompts, seeds):
        pictures = super().generate(prompts, seeds)
        hit = [i for i, p in enumerate(prompts) if self.at in p]
        if not hit or (self.until and Path(self.until).exists()):
            return pictures
        return getattr(self, self.fault)(pictures, hit)

    def raises(self, pictures, hit):
        raise RuntimeError("the model gave up\x1b[31m on purpose")

    def stops(self, pictures, hit):
        sys.exit(0)

    def memory(self, pictures, hit):
        if len(pictures) > 2:
            raise MemoryError("no room for more than two")
        return pictures

    def memory_always(self, pictures, hit):
        raise RuntimeError("CUDA error: out of memory")

    def nan(self, pictures, hit):
        pictures[hit] = np.nan
        return pictures

    def infinite(self, pictures, hit):
        pictures[hit, 0, 0, 0] = np.inf
        return pictures

    def fewer(self, pictures, hit):
        return pictures[:-1]

    def empty(self, pictures, hit):
        return pictures[:, :, :0]

    def flat(self, pictures, hit):
        pictures[hit] = 0.5
        return pictures

    def none(self, pictures, hit):
        return None

    def exits(self, pictures, hit):
        os._exit(7)

    def killed(self, pictures, hit):
        os.kill(os.getpid(), signal.SIGKILL)

    def segfault(self, pictures, hit):
        import ctypes

        ctypes.string_at(0)

    def hangs(self, pictures, hit):
        time.sleep(600)

    def talks(self, pictures, hit):
        print("chatter on stdout")
        os.write(1, b"chatter on descriptor 1\n")
        return pictures

    def overflows(self, pictures, hit):
        """The stack of C, past every limit of Python's."""
        import faulthandler

        faulthandler._stack_overflow()

    def floods(self, pictures, hit):
        for _ in range(100):
            os.write(1, b"chatter\n" * 125_000)
        return pictures

    def orphans(self, pictures, hit):
        """Dies, and leaves a process that holds all it had open."""
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        os._exit(7)

    def surrogate(self, pictures, hit):
        raise RuntimeError("half a character: \ud800")


class Large(Painter):
    """uint8 [B, 3, 2160, 2160] of noise: 14 MB each, in whatever way they are kept."""

    def paint(self, prompt, seed):
        return np.random.default_rng(seed).integers(0, 256, (3, 2160, 2160), np.uint8)


class Storm(Faulty):
    """Several faults at once: `item-001:exits,item-003:killed`. Each that happens leaves a byte in `marks/<item>`; with
    `times` it happens so many times and then no more."""

    def __init__(self, faults: str, marks: str, times: int = 0):
        super().__init__()
        self.faults = dict(part.split(":") for part in faults.split(","))
        self.marks, self.times = Path(marks), times

    def generate(self, prompts, seeds):
        pictures = Painter.generate(self, prompts, seeds)
        for i, prompt in enumerate(prompts):
            mark = self.marks / prompt
            seen = mark.stat().st_size if mark.exists() else 0
            if prompt in self.faults and not (self.times and seen >= self.times):
                with open(mark, "ab", buffering=0) as file:
                    file.write(b".")
                pictures = getattr(self, self.faults[prompt])(pictures, [i])
        return pictures


def broken_factory(size: int = 1):
    """A model that cannot be opened."""
    raise OSError("weights are on another planet")


def wordless_factory(size: int = 1):
    """A function whose object cannot do what suites need: seen only when it is open."""
    return object()


def dead_factory(size: int = 1):
    """A model whose opening ends the process."""
    os._exit(9)


# -- the command line, in a child of this process: as `bench …`, without a second import of everything


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


def start(folder, *argv, env=None, stdout=None):
    """Starts `bench …` in a folder; returns its pid. Its output goes to `.out` and `.err` in that folder."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.chdir(folder)
        os.setsid()
        os.environ.update({"BENCH_THREADS": "1", "BENCH_DEVICES": "cpu", **(env or {})})
        for fd, name in ((1, stdout or ".out"), (2, ".err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        for name, fd in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, os.fdopen(fd, "w", closefd=False))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import bench.cli

        sys.modules["__main__"] = sys.modules["bench.cli"]  # what spawned workers import first
        sys.argv = ["bench", *map(str, argv)]
        code = bench.cli.main(sys.argv[1:])
        sys.stderr.flush()
    except SystemExit as e:
        code = e.code or 0
        sys.stdout.flush()
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def finish(folder, pid):
    """Waits for a started command."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    texts = [p.read_text() if p.exists() else "" for p in (Path(folder) / ".out", Path(folder) / ".err")]
    return Done(code, *texts)


def command(folder, *argv, env=None, stdout=None):
    """`bench …` from beginning to end, as a user sees it."""
    return finish(folder, start(folder, *argv, env=env, stdout=stdout))
