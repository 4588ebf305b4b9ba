"""The example suite on the toy autoencoder: what it says follows from a closed form."""

import numpy as np
import pytest
from fake_context import FakeData, measure

from bench import UsageError
from bench.adapters.toy import Toy
from suites.noise import Noise


def grey(n=6, size=64):
    return FakeData({f"grey-{i}": (np.full((size, size, 3), 128, np.uint8), {"kind": "grey"}) for i in range(n)})


@pytest.mark.parametrize("factor", [1, 4])
def test_block_means_take_away_noise(factor):
    """On plain grey the mean of a block of k x k pixels has 1 / k^2 of the noise's variance: 20 log10(2 k / s) dB.

    Tolerance 0.15 dB: 6 x 3 x 64 x 64 / 16 draws, and rounding to 8 bits adds 1/12 level^2 to a variance of 10.
    """
    suite = Noise(strength=0.1, size=64)
    table, _ = measure(suite, Toy(factor=factor, bits=0), grey())
    (score, *_), expected = suite.score(table), 20 * np.log10(2 * factor / 0.1)
    assert score.metric == "psnr" and score.slice == "all" and score.n == 6
    assert score.value == pytest.approx(expected, abs=0.15)


def test_noise_is_that_of_the_item_whatever_the_batch():
    suite = Noise(size=64)
    one, _ = measure(suite, Toy(), grey(), batch=1)
    four, _ = measure(suite, Toy(), grey(), batch=4)
    assert one.rows == four.rows
    assert len(set(one.column("psnr"))) == 6


def test_wrong_strength_is_refused():
    with pytest.raises(UsageError, match="strength"):
        Noise(strength=-1)


def test_the_example_stays_short():
    import inspect

    import suites.noise

    assert len(inspect.getsource(suites.noise).splitlines()) <= 50
