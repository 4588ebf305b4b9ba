"""Grids of transformers against their FLOPs, sequential planning from a wrong prior, the D-optimal next point."""

import math

import numpy as np
import pytest

from suites.scaling import flops, planner
from suites.scaling.fit import Surface, fit_surface

BUDGETS = (1e17, 3e17, 6e17, 1e18, 3e18, 6e18)  # of the published study of diffusion transformers
SIGMA = 0.003


def diffusion_like():
    """a = 0.5677, N*(1.5e21) = 9.58e8, L* = 0.6325 there (arXiv 2410.08184), on a floor of 0.45."""
    alpha, n, d = 0.25, 9.58e8, 1.5e21 / 6 / 9.58e8
    beta = alpha * 0.5677 / 0.4323
    of_size = 0.1825 * beta / (alpha + beta)
    return Surface(0.45, of_size * n**alpha, (0.1825 - of_size) * d**beta, alpha, beta)


TRUTH = diffusion_like()


def test_the_truth_of_these_tests():
    n, _, loss = TRUTH.optimum(1.5e21)
    assert (TRUTH.a, n, loss) == pytest.approx((0.5677, 9.58e8, 0.6325))


# -- a grid


@pytest.mark.parametrize(
    "kind, text", [("adaln_zero", 0), ("in_context", 120), ("cross_attention", 77), ("mm_dit", 77)]
)
def test_a_grid_meets_its_budgets(kind, text):
    grid = planner.plan(TRUTH, BUDGETS, kind=kind, text=text, patch=2)
    assert {t.budget for t in grid} == set(BUDGETS)
    for t in grid:
        assert (t.width, t.heads) == (64 * t.layers, t.layers)
        counted = flops.dit(kind, 256, text, t.width, t.layers, patch=2).train * t.batch * t.steps
        assert t.flops == counted and counted == pytest.approx(t.budget, rel=0.01)
        assert t.tokens == 256 * t.batch * t.steps and t.steps >= 100
        assert t.params == flops.params(kind, t.width, t.layers)["backbone"]
    assert len({(t.budget, t.layers) for t in grid}) == len(grid)  # no row twice
    for budget in BUDGETS[2:]:
        sizes = np.array([t.params for t in grid if t.budget == budget])
        best = float(TRUTH.optimum(budget)[0])
        assert sizes.min() < best / 2.5 and sizes.max() > best * 2.5 and len(sizes) >= 4


def test_depths_are_the_nearest():
    """12 x 64^2 L^3 weights: adaLN-zero at 2, 15 and 27 layers, and halfway (in logarithms) between 4 and 5."""
    for layers in (1, 2, 15, 27):
        assert planner.depth_of(49152 * layers**3) == layers
    middle = 49152 * (4 * 5) ** 1.5
    assert (planner.depth_of(middle * 0.99), planner.depth_of(middle * 1.01)) == (4, 5)
    assert planner.depth_of(10.0) == 1


def test_small_budgets_train_in_small_batches_or_not_at_all():
    grid = planner.plan(lambda c: 5e6, [1e13], sizes=3)
    assert all(t.batch < 256 and t.steps >= 100 for t in grid)
    with pytest.raises(ValueError, match="pay for no 100 steps of any size"):
        planner.plan(lambda c: 1e9, [1e12])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"reach": 1.0}, "reach = 1 must be more than 1"),
        ({"sizes": 0}, "sizes = 0"),
        ({"budgets": [-1e18]}, "a budget of -1e"),
        ({"kind": "unet"}, "block 'unet' is not one of"),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        planner.plan(**({"law": TRUTH, "budgets": [1e18]} | arguments))


# -- one budget after another


def campaigns(seeds):
    """From priors three times too high and too low, in turns: (|error| of ln N* at 10 x, FLOPs over the oracle's)."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        wrong = 3.0 if seed % 2 else 1 / 3
        campaign = planner.sequential(
            lambda c, wrong=wrong: wrong * float(TRUTH.optimum(c)[0]),
            BUDGETS,
            lambda n, d, rng=rng: TRUTH.loss(n, d) * np.exp(SIGMA * rng.standard_normal(len(n))),
        )
        at = 10 * BUDGETS[-1]
        error = abs(math.log(campaign.fit.surface.optimum(at)[0] / TRUTH.optimum(at)[0]))
        found.append((error, campaign.flops / (7 * sum(BUDGETS)), campaign))
    return found


def reached(found):
    return np.mean([error < 0.1 and cost <= 1.3 for error, cost, _ in found])


def test_a_wrong_prior_is_overcome():
    """6 campaigns: at least 5 within 0.1 at no more than 1.3 times the oracle's FLOPs."""
    found = campaigns(6)
    assert reached(found) >= 5 / 6
    for _, _, campaign in found:  # from the third budget on, centres lie near the optimum, whatever the prior said
        for c, centre in list(zip(BUDGETS, campaign.centres, strict=True))[2:]:
            assert abs(math.log(centre / TRUTH.optimum(c)[0])) < 0.5
    assert max(len(campaign.params) for _, _, campaign in found) > 42  # a first budget was extended


@pytest.mark.full
def test_a_wrong_prior_is_overcome_at_full_size():
    assert reached(campaigns(200)) >= 0.9


def test_extensions_are_two_sizes_on_the_short_side():
    sizes = planner.sizes_around(1e8)
    assert np.ptp(np.log(sizes)) == pytest.approx(2 * math.log(4)) and not len(planner.extension(sizes, 1e8))
    right, left = planner.extension(sizes, 3.5e8), planner.extension(sizes, 1e6)
    step = sizes[1] / sizes[0]
    assert right == pytest.approx([4e8 * step, 4e8 * step**2])
    assert left == pytest.approx([0.25e8 / step, 0.25e8 / step**2])
    with pytest.raises(ValueError, match="1 budget"):
        planner.sequential(TRUTH, [1e18], TRUTH.loss)


# -- the next point


def fitted(seed=0):
    rng = np.random.default_rng(seed)
    n = np.concatenate([planner.sizes_around(float(TRUTH.optimum(c)[0])) for c in BUDGETS])
    d = np.repeat(BUDGETS, 7) / 6 / n
    loss = TRUTH.loss(n, d) * np.exp(SIGMA * rng.standard_normal(len(n)))
    return n, d, loss, fit_surface(n, d, loss, objective="ls_log", profile=False)


def test_the_gradient_of_the_optimum_is_that_of_finite_differences():
    *_, fit = fitted()
    from suites.scaling.fit import unpack

    exact = planner.optimum_gradient(fit, 1.5e21)
    for k in range(5):
        step = 1e-5 * np.eye(5)[k]
        ends = [np.log(unpack(fit.theta + s * step, fit.centre).optimum(1.5e21)[0]) for s in (1, -1)]
        assert exact[k] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_the_next_point_is_the_best_by_brute_force():
    """Every candidate's variance by inverting the information with its row added: equal to 1e-8."""
    from suites.scaling import solver
    from suites.scaling.fit import prepare

    n, d, _, fit = fitted()
    target = 6e19
    candidates = [
        (float(x), c) for c in (1e18, 6e18, 2e19) for x in planner.sizes_around(float(TRUTH.optimum(c)[0]), 16)
    ]
    found = planner.next_point(fit, n, d, target, candidates)
    g = planner.optimum_gradient(fit, target)
    gains = []
    for size, c in [(0.0, 0.0), *candidates]:
        rows = (np.append(n, size), np.append(d, c / 6 / size)) if c else (n, d)
        data, centre = prepare(*rows, np.ones(len(rows[0])))
        moved = solver.Data(data.x + centre[0] - fit.centre[0], data.z + centre[1] - fit.centre[1], data.y)
        j = solver.jacobian(fit.theta[None], moved, solver.Loss())[0]
        gains.append((fit.sigma**2 * g @ np.linalg.inv(j.T @ j) @ g, c))
    before = gains[0][0]
    best = max(range(len(candidates)), key=lambda k: (before - gains[k + 1][0]) / gains[k + 1][1])
    assert (found.params, found.flops) == candidates[best]
    assert (found.variance, found.after) == pytest.approx((before, gains[best + 1][0]), rel=1e-8)
    assert 0 < found.after < found.variance
    with pytest.raises(ValueError, match="no candidate"):
        planner.next_point(fit, n, d, target, [])
