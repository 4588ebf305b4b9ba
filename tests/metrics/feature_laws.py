"""Features whose law is known: for tests of what is computed from sets of them."""

import numpy as np


def rng(seed=0):
    return np.random.default_rng(seed)


def features(n, d, seed=0, power=1.0):
    """Correlated, skewed features with a falling spectrum."""
    g = rng(seed)
    z = g.normal(size=(n, d)) * np.arange(1, d + 1) ** (-power / 2)
    rotation = np.linalg.qr(rng(99).normal(size=(d, d)))[0]
    return np.maximum(z @ rotation, -0.5) + 0.3


def known_pair(d, condition, seed=0):
    """S2 = T S1 T for symmetric T > 0: the distance is tr (T - I) S1 (T - I), exactly."""
    g = rng(seed)
    q = np.linalg.qr(g.normal(size=(d, d)))[0]
    s1 = (q * np.geomspace(1, 1 / condition, d)) @ q.T
    r = np.linalg.qr(g.normal(size=(d, d)))[0]
    t = (r * g.uniform(0.5, 1.5, d)) @ r.T
    s1, t = (s1 + s1.T) / 2, (t + t.T) / 2
    s2 = t @ s1 @ t
    difference = t - np.eye(d)
    return s1, (s2 + s2.T) / 2, float(np.trace(difference @ s1 @ difference))


def gaussian_pairs(n, seed, d=16, noise=0.35, per_cluster=1):
    """Pairs whose distance is known: x ~ N(0, S), y = x + noise; clustered rows share their x and noise in part."""
    g = rng(seed)
    scales = np.linspace(0.5, 1.5, d)
    groups = n // per_cluster
    share = 0.0 if per_cluster == 1 else 0.8

    def draw(scale):
        common, own = g.normal(size=(groups, d)).repeat(per_cluster, axis=0), g.normal(size=(n, d))
        return (np.sqrt(share) * common + np.sqrt(1 - share) * own) * scale

    x = draw(scales)
    y = x + draw(noise)
    truth = float(((np.sqrt(scales**2 + noise**2) - scales) ** 2).sum())
    return y, x, np.repeat(np.arange(groups), per_cluster).astype(str), truth


class Skewed:
    """Rows T A z + shift of independent gamma-distributed z: skewed, correlated, falling spectrum, exact moments.

    `change` = 0 is the reference; otherwise T = I + change * a diagonal, and the mean moves with it. With symmetric T
    the distance to the reference is |shift|^2 + tr (T - I) S (T - I) only for commuting T and S, so `moments` are
    handed to a distance instead.
    """

    def __init__(self, d, change=0.0):
        g = rng(7)
        left, right = (np.linalg.qr(g.normal(size=(d, d)))[0] for _ in range(2))
        base = (left * np.arange(1, d + 1) ** -0.5) @ right
        self.mean = change * g.normal(size=d) * np.sqrt(np.diag(base @ base.T))
        self.matrix = (np.eye(d) + change * np.diag(g.normal(size=d))) @ base

    def moments(self):
        return self.mean, self.matrix @ self.matrix.T

    def rows(self, z):
        return z @ self.matrix.T + self.mean

    def draw(self, n, g, per_cluster=1):
        """[n, d]; rows of one cluster share 60 % of the variance of their z."""
        own = skewed_noise(g, n, len(self.mean))
        if per_cluster == 1:
            return self.rows(own)
        common = skewed_noise(g, n // per_cluster, len(self.mean)).repeat(per_cluster, axis=0)
        return self.rows(np.sqrt(0.6) * common + np.sqrt(0.4) * own)


def skewed_noise(g, n, d):
    """[n, d] of mean 0 and variance 1, skewness sqrt 2, excess kurtosis 3."""
    return (g.gamma(2.0, size=(n, d)) - 2.0) / np.sqrt(2.0)
