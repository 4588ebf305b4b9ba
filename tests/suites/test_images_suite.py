"""The suite of two sets of pictures: numbers against other libraries, one pass, flags, reuse, shards and bad input."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image
from toys import command

from bench import Error, Estimate, Store, Suite, Unit, UsageError, execute, images
from bench.adapters.folder_of_images import FolderOfImages
from bench.capabilities import held
from bench.config import How, bind
from bench.prepare import prepare
from bench.types import Data
from suites.images import flags, protocols
from suites.images.suite import Images

HOW = How(devices="cpu", threads=1, keep="none")
N, M, SIZE = 140, 150, 64


def pictures(n, seed, size=SIZE, soft=False):
    """uint8 [n, size, size, 3]: coloured noise of random smoothness, a picture alike at any n."""
    found = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        coarse = rng.normal(0.5, 0.2, (8, 8, 3)).repeat(size // 8, 0).repeat(size // 8, 1)
        fine = rng.normal(0, rng.uniform(0.02, 0.2), (size, size, 3))
        found.append(np.clip((coarse + (0.3 * fine if soft else fine)) * 255, 0, 255).astype(np.uint8))
    return np.stack(found)


def save(folder, found, suffix=".png", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(found, first):
        Image.fromarray(picture).save(folder / f"{i:04d}{suffix}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    save(root / "sharp", pictures(N, 1))
    save(root / "soft", pictures(N, 1, soft=True))
    save(root / "ref", pictures(M, 2))
    return root


def score(folder, reference, store, **more):
    args = bind(FolderOfImages, "folder-of-images", {"path": str(folder)}, {})
    suite = Images(reference=Data(f"image-folder:{reference}"), **more.pop("fields", {}))
    return execute(suite, "folder-of-images", arguments=args, store=Store(store), how=more.pop("how", HOW), **more)


def decodes(monkeypatch):
    """The names of the files that are decoded from now on."""
    found, decode = [], images._decode

    def counted(library, data, name):
        found.append(name)
        return decode(library, data, name)

    monkeypatch.setattr(images, "_decode", counted)
    return found


def by_name(run):
    return {s.metric: s for s in run.scores()}


def features(found):
    """float32 [n, 32] of the embedded network, straight from the pictures."""
    import torch

    from bench.mini.features import load

    with torch.no_grad():
        return load()(torch.from_numpy(found).permute(0, 3, 1, 2)).numpy()


@pytest.fixture(scope="module")
def scored(folders, tmp_path_factory):
    return score(folders / "sharp", folders / "ref", tmp_path_factory.mktemp("store") / ".bench")


def test_the_numbers_are_those_of_the_plain_formulas(folders, scored):
    """Fréchet: Dowson and Landau by scipy's sqrtm, relative 1e-6; KID: the U-statistic from Gram matrices, 1e-5."""
    from scipy.linalg import sqrtm

    x, y = (features(v).astype(np.float64) for v in (pictures(N, 1), pictures(M, 2)))
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t - 2 * sqrtm(s @ t).real)
    found = by_name(scored)
    plug_in, corrected = found["frechet-embedded"], found["frechet-embedded.corrected"]
    assert plug_in.value == pytest.approx(expected, rel=1e-6)
    assert corrected.low < corrected.value < corrected.high and corrected.value < plug_in.value
    xx, yy, xy = ((a @ b.T / 32 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    u = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    assert found["kid-embedded"].value == pytest.approx(sum(u) - 2 * xy.mean(), rel=1e-5, abs=1e-5)
    assert all(s.n == s.expected == N + M and s.complete for s in scored.scores())
    assert f"|n:{N}|m:{M}|" in plug_in.signature and not plug_in.note


def test_every_distance_of_the_default_protocol_is_there_with_its_error(scored):
    found = by_name(scored)
    assert set(found) == {
        *("frechet-embedded", "frechet-embedded.corrected", "kid-embedded"),
        *("cmmd-embedded", "cmmd-embedded.unbiased"),
        *(f"prdc-embedded.{part}" for part in ("precision", "recall", "density", "coverage")),
        *(f"pictures.{part}" for part in ("repeated", "repeated-reference", "shared")),
    }
    for metric in ("frechet-embedded.corrected", "kid-embedded", "cmmd-embedded.unbiased", "prdc-embedded.precision"):
        assert found[metric].low < found[metric].value < found[metric].high, metric


def test_small_pictures_have_a_protocol_with_an_inception_score(tmp_path, monkeypatch):
    """Of shapes of the drawn world: eight at most, and a classifier that is sure of them comes near (2,000 would)."""
    from bench.metrics import extractors
    from bench.mini import world

    outputs, passed = extractors.Network.outputs, []
    monkeypatch.setattr(
        extractors.Network, "outputs", lambda self, x, *rest: (passed.append(len(x)), outputs(self, x, *rest))[1]
    )
    own, ref = (save(tmp_path / f"s{seed}", world.draw(world.sample(160, seed))) for seed in (1, 2))
    found = by_name(score(own, ref, tmp_path / ".bench", fields={"protocol": "world"}))
    corrected = found["inception-score-mini-classifier.corrected"]
    assert 6.5 < corrected.value < 8.5 and corrected.low < corrected.value < corrected.high
    assert found["frechet-mini-classifier"].value > 0 and all(s.complete for s in found.values())
    assert sum(passed) == 640  # two networks; logits and features of the first come from one pass


def test_a_blurred_set_is_further_away(folders, scored):
    store = scored.store.root
    soft, sharp = by_name(score(folders / "soft", folders / "ref", store)), by_name(scored)
    for metric in ("frechet-embedded.corrected", "kid-embedded"):
        assert soft[metric].low > sharp[metric].high, metric


def test_each_file_is_decoded_once_and_each_picture_passes_the_network_once(folders, tmp_path, monkeypatch):
    from bench.metrics import extractors

    decoded, passed = decodes(monkeypatch), []
    outputs = extractors.Network.outputs

    def counted(self, x, *rest):
        passed.append(len(x))
        return outputs(self, x, *rest)

    monkeypatch.setattr(extractors.Network, "outputs", counted)
    score(folders / "sharp", folders / "ref", tmp_path / ".bench")
    assert len(decoded) == len(set(decoded)) == N + M
    assert sum(passed) == N + M


def test_the_reference_is_measured_once_for_all_models(folders, tmp_path, monkeypatch):
    """The second model reads no reference picture, and its scores are byte for byte those of a store of its own."""
    alone = score(folders / "soft", folders / "ref", tmp_path / "alone")
    score(folders / "sharp", folders / "ref", tmp_path / ".bench")
    decoded = decodes(monkeypatch)
    run = score(folders / "soft", folders / "ref", tmp_path / ".bench")
    assert len(decoded) == N and all("soft" in name for name in decoded)
    assert (run.path / "scores.csv").read_bytes() == (alone.path / "scores.csv").read_bytes()
    for path in (tmp_path / ".bench" / "shared").glob("*/*.json"):  # a damaged entry is no entry
        path.write_bytes(path.read_bytes()[:-20])
    decoded.clear()
    run = score(folders / "soft", folders / "ref", tmp_path / ".bench", how=replace(HOW, batch=7))
    assert not decoded  # the run is whole
    score(folders / "soft", folders / "ref", tmp_path / ".bench", seed=1)
    assert len(decoded) == N + M


def test_another_network_is_another_reference(folders, tmp_path, monkeypatch):
    from bench.metrics.sets import SetMetric

    score(folders / "sharp", folders / "ref", tmp_path / ".bench")
    decoded = decodes(monkeypatch)
    monkeypatch.setattr(SetMetric, "identity", lambda self, ctx: "another@00000000")
    score(folders / "soft", folders / "ref", tmp_path / ".bench")
    assert len(decoded) == N + M


def test_pictures_of_several_sizes_keep_their_own(tmp_path):
    """Features of a picture are those it has alone, whatever lies beside it (1e-5: other batches, other sums)."""
    mixed = [*pictures(3, 5), *pictures(3, 6, 96), *pictures(3, 7)]
    save(tmp_path / "mixed", mixed), save(tmp_path / "ref", pictures(4, 8))
    run = score(tmp_path / "mixed", tmp_path / "ref", tmp_path / ".bench", fields={"chunk": 5})
    table = run.table()
    generated = table.where("side", "generated")
    assert generated.column("item") == [f"generated:{i:04d}.png" for i in range(9)]
    expected = np.concatenate([features(p[None]) for p in mixed])
    np.testing.assert_allclose(generated.features("embedded"), expected, rtol=1e-4, atol=1e-5)
    assert generated.column("width") == [64] * 3 + [96] * 3 + [64] * 3
    note = by_name(run)["frechet-embedded"].note
    assert "of 2 sizes from 64x64 to 96x96 px, the reference of 64x64 px" in note
    resized = score(tmp_path / "mixed", tmp_path / "ref", tmp_path / ".bench", fields={"size": 64})
    assert "3 generated pictures resized to 64 px" in by_name(resized)["frechet-embedded"].note


def test_another_network_can_look_later_at_what_was_kept(tmp_path):
    """Pictures of several sizes, in their order; Fréchet is withheld for so few, its features are there."""
    from bench.metrics.extractors import opened
    from bench.reduction import derive, suite_of
    from bench.rescore import remeasure

    mixed = [*pictures(2, 5), *pictures(2, 6, 96), *pictures(2, 7)]
    save(tmp_path / "mixed", mixed), save(tmp_path / "ref", pictures(4, 8))
    run = score(tmp_path / "mixed", tmp_path / "ref", tmp_path / ".bench", how=replace(HOW, keep="all"))
    metric = "bench.metrics.frechet:Frechet?extractor=mini-classifier&fake=output&real=reference"
    assert remeasure(run, metric) == 2
    found = run.table().where("side", "generated").features("mini-classifier")

    class Here:
        device = "cpu"

    import torch

    network = opened("mini-classifier", Here())
    expected = np.concatenate([network(torch.from_numpy(p).permute(2, 0, 1)[None]) for p in mixed])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert {s.metric for s in derive(run, suite_of(run))} >= {"frechet-mini-classifier", "kid-embedded"}


def test_mixed_formats_repeats_and_leaks_stand_beside_every_distance(tmp_path):
    own, ref = pictures(6, 1), pictures(6, 2)
    save(tmp_path / "own", own[:4]), save(tmp_path / "own", own[4:], ".jpg", 4)
    save(tmp_path / "own", [own[0], ref[3]], first=6)
    save(tmp_path / "ref", ref, ".bmp")
    run = score(tmp_path / "own", tmp_path / "ref", tmp_path / ".bench")
    found = by_name(run)
    for metric, line in found.items():
        if not metric.startswith("pictures."):
            assert "stored as PNG (6) and JPEG (2), the reference as BMP" in line.note, metric
            assert "1 generated picture repeats another one" in line.note
            assert "1 generated picture stands in the reference, too" in line.note
    counts = [found[f"pictures.{name}"].value for name in ("repeated", "repeated-reference", "shared")]
    assert counts == [1, 0, 1]
    assert json.loads((run.path / "artifacts" / "protocol.json").read_text())["flags"] == flags.sentences(
        run.table().rows, None
    )


def row(side, content, width=64, height=64, format="PNG"):
    return {"side": side, "content": content, "width": width, "height": height, "format": format}


@pytest.mark.parametrize(
    "generated, reference, size, says",
    [
        ([row("generated", "a")], [row("reference", "b")], None, []),
        ([row("generated", "a")], [row("reference", "a")], None, ["1 generated picture stands in the reference, too"]),
        (
            [row("generated", "a"), row("generated", "b")],
            [row("reference", "a"), row("reference", "b")],
            None,
            ["all 2 generated pictures stand in the reference, too"],
        ),
        (
            [row("generated", "a")],
            [row("reference", c) for c in "bbb"],
            None,
            ["2 reference pictures repeat another one"],
        ),
        ([row("generated", "a", format=None)], [row("reference", "b", format="JPEG")], None, []),
        (
            [row("generated", "a", 512, 512)],
            [row("reference", "b", 500, 375)],
            256,
            [
                "of 512x512 px, the reference of 500x375 px",
                "1 generated and 1 reference pictures resized to 256 px",
            ],
        ),
        ([], [row("reference", "b"), row("reference", "b")], None, []),
    ],
)
def test_flags_say_what_is_there_and_nothing_else(generated, reference, size, says):
    assert flags.sentences([*generated, *reference], size) == says


def test_equal_content_needs_equal_pixels_and_shape():
    a = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert flags.content(a) == flags.content(a.copy()) != flags.content(a.reshape(2, 8, 3))
    assert flags.content(a) != flags.content(a[::-1])


def test_a_model_that_repeats_a_few_pictures_is_not_taken_for_the_few_of_many(tmp_path):
    own, few = pictures(8, 1), tmp_path / "few"
    save(few, [own[i % 8] for i in range(64)]), save(tmp_path / "ref", pictures(64, 2))
    run = score(few, tmp_path / "ref", tmp_path / ".bench")
    table = run.table()
    assert len(set(table.where("side", "generated").clusters())) == 64
    x, y = (table.where("side", side).features("embedded").astype(np.float64) for side in ("generated", "reference"))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = 64  # the plain U-statistic, copies included: what a model that draws each of eight at random has
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y))) / (n * (n - 1))
    found = next(s for s in run.scores() if s.metric == "kid-embedded")
    assert found.value == pytest.approx(within - 2 * kernel(x, y).mean(), rel=1e-4)
    assert "56 generated pictures repeat another one" in found.note


def test_the_files_are_the_identity(tmp_path):
    own, ref = save(tmp_path / "own", pictures(3, 1)), save(tmp_path / "ref", pictures(3, 2))

    def spec():
        args = bind(FolderOfImages, "folder-of-images", {"path": str(own)}, {})
        suite = Images(reference=Data(f"image-folder:{ref}"))
        return prepare(suite, "folder-of-images", args, store=Store(tmp_path / ".bench")).spec

    first = spec()
    assert spec() == first
    save(own, pictures(1, 9))
    changed = spec()
    assert changed["adapter_args"] != first["adapter_args"]
    (own / "0000.png").rename(own / "a.png")
    assert spec()["adapter_args"] not in (first["adapter_args"], changed["adapter_args"])


def test_shards_make_the_whole_and_a_foreign_row_is_found(folders, tmp_path):
    whole = score(folders / "sharp", folders / "ref", tmp_path / "whole", fields={"chunk": 20})
    fields = {"chunk": 20}
    first = score(folders / "sharp", folders / "ref", tmp_path / ".bench", shard="1/2", fields=fields)
    assert not any(s.complete for s in first.scores() if s.metric.startswith("frechet"))
    run = score(folders / "sharp", folders / "ref", tmp_path / ".bench", shard="0/2", fields=fields)
    assert (run.path / "scores.csv").read_bytes() == (whole.path / "scores.csv").read_bytes()
    other = score(folders / "soft", folders / "ref", tmp_path / ".bench", fields=fields)
    log = run.path / "units.0of2.jsonl"
    log.write_bytes(log.read_bytes() + (other.path / "units.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(Error, match="rows that are not the 290 items planned"):
        score(folders / "sharp", folders / "ref", tmp_path / ".bench", fields=fields)


def test_a_limit_takes_some_of_both_sets(folders, tmp_path):
    table = score(folders / "sharp", folders / "ref", tmp_path / ".bench", limit=5).table()
    assert table.column("side").count("generated") == table.column("side").count("reference") == 5


def test_a_live_set_of_arrays_is_a_model(tmp_path):
    class Held:
        def names(self):
            return ["b", "a", "c"]

        def pictures(self, names):
            return [pictures(3, 1)["abc".index(name)] for name in names]

    save(tmp_path / "ref", pictures(3, 2))
    suite = Images(reference=Data(f"image-folder:{tmp_path / 'ref'}"))
    run = execute(suite, Held(), identity={"name": "held"}, store=Store(tmp_path / ".bench"), how=HOW)
    rows = run.table().where("side", "generated")
    assert rows.column("item") == ["generated:b", "generated:a", "generated:c"]
    assert rows.column("content") == [flags.content(p) for p in pictures(3, 1)[[1, 0, 2]]]
    assert rows.column("format") == [None] * 3


# -- two models against one reference


def test_the_paired_difference_is_that_of_the_features(folders, scored):
    """Against the metrics' own pure functions on features computed here, relative 1e-4: float32 in other batches."""
    from bench.compare import compare
    from bench.metrics.frechet import frechet_difference

    soft = score(folders / "soft", folders / "ref", scored.store.root)
    found = compare(scored, soft)
    assert (found.shared, found.same_seed) == (N, True)
    by_metric = {d.metric: d for d in found.differences}
    a, b, ref = (features(v) for v in (pictures(N, 1), pictures(N, 1, soft=True), pictures(M, 2)))
    names = [str(i) for i in range(N + M)]
    expected = frechet_difference(a, b, ref, names[:N], names[N:])
    d = by_metric["frechet-embedded.corrected"]
    assert d.value == pytest.approx(expected.value, rel=1e-4) and d.low < d.value < d.high
    assert d.verdict == "sharp better" and d.gain > 1 and "paired" in d.method
    plain = by_metric["frechet-embedded"]
    assert plain.value == pytest.approx(plain.b - plain.a) and plain.verdict == "no interval"
    back = {d.metric: d for d in compare(soft, scored).differences}["frechet-embedded.corrected"]
    assert (back.value, back.low, back.verdict) == (pytest.approx(-d.value), pytest.approx(-d.high), "sharp better")


def test_rows_that_depend_on_each_other_in_either_run_do_so_in_both():
    from bench.compare import _clustered_alike
    from bench.metrics.sets import Sets

    def sets(generated, reference):
        rows = [np.zeros((len(names), 2), np.float32) for names in (generated, reference)]
        return Sets(*rows, False, list(generated), list(reference))

    a, b = _clustered_alike(sets("abcdd", "xyd"), sets("pqprs", "xyz"))
    assert a.generated_clusters == b.generated_clusters == ["0", "1", "0", "3", "3"]
    assert a.reference_clusters == b.reference_clusters == ["5", "6", "3"]


def test_sets_without_shared_names_are_compared_unpaired(folders, scored, tmp_path):
    from bench.compare import compare

    save(tmp_path / "other", pictures(N, 1, soft=True), first=5000)
    found = compare(scored, score(tmp_path / "other", folders / "ref", scored.store.root))
    d = {d.metric: d for d in found.differences}["frechet-embedded.corrected"]
    assert found.shared == 0 and d.method == "independent" and d.verdict == "sharp better, unpaired" and d.gain is None


def test_another_reference_or_protocol_is_refused(folders, scored):
    from bench.compare import compare

    with pytest.raises(Error, match="the runs differ in reference"):
        compare(scored, score(folders / "soft", folders / "sharp", scored.store.root))
    with pytest.raises(Error, match="the runs differ in size: None and 64"):
        compare(scored, score(folders / "soft", folders / "ref", scored.store.root, fields={"size": 64}))


def test_a_board_ties_models_by_their_paired_difference(folders, scored, tmp_path):
    """Copies with a grey level added: unpaired intervals overlap, paired ones do not."""
    from bench.compare import compare
    from bench.report import render
    from bench.report.collect import read_pairs

    brighter = np.minimum(pictures(N, 1).astype(int) + 6, 255).astype(np.uint8)
    run = score(save(tmp_path / "brighter", brighter), folders / "ref", scored.store.root)
    one, other = (by_name(r)["frechet-embedded.corrected"] for r in (scored, run))
    assert one.high > other.low  # unpaired, nothing can be told
    (tmp_path / "b.toml").write_text(
        'title = "b"\nsources = ["store"]\n[select]\nsuite = ["images"]\nmodel = ["sharp", "brighter"]\n'
        '[[column]]\nsuite = "images"\nmetric = "frechet-embedded.corrected"\n'
        '[rank]\nby = "images:frechet-embedded.corrected"\n'
    )
    render(tmp_path / "b.toml", scored.store, tmp_path / "out")
    (((_, first, second), pair),) = read_pairs((tmp_path / "out" / "pairs.csv").read_text())
    d = {d.metric: d for d in compare(*map(scored.store.run, (second, first))).differences}[
        "frechet-embedded.corrected"
    ]
    assert (pair.value, pair.low, pair.high) == (d.value, d.low, d.high)
    assert pair.low * pair.high > 0 and "paired" in pair.method and pair.n == N


def test_what_is_said_of_a_value_stands_on_the_page_and_outputs_in_the_gallery(tmp_path, capsys):
    from bench.report import render
    from bench.show import print_scores

    for name, n, suffix in (("own", 5, ".jpg"), ("other", 5, ".png"), ("ref", 6, ".png")):
        save(tmp_path / name, pictures(n, len(name) + n), suffix)
    keep = replace(HOW, keep="all")
    runs = [score(tmp_path / n, tmp_path / "ref", tmp_path / ".bench", how=keep) for n in ("own", "other")]
    (tmp_path / "b.toml").write_text(
        'title = "b"\nsources = ["store"]\n[[column]]\nsuite = "images"\nmetric = "kid-embedded"\n'
        '[[column]]\nsuite = "images"\nmetric = "pictures.shared"\n'
    )
    render(tmp_path / "b.toml", runs[0].store, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    said = "stored as JPEG, the reference as PNG"
    assert page.count(f"<li>{said} ") == 1 and '<span class="of">(own)</span>' in page and "<sup>1" in page
    assert said in (tmp_path / "out" / "tables" / "b.md").read_text().replace("\\", "")
    tiles = json.loads((tmp_path / "out" / "runs.json").read_text())["tiles"]
    assert {i for run in tiles.values() for i in run} <= {
        f"generated:000{i}{s}" for i in range(5) for s in (".jpg", ".png")
    }
    assert "6 independent clusters" not in page  # those of the reference are not those of all rows
    print_scores(runs[0])
    out = capsys.readouterr().out
    assert out.count(said) == 1 and re.search(rf"^  \[\d\] {said}$", out, re.MULTILINE)


# -- protocols


def test_every_protocol_names_its_source_and_differs():
    assert len({p.hash() for p in protocols.PRESETS.values()}) == len(protocols.PRESETS)
    for name, p in protocols.PRESETS.items():
        names = [metric.name for metric in Images(protocol=name).metrics]
        assert p.source and len(set(names)) == len(names) > 1, name


def test_the_definition_is_pinned():
    """What decides the numbers of a published protocol must not change unseen."""
    p = protocols.get("torch-fidelity")
    assert (p.frechet, p.kid_protocol, p.k, p.radius, p.splits) == (
        "inception-tf1",
        "subsets",
        3,
        "<=",
        "torch-fidelity",
    )
    assert protocols.get("clean").frechet == "inception-clean" and protocols.get("cmmd").extractors() == [
        "clip-vitl14-336"
    ]


def test_the_board_asks_for_scores_that_there_are():
    from pathlib import Path

    from bench.report.board import read_board

    named = set()
    for protocol in protocols.PRESETS:
        for metric in Images(protocol=protocol).metrics:
            parts = getattr(metric, "parts", ("repeated", "repeated-reference", "shared"))
            named |= {f"{metric.name}.{part}" if part else metric.name for part in parts}
    board = read_board(Path(__file__).parents[2] / "reports" / "images.toml")
    assert {c.metric for c in board.column} <= named


FID = {"fid", "fid.corrected"}
SCORE = {"inception-score-inception-tf1", "inception-score-inception-tf1.corrected"}
NEIGHBOURS = {f"prdc-inception-tf1.{part}" for part in ("precision", "recall", "density", "coverage")}


@pytest.mark.parametrize(
    "protocol, expected",
    [
        ("clean", FID | {"kid-inception-clean"}),
        ("legacy-tf", FID),
        ("torch-fidelity", FID | SCORE | NEIGHBOURS | {"kid-inception-tf1"}),
        ("adm", FID | SCORE | NEIGHBOURS | {"sfid", "sfid.corrected"}),
    ],
)
def test_published_protocols_run_on_one_pass_of_inception(folders, tmp_path, monkeypatch, protocol, expected):
    """With block means in the place of the network, whose weights are not here: every score, one pass."""
    import torch

    from bench.metrics import extractors
    from bench.worker import WorkerContext

    passed = []

    def forward(levels):
        passed.append(len(levels))
        means = torch.nn.functional.adaptive_avg_pool2d(levels, 4).flatten(1) / 255
        return {"": means[:, :32], "spatial": means[:, 16:], "logits": 5 * means[:, :10]}

    stub = extractors.Network("inception", "stub@0", {"": 32, "spatial": 32, "logits": 10}, forward, "cpu")
    monkeypatch.setattr(extractors, "inception", lambda *_: stub)
    monkeypatch.setattr(WorkerContext, "weights", lambda self, name: tmp_path / name)
    found = by_name(score(folders / "sharp", folders / "ref", tmp_path / ".bench", fields={"protocol": protocol}))
    assert {name for name in found if not name.startswith("pictures.")} == expected
    assert all(s.complete for s in found.values()) and found["fid"].value > 0
    assert N + M <= sum(passed) <= N + M + 40  # tails are filled up


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"protocol": "clen"}, "did you mean 'clean'"),
        ({"resize": "cubic"}, "resize = 'cubic' is unknown"),
        ({"size": 0}, "size = 0 must be 1 px or more"),
        ({"size": 32}, "the embedded network needs 64 px"),
        ({"chunk": 0}, "chunk = 0 must be 1 or more"),
    ],
)
def test_wrong_parameters_are_named(fields, says):
    with pytest.raises(UsageError, match=says):
        Images(**fields)


# -- as a user types it


def test_the_command_line_prints_every_distance_and_names_what_is_wrong(tmp_path):
    for name, n, size in (("own", 4, 64), ("ref", 4, 64), ("one", 1, 64), ("tiny", 4, 48)):
        save(tmp_path / name, pictures(n, n + size + ord(name[0]), size))
    (tmp_path / "empty").mkdir()
    base = ("score", "images", "--devices", "cpu", "--model", "folder-of-images")
    done = command(tmp_path, *base, "-m", "path=own", "-p", "reference=image-folder:ref")
    assert done.code == 0 and "frechet-embedded" in done.out and "rank-deficient" in done.out, done.err
    for path, reference, code, says in (
        ("empty", "ref", 1, "empty holds no pictures"),
        ("nowhere", "ref", 2, "nowhere is not a folder"),
        ("one", "ref", 1, "the generated set has one picture"),
        ("own", "one", 1, "the reference set has one picture"),
        ("own", "empty", 1, "no pictures there"),
        ("own", "tiny", 3, "has 48x48 px; the embedded network needs 64"),
    ):
        done = command(tmp_path, *base, "-m", f"path={path}", "-p", f"reference=image-folder:{reference}")
        assert (done.code, says in done.err) == (code, True), (path, reference, done)
    done = command(
        tmp_path, *base, "-m", "path=own", "-p", "reference=image-folder:ref", "-p", "protocol=clean",
        env={"BENCH_DATA": str(tmp_path)},
    )  # fmt: skip
    assert done.code == 1 and "bench data fetch weights/" in done.err
    done = command(tmp_path, "score", "images", "--model", "toy")
    assert done.code == 1 and "needs PictureSet" in done.err


def test_a_file_that_cannot_be_read_fails_its_unit_by_name(tmp_path):
    own, ref = save(tmp_path / "own", pictures(4, 1)), save(tmp_path / "ref", pictures(4, 2))
    (own / "0002.png").write_bytes((own / "0002.png").read_bytes()[:200])
    (own / "0003.png").write_text("hello")
    run = score(own, ref, tmp_path / ".bench", fields={"chunk": 1})
    failed = {r.unit: r.error["message"] for r in run.failures()}
    assert list(failed) == ["generated/0002", "generated/0003"]
    assert "0002.png" in failed["generated/0002"] and "0003.png is not a picture" in failed["generated/0003"]
    assert not any(s.complete for s in run.scores())
    save(own, pictures(4, 1))  # mended, it is another model
    assert score(own, ref, tmp_path / ".bench", fields={"chunk": 1}).id != run.id


# -- the adapter


def test_a_folder_looks_prompts_up(tmp_path):
    own = save(tmp_path / "own", pictures(3, 1))
    (tmp_path / "prompts.csv").write_text("name,prompt,seed\n0000.png,a cat,1\n0001.png,a cat,2\n0002.png,a dog,\n")
    model = FolderOfImages(own, tmp_path / "prompts.csv")
    assert set(held(model)) == {"TextToImage", "PictureSet"} and held(FolderOfImages(own)) == ("PictureSet",)
    found = model.generate(["a cat", "a dog", "a cat"], [2, 7, 1])
    expected = pictures(3, 1)[[1, 2, 0]].transpose(0, 3, 1, 2) / np.float32(255)
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
    with pytest.raises(Error, match="no picture of the prompt 'a bird'"):
        model.generate(["a bird"], [1])
    with pytest.raises(Error, match="2 pictures, none of seed 5"):
        model.generate(["a cat"], [5])
    with pytest.raises(Error, match="'a dog' is asked for with several seeds"):  # else one picture counted as two
        model.generate(["a dog"], [8])
    save(own, pictures(1, 3, 96), first=2)
    with pytest.raises(Error, match="differ in size: 64x64 px and 96x96 px"):
        FolderOfImages(own, tmp_path / "prompts.csv").generate(["a cat", "a dog"], [1, 1])


@pytest.mark.parametrize(
    "text, says",
    [
        ("file,prompt\n0000.png,a cat\n", "lacks the column name or prompt"),
        ("name,prompt\n9.png,a cat\n", "there is no picture '9.png'"),
        (f"name,prompt\n{'9' * 5000},a cat\n", r"there is no picture '9{97}\.\.\.'"),
        (f"name,prompt,seed\n0000.png,a cat,{'9' * 5000}\n", r"seed '9{97}\.\.\.'"),
        ("name,prompt\n0000.png,a cat\n0001.png,a cat\n", "two pictures that no seed tells apart"),
        ("name,prompt,seed\n0000.png,a cat,-1\n", "seed '-1'"),
        ("name,prompt\n", "names no picture"),
        ('name,prompt\n"0000.png,a cat\n', "is no CSV file"),
    ],
)
def test_a_wrong_list_of_prompts_is_named(tmp_path, text, says):
    own = save(tmp_path / "own", pictures(2, 1))
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(Error, match=says):
        FolderOfImages(own, tmp_path / "prompts.csv")


def test_links_and_foreign_names_are_refused(tmp_path):
    own = save(tmp_path / "own", pictures(2, 1))
    with pytest.raises(Error, match="has no picture 'elsewhere"):
        FolderOfImages(own).pictures(["elsewhere/ref.png"])
    (own / "0005.png").symlink_to(own / "0000.png")
    with pytest.raises(Error, match=r"0005\.png is a link"):
        FolderOfImages(own)


def test_the_format_is_the_content_not_the_name(tmp_path):
    own = save(tmp_path / "own", pictures(1, 1), ".jpg")
    (own / "0000.jpg").rename(own / "0000.png")
    assert FolderOfImages(own).formats(["0000.png"]) == ["JPEG"]
    (own / "0001.png").write_text("hello")
    with pytest.raises(Error, match="is not a picture"):
        FolderOfImages(own).formats(["0001.png"])


def test_conformance(tmp_path):
    from bench.check import check

    own = save(tmp_path / "own", pictures(3, 1))
    (tmp_path / "prompts.csv").write_text("name,prompt\n0000.png,a cat\n")
    for model in (FolderOfImages(own), FolderOfImages(own, tmp_path / "prompts.csv")):
        assert {f.status for f in check(model)} == {"ok"}

    class Fickle:
        def names(self):
            return ["a", "b"]

        def pictures(self, names):
            return [np.full((8, 8, 3), i, np.uint8) for i in range(len(names))]

    assert any(f.status == "fail" and "another order" in f.name for f in check(Fickle()))


# -- several manifests of one suite


class Count:
    name, version, unit, better = "count", 1, "", "none"

    def measure(self, media, ctx):
        return {}

    def reduce(self, table):
        return Estimate(float(len(table)), n=len(table))

    def signature(self, table):
        return "count"


@dataclass(frozen=True)
class Two(Suite):
    first: Data = "photographs"
    second: Data = "photographs"
    name = "two"
    version = 1
    metrics = (Count(),)

    def units(self, first, second):
        yield Unit("a", first.ids())
        yield Unit("b", tuple(f"second:{id}" for id in second.ids()))

    def run(self, unit, model, ctx):
        for ids in ctx.batches(unit):
            yield (
                ids,
                {
                    "name": [ctx.item(id).id for id in ids],
                    "mean": ctx.images(ids, 64).mean((1, 2, 3)).tolist(),
                    "own": [float(ctx.picture(id).mean()) for id in ids],
                },
            )


def test_a_second_manifest_is_read_verified_and_part_of_the_identity(tmp_path):
    a, b = save(tmp_path / "a", pictures(3, 1)), save(tmp_path / "b", pictures(3, 2))
    suite = Two(first=f"image-folder:{a}", second=f"image-folder:{b}")
    go = {"identity": {"name": "none"}, "store": Store(tmp_path / ".bench"), "how": HOW}
    run = execute(suite, object(), **go)
    rows = run.table().rows
    assert [r["item"] for r in rows] == [*(f"000{i}.png" for i in range(3)), *(f"second:000{i}.png" for i in range(3))]
    assert [r["name"] for r in rows] == [f"000{i}.png" for i in range(3)] * 2
    expected = [p.mean() for p in (*pictures(3, 1), *pictures(3, 2))]
    assert [r["own"] for r in rows] == pytest.approx(expected)
    assert [r["mean"] for r in rows] == pytest.approx(np.array(expected) / 127.5 - 1, abs=1e-5)
    assert [m["name"] for m in run.meta["manifests"]] == [f"image-folder:{a}", f"image-folder:{b}"]
    save(b, pictures(1, 9))
    assert execute(suite, object(), **go).id != run.id


def test_an_item_that_reads_as_one_of_another_source_is_refused(tmp_path):
    a, b = save(tmp_path / "a", pictures(1, 1)), save(tmp_path / "b", pictures(1, 2))
    (a / "0000.png").rename(a / "second:x.png")
    with pytest.raises(Error, match="reads as one of second"):
        prepare(Two(first=f"image-folder:{a}", second=f"image-folder:{b}"), object(), identity={"name": "x"},
                store=Store(tmp_path / ".bench"))  # fmt: skip
