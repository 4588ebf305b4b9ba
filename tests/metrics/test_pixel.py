import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_pictures import golden_pictures

from bench.metrics.pixel import PSNR, mse, psnr, quantise
from bench.types import Error, Table, UsageError


@pytest.mark.parametrize("part", ["crop256", "full"])
def test_golden_values_and_peers(part):
    from skimage.metrics import peak_signal_noise_ratio
    from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

    original, degraded, values = golden_pictures(part)
    for name, picture in degraded.items():
        known = values[f"{part}/{name}"]
        assert mse(original, picture)[0] == known["mse"]
        assert psnr(original, picture)[0] == pytest.approx(known["psnr_own"], abs=1e-9)
        assert psnr(original, picture)[0] == pytest.approx(
            peak_signal_noise_ratio(original[0], picture[0], data_range=255), abs=1e-9
        )
        theirs = torchmetrics_psnr(
            torch.tensor(picture, dtype=torch.float32), torch.tensor(original, dtype=torch.float32), data_range=255.0
        )
        assert psnr(original, picture)[0] == pytest.approx(float(theirs), abs=1e-4)  # float32 peer


def test_torch_numpy_and_batch_agree():
    g = np.random.default_rng(0)
    x, y = (g.integers(0, 256, (3, 3, 17, 19), dtype=np.uint8) for _ in range(2))
    together = psnr(x, y)
    assert together.dtype == np.float64 and together.shape == (3,)
    assert np.array_equal(together, psnr(torch.from_numpy(x), torch.from_numpy(y)))
    assert np.array_equal(together, np.concatenate([psnr(x[i : i + 1], y[i : i + 1]) for i in range(3)]))


def test_sums_are_exact_where_float32_is_not():
    x = np.zeros((1, 3, 2048, 2048), dtype=np.uint8)
    y = np.full_like(x, 255)
    y[0, 0, 0, 0] = 254
    assert mse(x, y)[0] == (x.size * 65025 - 509) / x.size


def test_floats_use_their_range():
    g = np.random.default_rng(1)
    x, y = g.uniform(-1, 1, (2, 2, 3, 8, 8)).astype(np.float32)
    by_hand = 10 * np.log10(4 / ((x.astype(float) - y) ** 2).mean(axis=(1, 2, 3)))
    assert psnr(x, y, data_range=2.0) == pytest.approx(by_hand, abs=1e-12)
    with pytest.raises(UsageError, match="data_range"):
        psnr(x, y)


@pytest.mark.parametrize("mode", ["round", "trunc", "vavae", "none"])
@pytest.mark.parametrize("span", [(-1.0, 1.0), (0.0, 1.0)])
def test_floats_of_another_scale_are_refused_and_overshoot_is_not(mode, span):
    low, high = span
    with pytest.raises(Error, match=r"these reach from 0 to 255"):
        quantise(torch.linspace(0, 255, 48).reshape(1, 3, 4, 4), mode, span)
    with pytest.raises(Error, match="must lie in"):
        quantise(torch.linspace(-40, 0, 48).reshape(1, 3, 4, 4), mode, span)
    quantise(torch.linspace(low - 2, high + 2, 48).reshape(1, 3, 4, 4), mode, span)


def test_quantise_by_hand():
    v = np.array([-2.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 0.999, 1.0, 3.0], dtype=np.float32)
    x = np.broadcast_to(v, (1, 3, 1, 8))
    assert quantise(x)[0, 0, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]  # 127.5 goes up
    assert quantise(x, "trunc")[0, 0, 0].tolist() == [0, 0, 0, 0, 127, 254, 255, 255]
    assert quantise(x, "vavae")[0, 0, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    assert quantise(x, "none") is not None and np.array_equal(quantise(x, "none"), x)
    assert quantise(x * 0.5 + 0.5, value_range=(0.0, 1.0)).tolist() == quantise(x).tolist()


def test_quantisation_costs_what_the_study_measured():
    """A rounded round trip is the identity; a truncated one changes 12 % of a picture's own values (golden)."""
    _, _, values = golden_pictures()
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    floats = torch.from_numpy(levels).float() / 127.5 - 1
    assert torch.equal(quantise(floats), torch.from_numpy(levels))
    original, _, _ = golden_pictures()
    trip = quantise(original.astype(np.float32) / np.float32(127.5) - np.float32(1), "trunc")
    changed = (trip != original).mean()
    assert changed == pytest.approx(values["quantise"]["gt_roundtrip_trunc_changes_frac"], abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 255), st.sampled_from([torch.float32, torch.float64]))
def test_round_trip_of_every_level(level, dtype):
    x = (torch.full((1, 3, 2, 2), level, dtype=dtype) / 127.5) - 1
    assert (quantise(x) == level).all() and (quantise(x, "vavae") == level).all()


def test_faults_are_named():
    x = np.zeros((1, 3, 4, 4), dtype=np.float32)
    bad = x.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(Error, match="NaN"):
        quantise(bad)
    with pytest.raises(UsageError, match="floor"):
        quantise(x, "floor")
    with pytest.raises(Error, match="int64"):
        quantise(x.astype(np.int64))
    with pytest.raises(Error, match="differ in shape"):
        mse(x, x[:, :, :2])


def rows(metric, media):
    columns = metric.measure(media, None)
    n = len(next(iter(columns.values())))
    return [{"item": str(i), **{k: list(v)[i] for k, v in columns.items()}} for i in range(n)]


def test_metric_counts_identical_copies_and_stores_no_infinity():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 16, 16, generator=g) * 2 - 1
    y = x + 0.1 * torch.randn(4, 3, 16, 16, generator=g)
    y[1] = x[1]
    measured = rows(PSNR(), {"image": x, "recon": y})
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured[1]["psnr"] is None and [r["identical"] for r in measured] == [False, True, False, False]
    found = PSNR().reduce(Table(measured))
    assert found.n == 3 and found.note == "1 identical"
    assert found.value == pytest.approx(np.mean([r["psnr"] for r in measured if r["psnr"] is not None]), abs=1e-12)
    assert found.low < found.value < found.high
    assert PSNR().reduce(Table(measured, expected=5)).note == ""  # a row is missing: not complete


def test_metric_without_rows_has_no_value():
    assert PSNR().reduce(Table([])).value is None
    same = torch.zeros(2, 3, 8, 8)
    found = PSNR().reduce(Table(rows(PSNR(), {"image": same, "recon": same})))
    assert found.value is None and found.note == "2 identical"


def test_signature():
    assert PSNR().signature(Table([])) == "psnr|range:255|round|v:1"
    assert PSNR(quantise="none").signature(Table([])) == "psnr|range:2|none|v:1"
