"""Conditioning blocks against closed forms, the ablation table against SciPy's t intervals."""

import math

import numpy as np
import pytest
from scipy import stats as peers

from suites.scaling import conditioning


def test_the_control_schedule():
    t = np.linspace(0, 1, 11)
    for power in conditioning.POWERS:
        gamma = conditioning.control_strength(t, power)
        assert (gamma[0], gamma[-1]) == pytest.approx((1, 0)) and (np.diff(gamma) < 0).all()
    assert conditioning.control_strength(0.5) == pytest.approx(0.5)
    assert conditioning.control_strength(0.5, 2.0) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_size_features_and_a_projection_that_changes_nothing():
    import torch

    one = conditioning.size_features((512, 768), (0, 128), (256, 256))
    assert one.shape == (224,) and np.abs(one).max() <= 1
    assert one[:16] == pytest.approx(np.sin(math.pi * 512 / 4096 * 2.0 ** np.arange(16)), abs=1e-9)
    assert (conditioning.size_features((512, 768), (0, 128), (256, 256), True) != one).any()
    out = conditioning.zero_projection(224, 8)(torch.tensor(one, dtype=torch.float32))
    assert out.tolist() == [0.0] * 8


def test_padding_repeats_and_its_noise_has_the_scale_of_the_channels():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3)) * [1.0, 10.0, 100.0]
    plain = conditioning.replicate_padding(x, 12, rng, 0.0)
    np.testing.assert_array_equal(plain, np.concatenate([x, x, x[:2]]))
    many = conditioning.replicate_padding(x, 20_005, rng, 0.1)
    np.testing.assert_array_equal(many[:5], x)
    noise = (many - x[np.arange(20_005) % 5])[5:]
    assert noise.std(0) / x.std(0) == pytest.approx(0.1, rel=0.03)
    with pytest.raises(ValueError, match="5 tokens cannot be padded to 4"):
        conditioning.replicate_padding(x, 4, rng)


def test_two_way_guidance_has_plain_guidance_inside():
    empty, semantic, full = np.random.default_rng(0).standard_normal((3, 4))
    np.testing.assert_allclose(conditioning.two_way_guidance(empty, semantic, full, 1, 1), full)
    np.testing.assert_allclose(conditioning.two_way_guidance(empty, semantic, full, 1, 0), semantic)
    expected = empty + 4 * (semantic - empty)
    np.testing.assert_allclose(conditioning.two_way_guidance(empty, semantic, full, 4, 0), expected)


def test_shifts_of_time_compose_and_move_the_log_snr():
    """Rectified flow: SNR = ((1 - t) / t)^2, so that a shift by s moves ln SNR by -2 ln s."""
    t = np.linspace(0.05, 0.95, 7)
    once = conditioning.shifted_time(t, 1024, 256)
    np.testing.assert_allclose(2 * np.log((1 - once) / once), 2 * np.log((1 - t) / t) - 2 * math.log(2))
    np.testing.assert_allclose(conditioning.shifted_time(once, 1024, 256), conditioning.shifted_time(t, 4096, 256))
    assert conditioning.shifted_time(0.3, 256, 256) == pytest.approx(0.3)
    assert conditioning.shifted_log_snr(1.0, 512, 256) == pytest.approx(1 - 2 * math.log(2))


def test_positions_at_another_resolution():
    assert conditioning.rescaled_positions(4, 4).tolist() == [0, 1, 2, 3]
    assert conditioning.rescaled_positions(8, 4).tolist() == pytest.approx(
        [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]
    )
    ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij"), -1)
    np.testing.assert_allclose(conditioning.resized_table(ramp, 8), ramp, atol=1e-12)
    doubled = conditioning.resized_table(ramp, 16)[4:12, 4:12, 0]
    # torch's cubic (a = -0.75) is off a ramp by 3 / 64 halfway between centre and edge of a cell
    error = doubled - conditioning.rescaled_positions(16, 8)[4:12, None]
    np.testing.assert_allclose(np.abs(error), 3 / 64, atol=1e-12)
    np.testing.assert_allclose(conditioning.resized_table(np.ones((4, 4, 2)), 7), 1.0, rtol=1e-12)


def test_an_ablation_pairs_its_seeds():
    luck = np.random.default_rng(0).standard_normal(4)
    found = conditioning.ablate(["zero", "replicate"], range(4), lambda cell, s: luck[s] - (cell == "replicate"))
    low, high = peers.t.interval(0.95, 3, luck.mean(), peers.sem(luck))
    assert (found[0].mean, found[0].low, found[0].high) == pytest.approx((luck.mean(), low, high))
    assert (found[0].difference, found[0].difference_high) == (0, 0)
    assert (found[1].difference_low, found[1].difference_high) == pytest.approx((-1, -1))
    with pytest.raises(ValueError, match="2 seeds"):
        conditioning.ablate(["a"], [1, 2], lambda *_: 0.0)
    with pytest.raises(ValueError, match="a gave nan with seed 1"):
        conditioning.ablate(["a"], [0, 1, 2], lambda _, s: math.nan if s == 1 else 0.0)
