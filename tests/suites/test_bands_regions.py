"""Bands and regions against golden values, closed forms and other people's filters."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from suites.reconstruction import bands, regions

SHARED = Path(__file__).parents[3] / "shared/data/reconstruction"


def degradations(x):
    """The two degradations that the golden values were measured on, of uint8 [H, W, 3]."""
    height, width = x.shape[:2]
    padded = np.pad(x.astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
    sum9 = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    noise = np.random.RandomState(0).randint(-20, 21, x.shape)
    return {
        "box3": ((2 * sum9 + 9) // 18).astype(np.uint8),
        "noise20": np.clip(x.astype(int) + noise, 0, 255).astype(np.uint8),
    }


def golden_pair(name):
    """uint8 [3, 256, 256] original and degraded, and the golden values of their bands."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here: no golden pictures")
    from PIL import Image

    known = json.loads((SHARED / "golden/metrics.json").read_text())
    whole = np.asarray(Image.open(SHARED / "images/cosmos/image.png").convert("RGB"))
    top, left = known["crop_origin_yx"]
    x = whole[top : top + 256, left : left + 256]
    y = degradations(x)[name]
    assert hashlib.sha256(np.ascontiguousarray(x)).hexdigest() == known["crop_sha256"]
    assert hashlib.sha256(y).hexdigest() == known[f"crop256/{name}"]["sha256"]
    golden = json.loads((SHARED / "golden/bands_and_latents.json").read_text())[f"bands/{name}"]
    return x.transpose(2, 0, 1), y.transpose(2, 0, 1), golden


@pytest.mark.parametrize("name", ["box3", "noise20"])
def test_bands_match_the_golden_values(name):
    x, y, golden = golden_pair(name)
    found = bands.energies(x, y)
    assert found[:, 1] == pytest.approx([golden["haar_mse_share"][b] for b in bands.BANDS], abs=1e-9)
    assert bands.snr(found[:, 0], found[:, 1]) == pytest.approx(
        [golden["haar_band_snr_db"][b] for b in bands.BANDS], abs=1e-9
    )
    assert found[:, 1].sum() == pytest.approx(golden["mse"], abs=1e-9)
    rings = bands.radial(x, y)
    assert rings[:, 1] == pytest.approx(golden["radial8_mse"], abs=1e-9)
    assert bands.snr(rings[:, 0], rings[:, 1]) == pytest.approx(golden["radial8_snr_db"], abs=1e-9)


def test_fast_sums_are_those_of_the_plain_transform():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (2, 3, 64, 32), dtype=np.uint8)
    found = bands.energies(x, y)
    for column, values in enumerate((x, y.astype(float) - x, y)):
        plain = [np.mean(band**2) * band.size / x.size for band in bands.haar(values).values()]
        assert found[:, column] == pytest.approx(plain, rel=1e-12)
    floats = bands.energies(x / 1.0, y / 1.0)
    assert floats == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 64, 32), (1, 33, 20), (2, 16, 17)])
def test_energies_of_rings_and_bands_add_up(shape):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, *shape)) * 50
    totals = [np.mean(x**2), np.mean((y - x) ** 2), np.mean(y**2)]
    assert bands.radial(x, y).sum(axis=0) == pytest.approx(totals, rel=1e-12)
    if shape[-1] % 16 == 0:
        assert bands.energies(x, y).sum(axis=0) == pytest.approx(totals, rel=1e-12)


def test_stripes_lie_in_their_band():
    """A pattern that changes sign from column to column is HL1 alone; from row to row, LH1 alone."""
    columns = np.tile([10.0, -10.0], (1, 32, 16))
    for pattern, name in ((columns, "HL1"), (columns.transpose(0, 2, 1), "LH1")):
        found = bands.energies(pattern, pattern)
        place = bands.BANDS.index(name)
        assert found[place, 0] == pytest.approx(100)
        assert np.delete(found[:, 0], place).max() == 0


def test_blur_is_seen_in_the_fine_bands_and_noise_as_invention():
    x, box, _ = golden_pair("box3")
    _, noise, _ = golden_pair("noise20")
    fine = [bands.by_scale(bands.energies(x, y))[0] for y in (box, noise)]
    blurred, noisy = (float(bands.sharpness(scale[0], scale[2])) for scale in fine)
    assert blurred < 0.5 and noisy > 1.2


def test_bands_refuse_sides_they_cannot_halve():
    with pytest.raises(ValueError, match="no multiples of 16"):
        bands.energies(np.zeros((3, 24, 32)), np.zeros((3, 24, 32)))


def picture(seed=0, size=64):
    """uint8 [3, size, size] with flat, textured, dark and bright areas."""
    rng = np.random.default_rng(seed)
    x = rng.integers(60, 200, (3, size, size))
    x[:, : size // 2] = 120
    x[:, : size // 4, : size // 2] = 5
    x[:, : size // 4, size // 2 :] = 250
    return x.astype(np.uint8)


def test_masks_are_those_of_scipy():
    """Sobel and the 7 x 7 variance by scipy.ndimage in float64, on the same luma: the same pixels."""
    from scipy import ndimage

    y = regions.luma(picture()).astype(float)
    gradient = np.hypot(ndimage.sobel(y, 0, mode="nearest"), ndimage.sobel(y, 1, mode="nearest"))
    expected = np.round(gradient**2) >= np.sort(np.round(gradient**2), axis=None)[round(0.9 * y.size)]
    assert (regions.edge_mask(y.astype(np.int32)) == expected).all()

    mean = ndimage.uniform_filter(y, 7, mode="mirror")
    variance = np.round(ndimage.uniform_filter(y * y, 7, mode="mirror") * 2401 - (mean * 49) ** 2)
    expected = variance <= np.sort(variance, axis=None)[round(0.3 * y.size) - 1]
    assert (regions.flat_mask(y.astype(np.int32)) == expected).all()


def test_masks_cover_the_shares_they_name():
    noise = np.random.default_rng(3).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    found = {name: mask.mean() for name, mask in regions.masks(noise).items()}
    assert found["edge"] == pytest.approx(0.1, abs=0.005)  # ties of integers
    assert found["flat"] == pytest.approx(0.3, abs=0.005)
    y = regions.luma(noise)
    assert found["dark"] == (y < 32).mean() and found["bright"] == (y > 224).mean()


def test_a_plain_picture_has_no_edge_and_is_all_flat():
    found = regions.masks(np.full((3, 32, 32), 100, np.uint8))
    assert not found["edge"].any() and found["flat"].all()


def test_masked_psnr_is_psnr_where_the_mask_holds():
    from skimage.metrics import peak_signal_noise_ratio

    x = picture()
    y = np.clip(x.astype(int) + np.random.default_rng(4).integers(-9, 10, x.shape), 0, 255).astype(np.uint8)
    masks = regions.masks(x)
    found = regions.masked_psnr(x, y, masks)
    for name in regions.REGIONS:
        expected = peak_signal_noise_ratio(x[:, masks[name]], y[:, masks[name]], data_range=255)
        assert found[name] == pytest.approx(expected, abs=1e-9)
    everywhere = regions.masked_psnr(x, y, {"all": np.ones(x.shape[1:], bool)})["all"]
    assert everywhere == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-9)


def test_a_region_too_small_or_without_error_is_null():
    x = picture()
    small = np.zeros((64, 64), bool)
    small.flat[: regions.MIN_PIXELS - 1] = True
    assert regions.masked_psnr(x, 255 - x, {"small": small}) == {"small": None}
    assert regions.masked_psnr(x, x, regions.masks(x)) == dict.fromkeys(regions.REGIONS)
