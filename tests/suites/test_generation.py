"""The suite of text-to-image models: numbers against peers, exact agreement, seeds, reuse, flags and bad input."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_model import Drawn
from scipy.linalg import sqrtm

from bench import Error, Store, UsageError, execute, manifest, manifest_verbs
from bench.compare import compare
from bench.config import How
from bench.mini import world
from bench.report import render
from suites.generation import protocols
from suites.generation.suite import Generation, mean_distance

HOW = How(devices="cpu", threads=1, keep="none")
N = 140  # of both sets; more than the 128 features


def score(model, store, limit=None, name="drawn", how=HOW, identity=(), **fields):
    known = {"name": name, **vars(model), "asked": None, **dict(identity)}
    return execute(Generation(**fields), model, identity=known, store=Store(store), limit=limit, how=how)


def by_name(run, slice="all"):
    return {s.metric: s for s in run.scores() if s.slice == slice}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / ".bench"


@pytest.fixture(scope="module")
def scored(store):
    return score(Drawn(wrong=4), store, N)


def pictures_of(run, model):
    """uint8 [n, 3, 32, 32] of both sets, in the order of the rows, and the prompts of the first."""
    suite, found = Generation(), []
    data, reference = manifest.load(suite.data), manifest.load(suite.reference)
    prompts = []
    for row in run.table().rows:
        name = row["item"].partition(":")[2]
        if name:
            found.append((row, reference.read(name)))
            continue
        from bench.identity import seed_for

        prompts.append(data.item(row["item"].partition("#")[0]).text)
        seed = seed_for(0, suite.name, suite.version, row["item"], "latent")
        found.append((row, world.draw([model.picture(prompts[-1], seed)])[0]))
    sides = [torch.from_numpy(np.stack([p for r, p in found if r["side"] == s])) for s in ("generated", "reference")]
    return *(x.permute(0, 3, 1, 2) for x in sides), prompts


@pytest.mark.skipif(
    "disp" not in inspect.signature(sqrtm).parameters, reason="clean-fid calls sqrtm(disp=…), which SciPy 1.18 dropped"
)
def test_distances_and_clip_score_are_those_of_peers(scored):
    """Fréchet by clean-fid's function on the classifier's features, relative 1e-5 (float32 features), KID by its Gram
    matrices, 1e-4; CLIP score by torchmetrics with the same towers, 1e-4; pictures and features are made here."""
    from cleanfid.fid import frechet_distance
    from torchmetrics.functional.multimodal import clip_score

    from bench.mini import judges

    made, reference, prompts = pictures_of(scored, Drawn(wrong=4))
    assert len(made) == len(reference) == N
    net = judges.load_classifier()
    with torch.no_grad():
        x, y = (net.features(p).numpy().astype(np.float64) for p in (made, reference))
    found = by_name(scored)
    moments = [v for s in (x, y) for v in (s.mean(0), np.cov(s, rowvar=False))]
    assert found["frechet-mini-classifier"].value == pytest.approx(frechet_distance(*moments), rel=1e-5)
    kernels = [(a @ b.T / 128 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    clusters = np.array(scored.table().where("side", "generated").clusters())
    apart = clusters[:, None] != clusters  # pictures of one sentence are no independent pair
    expected = kernels[0][apart].mean() + kernels[1][~np.eye(N, dtype=bool)].mean() - 2 * kernels[2].mean()
    assert found["kid-mini-classifier"].value == pytest.approx(expected, rel=1e-4, abs=1e-6)

    model, tokenizer = judges.load_clip()

    class Towers:
        """As torchmetrics calls them: it wants tensors, which transformers 5 wraps."""

        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return judges.embed_images(model, pixels)

        def get_text_features(self, ids, mask):
            return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def processor(text=None, images=None, **rest):
        if text is not None:
            return tokenizer(text, padding=True, return_tensors="pt")
        return {"pixel_values": torch.stack(list(images)) / 255}

    expected = clip_score(list(made), prompts, model_name_or_path=lambda: (Towers(), processor))
    assert found["clip-score"].value == pytest.approx(float(expected), abs=1e-4)
    assert all(s.complete for s in scored.scores())
    assert {found["clip-score"].n, found["agreement.all"].n, found["judge.all"].n} == {N}
    assert found["frechet-mini-classifier"].n == 2 * N


def test_agreement_is_the_share_that_the_model_got_right(scored):
    """Every fourth seed is drawn in another colour; the judge reads these pictures without error, as its own score on
    reference pictures says."""
    rows = [r for r in scored.table().rows if r["side"] == "generated"]
    from bench.identity import seed_for

    right = [seed_for(0, "generation", 1, r["item"], "latent") % 4 != 0 for r in rows]
    found = by_name(scored)
    assert found["agreement.colour"].value == pytest.approx(np.mean(right), abs=1 / N)
    assert found["agreement.all"].value <= found["agreement.colour"].value
    assert found["agreement.shape"].value > 0.97 and found["agreement.background"].value > 0.97
    assert 0 < found["agreement.all"].low < found["agreement.all"].value < found["agreement.all"].high < 1
    assert found["judge.all"].value > 0.97 and f"|m:{N}|" in found["judge.all"].signature
    held_out = by_name(scored, "composition=held out")
    assert held_out["agreement.all"].n < N and held_out["frechet-mini-classifier"].note == "the reference set is empty"
    assert by_name(scored, "composition=seen")["frechet-mini-classifier"].value > 0
    assert not [s for s in scored.scores() if s.slice.startswith("shape=") and s.metric.startswith("frechet")]


class Blank(Drawn):
    """No shape at all."""

    def generate(self, prompts, seeds):
        return torch.full((len(prompts), 3, 32, 32), 0.5)


def test_a_picture_of_nothing_agrees_with_no_prompt(store):
    run = score(Blank(), store, 12, "blank")
    assert set(run.table().where("side", "generated").column("seen.shape")) == {"none"}
    shape = by_name(run)["agreement.shape"]
    assert (shape.value, shape.low, shape.method) == (0.0, 0.0, "wilson") and 0 < shape.high < 0.3


def test_every_model_and_setting_gets_the_same_seeds(tmp_path):
    first, second = Drawn(), Drawn(wrong=3, guidance=4.0)
    for i, model in enumerate((first, second)):
        score(model, tmp_path / str(i), 6, images_per_prompt=2)
    assert first.asked == second.asked and len(set(first.asked)) == 12
    more = Drawn()
    score(more, tmp_path / "2", 6, images_per_prompt=3, how=replace(HOW, batch=5), chunk=4)
    assert set(first.asked) < set(more.asked) and len(more.asked) == 18


def test_diversity_is_the_mean_distance_of_pictures_of_one_prompt(store):
    """By scipy's pdist on features that torch gives here, relative 1e-4."""
    from scipy.spatial.distance import pdist

    from bench.mini import judges

    run = score(Drawn(), store, 8, prompts=5, images_per_prompt=3)
    made, _, prompts = pictures_of(run, Drawn())
    with torch.no_grad():
        features = judges.load_classifier().features(made).numpy().astype(np.float64)
    groups = {p: [i for i, q in enumerate(prompts) if q == p] for p in prompts}
    expected = np.mean([pdist(features[rows]).mean() for rows in groups.values()])
    found = by_name(run)["diversity-mini-classifier"]
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.low < found.value < found.high and found.n == 15 and found.complete
    alone = by_name(score(Drawn(), store, 3))["diversity-mini-classifier"]
    assert alone.value is None and alone.note == "3 of 3 prompts have one picture"
    assert mean_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == 5.0


def test_a_model_that_varies_less_is_less_diverse_and_comparison_is_paired(tmp_path):
    runs = [
        score(model, tmp_path, None, f"drawn-{model.guidance}", prompts=12, images_per_prompt=4, **FOLDER(tmp_path))
        for model in (Drawn(), Drawn(wrong=2, guidance=5.0))
    ]
    free, tied = (by_name(run)["diversity-mini-classifier"] for run in runs)
    assert tied.value < free.value
    found = {d.metric: d for d in compare(*runs).differences}
    colour = found["agreement.colour"]
    assert colour.high < 0 and colour.n == 48 and "drawn-1.0 better" in colour.verdict


def FOLDER(path):  # a small reference without truth
    from PIL import Image

    folder = path / "reference"
    if not folder.exists():
        folder.mkdir()
        for i, picture in enumerate(world.draw(world.sample(20, 7))):
            Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return {"reference": f"image-folder:{folder}"}


def test_prompts_beyond_the_limit_are_counted_and_said(tmp_path):
    class Short(Drawn):
        max_tokens = 8

    run = score(Short(), tmp_path, None, "short", prompts=4, **FOLDER(tmp_path))
    found = by_name(run)
    assert found["prompts.truncated"].value == 4
    assert all("4 of 4 prompts were cut to the model's limit" in s.note for s in found.values())
    assert by_name(score(Drawn(), tmp_path, None, prompts=4, **FOLDER(tmp_path)))["prompts.truncated"].value == 0

    class Silent(Drawn):
        tokens = None

    quiet = by_name(score(Silent(), tmp_path, None, "silent", prompts=4, **FOLDER(tmp_path)))["prompts.truncated"]
    assert quiet.value is None and quiet.note == "the model does not count tokens"


def test_a_reference_without_truth_withholds_the_judge_and_not_the_rest(tmp_path):
    found = by_name(score(Drawn(), tmp_path, None, prompts=4, **FOLDER(tmp_path)))
    assert found["judge.shape"].value is None and found["judge.shape"].note == "20 name no shape"
    assert found["agreement.all"].value == 1 and found["frechet-mini-classifier"].value > 0


def test_the_reference_is_measured_once_for_all_models(tmp_path, monkeypatch):
    read, original = [], manifest.Manifest.read
    monkeypatch.setattr(manifest.Manifest, "read", lambda self, id: (read.append(id), original(self, id))[1])
    fields = {"prompts": 2, **FOLDER(tmp_path)}
    score(Drawn(), tmp_path, **fields)
    assert len(read) == 20
    score(Drawn(wrong=1), tmp_path, **fields)
    assert len(read) == 20


# -- bad input


def prompts_manifest(folder, text):
    (folder / "data_manifests").mkdir(exist_ok=True)
    (folder / "data_manifests/mine.items.csv").write_text(text)
    head = 'kind = "prompts"\nsource = "me"\nlicense = "CC0-1.0"\nredistribute = true\nlocked = false\n'
    (folder / "data_manifests/mine.toml").write_text(head)
    return manifest_verbs.lock("mine")


def test_an_empty_prompt_file_and_items_without_prompt_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error, match="nothing to lock"):
        prompts_manifest(tmp_path, "id,text\n")
    prompts_manifest(tmp_path, 'id,text\na,a red circle on a white background\nb,""\n')
    with pytest.raises(Error, match="data mine: item b has no prompt"):
        score(Drawn(), tmp_path, data="mine")
    with pytest.raises(Error, match="item 000000: tag None"):  # pictures with captions are prompts, too
        suite = Generation(data="world-val", protocol="geneval", detector="toy")
        list(suite.units(manifest.load("world-val"), manifest.load("world-val")))


class Bad(Drawn):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def generate(self, prompts, seeds):
        x = super().generate(prompts, seeds)
        faults = {"nan": x.clone(), "levels": x * 255, "signed": x * 2 - 1, "fewer": x[:-1], "bytes": (x * 255).byte()}
        faults["nan"][-1, 0, 0, 0] = float("nan")
        return faults[self.fault]


@pytest.mark.parametrize(
    "fault, says",
    [
        ("nan", "NaN or infinity in 1 of 4 pictures, item "),
        ("levels", "pictures from 0 to 255|pictures from .* to 2"),
        ("signed", "pictures from -"),
        ("fewer", r"\[3, 3, 32, 32\] for 4 prompts"),
        ("bytes", "torch.uint8"),
    ],
)
def test_pictures_that_cannot_be_scored_are_failed_units_and_no_zero(fault, says, tmp_path):
    run = score(Bad(fault), tmp_path, None, fault, prompts=4, **FOLDER(tmp_path))
    (failure,) = run.failures()
    assert failure.unit == "generated/0000"
    assert pytest.importorskip("re").search(says, failure.error["message"]), failure.error["message"]
    assert len(run.table()) == 20 and not any(s.complete for s in run.scores())
    made = {s.metric: s.value for s in run.scores() if not s.metric.startswith("judge")}
    assert set(made.values()) == {None}


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"protocol": "wrold"}, "did you mean 'world'"),
        ({"images_per_prompt": 0}, "images_per_prompt = 0 must be 1 or more"),
        ({"prompts": 0}, "prompts = 0"),
        ({"protocol": "geneval"}, "needs a detector"),
        ({"detector": "toy"}, "asks no detector"),
    ],
)
def test_what_was_typed_wrong_is_said(fields, says):
    with pytest.raises(UsageError, match=says):
        Generation(**fields)


def test_the_definition_is_kept_with_the_run(scored):
    kept = json.loads((scored.path / "artifacts/protocol.json").read_text())
    assert kept["hash"] == protocols.get("world").hash() and kept["definition"]["clip"] == "mini-clip"


# -- GenEval through the suite

DETECTOR = '''
from suites.generation.geneval import Detection

class Sure:
    """Finds one object of each class asked for, red, in a row."""

    def __init__(self, count: int = 1):
        self.count = count

    def detect(self, images, labels, colours):
        return [
            [Detection(label, 0.95, (40 * i, 0, 40 * i + 20, 20), "red") for i, label in enumerate(one * self.count)]
            for one in labels
        ]
'''
ROWS = """id,text,tag,include,exclude
a,one dog,single_object,"[{""class"": ""dog"", ""count"": 1}]",
b,a dog and a cat,two_object,"[{""class"": ""dog"", ""count"": 1}, {""class"": ""cat"", ""count"": 1}]",
c,two dogs,counting,"[{""class"": ""dog"", ""count"": 2}]","[{""class"": ""dog"", ""count"": 3}]"
d,a red dog,colors,"[{""class"": ""dog"", ""count"": 1, ""color"": ""red""}]",
e,a cat right of a dog,position,"[{""class"": ""dog"", ""count"": 1}, {""class"": ""cat"", ""count"": 1, ""position"": [""right of"", 0]}]",
f,a red dog and a blue cat,color_attr,"[{""class"": ""dog"", ""count"": 1, ""color"": ""red""}, {""class"": ""cat"", ""count"": 1, ""color"": ""blue""}]",
"""  # noqa: E501


def test_geneval_asks_the_detector_and_means_the_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts_manifest(tmp_path, ROWS)
    (tmp_path / "my_detector.py").write_text(DETECTOR)
    fields = {"data": "mine", "protocol": "geneval", "images_per_prompt": 2}
    run = score(Blank(), tmp_path, detector="my_detector.py:Sure", **fields)
    found = by_name(run)
    tasks = {k.partition(".")[2]: s.value for k, s in found.items() if k.startswith("geneval.")}
    assert tasks == {
        "single_object": 1,
        "two_object": 1,
        "counting": 0,
        "colors": 1,
        "position": 1,
        "color_attr": 0,
    }
    assert found["geneval"].value == pytest.approx(4 / 6) and found["geneval"].n == 12 and found["geneval"].complete
    assert (
        found["geneval.counting"].n == 2
        and found["geneval.counting"].note == "1 prompts; 12 pictures are one flat colour"
    )
    faults = run.table().where("tag", "color_attr").column("geneval.fault")
    assert faults == ["cat is red, not blue"] * 2
    assert not any(row["side"] == "reference" for row in run.table().rows)
    twice = by_name(score(Blank(), tmp_path, detector="my_detector.py:Sure?count=2", **fields))
    assert twice["geneval.counting"].value == 1  # another detector is another run
    (tmp_path / "blind.py").write_text("class Blind:\n    pass\n")
    with pytest.raises(Error, match="no method detect"):
        score(Blank(), tmp_path, detector="blind.py:Blind", **fields)


# -- the page

BOARD = """
title = "Guidance"
[select]
suite = ["generation"]
[[column]]
suite = "generation"
metric = "agreement.all"
[[figure]]
kind = "tradeoff"
suite = "generation"
title = "Agreement by guidance"
y = "agreement.all"
vary = "guidance"
[[figure]]
kind = "tradeoff"
suite = "generation"
title = "Agreement against diversity"
x = "diversity-mini-classifier"
y = "agreement.all"
vary = "guidance"
[gallery]
items = 48
"""


def test_the_page_shows_prompts_by_seed_and_trade_offs(tmp_path):
    models = [Drawn(guidance=1.0), Drawn(wrong=3, guidance=2.0), Drawn(wrong=2, guidance=4.0)]
    for model in models:
        how = replace(HOW, keep="sample")
        fields = {"prompts": 20, "images_per_prompt": 4, **FOLDER(tmp_path)}
        score(model, tmp_path / ".bench", None, f"drawn-{model.guidance}", how, **fields)
    (tmp_path / "board.toml").write_text(BOARD)
    render(tmp_path / "board.toml", Store(tmp_path / ".bench"), tmp_path / "out")
    page = (tmp_path / "out/index.html").read_text()
    tiles = json.loads((tmp_path / "out/runs.json").read_text())["tiles"]
    assert len(tiles) == 3 and all(len(t) == 16 for t in tiles.values())
    prompts = {t["text"] for shown in tiles.values() for t in shown.values()}
    assert len(prompts) == 4 and all(f'<th scope="row">{p}</th>' in page for p in prompts)
    assert page.count('seed 1">') == 12 and page.count("<td><img") == 12
    import csv

    (first,) = (tmp_path / "out/figures").glob("01-*.csv")
    rows = {float(r["guidance"]): r for r in csv.DictReader(first.open())}
    assert sorted(rows) == [1.0, 2.0, 4.0]
    assert [rows[g]["front"] for g in (1.0, 2.0, 4.0)] == ["True", "False", "False"]
    (second,) = (tmp_path / "out/figures").glob("02-*.csv")
    assert next(r for r in csv.DictReader(second.open()) if r["guidance"] == "1.0")["front"] == "True"
    again = tmp_path / "again"
    render(tmp_path / "board.toml", Store(tmp_path / ".bench"), again)
    assert (again / "index.html").read_bytes() == (tmp_path / "out/index.html").read_bytes()


def test_what_a_caption_leaves_open_is_not_asked():
    from bench.types import Item
    from suites.generation.suite import _asked

    whole = {"shape": "circle", "colour": "red", "background": "blue"}
    items = [
        Item("a", text="a circle", attributes=whole),
        Item("b", text="a red disc on a blue background", attributes=whole),
    ]
    assert _asked(items, [str(i.text) for i in items]) == {
        "shape": ["circle", "circle"],
        "colour": [None, "red"],
        "background": [None, "blue"],
    }
