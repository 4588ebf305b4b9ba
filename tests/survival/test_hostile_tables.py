"""Tables of trainings for `bench fit`: estimates are finite or null with a reason, tables that are none are refused in
words, and no clean exponent comes out of curves that have none."""

import argparse
import csv
import io
import json
import math
import random
import warnings

import numpy as np
import pytest
from corpus import byte_mutant
from toys import command

from bench import registry
from bench.types import Error
from suites.scaling.analysis import resample_profiles
from suites.scaling.columns import TableError, read_rows
from suites.scaling.fit import Surface
from suites.scaling.isoflop import profiles
from suites.scaling.table import ingest

SEED = 7
TRUTH = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
HEAD = ("N", "D", "C", "loss")


def trainings(budgets=3, sizes=5, sigma=0.003, loss=lambda x: x, seed=0):
    """Rows of isoFLOP curves of a known law."""
    rng = np.random.default_rng(seed)
    for c in np.geomspace(6e18, 6e20, budgets):
        for w in np.linspace(-1.4, 1.4, sizes):
            n = float(TRUTH.optimum(c)[0]) * math.exp(w)
            d = c / 6 / n
            yield [n, d, c, loss(float(TRUTH.loss(n, d)) * math.exp(sigma * rng.standard_normal()))]


def table(rows, head=HEAD, delimiter=","):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([head, *rows])
    return out.getvalue().encode()


def changed(change, rows=()):
    """A good table with one thing changed in a row: {row: {column: cell}}."""
    rows = [list(row) for row in (rows or trainings())]
    for i, cells in change.items():
        for k, cell in cells.items():
            rows[i][k] = cell
    return table(rows)


GOOD = list(trainings())
AS_JSON = [dict(zip(HEAD, row, strict=True)) for row in GOOD]
# name -> (file name, bytes, what must be said: in the refusal, or in a warning or note of the finding)
BY_HAND = {
    "empty": ("t.csv", b"", "is empty"),
    "a quote alone": ("t.csv", b'"', "is empty"),
    "a heading of a thousand characters": ("t.csv", table(GOOD, (*HEAD[:3], "x" * 1000)), "has 1,000 characters"),
    "a thousand headings": ("t.csv", table([range(1000)] * 2, [f"column-{i}" for i in range(1000)]), "is a loss"),
    "a thousand losses that are none": (
        "t.csv",
        table([[*r[:3], -1 - i / 7] for i, r in enumerate(GOOD * 70)]),
        "no row can be used",
    ),
    "a heading alone": ("t.csv", table([]), "no row"),
    "a byte-order mark": ("t.csv", b"\xef\xbb\xbf" + table(GOOD), "params read from 'N'"),
    "constant loss": ("t.csv", table(trainings(loss=lambda _: 3.0)), "no law can be drawn"),
    "upside-down curves": ("t.csv", table(trainings(loss=lambda x: 7 - x)), "opens downwards"),
    "one budget": ("t.csv", table(trainings(budgets=1, sizes=8)), "one budget alone"),
    "losses that are none": ("t.csv", changed({i: {3: v} for i, v in enumerate(("nan", "inf", -1, 0))}), "not used"),
    "formulas": ("t.csv", changed({0: {0: "=1+1"}, 1: {3: "=cmd|'/C calc'!A0"}}), "no number"),
    "decimal commas": ("t.csv", table([[*r[:3], f"{r[3]:f}".replace(".", ",")] for r in GOOD], HEAD, ";"), "no number"),
    "a heading twice": ("t.csv", table(GOOD, ("N", "N", "C", "loss")), "stands twice"),
    "two losses": ("t.csv", table([[*r, r[3]] for r in GOOD], ("N", "D", "C", "loss", "Loss")), "could both be loss"),
    "tokens in billions, unsaid": ("t.csv", table([[r[0], r[1] / 1e9, *r[2:]] for r in GOOD]), "off by"),
    "one row in thousands": ("t.csv", changed({3: {1: GOOD[3][1] / 1e3}}), "in row 4"),
    "a ragged row": ("t.csv", table([*GOOD, [1, 2]]), "cells under"),
    "numbers beyond floats": ("t.csv", changed({0: {0: "1e400"}, 1: {1: "5e-324"}, 2: {2: 1e300}}), "not used"),
    "no text": ("t.csv", table(GOOD) + b"\xff\x00", "no UTF-8"),
    "a cell of a megabyte": ("t.csv", changed({0: {0: "1" * 1_000_000}}), "larger than"),
    "the same row again and again": ("t.csv", table([GOOD[0]] * 30), "a law needs more"),
    "JSON nested to the ground": ("t.json", b"[" * 100_000, "is no JSON"),
    "a JSON number of 400 digits": ("t.json", json.dumps([{**r, "N": 10**400} for r in AS_JSON]).encode(), "positive"),
}  # fmt: skip
# which a naive fit answers with a clean exponent
WRONG = dict.fromkeys(("constant loss", "upside-down curves"), ("isoFLOP: a", "surface: a"))
WRONG["one budget"] = ("isoFLOP: a",)


@pytest.fixture(scope="module")
def fits():
    law = registry.find("fits", "scaling")()
    parser = argparse.ArgumentParser()
    law.options(parser)
    args = parser.parse_args(["--resamples", "10"])
    return lambda path: law(path, path.name, args)


def numbers(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if isinstance(value, float) else [n for v in inner for n in numbers(v)]


def check_finding(finding):
    """Every number finite or null; where estimates are missing, a warning says why; strict JSON."""
    json.dumps(finding.record, allow_nan=False)
    assert all(math.isfinite(n) for n in numbers(list(finding.estimates)))
    for one in finding.estimates:
        low, high = one["low"], one["high"]
        assert (low is None) == (high is None) and (low is None or low <= high), one
    missing = [one["quantity"] for one in finding.estimates if one["value"] is None]
    assert all(any(name in warning for warning in finding.warnings) for name in missing)
    named = {e["quantity"] for e in finding.estimates}
    assert {"isoFLOP: a", "surface: a"} <= named or finding.warnings


@pytest.mark.parametrize("name", BY_HAND)
def test_tables_made_by_hand_are_refused_or_fitted_with_what_is_wrong_in_words(tally, tmp_path, fits, name):
    file, data, word = BY_HAND[name]
    path = tmp_path / file
    path.write_bytes(data)
    finding, said = None, ""
    try:
        finding = fits(path)
        said = "\n".join([*finding.warnings, *finding.notes])
    except Error as e:
        said = str(e)
        assert file in said and len(said) < 1000, said[:1000]
    false = 0
    if finding is not None:
        check_finding(finding)
        false = (
            sum(e["quantity"] in WRONG[name] and e["value"] is not None for e in finding.estimates)
            if name in WRONG
            else 0
        )
    tally("tables", int(word in said and not false), 1, false=false)
    assert word in said, said
    assert not false, finding.estimates


def test_a_refused_table_is_said_by_the_command_and_leaves_nothing(tmp_path):
    for name in ("empty", "no text", "JSON nested to the ground", "a cell of a megabyte"):
        file, data, word = BY_HAND[name]
        (tmp_path / file).write_bytes(data)
        done = command(tmp_path, "fit", file, "--out", "out")
        assert done.code == 1 and word in done.err and "Traceback" not in done.err and len(done.err.splitlines()) <= 12
        assert not (tmp_path / "out").exists()


EXTREMES = [
    "",
    "nan",
    "-1",
    "0",
    "1e400",
    "5e-324",
    "1e300",
    "x",
    "=1",
    "1,5",
    "1.2.3",
    "٣",
    "1e18M",
    "\x00",
    "-",
    "None",
]


def random_table(rng):
    """A table of anything: known laws with noise, or no law; few rows or many; some cells or bytes damaged."""
    kind = rng.randrange(4)
    if kind == 0:
        rows = list(
            trainings(rng.randint(1, 5), rng.randint(1, 7), rng.choice([0, 0.003, 0.3]), seed=rng.randrange(99))
        )
    elif kind == 1:
        rows = [[10 ** rng.uniform(5, 12) for _ in range(3)] + [rng.uniform(0.1, 9)] for _ in range(rng.randint(1, 30))]
    elif kind == 2:
        scale = rng.choice([1e-50, 1, 1e50])
        rows = [
            [scale * rng.random(), rng.random() / scale, rng.random(), rng.random()] for _ in range(rng.randint(1, 12))
        ]
    else:
        few = [rng.choice([1.0, 2.0, 1e9, 1e18]) for _ in range(3)]
        rows = [[rng.choice(few) for _ in range(4)] for _ in range(rng.randint(1, 20))]
    for _ in range(rng.choice([0, 0, 1, 5])):
        rng.choice(rows)[rng.randrange(4)] = rng.choice(EXTREMES)
    head = list(HEAD)
    if rng.random() < 0.2:
        head[rng.randrange(4)] = rng.choice(
            ["lr", "budget", "is_final", "condition", "run", "x", "N", "tokens_B", "warmup_tokens"]
        )
    data = table(rows, head, rng.choice(",,,;\t"))
    return byte_mutant(data, rng) if rng.random() < 0.3 else data


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of fits to what has no law; the numbers are what is checked
def test_random_tables_give_finite_numbers_or_reasons(tally, size, trials, tmp_path, fits):
    """All through reading, cleaning and the isoFLOP profiles; some through every fit."""
    print("seed", SEED)
    rng, path = random.Random(SEED), tmp_path / "t.csv"
    count, whole = trials(2000, 300), size(40, 75)
    bad, used, fitted = [], 0, 0
    for i in range(count):
        data = random_table(rng)
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                runs = ingest(read_rows(path))
                found = profiles(runs, kappa=None)
                exponents = resample_profiles(runs, count=20)
                used += 1
                columns = (runs.params, runs.tokens, runs.flops, runs.loss, runs.budget)
                assert all(np.isfinite(c).all() and (c > 0).all() for c in columns)
                assert not np.isinf(exponents).any()
                for v in found.vertices:
                    assert v.problem or (math.isfinite(v.params) and math.isfinite(v.loss)), v
                assert found.params is not None or found.warnings
            if i % whole == 0:
                check_finding(fits(path))
                fitted += 1
        except (TableError, Error) as e:
            if not (str(e) and len(str(e)) < 1000):
                bad.append((i, str(e)[:200], data[:300]))
        except Exception as e:
            bad.append((i, f"{type(e).__name__}: {e}"[:300], data[:300]))
    tally("tables", count - len(bad), count, tracebacks=len(bad))
    assert not bad, (len(bad), bad[:4])
    assert used > count / 4 and fitted > count / whole / 6
