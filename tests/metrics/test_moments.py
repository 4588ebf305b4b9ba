import numpy as np
import pytest
from feature_laws import features, rng

from bench.metrics.frechet import frechet_distance
from bench.metrics.moments import BLOCK, BlockMoments, Moments, digest_of, lower_product, mean_and_covariance
from bench.types import Error


@pytest.mark.parametrize("shards", [1, 2, 7, 300])
def test_shards_merge_to_the_whole(shards):
    """In any order and any split, with an origin of each shard's own: 1e-12 relative."""
    rows = features(3000, 24, 4).astype(np.float32) + 5
    ids = [f"image-{i}" for i in range(3000)]
    whole = Moments(24).update(rows, ids)
    merged = Moments(24)
    g = rng(shards)
    parts = np.array_split(g.permutation(3000), shards)
    for part in g.permutation(len(parts)):
        shard = Moments(24)
        for chunk in np.array_split(parts[part], 3):
            shard.update(rows[chunk], [ids[i] for i in chunk])
        merged.merge(Moments.from_bytes(shard.to_bytes()))
    scale = np.abs(whole.covariance()).max()
    np.testing.assert_allclose(merged.mean(), whole.mean(), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance(), whole.covariance(), rtol=1e-12, atol=1e-12 * scale)
    expected = np.cov(rows.astype(float), rowvar=False)
    np.testing.assert_allclose(whole.covariance(), expected, atol=1e-11 * scale)
    np.testing.assert_allclose(whole.covariance(biased=True), expected * 2999 / 3000, atol=1e-11 * scale)
    merged.expect(reversed(ids))


@pytest.mark.parametrize("batch", [1, 100, BLOCK, 3000])
def test_rows_wait_in_blocks_and_none_is_lost(batch):
    rows = features(2500, 6, 4)
    moments = Moments(6)
    for start in range(0, len(rows), batch):
        moments.update(rows[start : start + batch])
        if start == 0:
            assert moments.mean().shape == (6,)  # asking in between changes nothing
    assert moments.n == 2500
    np.testing.assert_allclose(moments.mean(), rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance(), np.cov(rows, rowvar=False), atol=1e-14)


def test_covariances_are_symmetric_to_the_last_bit():
    covariance = mean_and_covariance(features(900, 300, 1))[1]
    assert (covariance == covariance.T).all()


def test_wide_features_take_float32_products():
    """At 1,024 dimensions the distance moves by 1e-7 of itself at most, with `exact` by 1e-11; NumPy is the judge."""
    spectrum = np.arange(1, 1025, dtype=np.float32) ** -0.5
    a, b = (np.maximum(rng(s).normal(size=(1300, 1024)).astype(np.float32), -1) * spectrum + 1 for s in (1, 2))
    b[:, :512] *= np.float32(1.2)
    stats = [(x.mean(0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b)]
    expected = frechet_distance(*stats[0], *stats[1])
    for exact, tolerance in ((False, 1e-7), (True, 1e-11)):
        found = frechet_distance(*mean_and_covariance(a, exact), *mean_and_covariance(b, exact))
        assert found == pytest.approx(expected, rel=tolerance)
    single, double = (mean_and_covariance(a, exact)[1] for exact in (False, True))
    assert 0 < np.abs(single - double).max() < 1e-6 * np.abs(double).max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
def test_rows_of_any_type(dtype):
    rows = (rng(1).uniform(0, 20, size=(50, 5))).astype(dtype)
    np.testing.assert_allclose(
        Moments(5).update(rows).covariance(), np.cov(rows.astype(float), rowvar=False), rtol=1e-12
    )


def test_fixed_origin_far_away():
    rows = features(500, 8, 4)
    origin = np.full(8, 3.0)
    moments = Moments(8, origin).update(rows[:200]).merge(Moments(8, origin).update(rows[200:]))
    np.testing.assert_allclose(moments.covariance(), np.cov(rows, rowvar=False), atol=1e-12)
    np.testing.assert_allclose(moments.mean(), rows.mean(0), rtol=1e-12)


def test_missing_and_repeated_samples_are_found():
    rows, ids = features(6, 4), list("abcdef")
    moments = Moments(4).update(rows, ids)
    moments.expect("fedcba")
    with pytest.raises(Error, match="6 samples where 7"):
        moments.expect("abcdefg")
    padded = Moments(4).update(rows, list("abcdea"))  # as a padding sampler would
    with pytest.raises(Error, match="some missing, some repeated"):
        padded.expect(ids)
    assert digest_of(["a", "a"]) != digest_of(["a"])
    assert digest_of(["a", "b"]) == digest_of(["b", "a"]) == (digest_of(["a"]) + digest_of(["b"])) % (1 << 128)


def test_moments_refuse_what_does_not_fit():
    moments = Moments(4)
    for fault, call in [
        (r"\[n, 4\]", lambda: moments.update(np.zeros((2, 5)))),
        (r"\[n, 4\]", lambda: moments.update(np.zeros(8))),  # a flattened buffer
        ("NaN", lambda: moments.update(np.full((2, 4), np.nan))),
        ("3 ids for 2", lambda: moments.update(np.zeros((2, 4)), "abc")),
        ("differ in dimension", lambda: moments.merge(Moments(5))),
        ("needs 2", moments.covariance),
        ("needs 1", moments.mean),
        ("not an archive", lambda: Moments.from_bytes(b"nothing")),
    ]:
        with pytest.raises(Error, match=fault):
            call()
    assert moments.n == 0 and moments.digest == 0  # a refused update leaves nothing behind


def test_nothing_added_changes_nothing():
    rows = features(30, 4)
    moments = Moments(4).update(rows[:0], []).update(rows, map(str, range(30))).merge(Moments(4))
    np.testing.assert_allclose(moments.mean(), rows.mean(0), rtol=1e-13)
    assert Moments(4).merge(moments).covariance() == pytest.approx(np.cov(rows, rowvar=False), rel=1e-12)


def test_lower_product_is_the_lower_triangle():
    rows = features(40, 7)
    np.testing.assert_allclose(np.tril(lower_product(rows)), np.tril(rows.T @ rows), rtol=1e-13)


def test_blocks_are_the_same_on_any_shard():
    rows, ids = features(600, 5), [f"i{i}" for i in range(600)]
    clusters = [f"c{i // 3}" for i in range(600)]
    whole = BlockMoments(5).update(rows, ids, clusters)
    order = rng(1).permutation(600)
    merged = BlockMoments(5)
    for part in np.array_split(order, 7):
        shard = BlockMoments(5).update(rows[part], [ids[i] for i in part], [clusters[i] for i in part])
        merged.merge(shard)
    assert merged.n == 600
    assert [b.digest for b in merged.blocks] == [b.digest for b in whole.blocks]
    for one, other in zip(merged.blocks, whole.blocks, strict=True):
        assert one.n == other.n and one.n % 3 == 0  # no cluster is cut
        np.testing.assert_allclose(one.covariance(), other.covariance(), rtol=1e-11, atol=1e-13)
    first, second = whole.halves()
    joined = first.merge(second)
    joined.expect(ids)
    np.testing.assert_allclose(joined.covariance(), np.cov(rows, rowvar=False), rtol=1e-11, atol=1e-13)


def test_blocks_refuse_what_does_not_fit():
    blocks = BlockMoments(4)
    for fault, call in [
        ("1 block tells nothing", lambda: BlockMoments(4, 1)),
        ("cannot take up", lambda: blocks.merge(BlockMoments(4, 21))),
        ("3 ids", lambda: blocks.update(np.zeros((2, 4)), "abc")),
        ("differ in dimension", lambda: blocks.merge(BlockMoments(5))),
    ]:
        with pytest.raises(Error, match=fault):
            call()
