"""Mean and covariance of features as sums that shards add up: all that a Fréchet distance or a CMMD needs."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bench.types import Error

BLOCK = 1024  # rows per rank-k update: enough for the matrix product to be the cost
WIDE = 1024  # dimensions from which on those products are float32
STRIP = 256  # rows of a lower triangle that are added at a time
MODULUS = 1 << 128


class Moments:
    """Count, sum and second moment of features [n, dim] about a fixed origin; shards merge by addition.

    The sums are float64. From 1,024 dimensions on, the products of a block of 1,024 rows are float32, unless `exact`:
    twice as fast, and 4e-8 of a Fréchet distance of 2 (float64: 2e-13). `origin` [dim] is one for all shards, near the
    mean so that the sums stay small; without it the mean of the first rows is taken, and merging shifts exactly.

    `digest` sums 128-bit hashes of the sample ids mod 2^128: with the count it tells whether a merged set has every
    sample once. dim = 2048 takes 34 MB, and 8 MB while rows wait. Not safe for several threads.
    """

    def __init__(self, dim: int, origin: np.ndarray | None = None, exact: bool = False):
        self.dim = dim
        self.n = 0
        self.origin = None if origin is None else np.asarray(origin, dtype=np.float64)
        self.digest = 0
        self._sum = np.zeros(dim)
        self._second = np.zeros((dim, dim))  # its lower triangle
        self._dtype = np.float32 if dim >= WIDE and not exact else np.float64
        self._waiting: np.ndarray | None = None  # [BLOCK, dim], rows less the origin
        self._num_waiting = 0

    def update(self, features: np.ndarray, ids: Iterable[str] | None = None) -> Moments:
        """Adds rows [n, dim]; `ids` name them for the digest. Raises Error where shape or finiteness is wrong."""
        rows = np.asarray(features)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise Error(f"features must be [n, {self.dim}], not of shape {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise Error("features hold NaN or infinity")
        if ids is not None:
            ids = list(ids)
            if len(ids) != len(rows):
                raise Error(f"{len(ids)} ids for {len(rows)} rows of features")
            self.digest = (self.digest + digest_of(ids)) % MODULUS
        if len(rows) == 0:
            return self
        if self.origin is None:
            self.origin = near_mean(rows)
        if self._waiting is None:
            self._waiting = np.empty((BLOCK, self.dim), self._dtype)
        self.n += len(rows)
        origin = self.origin.astype(rows.dtype) if rows.dtype == self._dtype else self.origin
        start = 0
        while start < len(rows):
            part = rows[start : start + BLOCK - self._num_waiting]
            end = self._num_waiting + len(part)
            np.subtract(part, origin, out=self._waiting[self._num_waiting : end], casting="same_kind")
            self._num_waiting, start = end, start + len(part)
            if end == BLOCK:
                self._settle()
        return self

    def merge(self, other: Moments) -> Moments:
        """Adds another set's moments, exactly to 1e-12 relative; a different origin is shifted."""
        if other.dim != self.dim:
            raise Error(f"moments differ in dimension: {self.dim} and {other.dim}")
        self._settle()
        other._settle()
        self.digest = (self.digest + other.digest) % MODULUS
        if other.n == 0:
            return self
        if self.origin is None:
            self.origin = other.origin.copy()
        shift = other.origin - self.origin
        self._second += other._second
        if shift.any():
            cross = np.outer(shift, other._sum)
            self._second += cross + cross.T + other.n * np.outer(shift, shift)
        self._sum += other._sum + other.n * shift
        self.n += other.n
        return self

    def mean(self) -> np.ndarray:
        """float64 [dim]."""
        self._need(1)
        return self.origin + self._sum / self.n

    def covariance(self, biased: bool = False) -> np.ndarray:
        """float64 [dim, dim], over n - 1; `biased` divides by n, as StyleGAN-V's and cd-fvd's FVD do."""
        self._need(2)
        found = np.tril(self._second).astype(np.float64, copy=False)
        for start in range(0, self.dim, STRIP):
            stop = start + STRIP
            found[start:stop, :stop] -= np.outer(self._sum[start:stop] / self.n, self._sum[:stop])
            corner = found[start:stop, start:stop]
            found[start:stop, start:stop] = np.tril(corner) + np.tril(corner, -1).T
            found[:start, start:stop] = found[start:stop, :start].T  # onto the upper triangle
        found /= self.n if biased else self.n - 1
        return found

    def expect(self, ids: Iterable[str]) -> None:
        """Raises Error unless exactly these samples were added, each once."""
        ids = list(ids)
        if self.n != len(ids):
            raise Error(f"moments hold {self.n} samples where {len(ids)} were expected")
        if self.digest != digest_of(ids):
            raise Error(f"moments hold other samples than the {len(ids)} expected: some missing, some repeated")

    def to_bytes(self) -> bytes:
        """An npz archive that holds plain arrays."""
        self._settle()
        origin = np.zeros(self.dim) if self.origin is None else self.origin
        digest = np.frombuffer(self.digest.to_bytes(16, "big"), dtype=np.uint8)
        file = io.BytesIO()
        np.savez(file, n=np.int64(self.n), origin=origin, sum=self._sum, second=self._second, digest=digest)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Reads `to_bytes`; raises Error where the archive is damaged or is something else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                n, origin, total, second, digest = (file[k] for k in ("n", "origin", "sum", "second", "digest"))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
            raise Error(f"not an archive of moments: {e}") from None
        dim = origin.size
        if second.shape != (dim, dim) or total.shape != (dim,) or digest.size != 16:
            raise Error("not an archive of moments: its arrays do not fit together")
        moments = cls(dim, origin if n else None)
        moments.n, moments._sum, moments._second = int(n), total, second
        moments.digest = int.from_bytes(digest.tobytes(), "big")
        return moments

    def _settle(self) -> None:
        """Adds the rows that wait."""
        if not self._num_waiting:
            return
        rows = self._waiting[: self._num_waiting]
        self._num_waiting = 0
        self._sum += rows.sum(axis=0, dtype=np.float64)
        product = lower_product(rows)
        for start in range(0, self.dim, STRIP):
            self._second[start : start + STRIP, : start + STRIP] += product[start : start + STRIP, : start + STRIP]

    def _need(self, n: int) -> None:
        self._settle()
        if self.n < n:
            raise Error(f"this statistic needs {n} sample{'' if n == 1 else 's'}; the moments hold {self.n}")


class BlockMoments:
    """Moments in blocks of samples: an error of what is computed from them needs no features (see `block_distance`).

    The block of a row is a hash of its cluster, or of its id, so that blocks are the same on any shard and a cluster
    is never cut. From 1,024 dimensions on the blocks are kept in float32: dim = 2048 takes 17 MB a block.
    """

    def __init__(self, dim: int, num_blocks: int = 20, origin: np.ndarray | None = None):
        if num_blocks < 2:
            raise Error(f"{num_blocks} block tells nothing of an error", hint="take 20 or more")
        self.dim = dim
        self.origin = None if origin is None else np.asarray(origin, dtype=np.float64)
        self.blocks = [self._block() for _ in range(num_blocks)]

    def _block(self) -> Moments:
        block = Moments(self.dim, self.origin)
        block._second = block._second.astype(block._dtype)
        return block

    @property
    def n(self) -> int:
        return sum(block.n for block in self.blocks)

    def update(self, features: np.ndarray, ids: Sequence[str], clusters: Sequence[str] | None = None) -> BlockMoments:
        """Adds rows [n, dim]; `ids` name them, `clusters` what they share with dependent rows."""
        rows, ids = np.asarray(features), list(ids)
        names = ids if clusters is None else list(clusters)
        if not len(rows) == len(ids) == len(names):
            raise Error(f"{len(rows)} rows of features have {len(ids)} ids and {len(names)} clusters")
        if self.origin is None and len(rows):
            self.origin = near_mean(rows)
            for block in self.blocks:
                block.origin = self.origin
        home = np.array([_hash(name) % len(self.blocks) for name in names], dtype=np.int64)
        for number, block in enumerate(self.blocks):
            picked = np.flatnonzero(home == number)
            block.update(rows[picked], [ids[i] for i in picked])
        return self

    def merge(self, other: BlockMoments) -> BlockMoments:
        """Adds another set's blocks, each to its own."""
        if len(other.blocks) != len(self.blocks):
            raise Error(f"{len(self.blocks)} blocks cannot take up {len(other.blocks)}")
        for block, more in zip(self.blocks, other.blocks, strict=True):
            block.merge(more)
        self.origin = self.blocks[0].origin if self.origin is None else self.origin
        return self

    def halves(self) -> tuple[Moments, Moments]:
        """The moments of the first and of the second half of the blocks."""
        middle = len(self.blocks) // 2
        return self._joined(self.blocks[:middle]), self._joined(self.blocks[middle:])

    def _joined(self, blocks: Sequence[Moments]) -> Moments:
        whole = Moments(self.dim, self.origin)
        for block in blocks:
            whole.merge(block)
        return whole


def mean_and_covariance(features: np.ndarray, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float64 [d] and unbiased [d, d] of features [n, d], n > 1, in blocks: no float64 copy of the whole."""
    moments = Moments(features.shape[1], exact=exact).update(features)
    return moments.mean(), moments.covariance()


def near_mean(rows: np.ndarray) -> np.ndarray:
    """The mean of rows [n, d] as an origin: rounded to float32, so that float32 rows lose nothing to it."""
    return rows.mean(axis=0, dtype=np.float64).astype(np.float32).astype(np.float64)


def lower_product(rows: np.ndarray) -> np.ndarray:
    """rows' rows [d, d] in the precision of rows [n, d], of which only the lower triangle counts."""
    from scipy.linalg import blas

    syrk: Any = blas.ssyrk if rows.dtype == np.float32 else blas.dsyrk
    return syrk(1.0, rows.T).T  # the upper triangle of a Fortran array


def digest_of(ids: Iterable[str]) -> int:
    """Sum of the 128-bit hashes of sample ids mod 2^128: any order, any sharding, repeats counted."""
    return sum(map(_hash, ids)) % MODULUS


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:16], "big")
