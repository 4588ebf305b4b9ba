"""Training that is killed, whose states are damaged, whose disk is full, whose loss is not finite.

It ends with the bytes of a run that nothing disturbed, or says what is wrong and keeps the last good state.
"""

import errno
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from toys import command

import bench.train
from bench import Recipe, door
from bench.identity import canonical, digest
from bench.train import not_finite, read_state, train

SEED = int.from_bytes(os.urandom(4))
HERE = str(Path(__file__).resolve())


@pytest.fixture(scope="module", autouse=True)
def deterministic():
    """One thread, algorithms that give the same bytes twice, and no painting, which takes longer than the training."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.train._plot", lambda run, path: None)
        patch.setattr("bench.train.collect", lambda: {})  # packages and git: not compared, nor are the figures of merit
        patch.setattr("suites.reconstruction.recipes.MiniAE.checks", Recipe.checks)
        yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """What a small diffusion transformer learns from: four classes, each a constant with noise, 2 x 4 x 4."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(4, (256, 1), generator=generator)
    values = 0.5 * torch.randn(256, 2, 4, 4, generator=generator) + text[:, :, None, None] - 1.5
    path = tmp_path_factory.mktemp("latents") / "toy.safetensors"
    parts = {"train": values[:192], "train_text": text[:192], "validation": values[192:], "validation_text": text[192:]}
    save_file({name: part.contiguous() for name, part in parts.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def recipes(latents):
    """Recipes that come with the harness, small: with a moving average, with two networks, in half precision."""
    from suites.reconstruction.recipes import MiniAE, MiniFeatures
    from suites.scaling.recipes import DiTTraining

    return {
        "dit": DiTTraining(width=8, layers=1, batch=4, steps=60, latents=latents, vae="", validation=64),
        "mini-ae": MiniAE(width=8, steps=20, batch=1, size=32),
        "mini-features": MiniFeatures(steps=60, pictures=1, variants=2),
    }


def files(out):
    return {p.name: p.read_bytes() for p in sorted(Path(out).iterdir()) if p.name != "recipe.json"}


def states(out):
    return sorted(Path(f"{out}.training").glob("*.state"))


def run(recipe, out, **how):
    return train(recipe, out, spec=asdict(recipe), **how)


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """{recipe: (files of a run that nothing disturbed, seconds it took)}."""
    found = {}
    for name, recipe in recipes.items():
        begun = time.monotonic()
        out = run(recipe, tmp_path_factory.mktemp("whole") / name, save_every=1e9)
        found[name] = files(out), time.monotonic() - begun
        assert {"loss.csv"} < set(found[name][0]) and any(n.endswith(".safetensors") for n in found[name][0])
    return found


def forked(body):
    """The exit code of `body` in a process of its own, negative for a signal; 70 where it raised."""
    pid = os.fork()
    if not pid:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(call, nth, how="before"):
    """This process dies at a call of `os`, after `nth` others of its kind: before it, half way, or after it."""
    real, counted = getattr(os, call), []

    def last(*args, **kwargs):
        counted.append(args)
        if len(counted) > nth:
            if how == "half":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            elif how == "after":
                real(*args, **kwargs)
            die()
        return real(*args, **kwargs)

    setattr(os, call, last)


# -- killed


def test_killed_at_a_random_step_it_ends_byte_equal(recipes, whole, tmp_path, tally, trials):
    """SIGKILL from outside, at any moment after a random step, saving included; then the same call again.

    No more is lost than the steps since the newest state, and a state is there from the first save on.
    """
    made, passed, rng = trials(20, 4), 0, random.Random(SEED)
    wrong = []
    for trial in range(made):
        name = list(recipes)[trial % 3]
        recipe, (expected, seconds) = recipes[name], whole[name]
        step, every = rng.randrange(1, recipe.total - 1), rng.choice([0.0, 0.0, seconds / 5])
        out = tmp_path / f"{trial}"
        reached, where = killed_at(recipe, out, step, every, rng.uniform(0, seconds / recipe.total))
        kept = [int(p.name[:9]) for p in states(out)]
        begun = []
        found = files(run(recipe, out, save_every=every, progress=lambda done, _: begun.append(done)))  # noqa: B023
        first = begun[0] - 1 if begun else recipe.total
        resumed = first == max(kept, default=0) and (every > 0 or first >= reached - 1)
        if where == -signal.SIGKILL and resumed and found == expected and not Path(f"{out}.training").exists():
            passed += 1
        else:
            wrong.append((name, step, every, reached, where, kept, first, found == expected))
    tally("resumes", passed, made, lost=len(wrong))
    assert not wrong, f"seed {SEED}: {wrong}"


def killed_at(recipe, out, step, every, pause):
    """Kills a training `pause` seconds after `step` steps; (steps that it had told of, exit code)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            run(recipe, out, save_every=every, progress=lambda done, losses: os.write(writer, b"."))
            os._exit(0)
        except BaseException:
            os._exit(70)
    os.close(writer)
    reached = 0
    while reached < step and (said := os.read(reader, 1)):
        reached += len(said)
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    while select.select([reader], [], [], 0)[0] and (said := os.read(reader, 4096)):
        reached += len(said)
    os.close(reader)
    return reached, code


STAGES = {  # of writing a state: the call at which it dies, how many of its kind come before, how far that one gets
    "before a byte": ("open", 0, "before"),
    "half written": ("write", 0, "half"),
    "before the rename": ("rename", 0, "before"),
    "after the rename": ("fsync", 1, "before"),  # of the folder; the first is of the file
    "before the old one goes": ("fsync", 1, "after"),
}


def test_killed_while_saving_it_ends_byte_equal(recipes, whole, tmp_path, tally):
    """At each stage of writing the state after step 10: the state before it is whole, and no half one is believed."""
    recipe, (expected, _) = recipes["dit"], whole["dit"]
    passed, wrong = 0, []
    for number, (stage, (call, nth, how)) in enumerate(STAGES.items()):
        out = tmp_path / str(number)

        def body(out=out, place=(call, nth, how)):
            def replace(path, data, mode=0o666, real=door.replace):
                if path.name == "000000010.state":
                    deadly(*place)
                return real(path, data, mode)

            door.replace = replace
            run(recipe, out, save_every=0.0)

        code = forked(body)
        kept = [p.name for p in states(out)]
        newest = stage in ("after the rename", "before the old one goes")
        begun = []
        found = files(run(recipe, out, progress=lambda done, _: begun.append(done)))  # noqa: B023
        first = 10 if newest else 9
        litter = [p.name for p in tmp_path.iterdir() if p.name.startswith((".", f"{number}."))]
        if (
            code == -signal.SIGKILL
            and kept[-1] == f"{first:09d}.state"
            and begun[0] == first + 1
            and found == expected
            and not litter
        ):
            passed += 1
        else:
            wrong.append((stage, code, kept, begun[:1], found == expected, litter))
    tally("resumes", passed, len(STAGES), lost=len(wrong))
    assert not wrong


def test_killed_while_exporting_it_ends_byte_equal(recipes, whole, tmp_path, tally):
    """At every operation on files of the export, the folder is whole or absent; nothing half stays beside it."""
    recipe, (expected, _) = recipes["dit"], whole["dit"]
    template = tmp_path / "template"

    def last(done, losses):
        if done == recipe.total:
            die()

    assert forked(lambda: run(recipe, template, save_every=1e9, progress=last)) == -signal.SIGKILL
    assert [int(p.name[:9]) for p in states(template)] == [60]
    passed = made = 0
    wrong = []
    for call in ("mkdir", "fsync", "rename"):
        for nth in range(9):
            out = tmp_path / f"{call}{nth}" / "out"
            out.parent.mkdir()
            shutil.copytree(f"{template}.training", f"{out}.training")

            def body(out=out, place=(call, nth)):
                def replace_folder(*args, real=door.replace_folder):
                    deadly(*place)
                    return real(*args)

                door.replace_folder = replace_folder
                run(recipe, out)

            if forked(body) != -signal.SIGKILL:
                break  # there are not that many
            made += 1
            half = out.exists() and files(out) != expected
            same = files(run(recipe, out)) == expected
            litter = [p.name for p in out.parent.iterdir() if p.name != "out"]
            passed += same and not half and not litter
            wrong += [] if same and not half and not litter else [(call, nth, half, same, litter)]
    tally("killed exports", passed, made)
    assert made > 5 and not wrong


# -- states that cannot be trusted


@pytest.fixture(scope="module")
def argv(latents):
    given = {"width": 8, "layers": 1, "batch": 4, "steps": 16, "latents": latents, "vae": "", "validation": 64}
    return ["train", "dit", *(part for k, v in given.items() for part in ("-p", f"{k}={v}")), "--devices", "cpu"]


@pytest.fixture(scope="module")
def stopped(argv, tmp_path_factory):
    """A folder in which `bench train … --out out` was killed after step 12, and the files that it should end with."""
    folder, other = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.train, "train", often(lambda done, losses: done == 12 and die()))
        assert command(folder, *argv, "--out", "out").code == -signal.SIGKILL
    assert [int(p.name[:9]) for p in states(folder / "out")] == [11, 12]
    done = command(other, *argv, "--out", "out")
    assert done.code == 0, done.err
    return folder, files(other / "out")


def often(progress=None, real=bench.train.train):
    """`train` that saves after each step."""

    def saving(*args, **how):
        return real(*args, **{**how, "save_every": 0.0, **({"progress": progress} if progress else {})})

    return saving


def says(done, *words):
    """Does a refusal read as it should: what, where, what next, in at most twelve lines without trace or controls?"""
    assert all(word in done.err for word in words), (words, done.err)
    lines = [x for x in done.err.split("\r")[-1].splitlines() if x]
    assert "Traceback" not in done.err and len(lines) <= 12, done.err
    assert "error: " in done.err and "hint: " in done.err, done.err
    return not any(ord(c) < 32 and c not in "\n\r\t" for c in done.err)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewritten(path, change=None, content=None, **header):
    """The state with another header or content, and a checksum that is right."""
    head, _, payload = path.read_bytes().partition(b"\n")
    if change:
        content = torch.load(io.BytesIO(payload), weights_only=True)
        change(content)
    if content is not None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
    facts = json.loads(head) | header | {"sha256": digest(payload)}
    path.write_bytes(canonical(facts).encode() + b"\n" + payload)


class Foreign:
    """What a pickle could run."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def poison(content):
    next(iter(content["parts"]["model"].values())).view(-1)[0] = math.nan


DAMAGED = {  # passed over, and said
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "one bit": flipped,
    "no header": lambda path: path.write_bytes(b"\x80" + path.read_bytes()),
    "header is a list": lambda path: path.write_bytes(b"[]\n"),
    "header nested to the ground": lambda path: path.write_bytes(b"[" * 100_000 + b"\n"),
    "a checksum that is no text": lambda path: path.write_bytes(b'{"sha256": {"a": 1}}\n'),
    "NaN inside": lambda path: rewritten(path, poison),
    "other parts": lambda path: rewritten(path, lambda c: c["parts"].pop("optimizer")),
    "no parts": lambda path: rewritten(path, content={}),
    "a list": lambda path: rewritten(path, content=[1, 2]),
    "a pickle that runs": lambda path: rewritten(path, content={"parts": Foreign()}),
    "no archive": lambda path: rewritten_bytes(path, b"PK\x03\x04 nothing"),
    "a pickle of nothing": lambda path: rewritten_bytes(path, b"\x80\x02u."),
    "losses are no table": lambda path: rewritten(path, lambda c: c.update(losses=torch.zeros(3))),
    "names of other losses": lambda path: rewritten(path, lambda c: c.update(names=["a"])),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}
ANOTHERS = {"recipe": "circle", "version": 2, "identity": "0" * 64, "format": 99}  # refused


def rewritten_bytes(path, payload):
    head = json.loads(path.read_bytes().partition(b"\n")[0]) | {"sha256": digest(payload)}
    path.write_bytes(canonical(head).encode() + b"\n" + payload)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_passed_over_and_said(stopped, argv, tmp_path, tally, damage):
    """The state before it is taken; with both damaged the command refuses and touches neither: never from zero."""
    template, expected = stopped
    one, both = tmp_path / "one", tmp_path / "both"
    for folder in (one, both):
        shutil.copytree(template, folder)
    newest = states(one / "out")[-1]
    DAMAGED[damage](newest)
    done = command(one, *argv, "--out", "out")
    went_on = done.code == 0 and newest.name in done.err and files(one / "out") == expected
    for path in states(both / "out"):
        DAMAGED[damage](path)
    before = [p.is_file() and p.read_bytes() for p in states(both / "out")]
    refused = command(both, *argv, "--out", "out")
    kept = [p.is_file() and p.read_bytes() for p in states(both / "out")] == before and not (both / "out").exists()
    passed = went_on and refused.code == 1 and kept
    ran = (one / "ran").exists() + (both / "ran").exists()
    traces = ("Traceback" in done.err) + ("Traceback" in refused.err)
    tally("damaged states", int(passed and not ran), 1, ran=ran, tracebacks=traces)
    assert went_on, done
    assert not ran and refused.code == 1 and kept and says(refused, "no state in out.training is whole", "step 0")


@pytest.mark.parametrize("name", ANOTHERS)
def test_a_state_of_another_run_is_refused(stopped, argv, tmp_path, tally, name):
    """Of another recipe, version, specification or format: exit 1, and it stays as it is."""
    template, _ = stopped
    shutil.copytree(template, tmp_path / "a")
    newest = states(tmp_path / "a" / "out")[-1]
    rewritten(newest, **{name: ANOTHERS[name]})
    before = [p.read_bytes() for p in states(tmp_path / "a" / "out")]
    done = command(tmp_path / "a", *argv, "--out", "out")
    kept = [p.read_bytes() for p in states(tmp_path / "a" / "out")] == before and not (tmp_path / "a" / "out").exists()
    tally("damaged states", int(done.code == 1 and kept), 1, tracebacks="Traceback" in done.err)
    assert done.code == 1 and kept and says(done, newest.name, "another", "--out")


# -- a disk that is full


class Failing:
    """`os` for the door: the nth call of a kind fails, writes maybe after half of the bytes; `fired` is a file then."""

    def __init__(self, call, nth, code, fired, half=False):
        self.call, self.nth, self.code, self.fired, self.half = call, nth, code, fired, half
        self.armed = False

    def __getattr__(self, name):
        real = getattr(os, name)
        if name != self.call or not self.armed:
            return real

        def failing(*args, **kwargs):
            self.nth -= 1
            if self.nth == -2 and self.half:
                return self._fail()
            if self.nth == -1:
                if not self.half:
                    return self._fail()
                return real(args[0], bytes(args[1])[: len(args[1]) // 2])
            return real(*args, **kwargs)

        return failing

    def _fail(self):
        Path(self.fired).touch()
        raise OSError(self.code, os.strerror(self.code))


FULL = [("write", 0, code, half) for half in (False, True) for code in ("ENOSPC", "EDQUOT", "EIO", "EFBIG")]
FULL += [("fsync", 0, code, False) for code in ("ENOSPC", "EDQUOT", "EIO")]
FULL += [("rename", 0, code, False) for code in ("ENOSPC", "EDQUOT", "EROFS")]
FULL += [("open", 0, code, False) for code in ("ENOSPC", "EDQUOT", "EROFS")]
FULL += [("fsync", 1, "EIO", False)]  # of the folder


def test_a_disk_that_fills_while_saving(stopped, argv, tmp_path, tally, size, monkeypatch):
    """Exit 1 with file, reason and how to go on; the states before are whole, and the same command completes it."""
    template, expected = stopped
    trials = FULL if size(1, 0) else FULL[::3]
    wrong = []
    for number, (call, nth, code, half) in enumerate(trials):
        folder, fired = tmp_path / str(number), tmp_path / f"{number}.fired"
        shutil.copytree(template, folder)
        before = {p.name: p.read_bytes() for p in states(folder / "out")}
        shim = Failing(call, nth, getattr(errno, code), fired, half)

        def replace(path, data, mode=0o666, shim=shim, real=door.replace):
            shim.armed = shim.armed or path.name == "000000014.state"
            return real(path, data, mode)

        with monkeypatch.context() as patch:
            patch.setattr(door, "os", shim)
            patch.setattr(door, "replace", replace)
            patch.setattr(bench.train, "train", often())
            done = command(folder, *argv, "--out", "out")
        kept = {p.name for p in states(folder / "out")}
        good = sum(is_whole(p) for p in states(folder / "out"))
        ok = fired.exists() and done.code == 1 and os.strerror(getattr(errno, code)) in done.err
        ok = ok and says(done, "000000014.state", "same command") and not (folder / "out").exists()
        ok = ok and good == len(kept) >= 2 and max(before) < max(kept)
        again = command(folder, *argv, "--out", "out")
        ok = ok and again.code == 0 and files(folder / "out") == expected
        wrong += [] if ok else [(call, nth, code, half, done, kept, again)]
    tally("full disks while training", len(trials) - len(wrong), len(trials))
    assert not wrong


def is_whole(path):
    head, _, payload = path.read_bytes().partition(b"\n")
    content = torch.load(io.BytesIO(payload), weights_only=True)
    return json.loads(head)["sha256"] == digest(payload) and not_finite(content) == ""


@pytest.mark.parametrize("where", ["a state", "the export"])
def test_a_file_that_may_not_grow(stopped, argv, tmp_path, tally, monkeypatch, where):
    """A real limit of the system on the size of files, reached while a state or the finished weights are written."""
    template, expected = stopped
    folder = tmp_path / "a"
    shutil.copytree(template, folder)
    limit, ended = 2_000, (1 << 62)

    def limited(real):
        def body(*args, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, ended))
            return real(*args, **kwargs)

        return body

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ended = hard
    with monkeypatch.context() as patch:
        if where == "a state":
            patch.setattr(bench.train, "train", often())
            patch.setattr(bench.train.Run, "save", limited(bench.train.Run.save))
        else:
            patch.setattr(bench.train, "_export", limited(bench.train._export))
        done = command(folder, *argv, "--out", "out")
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)
    good = sum(is_whole(p) for p in states(folder / "out"))
    again = command(folder, *argv, "--out", "out")
    same = again.code == 0 and files(folder / "out") == expected
    fired = "File too large" in done.err
    passed = fired and done.code == 1 and good >= 1 and same
    tally("full disks while training", int(passed), 1, tracebacks="Traceback" in done.err)
    assert passed and says(done, "same command"), (done, good, again)


# -- losses and weights that are not finite


@dataclass(frozen=True)
class Exploding(Recipe):
    """One weight that learns to be zero, until a loss, or the weight, is not finite."""

    name: ClassVar[str] = "exploding"
    version: ClassVar[int] = 1
    what: str = "nan"  # the loss, or "weight"
    at: int = 9
    steps: int = 12

    @property
    def total(self):
        return self.steps

    def train(self, model, ctx):
        net = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            net.weight.fill_(1.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(ctx.restore(net=net, optimizer=optimizer), self.steps):
            loss = net.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = loss.detach()
            if step == self.at and self.what == "weight":
                with torch.no_grad():
                    net.weight.fill_(math.nan)
            elif step == self.at:
                value = torch.tensor(float(self.what))
            yield {"weight": float(value), "other": 1.0}
        return net

    def export(self, model, folder):
        save_file(model.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize("what", ["nan", "inf", "-inf", "weight", "too fast"])
def test_what_is_not_finite_stops_the_training(argv, tmp_path, tally, monkeypatch, what):
    """At that step, by name; the last good state is kept, the curve has a gap there, and no result is written.

    Four trainings are made to explode, one does it by itself: its learning rate is absurd. Tried again, it goes on
    from that state and stops at the same step.
    """
    if what == "too fast":
        line = [*argv, "-p", "lr=1e30", "-p", "warm=0.9", "--out", "out"]
    else:
        line = ["train", f"{HERE}:Exploding", "-p", f"what={what}", "--devices", "cpu", "--out", "out"]
    monkeypatch.setattr(bench.train, "train", often())
    first, second = command(tmp_path, *line), command(tmp_path, *line)
    step = int(first.err.partition("step ")[2].partition(":")[0])
    newest = states(tmp_path / "out")[-1]
    rows = (tmp_path / "out.training" / "loss.csv").read_text().splitlines()
    stopped = first.code == second.code == 1 and step == (9 if what != "too fast" else step) and step > 0
    gap = "" in rows[-1].split(",") and rows[-1].startswith(f"{step},") and len(rows) == step + 2
    gap = gap and not any("" in row.split(",") for row in rows[:-1])
    gap = gap if what != "weight" else len(rows) == step + 2
    kept = int(newest.name[:9]) == step and is_whole(newest) and not (tmp_path / "out").exists()
    same = f"step {step}:" in second.err
    passed = stopped and gap and kept and same
    tally("losses not finite", int(passed), 1, tracebacks="Traceback" in first.err + second.err)
    assert passed, (first, second, rows, newest)
    assert says(first, f"step {step}: ", "out.training") and says(second, f"step {step}: ", "out.training")


def test_read_state_takes_what_was_saved(stopped):
    """The reader that the tests of damage rely on does read a state that is whole."""
    path = states(stopped[0] / "out")[-1]
    header = json.loads(path.read_bytes().partition(b"\n")[0])
    from suites.scaling.recipes import DiTTraining

    content = read_state(path, DiTTraining(), header["identity"])
    assert set(content) == {"parts", "names", "losses"} and len(content["losses"]) == 12
