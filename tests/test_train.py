"""The runner of recipes: what it leaves, interrupted or finished, and what it refuses; killing it is in survival/."""

import json
import math
import os
import signal
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import Error, Recipe
from bench.capabilities import Autoencoder
from bench.train import _plot, loss_table, not_finite, train


@dataclass(frozen=True)
class Line(Recipe):
    """A tiny network that learns sin(x): 60 steps of noisy samples."""

    name: ClassVar[str] = "line"
    version: ClassVar[int] = 1
    steps: int = 60
    lr: float = 0.1
    hook: Any = field(default=None, compare=False)  # called in the middle of each step

    @property
    def total(self):
        return self.steps

    def train(self, model, ctx):
        net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(generator=ctx.generator(0, "weights"))
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr)
        first = ctx.restore(net=net, optimizer=optimizer)
        for step in range(first, self.steps):
            x = torch.randn(16, 1, generator=ctx.generator(step, "x"))
            loss = (net(x) - x.sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if self.hook:
                self.hook(step)
            optimizer.step()
            yield {"loss": float(loss.detach()), "x": float(x.mean())}
        return net

    def export(self, model, folder):
        save_file(model.state_dict(), folder / "model.safetensors")

    def checks(self, model, ctx):
        x = torch.linspace(-2, 2, 50)[:, None]
        yield "worst", float((model(x) - x.sin()).detach().abs().max())


def run(recipe, out, **how):
    how.setdefault("save_every", 0.0)
    spec = {k: v for k, v in asdict(recipe).items() if k in ("steps", "lr")}
    return train(recipe, out, spec=spec, **how)


def files(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.name != "recipe.json"}


def states(out):
    return sorted(Path(f"{out}.training").glob("*.state"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Painting the curve takes longer than the training; one test looks at it alone."""
    monkeypatch.setattr("bench.train._plot", lambda run, path: None)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    """What a run that nothing disturbed leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.train._plot", lambda run, path: None)
        out = run(Line(), tmp_path_factory.mktemp("whole") / "out", save_every=1e9)
    assert sorted(files(out)) == ["loss.csv", "model.safetensors"]
    return files(out)


class Stop(Exception):
    """Ends a run from within, as a crash does."""


def stop_at(step):
    def progress(done, losses):
        if done == step:
            raise Stop

    return progress


def stopped(out, step, **how):
    with pytest.raises(Stop):
        run(Line(), out, progress=stop_at(step), **how)
    return states(out)


def test_result(whole, tmp_path):
    """The network learns (|error| < 0.35 on [-2, 2]; a constant has 1), and another seed gives another one."""
    out = run(Line(), tmp_path / "out")
    facts = json.loads((out / "recipe.json").read_text())
    assert facts["figures"]["worst"] < 0.35
    assert (facts["recipe"], facts["version"], facts["seed"], facts["steps"]) == ("line", 1, 0, 60)
    assert facts["spec"] == {"steps": 60, "lr": 0.1} and facts["made"]["packages"]["torch"]
    assert files(out) == whole  # however often it was saved
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {out.stat().st_mode & 0o666}
    rows = (out / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,loss,x" and len(rows) == 61 and rows[-1].startswith("59,")
    assert not Path(f"{out}.training").exists()
    other = run(Line(), tmp_path / "other", seed=1)
    assert files(other)["model.safetensors"] != whole["model.safetensors"]


def test_the_curve_is_drawn_the_same_twice(tmp_path):
    curves = []
    for name in "ab":
        run_ = Namespace(losses=[{"loss": 1 / (1 + i), "x": i - 2.0} for i in range(5)], recipe=Line())
        _plot(run_, tmp_path / name)
        curves.append((tmp_path / name).read_bytes())
    assert curves[0] == curves[1] and b"<svg" in curves[0] and curves[0].count(b'<g id="axes_') == 2


def test_other_parameters_or_seed_do_not_take_over_a_state(tmp_path):
    out = tmp_path / "out"
    stopped(out, 5)
    for recipe, seed in ((Line(lr=0.01), 0), (Line(), 1)):
        with pytest.raises(Error, match="another specification"):
            run(recipe, out, seed=seed)


def test_not_finite_names_the_place():
    assert not_finite({"a": [1.0, torch.ones(2)], "b": {"c": torch.ones(2, dtype=torch.int64)}}) == ""
    assert not_finite({"a": [1.0, torch.tensor([1.0, math.inf])]}) == "state.a.1"
    assert not_finite({"a": {"b": math.nan}}) == "state.a.b"


def test_loss_table_is_exact_and_leaves_gaps():
    """repr of a float64 reads back as the same number."""
    rows = loss_table([{"loss": 1 / 3}, {"loss": math.nan}]).decode().splitlines()
    assert rows == ["step,loss", f"0,{1 / 3!r}", "1,"] and float(rows[1].split(",")[1]) == 1 / 3


@dataclass(frozen=True)
class Turning(Line):
    """Yields its losses in another order at every other step."""

    def train(self, model, ctx):
        net = torch.nn.Linear(1, 1)
        for step in range(ctx.restore(net=net), self.steps):
            if self.hook:
                self.hook(step)
            losses = {"a": 1.0, "b": 2.0}
            yield losses if step % 2 == 0 else dict(reversed(losses.items()))
        return net


def test_losses_go_by_names_not_by_their_order(tmp_path):
    """In the table, and in a state that a training goes on from."""

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Turning(steps=6, hook=stop), tmp_path / "out")
    out = run(Turning(steps=6), tmp_path / "out")
    assert (out / "loss.csv").read_text().splitlines() == ["step,a,b", *(f"{k},1.0,2.0" for k in range(6))]


def test_names_in_a_loss_table_stay_cells_and_start_no_formula():
    assert loss_table([{"=1+1": 0.5, 'a,"b"\n': 0.25}]).decode() == 'step,\'=1+1,"a,""b""\n"\n0,0.5,0.25\n'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_middle_of_a_step(whole, tmp_path, number):
    """The step is finished and saved, then the signal does what it does without us."""
    out = tmp_path / "out"

    def leave(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(number, leave)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Line(hook=lambda step: step == 17 and os.kill(os.getpid(), number)), out, save_every=1e9)
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
    assert [int(p.name[:9]) for p in states(out)] == [18]
    assert files(run(Line(), out)) == whole


def test_killed_after_the_last_step_it_only_exports(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Line, "export", lambda self, model, folder: (folder / "half").write_text("") or die_softly())
        with pytest.raises(Stop):
            run(Line(), out, save_every=1e9)
    assert not out.exists() and [int(p.name[:9]) for p in states(out)] == [60]
    done = []
    assert files(run(Line(), out, progress=lambda *step: done.append(step))) == whole
    assert done == [] and [p.name for p in tmp_path.iterdir()] == ["out"]


def die_softly():
    raise Stop


def test_finished_folder(tmp_path, monkeypatch):
    """The same command returns at once; another one, or a folder that is not ours, is refused and left alone."""
    out = run(Line(steps=3), tmp_path / "out")
    data = files(out)
    monkeypatch.setattr(Line, "train", None)
    assert run(Line(steps=3), out) == out and files(out) == data
    with pytest.raises(Error, match="another specification"):
        run(Line(steps=4), out)
    for text in (None, "", "[]", '{"recipe": "x"}'):
        strange = tmp_path / f"strange{text!r}".replace("/", "")
        strange.mkdir()
        if text is not None:
            (strange / "recipe.json").write_text(text)
        with pytest.raises(Error, match="not made by a recipe"):
            run(Line(steps=3), strange)
    assert files(out) == data and not list(tmp_path.glob("*.training"))


def test_two_runs_of_one_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Error, match="is being written by"):
        run(Line(hook=lambda step: run(Line(), out)), out)


def test_refusals(tmp_path):
    class FromModel(Line):
        starts_from = (Autoencoder,)

    with pytest.raises(Error, match="starts from a model with Autoencoder"):
        run(FromModel(), tmp_path / "a")

    class Forgetful(Line):
        def train(self, model, ctx):
            yield {"loss": 1.0}

    with pytest.raises(Error, match="never calls restore"):
        run(Forgetful(), tmp_path / "b")

    class Pictures(Line):
        def train(self, model, ctx):
            ctx.restore()
            yield {"loss": float(ctx.images(ctx.ids(), 8).sum())}

        def export(self, model, folder):
            pass

        def checks(self, model, ctx):
            return iter(())

    with pytest.raises(Error, match="asks for pictures"):
        run(Pictures(), tmp_path / "c")

    class White:
        def ids(self):
            return ("a",)

        def read(self, id):
            return np.full((8, 8, 3), 255, np.uint8)

    out = run(Pictures(steps=1), tmp_path / "d", manifest=White())
    assert (out / "loss.csv").read_text() == "step,loss\n0,192.0\n"


def test_global_random_state_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    net = torch.nn.Linear(1, 1)  # the toy's own constructor draws from it; a second one shows that this can fail
    assert not torch.equal(torch.get_rng_state(), before) and net is not None

    class Still(Line):
        def train(self, model, ctx):
            weight = torch.nn.Parameter(torch.randn(3, generator=ctx.generator(0, "weights")))
            optimizer = torch.optim.AdamW([weight])
            ctx.restore(optimizer=optimizer)
            for step in range(self.steps):
                yield {"loss": float(ctx.seed(step, "a") % 7)}

        def export(self, model, folder):
            pass

        def checks(self, model, ctx):
            return iter(())

    before = torch.get_rng_state()
    run(Still(steps=3), tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
