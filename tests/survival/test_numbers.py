"""Numbers: outputs that no score may come from, metrics on inputs that break peers, seeds that nothing may move."""

import hashlib
import json
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from toys import Drawing, Painter

from bench import Error, Store, execute, metrics, stats
from bench.adapters.toy import Toy
from bench.config import How
from bench.execution import Observer
from bench.identity import seed_for
from bench.suite import Suite
from bench.types import Table

CPU = How(devices="cpu", threads=1)
SEED = int.from_bytes(os.urandom(4))


class Quiet(Observer):
    """Says nothing."""

    def say(self, text):
        pass


def go(suite, model, folder, how=CPU, **more):
    identity = {"name": type(model).__name__, **more.pop("identity", {})}
    return execute(suite, model, store=Store(folder), identity=identity, how=how, observer=Quiet(), **more)


# -- what a model may return


def one_bad(value):
    """The second picture holds one such value."""

    def change(y):
        y[1, 0, 3, 3] = value
        return y

    return change


def flat(y):
    y[1] = 0.25
    return y


FAULTS = {  # what is done to pictures [4, 3, H, W]; kind of the failure; what both suites say of it
    "NaN": (one_bad(float("nan")), "NonFinite", "NaN or infinity in 1 of 4 pictures, item "),
    "infinity": (one_bad(float("inf")), "NonFinite", "NaN or infinity in 1 of 4 pictures, item "),
    "integers": (lambda y: (y * 255).to(torch.int64), "BadOutput", "torch.int64"),
    "complex numbers": (lambda y: y.to(torch.complex64), "BadOutput", "torch.complex64"),
    "bytes that ran over": (lambda y: (y * 400).to(torch.int32).to(torch.uint8), "BadOutput", "torch.uint8"),
    "channels last": (lambda y: y.permute(0, 2, 3, 1), "BadOutput", ", 3]"),
    "grey": (lambda y: y[:, :1], "BadOutput", "[4, 1, "),
    "levels up to 255": (lambda y: y * 255, "BadOutput", "must lie in [", "from "),
    "the largest numbers": (lambda y: y.sign() * 1e38, "BadOutput", "must lie in [", "from "),
    "another number of pictures": (lambda y: y[:-1], "BadOutput", "[3, 3, "),
    "nothing": (lambda y: y[..., :0], "BadOutput", ", 0]"),
    "no values": (lambda y: y.to("meta"), "BadOutput", "the device meta"),
    "no tensor": (lambda y: None, "BadOutput", "NoneType"),
    "one flat colour": (flat, "", ""),
}


class Bad(Toy):
    """An autoencoder and a generator whose pictures are changed on the way out."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def decode(self, latents, seeds=None):
        return self.change(super().decode(latents, seeds).clone())

    def generate(self, prompts, seeds):
        return self.change(super().generate(prompts, seeds).clone())


@cache
def suites():
    """{name: (suite, the column of its number for each picture)}: pictures coded, and pictures drawn."""
    from suites.generation.suite import Generation
    from suites.reconstruction.suite import Reconstruction

    return {
        "reconstruction": (Reconstruction(size=64, chunk=4), "psnr"),
        "generation": (Generation(chunk=4), "clip-score"),
    }


@pytest.mark.parametrize("name", ["reconstruction", "generation"])
def test_bad_output_fails_its_unit_with_counts_and_is_never_scored(tmp_path, tally, size, name):
    """A model that is wrong in fourteen ways, over two real suites: no record of its pictures, no blob, no number.

    One flat colour is a picture: it is scored, and every number of the run says how many there are.
    """
    suite, column = suites()[name]
    passed, wrong = 0, []
    step = size(1, 2 if name == "generation" else 1)
    faults = {fault: FAULTS[fault] for i, fault in enumerate(FAULTS) if i % step == 0 or fault == "one flat colour"}
    for fault, (change, kind, *says) in faults.items():
        run = go(suite, Bad(change), tmp_path, how=replace(CPU, keep="all"), limit=4, identity={"bad": fault})
        rows = [r for r in run.table().rows if r.get("side") != "reference"]
        errors = [(r.error["kind"], r.error["message"]) for r in run.failures()]
        if kind:
            good = not rows and len(errors) == 1 and errors[0][0] == kind
            good = good and all(s in errors[0][1] for s in says[-1:]) and not run.complete()
            good = good and not any(s.complete for s in run.scores())
            good = good and all(s.value is None or s.metric.startswith("judge.") for s in run.scores())  # of references
        else:
            flagged = [r for r in rows if "flat" in r]
            good = not errors and len(flagged) == 1 and flagged[0][column] is not None
            notes = [s.note for s in run.scores() if s.value is not None]
            good = good and notes and all("1 picture is one flat colour" in n for n in notes)
        passed += bool(good)
        wrong += [] if good else [(fault, kind, errors, rows[:2])]
    tally("bad outputs", passed, len(faults), false=len(wrong))
    assert not wrong, wrong


class Reusing(Painter):
    """Writes every batch into one buffer, and hands that out."""

    def __init__(self):
        super().__init__()
        self.buffer = np.empty((2, 3, 4, 4))

    def generate(self, prompts, seeds):
        self.buffer[:] = super().generate(prompts, seeds)
        return self.buffer


class Slow(toys.Mean):
    """Measures while the model is already writing its next batch."""

    def measure(self, media, ctx):
        import time

        time.sleep(0.02)
        return super().measure(media, ctx)


class Hurried(Drawing):
    """Three batches a unit, measured slowly."""

    metrics = (Slow(),)


def test_a_model_that_writes_into_its_last_output_changes_no_number(tmp_path, tally):
    how = replace(CPU, batch=2)
    reused, fresh = (go(Hurried(num=12, chunk=6), m, tmp_path / type(m).__name__, how) for m in (Reusing(), Painter()))
    same = [r["mean"] for r in reused.table().rows] == [r["mean"] for r in fresh.table().rows]
    tally("bad outputs", int(same), 1, false=not same)
    assert same and len({r["mean"] for r in reused.table().rows}) == 12


# -- metrics

SIDE = 176


class Tiny:
    """A stand-in for a feature network, of pictures or of clips: means of quarters."""

    fingerprint = "tiny@0"

    def __call__(self, images):
        x = images.float() if images.dtype == torch.uint8 else (images.float() + 1) * 127.5
        pool = torch.nn.functional.adaptive_avg_pool2d if x.dim() == 4 else torch.nn.functional.adaptive_avg_pool3d
        found = pool(x, 2 if x.dim() == 4 else (1, 2, 2)).flatten(1).numpy()
        if not np.isfinite(found).all():
            raise Error("tiny@0 gave NaN or infinity")
        return found


class Context:
    device = torch.device("cpu")

    def weights(self, name):
        return Path(name)


@cache
def judge():
    """LPIPS on AlexNet with random weights."""
    from torchvision.models import alexnet

    from bench.metrics.lpips import Judge

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = alexnet(weights=None).features.state_dict()
        sizes = enumerate((64, 192, 384, 256, 256))
        heads = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in sizes}
    return Judge("alex", {f"features.{k}": v for k, v in backbone.items()}, heads)


@pytest.fixture
def networks(monkeypatch):
    from bench.metrics import clip, extractors, lpips

    real = extractors.opened
    monkeypatch.setattr(extractors, "opened", lambda name, ctx: real(name, ctx) if name == "mini-clip" else Tiny())
    monkeypatch.setattr(clip, "opened", extractors.opened, raising=False)
    monkeypatch.setattr(lpips, "opened", lambda *given: (judge(), "alex@random"))


PAIRS = [  # a row is a picture and its counterpart
    metrics.PSNR(),
    metrics.PSNR(quantise="none"),
    metrics.SSIM(),
    metrics.SSIM("uniform7", quantise="none"),
    metrics.MSSSIM(),
    metrics.LPIPS(),
    metrics.Frechet(),
    metrics.Frechet(covariance="biased"),
    metrics.PairwiseFeatureDistance(),
    metrics.KID(),
    metrics.KID(protocol="subsets"),
    metrics.CMMD(),
    metrics.PRDC(),
    metrics.BitsPerPixel(),
]
SETS = [  # a row is a picture of one of two sets
    metrics.Frechet(),
    metrics.PairwiseFeatureDistance(),
    metrics.KID(),
    metrics.CMMD(),
    metrics.PRDC(k=3),
    metrics.InceptionScore("tiny"),
    metrics.InceptionScore("tiny", protocol="torch-fidelity"),
    metrics.InceptionScore("tiny", protocol="guided-diffusion"),
    metrics.FVD(frames=2, real="image", fake="recon"),
    metrics.CLIPScore("mini-clip", fake="recon"),
    metrics.CLIPScore("mini-clip", convention="original", fake="recon"),
]


def noise(n, seed=0, side=SIDE):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def inputs():
    """{name: (pictures, their counterparts)}."""
    x, y = noise(3), noise(3, 1)
    level = torch.linspace(-1, 1, 3)[:, None, None, None].expand_as(x)
    poisoned = y.clone()
    poisoned[1, 0, 5, 5] = float("nan")
    return {
        "no variance": (torch.zeros_like(x), torch.zeros_like(x) + 0.5),
        "no variance within": (level.contiguous(), level.flip(0).contiguous()),
        "n = 0": (x[:0], y[:0]),
        "n = 1": (x[:1], y[:1]),
        "n = 2": (x[:2], y[:2]),
        "n below d": (x, y),
        "many": (noise(30, 2, 32), (noise(30, 2, 32) + 0.1 * noise(30, 3, 32)).clamp(-1, 1)),
        "the largest numbers": (x, y * 1e38),
        "levels up to 127": (x, y * 127.5),
        "whole numbers": (((x + 1) * 127).to(torch.int64), ((y + 1) * 127).to(torch.int64)),
        "8-bit": (((x + 1) * 127).to(torch.uint8), ((y + 1) * 127).to(torch.uint8)),
        "float16": (x.half(), y.half()),
        "overshoot": (x * 5, y * -5),
        "NaN in one row": (x, poisoned),
        "identical": (x, x.clone()),
        "one identical": (x, torch.cat([x[:1], y[1:]])),
        "small": (x[..., :8, :8], y[..., :8, :8]),
    }


REFUSED = {"the largest numbers", "levels up to 127", "whole numbers", "NaN in one row"}  # where pictures are compared


def table_of(metric, x, y, sets):
    """The rows and features that a metric measures of pairs, or of two sets."""
    if isinstance(metric, metrics.FVD):
        x, y = (v[:, :, None].expand(-1, -1, 2, -1, -1).contiguous() for v in (x, y))
    bits = {"bits": [8.0] * len(x), "side_bits": [1.0] * len(x), "pixels": [64] * len(x)}
    batches = [("", {"image": x, "recon": y, **bits})]
    if sets:
        prompts = ["a red circle", None, "a small blue square on white " * 9] * len(y)
        batches = [("generated", {"recon": y, "prompt": prompts[: len(y)]}), ("reference", {"image": x})]
    rows, kept = [], {}
    for side, media in batches:
        columns = metric.measure(media, Context())
        assert all(len(v) == len(x) for v in columns.values())
        arrays = {k: v for k, v in columns.items() if isinstance(v, np.ndarray) and v.ndim > 1}
        for name, values in arrays.items():
            kept.setdefault(name, []).append(values)
        columns = {k: v for k, v in columns.items() if k not in arrays} | ({"side": [side] * len(x)} if side else {})
        rows += [{"item": f"{side}{i}", **{k: v[i] for k, v in columns.items()}} for i in range(len(x))]
    json.dumps(rows, allow_nan=False)
    return Table(rows, load_features=lambda name: np.concatenate(kept[name]))


class One(Suite):
    """A suite of one metric, to see which scores are called complete."""

    name = "one"
    version = 1
    metrics = ()

    def units(self, data):
        return iter(())

    def run(self, unit, model, ctx):
        return iter(())


def sound(metric, table, nothing=False):
    """Is what a metric makes of a table finite, or null with a reason; and the values. `nothing` was measured of it."""
    values, good = [], True
    for score in One()._reduce(metric, "all", table):
        json.dumps([score.value, score.low, score.high], allow_nan=False)
        values.append(score.value)
        bounds = score.low, score.high
        if nothing or score.value is None:
            good &= (score.value, *bounds) == (None, None, None) and bool(score.note) == (not nothing)
            good &= not (nothing and score.complete)
        else:
            good &= np.isfinite(score.value) and (None in bounds) == (bounds == (None, None))
            good &= None in bounds or bounds[0] <= score.value <= bounds[1]
    return good and metric.signature(table).endswith(f"v:{metric.version}"), values


METRICS = [(m, False) for m in PAIRS] + [(m, True) for m in SETS]


@pytest.mark.parametrize(("metric", "sets"), METRICS, ids=[f"{m.name}-{s}-{i}" for i, (m, s) in enumerate(METRICS)])
def test_metrics_are_finite_or_null_with_a_reason(metric, sets, networks, tally):
    """Twenty-one inputs: an Error that says why, a finite value inside its interval, or null and why. No warning.

    Nulls of judges that failed and rows that are missing leave no value and no note: a note would call the score
    complete.
    """
    passed, wrong, values = 0, [], []
    compares = not isinstance(metric, metrics.BitsPerPixel)
    cases = inputs()
    for name, (x, y) in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                ok, found = sound(metric, table_of(metric, x, y, sets))
                values += found
                ok = ok and not (compares and name in REFUSED)
            except Error as e:
                ok, found = name in REFUSED and compares and len(str(e)) > 20, str(e)
        passed += ok
        wrong += [] if ok else [(name, found)]
    x, y = cases["many"]
    whole = table_of(metric, x, y, sets)
    own = ("item", "side", "cluster")
    nulls = [{k: v if k in own else None for k, v in row.items()} for row in whole.rows]
    absent = Table([{k: v for k, v in row.items() if k in own} for row in whole.rows])
    short = Table(whole.rows[:-1], len(whole), load_features=lambda name: whole.features(name)[:-1])
    tables = {
        "all nulls": Table(nulls),
        "never measured": absent,
        "an empty slice": whole.where("item", "none such"),
        "rows missing": short,
    }
    for name, table in tables.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if name == "rows missing":
                scores = list(One()._reduce(metric, "all", table))
                ok = not any(s.complete or s.note for s in scores)
            else:
                ok, _ = sound(metric, table, nothing=table.expected > 0)
        passed += ok
        wrong += [] if ok else [(name, list(One()._reduce(metric, "all", table)))]
    tally("metrics on bad input", passed, len(cases) + len(tables), false=len(wrong))
    assert not wrong, wrong
    hungry = getattr(metric, "protocol", "") in ("subsets", "hash")  # they need more rows than these
    paired_only = isinstance(metric, metrics.PairwiseFeatureDistance) and sets
    assert hungry or paired_only or any(v is not None for v in values)


def test_identical_pairs_have_no_psnr_and_rates_stay_inside_their_intervals(networks, tally):
    """Below as many rows as dimensions a Fréchet distance has no interval and says so; Wilson holds 0/n and n/n."""
    x, _ = inputs()["identical"]
    psnr = metrics.PSNR().reduce(table_of(metrics.PSNR(), x, x.clone(), False))
    few = metrics.Frechet().reduce(table_of(metrics.Frechet(), *inputs()["n below d"], False))
    ok = [
        psnr.value is None and psnr.note == "3 identical",
        few["corrected"].value is None and few[""].low is None and "rank-deficient: 3 rows" in few[""].note,
    ]
    for n in (0, 1, 2, 3, 10, 1000, 10**9):
        for k in {0, n // 2, n}:
            found = stats.proportion(k, n)
            inside = n and 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
            ok.append(bool(inside) or (n == 0 and found.value is None and found.low is None))
    tally("metrics on bad input", sum(ok), len(ok), false=len(ok) - sum(ok))
    assert all(ok)


# -- seeds


def outcome(run):
    """What may not depend on how a run was done: rows, media and features by content, and the file of scores."""
    records = {k: (r.rows, dict(r.blobs)) for k, r in run.records().items()}
    return records, (run.path / "scores.csv").read_bytes()


class Reordered(Drawing):
    """The same units in another order."""

    order = None

    def units(self, data):
        units = list(super().units(data))
        return iter(units[::-1] if self.order == "reversed" else random.Random(self.order).sample(units, len(units)))


class Reseeding(Painter):
    """A library that sets the global generators whenever it is called, and draws from them."""

    def generate(self, prompts, seeds):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        random.random(), np.random.rand(), torch.rand(1)
        return super().generate(prompts, seeds)


HASHED = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from toys import Drawing, Painter
from bench import Store, execute
from bench.config import How
run = execute(Drawing(num=24, chunk=4), Painter(), store=Store(sys.argv[1]), identity={{"name": "painter"}},
              how=How(devices="cpu", threads=1))
records = {{k: (r.rows, dict(r.blobs)) for k, r in run.records().items()}}
print(hashlib.sha256(repr((records, (run.path / "scores.csv").read_bytes())).encode()).hexdigest())
"""


def generators():
    """The state of every global generator."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_nothing_moves_a_seed(tmp_path, tally):
    """Other order, batches, shards, processes, hash seeds, interruptions and libraries that reseed: the same bytes."""
    name = {"name": "painter"}

    def run(folder, suite=None, model=None, how=CPU, **more):
        kind = suite or Drawing(num=24, chunk=4)
        return outcome(go(kind, model or Painter(), tmp_path / folder, how, identity=name, **more))

    expected = run("undisturbed")
    same = {f"batch {b}": run(f"b{b}", how=replace(CPU, batch=b)) == expected for b in (1, 2, 3, 5)}
    for order in ("reversed", SEED, SEED + 1):
        suite = type("Drawing", (Reordered,), {"order": order, "__module__": Drawing.__module__})(num=24, chunk=4)
        same[f"order {order}"] = run(f"o{order}", suite) == expected
    for shards in (2, 3, 7):
        for k in random.Random(SEED).sample(range(shards), shards):
            found = run(f"s{shards}", shard=f"{k}/{shards}")
        same[f"{shards} shards"] = found == expected  # of seven one holds no unit
    same["a library that reseeds"] = run("r", model=Reseeding()) == expected
    same["stopped half way"] = half_way(tmp_path / "h", name) == expected
    model = f"{toys.__file__}:Painter"
    two = execute(
        Drawing(num=24, chunk=4),
        model,
        suite_ref=f"{toys.__file__}:Drawing",
        store=Store(tmp_path / "two"),
        how=replace(CPU, devices="cpu,cpu"),
        observer=Quiet(),
    )
    rows = [(r["item"], r["mean"]) for r in two.table().rows]
    undisturbed = go(Drawing(num=24, chunk=4), Painter(), tmp_path / "undisturbed", identity=name)
    same["two processes"] = rows == [(r["item"], r["mean"]) for r in undisturbed.table().rows]
    here = Path(__file__).resolve()
    code = HASHED.format(tests=str(here.parents[1]))
    digests = {hashlib.sha256(repr(expected).encode()).hexdigest()}
    for value in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / f"hash{value}")],
            cwd=here.parents[2],
            env={**os.environ, "PYTHONHASHSEED": value},
            capture_output=True,
            text=True,
        )
        digests.add(done.stdout.strip() or done.stderr)
        same[f"hash seed {value}"] = len(digests) == 1 and len(done.stdout) == 65
    passed = sum(same.values())
    tally("seeds", passed, len(same), false=len(same) - passed)
    assert passed == len(same), (f"seed {SEED}", [k for k, ok in same.items() if not ok], digests)


def half_way(folder, name):
    class Interrupted(Exception):
        pass

    class Stops(Observer):
        def done(self, unit, record):
            raise Interrupted

    suite = Drawing(num=24, chunk=4)
    for _ in range(2):
        with pytest.raises(Interrupted):
            execute(suite, Painter(), store=Store(folder), identity=name, how=CPU, observer=Stops())
    run = go(suite, Painter(), folder, identity=name)
    assert len(run.records()) == 6
    return outcome(run)


def test_no_metric_and_no_statistic_touches_a_global_generator(networks, tally):
    """Bootstraps, subsets, shuffles, kernels and networks: what is drawn has an address of its own."""
    judge()
    before = generators()
    x, y = inputs()["many"]
    for metric, sets in METRICS:
        metric.reduce(table_of(metric, x, y, sets))
    values = np.linspace(0, 1, 40)
    stats.mean(values, [i // 4 for i in range(40)])
    stats.ratio(values, values + 1, [i // 4 for i in range(40)])
    stats.paired_difference(values, values**2)
    Toy(noise=0.5).generate(["a"], [1])
    same = generators() == before
    torch.rand(1)
    assert generators() != before  # the comparison can fail
    tally("seeds", int(same), 1, false=not same)
    assert same


def test_addresses_do_not_collide(tally, size):
    """A million of them at full size: by chance 5e-8."""
    items = size(100_000, 10_000)
    seeds = {seed_for(r, "s", 1, f"i{i}", stream) for r in range(5) for i in range(items) for stream in ("a", "b")}
    tally("seeds", int(len(seeds) == 10 * items), 1, false=10 * items - len(seeds))
    assert len(seeds) == 10 * items
