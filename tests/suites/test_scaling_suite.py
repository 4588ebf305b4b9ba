"""The suite `scaling` on twelve micro trainings, its resume inside a training, and the adapter that plans them."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import Error, Table, UsageError, execute
from bench.check import check
from bench.cli import main
from bench.config import How
from bench.recipe import Recipe
from bench.store import Store
from bench.train import Run, train
from suites.scaling import measure
from suites.scaling.fit import Surface
from suites.scaling.recipes import DATA, DiT, DiTTraining, learning_rate, open_data
from suites.scaling.suite import Scaling

TRUTH = Surface(0.3, 40.0, 90.0, 0.45, 0.5)  # E, A, B, alpha, beta
CELL = {"channels": 4, "side": 8, "vocabulary": 64, "text": 1}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def unpainted():
    """Painting the curve takes longer than a micro training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.train._plot", lambda run, path: None)
        yield


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Four classes, each a constant with noise: 2 x 4 x 4."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(4, (256, 1), generator=generator)
    values = 0.5 * torch.randn(256, 2, 4, 4, generator=generator) + text[:, :, None, None] - 1.5
    path = tmp_path_factory.mktemp("latents") / "toy.safetensors"
    save_file(
        {
            "train": values[:192].contiguous(),
            "train_text": text[:192].contiguous(),
            "validation": values[192:].contiguous(),
            "validation_text": text[192:].contiguous(),
        },
        path,
    )
    return path


def small(latents, **more):
    fields = {"budgets": (3e7, 6e7, 1.2e8), "sizes": 4, "centre": 2500.0, "reach": 3.0, "latents": str(latents)}
    return Scaling(**{**fields, "vae": "", "validation": 64, **more})


def go(suite, model, store, name="dit"):
    return execute(suite, model, identity={"name": name}, store=Store(store), how=How(devices="cpu", store=str(store)))


# -- T17: twelve micro trainings, end to end


@pytest.fixture(scope="module")
def study(latents, tmp_path_factory):
    return go(small(latents), DiT(batch=8), tmp_path_factory.mktemp("study"))


def test_twelve_trainings_end_in_a_table_that_is_whole(study, latents):
    rows = study.table().rows
    assert study.complete() and len(rows) == 12 and len({row["item"] for row in rows}) == 12
    for row in rows:
        assert row["flops"] == pytest.approx(row["budget"], rel=0.05)  # a whole number of steps
        assert row["tokens"] == row["steps"] * row["batch"] * 4
        assert 0 < row["loss"] < 3 and 0 < row["loss_sd"] < 0.3 and row["loss_raw"] > 0
        assert row["loss"] == pytest.approx(np.mean([row[f"loss_t{k}"] for k in range(10)]), rel=0.1)
        assert 0 < row["unique_tokens"] <= 192 * 4
    assert measure.one_cell([row["signature"] for row in rows])
    for budget in (3e7, 6e7, 1.2e8):
        sizes = [row["params"] for row in rows if row["budget"] == budget]
        assert sizes == sorted(set(sizes)) and len(sizes) == 4


def test_more_compute_is_less_loss(study):
    """The best of each budget: only that they fall; and every loss is below that of predicting nothing."""
    rows = study.table().rows
    best = [min(r["loss"] for r in rows if r["budget"] == b) for b in (3e7, 6e7, 1.2e8)]
    assert best[0] > best[1] > best[2]


def test_its_scores_are_a_law_with_intervals_or_a_reason(study):
    with open(study.path / "scores.csv", newline="") as file:
        scores = {row["metric"]: row for row in csv.DictReader(file)}
    assert {"law.a", "law.alpha", "law.beta", "law.E", "law.N-at-10x", "law.L-at-10x"} <= scores.keys()
    assert all("cell:" in row["signature"] for row in scores.values())
    for row in scores.values():
        assert row["value"] or row["note"]


def test_bench_fit_reads_the_run(study, tmp_path):
    store, out = str(study.path.parent.parent), tmp_path / "page"
    assert main(["fit", study.id, "--store", store, "--out", str(out), "--resamples", "20"]) == 0
    assert (out / "index.html").is_file()
    record = json.loads((out / "fit.json").read_text())
    assert len(record["rows"]["used"]) == 12 and record["rows"]["columns"]["loss_sd"] == "loss_sd"


# -- resume


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_inside_and_ends_the_same(latents, tmp_path, monkeypatch):
    suite, model = small(latents, budgets=(4e7,), sizes=1), DiT(batch=8)
    whole = go(suite, model, tmp_path / "a").table().rows
    steps = []
    plain_save = Run.save

    def save(self):
        plain_save(self)
        steps.append(len(self.losses))
        if len(self.losses) == 11:
            raise Killed

    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr("bench.train.train.__kwdefaults__", {**train.__kwdefaults__, "save_every": 0.0})
    run = go(suite, model, tmp_path / "b")
    assert not run.complete() and steps[-1] == 11 and list((tmp_path / "b" / "scratch").rglob("*.state"))
    monkeypatch.setattr(Run, "save", lambda self: (plain_save(self), steps.append(len(self.losses))))
    run = go(suite, model, tmp_path / "b")
    assert steps[steps.index(11) + 1] == 12  # not from the beginning
    assert run.complete() and run.table().rows == whole
    assert not list((tmp_path / "b" / "scratch").rglob("*.state"))


# -- a design whose law is known


class KnownLaw:
    """Trains nothing: its losses are those of a surface."""

    def trainings(self, budget, sizes, cell, data):
        return [Known(size, budget / (6 * size)) for size in sizes]


class Known:
    def __init__(self, params, tokens):
        self.params, self.tokens, self.total = params, tokens, 1

    def facts(self, cell):
        return {"params": self.params, "tokens": self.tokens, "flops": 6 * self.params * self.tokens, "lr": 0.1}


def test_a_known_law_is_found_again(latents, tmp_path):
    """Noise-free rows of a surface through run() and score(): E, alpha, beta and a to 1e-3 relative."""
    suite = small(latents, budgets=(1e9, 1e10, 1e11, 1e12), sizes=7, centre=1e4, reach=5.0)

    class Context:
        device = "cpu"

        def train(self, unit, training):
            folder = tmp_path / unit.id.replace("/", "-")
            folder.mkdir()
            loss = float(TRUTH.loss(training.params, training.tokens))
            (folder / "recipe.json").write_text(json.dumps({"figures": {"loss": loss}}))
            return folder

    rows = []
    for unit in suite.units(None):
        for ids, media in suite.run(unit, KnownLaw(), Context()):
            rows.append({"item": ids[0], **{k: v[0] for k, v in media.items()}})
    found = {s.metric: s for s in suite.score(Table(rows))}
    for name, truth in (("E", TRUTH.E), ("alpha", TRUTH.alpha), ("beta", TRUTH.beta), ("a", TRUTH.a)):
        assert found[f"law.{name}"].value == pytest.approx(truth, rel=1e-3), name
    assert found["law.N-at-10x"].value == pytest.approx(TRUTH.optimum(1e13)[0], rel=5e-3)
    assert {f.name for f in suite.figures(Table(rows))} >= {"isoflop", "params", "loss"}
    rows[3]["signature"] = "another"
    (mixed,) = suite.score(Table(rows))
    assert mixed.value is None and "2 cells cannot be pooled" in mixed.note


def test_too_few_rows_are_no_law():
    (score,) = Scaling(vae="").score(Table([{"item": "a", "params": 1, "tokens": 2, "flops": 12, "loss": 1.0}]))
    assert score.value is None and score.note


# -- plans


@pytest.mark.parametrize("kind", ["in_context", "cross_attention", "adaln_zero", "mm_dit"])
def test_plans_keep_budget_aspect_and_sizes(kind):
    """FLOPs within 1 %, sizes in steps of the width, each once, depth a constant share of the width."""
    budget = 3e11
    plans = DiT(kind=kind).trainings(budget, [1e4, 1.05e4, 3e4, 1e5, 3e5], CELL, {})
    facts = [plan.facts(CELL) for plan in plans]
    params = [f["params"] for f in facts]
    assert params == sorted(set(params)) and len(params) == 5
    assert all(f["flops"] == pytest.approx(budget, rel=0.01) for f in facts)
    for plan in plans:
        assert isinstance(plan, Recipe) and abs(plan.width / 8 - plan.layers) <= 0.5
        assert plan.steps == plan.total
    assert plans[0].lr / plans[-1].lr == pytest.approx((plans[-1].width / plans[0].width) ** DiT().lr_falls)


def test_a_design_passes_its_check():
    findings = check(DiT())
    assert not [f for f in findings if f.status == "fail"], findings


def test_what_cannot_be_planned_is_said(latents):
    with pytest.raises(Error, match="steps of"):
        DiT().trainings(1e7, [1e5], CELL, {})
    for wrong in ({"budgets": ()}, {"budgets": (1e9, 1e9)}, {"sizes": 0}, {"reach": 1.0}, {"centre": -1.0}):
        with pytest.raises(UsageError):
            Scaling(**wrong)
    for wrong in ({"steps": 0}, {"drop": 1.0}, {"lr": -1.0}):
        with pytest.raises(UsageError):
            DiTTraining(**wrong)
    with pytest.raises(UsageError, match="multiple of 4"):
        DiTTraining(width=30).shape(CELL)
    with pytest.raises(UsageError):
        DiT(aspect=0.0)


def test_the_learning_rate_rises_and_ends_at_nothing():
    found = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert found[0] == pytest.approx(0.1) and max(found) == 1.0 and found.index(1.0) == 9
    assert found[-1] == pytest.approx(1 / 90) and found[9:] == sorted(found[9:], reverse=True)


# -- data


def test_a_file_of_latents_is_looked_at(latents, tmp_path):
    from safetensors.torch import load_file, save_file

    fields = {"latents": str(latents), "vae": "", "condition": "class", "pictures": 1, "validation": 64}
    data = open_data(fields)
    assert data.cell == {"channels": 2, "side": 4, "vocabulary": 4, "text": 1} and len(data.questions) == 64
    good = load_file(latents)
    for change, said in (
        ({"train": None}, "there is no tensor 'train'"),
        ({"train_text": good["train_text"][:5]}, "train_text is"),
        ({"validation": good["validation"][:, :1].contiguous()}, "differ in shape"),
        ({"train": good["train"][:, :, :3].contiguous()}, r"not \[n, c, s, s\]"),
    ):
        path = tmp_path / "wrong.safetensors"
        save_file({k: v for k, v in {**good, **change}.items() if v is not None}, path)
        with pytest.raises(Error, match=said):
            open_data({**fields, "latents": str(path)})
        open_data.__globals__["_opened"].cache_clear()
    assert set(fields) == set(DATA)


@pytest.mark.parametrize("condition, text, vocabulary", [("class", 1, 64), ("text", 16, 52)])
def test_the_small_world_as_latents(condition, text, vocabulary):
    """Through the embedded autoencoder: shapes, scale about one, and conditions that say what the pictures show."""
    from bench.mini import world

    fields = {"latents": "", "vae": "mini-sd", "condition": condition, "pictures": 40, "validation": 24}
    try:
        data = open_data(fields)
    except Error as e:
        pytest.skip(str(e))
    assert data.train.shape == (40, 4, 8, 8) and data.train_text.shape == (40, text)
    assert data.cell == {"channels": 4, "side": 8, "vocabulary": vocabulary, "text": text}
    assert 0.7 < float(data.train.std()) < 1.4
    first = world.sample(1, 20260001)[0]
    ids = data.train_text[0].tolist()
    if condition == "class":
        assert (world.SHAPES[ids[0] // 8], list(world.COLOURS)[ids[0] % 8]) == (first.shape, first.colour)
    else:
        said = [world.WORDS[i] for i in ids if i < vocabulary]
        assert "a" in said and set(ids[len(said) :]) <= {vocabulary}


# -- the recipe by itself


def test_the_recipe_trains_resumes_and_is_read_back(latents, tmp_path):
    """A killed run ends as an uninterrupted one, bit for bit; the exported weights give the loss that was noted."""
    from safetensors.torch import load_file

    from suites.scaling import dit
    from suites.scaling.flops import Shape

    recipe = DiTTraining(width=8, layers=1, batch=4, steps=6, latents=str(latents), vae="", validation=64)
    recipe = replace(recipe, direction=0.5)
    spec = {"toy": 1}

    def stop(done, losses):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "b", spec=spec, save_every=0.0, progress=stop)
    for name in "ab":
        train(recipe, tmp_path / name, spec=spec, save_every=0.0)
    a, b = (load_file(tmp_path / name / "dit.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    model = dit.DiT(Shape(**json.loads((tmp_path / "a" / "config.json").read_text())))
    model.load_state_dict(a)
    data = open_data({name: getattr(recipe, name) for name in DATA})
    figures = json.loads((tmp_path / "a" / "recipe.json").read_text())["figures"]
    assert measure.measure(model, data.questions).mean == pytest.approx(figures["loss"], rel=1e-6)
    losses = (tmp_path / "a" / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,loss,mse" and len(losses) == 7
    assert all(float(line.split(",")[1]) > float(line.split(",")[2]) for line in losses[1:])  # the direction counts


def test_conditions_are_left_out_and_the_average_follows(latents, tmp_path):
    """The share of dropped conditions changes the course; a short memory makes the average the last weights."""
    base = DiTTraining(width=8, layers=1, batch=8, steps=20, latents=str(latents), vae="", validation=64)

    def figures(recipe, name):
        folder = train(recipe, tmp_path / name, spec={})
        return json.loads((folder / "recipe.json").read_text())["figures"]

    found = figures(base, "a")
    assert found["loss"] != figures(replace(base, drop=0.5), "b")["loss"]
    short = figures(replace(base, ema=0.001), "c")
    assert short["loss"] == pytest.approx(short["loss_raw"], rel=1e-5)
    assert math.isclose(found["loss"] - found["loss_raw"], found["loss_gain"], abs_tol=1e-9)
