import json

import numpy as np
import pytest
import torch
from metric_pictures import golden_pictures

from bench.metrics.ssim import FLAVOURS, MSSSIM, SCALE_WEIGHTS, SSIM, ms_ssim, ssim, ssim_map
from bench.types import Error, Table, UsageError

# 8-bit pictures are filtered in float32: what it may cost on photographs and noise, and on black-and-white pictures,
# whose flat parts have almost no variance about a mean far from the strip's.
FLOAT32, FLOAT32_WORST = 3e-7, 5e-6
OWN = {
    "uniform7": "ssim_own_uniform7",
    "gauss11_valid": "ssim_own_gauss11_valid",
    "gauss11_reflect": "ssim_own_gauss11_reflect",
    "avgpool_gauss11": "ssim_piq_like",
}


def skimage_ssim(x, y, flavour, data_range=255, **more):
    from skimage.metrics import structural_similarity

    if flavour != "uniform7":
        more |= {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5}
    x, y = (np.moveaxis(v[0], 0, -1) for v in (x, y))
    return structural_similarity(x, y, channel_axis=2, data_range=data_range, **more)


def torchmetrics_ssim(x, y, data_range, dtype=torch.float64):
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(
        structural_similarity_index_measure(
            torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype), data_range=data_range
        )
    )


def pair(height=40, width=56, seed=0, batch=1):
    g = np.random.default_rng(seed)
    x = g.integers(0, 256, (batch, 3, height, width)).astype(np.uint8)
    y = np.clip(x.astype(int) + g.integers(-40, 41, x.shape), 0, 255).astype(np.uint8)
    return x, y


def floats(*pictures):
    return (v.astype(np.float64) for v in pictures)


@pytest.mark.parametrize("part", ["crop256", "full"])
@pytest.mark.parametrize("flavour", OWN)
def test_golden_values(part, flavour):
    original, degraded, values = golden_pictures(part)
    for name, picture in degraded.items():
        known = values[f"{part}/{name}"][OWN[flavour]]
        assert ssim(original, picture, flavour)[0] == pytest.approx(known, abs=FLOAT32)
        assert ssim(*floats(original, picture), flavour, 255.0)[0] == pytest.approx(known, abs=1e-9)


def test_golden_noise_is_what_torchmetrics_1_4_1_gave():
    original, degraded, _ = golden_pictures()
    assert ssim(original, degraded["noise20"])[0] == pytest.approx(0.766515740, abs=FLOAT32)
    assert ssim(*floats(original, degraded["noise20"]), data_range=255)[0] == pytest.approx(0.766515740, abs=1e-9)


@pytest.mark.parametrize("flavour", ["uniform7", "gauss11_valid"])
@pytest.mark.parametrize("size", [(11, 11), (12, 43), (75, 30), (300, 290)])  # below, at and above the tile edges
def test_skimage_in_process(flavour, size):
    x, y = pair(*size)
    assert ssim(x, y, flavour)[0] == pytest.approx(skimage_ssim(x, y, flavour), abs=FLOAT32)
    x, y = floats(x, y)
    assert ssim(x, y, flavour, 255)[0] == pytest.approx(skimage_ssim(x, y, flavour), abs=1e-12)


def black_and_white(size):
    g = np.random.default_rng(3)
    squares = (np.indices((size, size)).sum(0) // 32 % 2 * 255.0)[None, None].repeat(3, 1)
    return (np.clip(np.rint(squares + g.normal(0, 20, squares.shape)), 0, 255).astype(np.uint8) for _ in range(2))


@pytest.mark.parametrize("flavour", ["uniform7", "gauss11_valid"])
def test_where_float32_has_least_left(flavour):
    x, y = black_and_white(300)
    assert ssim(x, y, flavour)[0] == pytest.approx(skimage_ssim(x, y, flavour), abs=FLOAT32_WORST)


def test_flat_pictures_of_any_level():
    """Without variance what is left is the luminance term, (2ab + C1) / (a^2 + b^2 + C1)."""
    for a, b in [(255, 254), (255, 0), (0, 0), (3, 200)]:
        x, y = (np.full((1, 3, 40, 50), level, dtype=np.uint8) for level in (a, b))
        by_hand = (2 * a * b + 2.55**2) / (a**2 + b**2 + 2.55**2)
        assert [ssim(x, y, f)[0] for f in FLAVOURS] == pytest.approx([by_hand] * len(FLAVOURS), abs=FLOAT32)


def test_a_models_own_precision_changes_nothing():
    """Foreign code may let torch multiply float32 as bfloat16; scores keep every bit."""
    x, y = pair(60, 60)
    before, kept = ssim(x, y), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert np.array_equal(ssim(x, y), before)
    finally:
        torch.set_float32_matmul_precision(kept)


@pytest.mark.parametrize("size", [(12, 43), (75, 30), (100, 97)])
def test_torchmetrics_in_process(size):
    x, y = pair(*size)
    assert ssim(x, y, "gauss11_reflect")[0] == pytest.approx(torchmetrics_ssim(x, y, 255.0), abs=FLOAT32)
    close = ssim(*floats(x, y), "gauss11_reflect", 255.0)[0]
    assert close == pytest.approx(torchmetrics_ssim(x, y, 255.0), abs=1e-9)
    assert ssim(x, y, "gauss11_reflect")[0] == pytest.approx(torchmetrics_ssim(x, y, 255.0, torch.float32), abs=2e-5)


def test_floats_and_their_range():
    x, y = (v.astype(np.float64) / 127.5 - 1 for v in pair())
    assert ssim(x, y, "uniform7", 2.0)[0] == pytest.approx(skimage_ssim(x, y, "uniform7", 2.0), abs=1e-12)
    assert ssim(x, y, "gauss11_reflect", 2.0)[0] == pytest.approx(torchmetrics_ssim(x, y, 2.0), abs=1e-9)
    x, y = ((v + 1) / 2 for v in (x, y))
    assert ssim(x, y, "uniform7", 2.0)[0] == pytest.approx(skimage_ssim(x, y, "uniform7", 2.0), abs=1e-12)
    with pytest.raises(UsageError, match="data_range"):
        ssim(x, y)


def test_pooling_averages_before_the_window():
    x, y = pair(512, 530)
    pooled = [v[0].reshape(3, 256, 2, 265, 2).mean((2, 4))[None] for v in (x, y)]
    expected = skimage_ssim(*pooled, "gauss11_valid")
    assert ssim(x, y, "avgpool_gauss11")[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_batch_order_and_kind_change_nothing(flavour):
    x, y = pair(batch=3)
    together = ssim(x, y, flavour)
    assert together.shape == (3,) and together.dtype == np.float64
    assert np.array_equal(together, np.concatenate([ssim(x[i : i + 1], y[i : i + 1], flavour) for i in range(3)]))
    assert np.array_equal(together, ssim(torch.from_numpy(x), torch.from_numpy(y), flavour))
    assert ssim(x, x, flavour) == pytest.approx(1.0, abs=1e-12)
    assert ssim(y, x, flavour) == pytest.approx(together, abs=FLOAT32)


@pytest.mark.parametrize("flavour", ["uniform7", "gauss11_valid", "gauss11_reflect"])
def test_map(flavour):
    x, y = pair(90, 301, batch=2)
    values, offset = ssim_map(x, y, flavour)
    assert values.mean((1, 2, 3)).numpy() == pytest.approx(ssim(x, y, flavour), abs=FLOAT32)
    assert offset == {"uniform7": 3, "gauss11_valid": 5, "gauss11_reflect": 0}[flavour]
    assert values.shape == (2, 3, 90 - 2 * offset, 301 - 2 * offset)
    if offset:
        full = skimage_ssim(x[:1], y[:1], flavour, full=True)[1]
        inside = np.moveaxis(full, -1, 0)[:, offset:-offset, offset:-offset]
        np.testing.assert_allclose(values[0].numpy(), inside, atol=1e-11)
    else:
        valid, edge = ssim_map(x, y, "gauss11_valid")
        np.testing.assert_allclose(values[:, :, edge:-edge, edge:-edge].numpy(), valid.numpy(), atol=1e-12)


def multiscale_by_skimage(x, y):
    """Contrast is the SSIM whose luminance term is held at 1 by a huge K1."""
    x, y = (v.astype(np.float64) for v in (x, y))
    per_channel = np.ones(3)
    for scale, weight in enumerate(SCALE_WEIGHTS):
        more = {} if scale == 4 else {"K1": 1e6}
        for c in range(3):
            one = [v[:, c : c + 1] for v in (x, y)]
            per_channel[c] *= max(skimage_ssim(*one, "gauss11_valid", **more), 0) ** weight
        odd = [(0, 0), (0, 0), *((n % 2, n % 2) for n in x.shape[2:])]
        x, y = (np.pad(v, odd) for v in (x, y))
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x, y = (v[..., : 2 * height, : 2 * width].reshape(1, 3, height, 2, width, 2).mean((3, 5)) for v in (x, y))
    return per_channel.mean()


@pytest.mark.parametrize("size", [(176, 176), (161, 203)])
def test_multiscale_against_scales_from_skimage(size):
    x, y = pair(*size)
    assert ms_ssim(x, y)[0] == pytest.approx(multiscale_by_skimage(x, y), abs=FLOAT32)
    assert ms_ssim(*floats(x, y), 255)[0] == pytest.approx(multiscale_by_skimage(x, y), abs=1e-9)
    assert ms_ssim(x, x)[0] == pytest.approx(1.0, abs=1e-12)


def test_multiscale_near_torchmetrics():
    """Theirs averages channels before the product and reflects at the last scale: near, not equal."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs

    original, degraded, _ = golden_pictures()
    for picture in degraded.values():
        x, y = (torch.from_numpy(v).double() for v in (original, picture))
        assert ms_ssim(original, picture)[0] == pytest.approx(float(theirs(y, x, data_range=255.0)), abs=5e-3)


def test_faults_are_named():
    x, y = pair(10, 40)
    for fault, call in [
        ("smaller than the 11 px", lambda: ssim(x, y)),
        ("not one of uniform7", lambda: ssim(x, y, "gauss")),
        ("'bad' is not one of uniform7, gauss11_valid", lambda: SSIM(flavour="bad")),
        ("differ in shape", lambda: ssim(x, y[..., :39])),
        ("smaller than the 161 px", lambda: ms_ssim(*pair(160, 200))),
        (r"\[B, C, H, W\]", lambda: ssim(x[0], y[0])),
        ("no place", lambda: ssim_map(*pair(), "avgpool_gauss11")),
    ]:
        with pytest.raises(Error, match=fault):
            call()


def rows(metric, x, y):
    measured = metric.measure({"image": torch.from_numpy(x), "recon": torch.from_numpy(y)}, None)
    found = [{"item": str(i), **{k: v[i] for k, v in measured.items()}} for i in range(len(x))]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_metrics_reduce_to_the_mean():
    x, y = pair(170, 165, batch=3)
    for metric, direct in [(SSIM(), ssim(x, y)), (SSIM("uniform7"), ssim(x, y, "uniform7")), (MSSSIM(), ms_ssim(x, y))]:
        found = metric.reduce(Table(rows(metric, x, y)))
        assert found.value == pytest.approx(direct.mean(), abs=1e-12) and found.n == 3 and found.note == ""
    assert [SSIM().name, SSIM("uniform7").name] == ["ssim", "ssim_uniform7"]
    assert SSIM().signature(Table([])) == "ssim|gauss11_valid|range:255|round|v:1"


def test_small_pictures_are_null_with_a_reason():
    for metric, reason in [(SSIM(), "2 pictures smaller than the window of 11 px"), (MSSSIM(), "2 a side of at most")]:
        found = metric.reduce(Table(rows(metric, *pair(10, 10, batch=2))))
        assert found.value is None and found.note.startswith(reason)
