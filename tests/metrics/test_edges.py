"""Every metric on inputs that break peers: a finite value, a null with a reason, or an Error that names the fault."""

import json
import warnings

import numpy as np
import pytest
import torch

from bench import metrics
from bench.types import Error, Table

SIDE = 176


class Tiny:
    """A stand-in for a feature network: means of quarters of the picture."""

    fingerprint = "tiny@0"

    def __call__(self, images):
        x = images.float() if images.dtype == torch.uint8 else (images.float() + 1) * 127.5
        found = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1).numpy()
        if not np.isfinite(found).all():
            raise Error("tiny@0 gave NaN or infinity")
        return found


class Context:
    device = torch.device("cpu")

    def weights(self, name):
        raise Error(f"weights {name} are missing", hint=f"bench data fetch weights/{name}")


ALL = [
    metrics.PSNR(),
    metrics.PSNR(quantise="none"),
    metrics.SSIM(),
    metrics.SSIM("uniform7", quantise="none"),
    metrics.MSSSIM(),
    metrics.Frechet(),
    metrics.PairwiseFeatureDistance(),
    metrics.KID(),
    metrics.CMMD(),
    metrics.PRDC(),
    metrics.BitsPerPixel(),
]


def noise(n, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, SIDE, SIDE, generator=g) * 2 - 1).to(dtype)


def inputs():
    x, y = noise(3), noise(3, 1)
    flat = torch.zeros_like(x)
    yield "nothing", x[:0], y[:0]
    yield "one", x[:1], y[:1]
    yield "two", x[:2], y[:2]
    yield "identical", x, x.clone()
    yield "one identical", x, torch.cat([x[:1], y[1:]])
    yield "constant", flat, flat + 0.5
    yield "both constant and equal", flat, flat.clone()
    yield "overshoot", x * 5, y * -5
    yield "float16", x.half(), y.half()
    yield "8-bit", ((x + 1) * 127).to(torch.uint8), ((y + 1) * 127).to(torch.uint8)
    yield "small", x[..., :8, :8], y[..., :8, :8]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    from bench.metrics import extractors

    monkeypatch.setattr(extractors, "opened", lambda name, ctx: Tiny())


def table_of(metric, x, y, expected=None):
    media = {"image": x, "recon": y, "bits": [8.0] * len(x), "side_bits": [1.0] * len(x), "pixels": [64] * len(x)}
    columns = metric.measure(media, Context())
    assert all(len(v) == len(x) for v in columns.values())
    kept = {k: v for k, v in columns.items() if isinstance(v, np.ndarray) and v.ndim > 1}
    rows = [{"item": str(i), **{k: v[i] for k, v in columns.items() if k not in kept}} for i in range(len(x))]
    json.dumps(rows, allow_nan=False)
    return Table(rows, expected, load_features=kept.__getitem__)


@pytest.mark.parametrize("metric", ALL, ids=lambda m: f"{m.name}-{getattr(m, 'quantise', '')}")
@pytest.mark.parametrize("case", list(inputs()), ids=lambda c: c[0])
def test_finite_or_null_with_a_reason(metric, case):
    _, x, y = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = table_of(metric, x, y)
        found = metric.reduce(table)
        signature = metric.signature(table)
    assert signature.endswith(f"v:{metric.version}")
    for estimate in (found if isinstance(found, dict) else {"": found}).values():
        json.dumps([estimate.value, estimate.low, estimate.high], allow_nan=False)
        if estimate.value is None:
            assert estimate.note or len(x) == 0
        else:
            assert np.isfinite(estimate.value)
            if estimate.low is not None:
                assert estimate.low <= estimate.value <= estimate.high


@pytest.mark.parametrize("metric", ALL[:-1], ids=lambda m: f"{m.name}-{getattr(m, 'quantise', '')}")
def test_nan_in_one_row_is_an_error(metric):
    x, y = noise(3), noise(3, 1)
    y[1, 0, 5, 5] = float("nan")
    with pytest.raises(Error, match="NaN"):
        metric.measure({"image": x, "recon": y}, Context())


@pytest.mark.parametrize("metric", ALL[:-1], ids=lambda m: f"{m.name}-{getattr(m, 'quantise', '')}")
@pytest.mark.parametrize("scale", [127.5, 1e38])
def test_pictures_of_another_scale_are_an_error(metric, scale):
    with pytest.raises(Error, match="must lie in"):
        metric.measure({"image": noise(3), "recon": noise(3, 1) * scale}, Context())


@pytest.mark.parametrize("metric", ALL, ids=lambda m: f"{m.name}-{getattr(m, 'quantise', '')}")
def test_missing_rows_and_unexplained_nulls_leave_no_note(metric):
    x, y = noise(3), noise(3, 1)
    y[0] = x[0]
    whole = table_of(metric, x, y)
    short = Table(whole.rows[:2], 3, load_features=lambda name: whole.features(name)[:2])
    nulls = Table([{"item": str(i)} for i in range(3)])
    for table in (short, nulls):
        found = metric.reduce(table)
        for estimate in (found if isinstance(found, dict) else {"": found}).values():
            assert not estimate.note
    for estimate in (found if isinstance(found, dict) else {"": found}).values():
        assert estimate.value is None and estimate.n == 0


def test_missing_weights_name_the_fetch_line():
    with pytest.raises(Error) as caught:
        metrics.LPIPS().measure({"image": noise(1), "recon": noise(1, 1)}, Context())
    assert caught.value.hint == "bench data fetch weights/lpips-alex-backbone"


def test_metrics_say_which_weights_they_need():
    from bench.manifest import find, read_weights

    needed = metrics.LPIPS("vgg").weights + metrics.Frechet("inception-tf1").weights
    assert len(needed) == 3 and all(read_weights(find(f"weights/{name}"))["locked"] for name in needed)
    assert metrics.Frechet().weights == metrics.PairwiseFeatureDistance().weights == ()


def test_all_metrics_are_exported_and_frozen():
    for name in metrics.__all__:
        made = getattr(metrics, name)()
        assert made.version >= 1 and made.better in ("higher", "lower") and hash(made) == hash(getattr(metrics, name)())
