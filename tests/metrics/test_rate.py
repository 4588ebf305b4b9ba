import json

import numpy as np
import pytest
import torch

from bench.metrics.rate import BitsPerPixel, Histogram, bits_per_pixel, nominal_bits_per_pixel
from bench.types import Error, Table


@pytest.mark.parametrize(
    "channels,bits,stride,published",
    [
        (4, 16, (8, 8), 1.0),  # SD f8c4
        (16, 16, (8, 8), 4.0),  # FLUX
        (32, 16, (16, 16), 2.0),  # VA-VAE f16d32
        (32, 16, (32, 32), 0.5),  # DC-AE f32c32
        (16, 16, (4, 8, 8), 1.0),  # Cosmos-CV 4x8x8
        (1, np.log2(64000), (4, 8, 8), 0.0624),  # Cosmos-DV 4x8x8
        (1, 14, (16, 16), 0.0547),  # VQ-f16-16384
    ],
)
def test_nominal_rates_of_published_codecs(channels, bits, stride, published):
    assert nominal_bits_per_pixel(channels, bits, stride) == pytest.approx(published, abs=6e-5)


def test_side_information_counts():
    assert bits_per_pixel([512, 1024], [256, 256], [0, 256]).tolist() == [2.0, 5.0]
    with pytest.raises(Error, match="differ in number"):
        bits_per_pixel([1, 2], [1])
    with pytest.raises(Error, match="at least one pixel"):
        bits_per_pixel([1], [0])


def test_metric():
    media = {"bits": [512.0, 1024.0], "side_bits": [0.0, 256.0], "pixels": [256, 256]}
    columns = BitsPerPixel().measure(media, None)
    rows = [{"item": str(i), **{k: v[i] for k, v in columns.items()}} for i in range(2)]
    assert json.loads(json.dumps(rows)) == rows
    found = BitsPerPixel().reduce(Table(rows))
    assert found[""].value == 3.5 and found["side"].value == 0.5 and found[""].low < 3.5 < found[""].high
    with pytest.raises(Error, match="columns bits and pixels"):
        BitsPerPixel().measure({"image": None}, None)


def test_even_use_of_a_codebook():
    histogram = Histogram(8).update(torch.arange(8).repeat(3).reshape(2, 3, 4))
    assert (histogram.n, histogram.usage()) == (24, 1.0)
    assert histogram.entropy() == pytest.approx(3.0, abs=1e-12)
    assert histogram.perplexity() == pytest.approx(8.0, abs=1e-11)


def test_against_scipy_and_in_shards():
    from scipy.stats import entropy

    codes = np.random.default_rng(0).zipf(1.5, 5000) % 64
    whole = Histogram(64).update(codes)
    merged = Histogram(64)
    for part in np.array_split(codes, 7):
        merged.merge(Histogram(64).update(part))
    assert np.array_equal(whole.counts, merged.counts)
    assert whole.entropy() == pytest.approx(entropy(np.bincount(codes, minlength=64), base=2), abs=1e-12)
    assert whole.usage() == len(set(codes.tolist())) / 64


def test_nothing_seen_and_wrong_codes():
    assert Histogram(4).usage() is None and Histogram(4).perplexity() is None
    assert Histogram(4).update([2]).entropy() == 0.0
    for codes in ([4], [-1]):
        with pytest.raises(Error, match="outside a codebook of 4"):
            Histogram(4).update(codes)
    with pytest.raises(Error, match="differ in size"):
        Histogram(4).merge(Histogram(5))
