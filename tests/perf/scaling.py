"""Scaling laws against SciPy: resampled surface fits, one fit, `bench fit`: python tests/perf/scaling.py [--quick]."""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import QUICK, Race, Row, added_memory, write

from suites.scaling import solver
from suites.scaling.fit import Surface, fit_surface, prepare

ROWS, RESAMPLES, SUBSET = 240, 4000, 100
DELTA = 1e-3  # Huber's threshold, summed over ln L, as in Hoffmann et al.
ABOUT = (
    "A surface E + A N^-alpha + B D^-beta through 240 rows, sigma = 0.7 %, Huber on ln L with threshold 0.001. Both "
    "solvers start every resample (pairs) at the optimum of the full table; SciPy's BFGS has the analytic gradient. It "
    "runs on the first resamples only, whose time is scaled to all; on these the objectives are compared."
)


def table(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Twelve budgets of twenty sizes each, up to eight times N* on either side."""
    truth = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
    c = np.repeat(np.geomspace(1e18, 3e21, 12), ROWS // 12)
    n = truth.optimum(c)[0] * np.exp(np.tile(np.linspace(-np.log(8), np.log(8), ROWS // 12), 12))
    d = c / 6 / n
    return n, d, truth.loss(n, d) * np.exp(0.007 * np.random.default_rng(seed).standard_normal(ROWS))


def problem(count: int):
    """(data, start, multiplicities [count, 240], criterion)."""
    n, d, loss = table()
    data, _ = prepare(n, d, loss)
    start = fit_surface(n, d, loss, objective="huber_log", profile=False).theta
    drawn = np.random.default_rng(1).multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=count).astype(float)
    return data, start, drawn, solver.Loss(DELTA)


def build(count: int):
    data, start, drawn, criterion = problem(count)
    return {"": lambda: solver.polish(np.repeat(start[None], count, 0), data, drawn, criterion)}


WHAT = f"Huber resamples of {ROWS} rows"
RACES = (Race(WHAT, build, RESAMPLES, 20, memory=True),)


def scipy_objectives(count: int) -> np.ndarray:
    """The objectives [count] that BFGS with the analytic gradient ends at."""
    from scipy.optimize import minimize

    data, start, drawn, _ = problem(count)
    x, z, target = data.x, data.z, np.log(data.y)
    found = []
    for m in drawn:

        def both(theta, m=m):  # nothing but the arithmetic of the objective and of its gradient
            size, length, floor = np.exp(theta[0] - theta[3] * x), np.exp(theta[1] - theta[4] * z), np.exp(theta[2])
            total = size + length + floor
            r = np.log(total) - target
            psi = np.clip(r, -DELTA, DELTA)
            pull = m * psi / total
            of_size, of_length = pull * size, pull * length
            gradient = [of_size.sum(), of_length.sum(), floor * pull.sum(), -(of_size @ x), -(of_length @ z)]
            return m @ (psi * (r - 0.5 * psi)), np.array(gradient)

        found.append(minimize(both, start, jac=True, method="BFGS", options={"gtol": 1e-8}).fun)
    return np.array(found)


def timed(call) -> tuple[float, object]:
    begin = time.process_time()
    result = call()
    return time.process_time() - begin, result


def resamples(count: int, subset: int) -> list[Row]:
    call = build(count)[""]
    build(20)[""]()
    ours, found = timed(call)
    peer, theirs = timed(lambda: scipy_objectives(subset))
    excess = float((found.objective[:subset] / theirs - 1).max())
    lost = int((~found.converged).sum())
    note = f"BFGS on {subset}, scaled; {lost} of ours unconverged; our objectives at most {excess:.0e} above BFGS's"
    added = added_memory("scaling", WHAT, "", count)
    return [
        Row(f"{count:,} {WHAT}", "SciPy BFGS", ours, peer * count / subset, "CPU s", 8, note, most=8),
        Row(f"{count:,} {WHAT}, memory", "", added, None, "MB", most=250),
    ]


def single() -> Row:
    n, d, loss = table()
    spent, _ = timed(lambda: fit_surface(n, d, loss, profile=False))
    return Row(f"one fit of {ROWS} rows with its start", "", spent, None, "CPU s", most=1)


def command(count: int) -> Row:
    """`bench fit` as a user runs it, in CPU seconds of its process."""
    n, d, loss = table()
    with tempfile.TemporaryDirectory() as place:
        with (Path(place) / "runs.csv").open("w", newline="") as out:
            csv.writer(out).writerows([("params", "tokens", "loss"), *zip(n, d, loss, strict=True)])
        call = [sys.executable, "-m", "bench", "fit", "runs.csv", "--resamples", str(count), "--out", "page"]
        before = os.times()
        subprocess.run(call, cwd=place, check=True, capture_output=True)
        after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    note = f"{count:,} resamples, figures and page"
    return Row(f"bench fit, {ROWS} rows", "", spent, None, "CPU s", most=25, note=note)


def main() -> None:
    from threadpoolctl import threadpool_limits

    os.environ["OMP_NUM_THREADS"] = "1"
    with threadpool_limits(1):
        rows = resamples(40, 4) if QUICK else resamples(RESAMPLES, SUBSET)
        rows += [single(), command(20 if QUICK else 1000)]
    write("scaling", "Scaling laws against SciPy", rows, ABOUT)


if __name__ == "__main__":
    main()
