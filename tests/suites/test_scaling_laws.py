"""Tables, isoFLOP profiles, laws of one variable, resampling and FLOPs, against published and known numbers."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from suites.scaling import analysis, flops, laws, resample
from suites.scaling.columns import TableError, number, read_rows, recognise
from suites.scaling.fit import Surface, fit_surface
from suites.scaling.isoflop import corrected, corrected_vertex, envelope, fieller, line, parabola, profiles
from suites.scaling.table import cluster_budgets, dropped_lines, ingest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "scaling"
TRUTH = Surface(1.69, 406.4, 410.7, 0.34, 0.28)


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path.name} of the shared scaling data")
    return read_rows(path)


def grid(budgets=6, sizes=7, reach=4.0, sigma=0.0, seed=0):
    """Rows of isoFLOP curves of TRUTH, centred on the optimum."""
    rng = np.random.default_rng(seed)
    rows = []
    for c in np.geomspace(6e18, 3e21, budgets):
        for w in np.linspace(-math.log(reach), math.log(reach), sizes):
            n = TRUTH.optimum(c)[0] * math.exp(w)
            d = c / 6 / n
            rows.append({"N": n, "D": d, "C": c, "loss": TRUTH.loss(n, d) * math.exp(sigma * rng.standard_normal())})
    return rows


def columns(runs):
    return runs.params, runs.tokens, runs.loss


# -- tables


def test_a_csv_with_a_byte_order_mark_semicolons_and_units(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("﻿params (M);tokens_B;Final Loss\n100;2;3.5\n200;4;3.1\n\n400;8;2,9\n".encode())
    rows = read_rows(path)
    runs = ingest(rows)
    assert runs.params.tolist() == [1e8, 2e8] and runs.tokens.tolist() == [2e9, 4e9]
    assert runs.derived == "flops" and runs.flops[0] == 6 * 1e8 * 2e9
    assert dropped_lines(runs) == ["row 3: Final Loss is '2,9', no number"]


def test_json_of_rows_of_columns_and_lines_are_the_same(tmp_path):
    rows = grid(2, 4)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({k: [r[k] for r in rows] for k in rows[0]}))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [ingest(read_rows(tmp_path / name)) for name in ("a.json", "b.json", "c.jsonl")]
    for one in found[1:]:
        np.testing.assert_array_equal(one.loss, found[0].loss)


def test_every_dropped_row_has_its_reason():
    rows = grid(2, 5)
    rows[1] = {**rows[1], "loss": ""}
    rows[2] = {**rows[2], "loss": -1}
    rows[3] = {**rows[3], "N": "many"}
    rows.append(dict(rows[0]))
    rows.append({**rows[5], "N": rows[5]["N"] * 1.005, "loss": 9.0, "C": rows[5]["C"] * 1.02})
    runs = ingest(rows)
    assert dropped_lines(runs) == [
        "row 2: loss is missing",
        "row 3: loss = -1 is not positive and finite",
        "row 4: N is 'many', no number",
        "row 11: the same as row 1",
        "row 12: the same size and budget as row 6, which is kept",
    ]
    assert len(runs) == 7 and runs.row.tolist() == [1, 5, 6, 7, 8, 9, 10]


def test_sweeps_over_learning_rates_keep_their_best_and_say_where_it_lay():
    rows = [
        {**r, "lr": lr, "loss": r["loss"] * f} for r in grid(2, 4) for lr, f in ((1e-3, 1.1), (2e-3, 1.0), (4e-3, 1.05))
    ]
    rows[0]["loss"] = 0.5  # an end of the first sweep
    runs = ingest(rows)
    assert len(runs) == 8 and len(runs.dropped) == 16
    assert "8 sweeps over learning rates reduced to their best; 1 of these lie at an end of their sweep" in runs.notes


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{"N": 1, "loss": 2}], "two of params, tokens and flops"),
        ([{"N": 1, "D": 2}], "no column is a loss"),
        ([{"N": 1, "D": 2, "loss": "x"}], "no row can be used"),
        ([{"N": 1e8, "D": 2e9, "C": 1.2e9, "loss": 3}] * 3, "off by 1e-9"),
        ([{"N": 1e8, "D": 2, "C": 1.2e18, "loss": 3}] * 3, r"off by 1e\+9"),
        ([{"N": 1e8, "D": 2e9, "loss": 3, "condition": c} for c in "ab"], "2 conditions"),
        ([{"params": 1, "parameters": 2, "Params": 3, "D": 2, "loss": 3}], "could both be params"),
    ],
)
def test_tables_that_cannot_be_used_say_why(rows, message):
    with pytest.raises(TableError, match=message):
        ingest(rows)


def test_one_row_in_another_unit_is_named():
    rows = grid(2, 5)
    rows[3] = {**rows[3], "D": rows[3]["D"] / 1e3}
    with pytest.raises(TableError, match="in row 4"):
        ingest(rows)


@pytest.mark.parametrize("text, message", [("", "is empty"), ("a,b\n", "no row"), ("a,a\n1,2\n", "'a' stands twice")])
def test_files_that_are_no_table(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableError, match=message):
        read_rows(tmp_path / "t.csv")
    with pytest.raises(TableError, match="No such file"):
        read_rows(tmp_path / "absent.csv")


def test_numbers_and_headings():
    assert [number(t) for t in ("1e9", "125M", "1,000,000", "1.5B", 7)] == [1e9, 125e6, 1e6, 1.5e9, 7.0]
    assert math.isnan(number("")) and math.isnan(number(None))
    with pytest.raises(ValueError):
        number("1,5")
    found = recognise(["throughput/total_gflops", "eval/paloma/macro_loss", "parameter_count"])
    assert found["flops"] == ("throughput/total_gflops", 1e9) and found["loss"][0].endswith("macro_loss")
    assert recognise(["x", "N", "loss"], {"flops": "x"})["flops"] == ("x", 1.0)


def test_budgets_are_clusters_not_rounded_numbers():
    c = np.array([1.79e19, 1.81e19, 2.2e19, 2.19e19])
    assert len(np.unique(cluster_budgets(np.log(c))[0])) == 2


def scattered_rows(between=60, seed=0):
    """Four budgets of eight sizes, digitised within 2 %, and runs at computes in between, down to one gap of chains."""
    rng = np.random.default_rng(seed)
    budgets = [(c * math.exp(rng.normal(0, 0.01)), n) for c in (1e19, 4e19, 1.6e20, 6.4e20) for n in SIZES * c**0.5]
    others = [(c, 0.04 * c**0.5 * math.exp(rng.uniform(-1, 1))) for c in np.geomspace(1.2e19, 5.8e20, between)]
    return [
        {"Model Size": n, "Training FLOP": c, "loss": 1.8 + 480 * n**-0.35 + 2000 * (c / 6 / n) ** -0.37}
        for c, n in budgets + others
    ]


SIZES = 0.04 * np.geomspace(0.25, 4, 8)


def test_runs_between_budgets_chain_nothing_together():
    """As in digitised published tables: isoFLOP curves and other runs in one list, without a column of budgets."""
    rows = scattered_rows()
    runs = ingest(rows)
    assert len(runs) == len(rows), dropped_lines(runs)
    found = [c for c, part in runs.budgets() if len(part) >= 8]
    assert found == pytest.approx([1e19, 4e19, 1.6e20, 6.4e20], rel=0.15)
    assert all(np.ptp(np.log(part.flops)) <= 0.3 for _, part in runs.budgets())
    assert runs.loose.any() and any("lie between budgets" in note for note in runs.notes)
    surface = fit_surface(*columns(runs), profile=False).surface
    assert (surface.E, surface.alpha, surface.beta) == pytest.approx((1.8, 0.35, 0.37), rel=1e-5)


def test_seeds_of_one_size_are_replicates_and_twins_are_not():
    rows = [
        {"params": n, "tokens": 1e18 / 6 / n, "loss": 3 + 0.01 * k, "budget": 1e18, "seed": k}
        for n in (1e7, 2e7, 4e7, 8e7)
        for k in (0, 1, 2)
    ]
    assert len(ingest(rows)) == 12
    without = ingest([{k: v for k, v in row.items() if k != "seed"} for row in rows])
    assert len(without) == 4 and set(without.loss) == {3.0}
    twice = ingest([*rows, rows[0] | {"loss": 3.5}])
    assert len(twice) == 12 and [d.row for d in twice.dropped] == [13]


def test_the_minimum_of_an_interpolated_curve_takes_the_mean_of_replicates():
    rows = [
        {"params": n, "tokens": 1e18 / 6 / n, "loss": y * math.exp(e), "budget": 1e18, "seed": str(e)}
        for n, y in ((1e7, 3.4), (2e7, 3.1), (4e7, 3.0), (8e7, 3.2))
        for e in (-0.02, 0.02)
    ]
    both = profiles(ingest(rows), vertex="akima").vertices[0]
    means = profiles(ingest([r | {"loss": r["loss"] * math.exp(-float(r["seed"]))} for r in rows[::2]]), vertex="akima")
    assert both.params == pytest.approx(means.vertices[0].params) and both.sizes == 4


def test_highest_losses_are_left_out_on_request_and_named():
    runs = ingest(scattered_rows(0), drop_highest=2)
    highest = sorted(range(32), key=lambda i: -scattered_rows(0)[i]["loss"])[:2]
    assert [d.row - 1 for d in runs.dropped] == sorted(highest)
    assert "as asked" in dropped_lines(runs)[0]


def test_several_studies_in_one_table_are_told_apart_by_name():
    rows = [row | {"dataset": name, "loss": row["loss"] * f} for row in grid() for name, f in (("a", 1.0), ("b", 1.2))]
    assert "'dataset'" in ingest(rows).mixed and "--where dataset=a" in ingest(rows).mixed
    assert not ingest(rows, where={"dataset": "b"}).mixed and not ingest(grid()).mixed


def test_what_the_farthest_rows_do_to_a_fit_is_said():
    rows = grid(budgets=3, sigma=0.002)
    rest = fit_surface(*columns(ingest(rows[:3] + rows[4:])), profile=False).surface
    rows[3]["loss"] *= 1.3
    said = [w for w in analysis.analyse(ingest(rows), count=2).warnings if "six sigma" in w]
    assert len(said) == 1 and said[0].startswith("row 4:") and f"Without, E = {rest.E:.4g}, " in said[0]


# -- profiles


def test_profiles_of_public_noiseless_rows():
    """Raw vertices are off by -0.8 % at 1e23; the fixed point takes the error below 0.01 %."""
    runs = ingest(shared("cs336/isoflops_curves.json"))
    found = profiles(runs)
    assert found.params.exponent == pytest.approx(0.51458, rel=1e-4)
    assert found.params(1e23) == pytest.approx(9.114e10, rel=1e-4)
    surface = fit_surface(*columns(runs), profile=False).surface
    assert corrected(runs, found, surface)(1e23) == pytest.approx(9.18925e10, rel=1e-4)


def test_profiles_of_a_public_export_with_counted_flops():
    runs = ingest(shared("marin/isoflop-comma.csv"), best_of_twins=False)
    found = profiles(runs, strict=False)
    assert found.params.points == 7
    assert (found.params.exponent, found.tokens.exponent) == pytest.approx((0.4101, 0.5662), abs=1e-3)
    assert any("add up to 0.97" in w for w in found.warnings)
    assert any("FLOPs are counted" in n for n in runs.notes)


def test_published_exponents_of_interpolated_minima():
    """Five configurations are published as `basic`; Akima minima of our own lie within 0.010."""
    published = {
        tuple(r[k] for k in ("source", "dataset", "hparams", "warmup", "decay", "param_count")): float(r["n_exponent"])
        for r in shared("formll/published_fits_derived.csv")
        if r["method"] == "basic"
    }
    configurations = defaultdict(list)
    for r in shared("formll/isoflop_points_derived.csv"):
        configurations[tuple(r[k] for k in ("source", "dataset", "hparams", "warmup", "decay", "param_count"))].append(
            r
        )
    assert len(configurations) == 14
    compared = 0
    for key, rows in configurations.items():
        found = profiles(ingest(rows, {"params": "n"}), vertex="akima")
        if key in published:
            compared += 1
            assert found.params.exponent == pytest.approx(published[key], abs=0.010)
    assert compared >= 10
    flagged = profiles(ingest(configurations["summary_df", "rw", "base", "long", "kaplan", "kaplan"], {"params": "n"}))
    assert flagged.warnings


def test_published_lines_through_published_pairs():
    """OLS and 1/sd^2 exponents of all configurations to 1e-10."""
    keys = ("source", "dataset", "hparams", "warmup", "decay", "param_count", "val")
    pairs = defaultdict(list)
    for r in shared("formll/optimal_pairs_derived.csv"):
        if r["n_star"]:  # budgets without a minimum are empty
            pairs[tuple(r[k] for k in keys)].append(r)
    compared = 0
    for fit in shared("formll/published_fits_derived.csv"):
        rows = pairs[tuple(fit[k] for k in keys)]
        c, n = (np.array([float(r[k]) for r in rows]) for k in ("flops", "n_star"))
        weights = None if fit["method"] == "basic" else 1 / np.array([float(r["n_star_std_log"]) for r in rows]) ** 2
        assert line(c, n, weights).exponent == pytest.approx(float(fit["n_exponent"]), abs=1e-10)
        compared += 1
    assert compared == 30


@pytest.mark.parametrize(
    "alpha, beta, shifts",
    [
        (0.34, 0.28, (0.33, 1.32, 2.99, 5.37)),
        (0.30, 0.394, (-0.5, -2.0, -4.5, -7.9)),
        (0.465, 0.155, (1.7, 6.9, 16.0, 30.0)),
    ],
)
def test_the_shift_of_a_vertex_and_its_undoing(alpha, beta, shifts):
    """Per cent of N* for grids of 2, 4, 8 and 16 times either side: 15 sizes, to the table's digits."""
    truth = Surface(1.0, 400.0, 400.0, alpha, beta)
    c = 1e21
    best = float(truth.optimum(c)[0])
    for reach, shift in zip((2, 4, 8, 16), shifts, strict=True):
        n = best * np.exp(np.linspace(-math.log(reach), math.log(reach), 15))
        d = c / 6 / n
        vertex = parabola(n, truth.loss(n, d), d, c, strict=False)
        assert 100 * (vertex.params / best - 1) == pytest.approx(shift, rel=0.01, abs=0.06)
        assert corrected_vertex(vertex, n, alpha, beta) == pytest.approx(best, rel=1e-9)


def test_curves_that_are_no_profile_are_named():
    rows = grid(3, 7)
    c = rows[0]["C"]
    for r in rows[:7]:
        r["loss"] = 6.0 - r["loss"]  # upside down
    rows[7:14] = rows[7:10]  # three sizes
    found = profiles(ingest(rows))
    problems = {v.budget: v.problem for v in found.vertices}
    assert problems[min(problems)] == "the curve opens downwards" and min(problems) == pytest.approx(c)
    assert "3 sizes; 4 are needed" in problems.values()
    assert found.params is None and any("no law can be drawn" in w for w in found.warnings)
    edge = [r for r in grid(2, 9, 16.0) if r["N"] > 1.2 * TRUTH.optimum(r["C"])[0]]
    assert all("outside the sampled sizes" in v.problem for v in profiles(ingest(edge)).vertices)


def test_fieller_is_the_delta_method_where_the_denominator_is_sure_and_unbounded_where_it_is_not():
    low, high = fieller(2.0, 1.0, 1e-4, 1e-6, 0.0, 1.96)
    assert (low, high) == pytest.approx((2 - 1.96 * 0.0102, 2 + 1.96 * 0.0102), abs=2e-3)
    assert fieller(2.0, 1.0, 1e-4, 1.0, 0.0, 1.96) == (-math.inf, math.inf)


def test_the_envelope_of_exact_curves():
    """Curves of TRUTH at 15 sizes: the exponent of the envelope is a to 0.02."""
    curves = []
    for n in np.geomspace(1e8, 2e10, 15):
        d = np.geomspace(1e8, 1e13, 400)
        curves.append((n, 6 * n * d, d, TRUTH.loss(n, d)))
    assert envelope(curves).params.exponent == pytest.approx(TRUTH.a, abs=0.02)
    with pytest.raises(ValueError, match="4 are needed"):
        envelope(curves[:4])


# -- laws


@pytest.mark.parametrize(
    "dataset, floor, size, tokens, exponent",
    [
        ("rpj", 1.83665, 166.21, 366.69, 0.27285),
        ("c4_original", 1.50826, None, None, 0.24247),
        ("rw_original", 1.73446, None, None, 0.25439),
    ],
)
def test_published_over_training_fits(dataset, floor, size, tokens, exponent):
    """Five runs: the four smallest models at multiplier 1 and the smallest at 16; 4 digits."""
    rows = [r for r in shared("gadre/runs_derived.csv") if r["dataset"] == dataset and "c4_val" in r["val_data"]]
    models = sorted({float(r["params"]) for r in rows})
    picked = [
        r
        for r in rows
        if (float(r["chinchilla_multiplier"]) == 1 and float(r["params"]) in models[:4])
        or (float(r["chinchilla_multiplier"]) == 16 and float(r["params"]) == models[0])
    ]
    law = laws.over_training(*(np.array([float(r[k]) for r in picked]) for k in ("params", "tokens", "loss")))
    assert pytest.approx(floor, rel=1e-4) == law.E and 2 * law.eta == pytest.approx(exponent, rel=2e-4)
    if size:
        assert (law.fit.surface.A, law.b) == pytest.approx((size, tokens), rel=1e-3)
        errors = []
        for multiplier, params in ((32.0, 1.4e9), (1.0, 6.9e9)):  # D / N = 640 and 20
            r = min(
                (r for r in rows if float(r["chinchilla_multiplier"]) == multiplier),
                key=lambda r: abs(math.log(float(r["params"]) / params)),
            )
            n, d, seen = (float(r[k]) for k in ("params", "tokens", "loss"))
            errors.append(100 * abs(law(6 * n * d, d / n) / seen - 1))
        assert errors == pytest.approx([0.7103, 0.7320], abs=2e-3)


def test_a_broken_law_predicts_what_it_did_not_see():
    rows = shared("bnsl/four_digit_addition_derived.csv")
    x, y = (np.array([float(r[k]) for r in rows]) for k in ("train_set_size", "test_cross_entropy"))
    seen = np.array([r["split"] == "fit" for r in rows])
    law = laws.broken(x[seen], y[seen], 1)
    errors = np.log(law(x) + 1) - np.log(y + 1)
    assert np.sqrt(np.mean(errors[seen] ** 2)) <= 6.0e-4
    assert np.sqrt(np.mean(errors[~seen] ** 2)) <= 0.0109


def test_published_constants_of_repeated_data():
    rows = [
        r for r in shared("datablations/val_losses_derived.csv") if r["dedup"] == "False" and float(r["val_loss"]) < 6
    ]
    n, d, u, y = (np.array([float(r[k]) for r in rows]) for k in ("params", "tokens", "unique_tokens", "val_loss"))
    base = Surface(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596)
    assert len(rows) == 276
    found = laws.repeated_r_squared(laws.Repeated(base, 15.387756, 5.309743, 0.0), n, d, u, y)
    without = laws.repeated_r_squared(laws.Repeated(base, math.inf, math.inf, 0.0), n, d, u, y)
    assert (found, without) == pytest.approx((0.687, 0.081), abs=2e-3)


def test_laws_of_one_variable_recover_what_made_them():
    c = np.geomspace(1e16, 1e22, 20)
    law = laws.saturating(c, 2 + 3e3 * c**-0.2)
    assert (law.floor, law.exponent) == pytest.approx((2, -0.2), rel=1e-6) and not law.edge
    assert laws.power(c, 5 * c**-0.05).exponent == pytest.approx(-0.05, rel=1e-10)
    assert laws.saturating(c, np.full(20, 2.0))(1e30) == pytest.approx(2.0)
    loss = np.linspace(2, 4, 12)
    error = laws.error_from_loss(loss, 0.85 - 2.0 * np.exp(-0.9 * loss))
    assert (error.ceiling, error.k, error.gamma) == pytest.approx((0.85, 2.0, 0.9), rel=1e-4)
    with pytest.raises(ValueError, match="row 2 holds"):
        laws.power([1, 2, -3], [1, 1, 1])


def test_breaks_are_chosen_by_what_they_predict():
    x = np.geomspace(1, 1e6, 25)
    law, errors = laws.choose_breaks(x, 1 + 4 * x**-0.3)
    assert len(law.breaks) <= 1 and errors[0] < 1e-3
    assert law(1e7) == pytest.approx(1 + 4 * 1e7**-0.3, rel=0.02)


def test_published_laws_evaluate_to_their_printed_points():
    """DiT (arXiv 2410.08184): N*(1.5e21) = 9.65e8 from rounded coefficients, loss .6325, FID 25.0."""
    c = 1.5e21
    assert 0.0009 * c**0.5681 == pytest.approx(9.65e8, rel=2e-3)
    assert laws.Power(0.0, 2.3943, -0.0273, 0.0, True)(c) == pytest.approx(0.6325, abs=2e-4)
    assert laws.Power(0.0, 2.2566e6, -0.234, 0.0, True)(c) == pytest.approx(25.0, abs=0.1)


# -- resampling


def table(sigma=0.003, seed=0):
    return ingest(grid(sigma=sigma, seed=seed))


@pytest.mark.parametrize("kind", ["pairs", "residual", "parametric"])
def test_resamples_converge_and_surround_the_estimate(kind):
    runs = table()
    fit = fit_surface(*columns(runs), profile=False)
    found = resample.resample(fit, *columns(runs), kind=kind, count=200)
    low, high = found.interval(lambda s: s.a)
    assert found.failed == 0 and low < fit.surface.a < high and high - low < 0.2
    again = resample.resample(fit, *columns(runs), kind=kind, count=200)
    np.testing.assert_array_equal(found.surfaces, again.surfaces)


def coverage(seeds, count, design=grid, sigma=0.003):
    quantities = {
        "E": lambda s: s.E,
        "alpha": lambda s: s.alpha,
        "a": lambda s: s.a,
        "N*(10x)": lambda s: np.log(s.optimum(3e22)[0]),
        "L*(10x)": lambda s: s.optimum(3e22)[2],
        "L*(250x)": lambda s: s.optimum(7.5e23)[2],
    }
    hits = dict.fromkeys(quantities, 0)
    for seed in range(seeds):
        runs = ingest(design(sigma=sigma, seed=seed))
        fit = fit_surface(*columns(runs), profile=False)
        found = resample.resample(fit, *columns(runs), kind="residual", count=count, seed=seed)
        for name, quantity in quantities.items():
            low, high = found.interval(quantity)
            hits[name] += bool(low[0] <= float(quantity(TRUTH)) <= high[0])
    return {name: hit / seeds for name, hit in hits.items()}


def test_intervals_cover_the_truth():
    """20 data sets: 95 % intervals miss no more than 4 (a binomial with 0.95 misses more with probability 0.3 %)."""
    for name, share in coverage(20, 199).items():
        assert share >= 16 / 20, name


@pytest.mark.full
def test_intervals_cover_the_truth_at_full_size():
    """400 data sets of 999 resamples: coverage in [0.92, 0.98]."""
    for name, share in coverage(400, 999).items():
        assert 0.92 <= share <= 0.98, (name, share)


def test_clusters_are_wider_than_pairs_where_runs_have_many_rows():
    rows = shared("gemstones/wandb_df_for_fitting_cool_end.jsonl")
    runs = ingest(rows, {"params": "params_active_precise"}, best_of_twins=False)
    fit = fit_surface(*columns(runs), profile=False)
    assert resample.choose(fit, runs.run_id, runs.params, runs.tokens)[0] == "cluster"
    width = {}
    for kind in ("pairs", "cluster"):
        low, high = resample.resample(fit, *columns(runs), kind=kind, count=300, run_id=runs.run_id).interval(
            lambda s: s.a
        )
        width[kind] = float(high[0] - low[0])
    assert width["cluster"] > width["pairs"]


def test_wild_resampling_is_refused_with_a_small_threshold():
    runs = table()
    fit = fit_surface(*columns(runs), objective="huber_log", delta=1e-4, profile=False)
    with pytest.raises(ValueError, match="wild resampling is refused"):
        resample.resample(fit, *columns(runs), kind="wild", count=10)
    with pytest.raises(ValueError, match="take the sandwich"):
        resample.delta_t(fit, *columns(runs), lambda s: s.a)


def test_the_delta_method_and_bca_agree_with_the_percentiles_where_all_is_near_normal():
    runs = table()
    fit = fit_surface(*columns(runs), objective="ls_log", profile=False)
    found = resample.resample(fit, *columns(runs), count=600)
    low, high = (float(v[0]) for v in found.interval(lambda s: s.a))
    delta = resample.delta_t(fit, *columns(runs), lambda s: s.a)
    left_out = resample.jackknife(fit, *columns(runs))
    accelerated = resample.bca(
        found.derive(lambda s: s.a)[:, 0], fit.surface.a, left_out[:, 4] / (left_out[:, 3] + left_out[:, 4])
    )
    for other in (delta, accelerated):
        assert other == pytest.approx((low, high), abs=0.25 * (high - low))


def test_bands_contain_their_value_and_predictions_are_wider():
    runs = table()
    fit = fit_surface(*columns(runs), profile=False)
    found = resample.resample(fit, *columns(runs), count=300)
    at = np.geomspace(1e19, 1e24, 6)
    of_loss = resample.bands(fit, found, at)["loss"]
    assert (of_loss.low < of_loss.value).all() and (of_loss.value < of_loss.high).all()
    assert (of_loss.prediction_high - of_loss.prediction_low > of_loss.high - of_loss.low).all()
    wide = resample.bands(fit, found, at, inflate=2.0)["loss"]
    np.testing.assert_allclose(np.log(wide.high / wide.value), 2 * np.log(of_loss.high / of_loss.value), rtol=1e-9)


def test_a_back_test_of_a_true_law_covers_and_of_a_false_one_inflates():
    runs = table(seed=3)
    honest = resample.back_test(*columns(runs), runs.budget, count=200)
    assert honest.covered.mean() > 0.8 and honest.inflate < 3
    bent = runs.loss * np.where(runs.budget > np.median(runs.budget), 1.03, 1.0)
    assert resample.back_test(runs.params, runs.tokens, bent, runs.budget, count=200).inflate > 2 * honest.inflate
    assert resample.back_test(*(c[:21] for c in columns(runs)), runs.budget[:21]) is None


def test_extrapolation_is_said():
    assert resample.extrapolation_warning(1e22, 1e21) == ""
    assert "100 times" in resample.extrapolation_warning(1e23, 1e21)
    assert "no point estimate" in resample.extrapolation_warning(2e24, 1e21)


def test_the_mixture_prefers_the_form_that_made_the_rows():
    runs = table()
    found = resample.mixture(*columns(runs))
    assert found.forms[int(found.weights.argmax())] == "full" and found.weights.sum() == pytest.approx(1)
    mean, spread = found.loss(1e22)
    assert mean == pytest.approx(TRUTH.optimum(1e22)[2], rel=5e-3) and spread >= 0


# -- FLOPs


def test_the_share_of_6nd_that_is_missing():
    """In-context, 377 tokens: true over 6 N D at widths 128 to 2,048 (N = 12 layers d^2)."""
    for d, ratio in ((128, 1.49), (256, 1.245), (512, 1.123), (1024, 1.061), (2048, 1.031)):
        forward, _ = flops.block("in_context", 256, 120, d)
        assert 3 * forward / (6 * 12 * d * d * 377) == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("n, m, d, heads", [(16, 4, 32, 2), (64, 8, 64, 4), (25, 1, 48, 3)])
def test_blocks_are_what_the_counter_sees(n, m, d, heads):
    """Forward FLOPs of self-attention and MLP with modulations, by torch's own counter: equal."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
            self.modulation = nn.Linear(d, 6 * d)

        def forward(self, x, c):
            shift = self.modulation(c)
            q, k, v = self.qkv(x).reshape(1, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            x = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, d))
            return self.down(self.up(x)) + shift[:, None, :d]

    counted = flops.count(Block(), torch.zeros(1, n, d), torch.zeros(1, d))
    assert counted == flops.block("adaln_zero", n, m, d)[0]


def test_unknown_blocks_and_the_rule_of_the_counter():
    with pytest.raises(ValueError, match="block 'unet' is not one of"):
        flops.block("unet", 1, 1, 1)
    whole = flops.dit("in_context", 256, 120, 256, 4)
    assert whole.train == 3 * whole.forward and whole.hardware == (3 + 0.5 * whole.attention_share) * whole.forward
    assert whole.per_token * 256 == whole.train
    assert flops.params("adaln_zero", 64, 2) == {"backbone": 2 * 12 * 64**2, "conditioning": 2 * 6 * 64**2}
