"""What the tests of survival share: how many trials to make, and the dashboard that counts those that were made.

A trial is counted only where its fault was seen to happen: a test that injects nothing must fail, not pass.
"""

from collections import Counter

import pytest

# kind of trial -> how many `make survival` makes
GOALS = {
    "kills": 1025,
    "crash states": 2180,
    "I/O faults": 720,
    "fuzz": 10000,
    "hostile files": 260,
    "judges": 30,
    "resumes": 25,
    "guards": 12,
}
# and how many `make nightly` makes
NIGHTLY = {
    "kills on file systems": 11000,
    "power cuts": 500,
    "NFS races": 100,
    "Slurm jobs disturbed": 10,
    "fuzzed inputs": 1_000_000,
    "spreadsheet cells": 13,
    "terminal outputs": 7,
    "version rows": 4,
    "soaked units": 200_000,
}
ZEROS = ("lost", "false", "ran", "leaked", "tracebacks")
PROPERTY = "survival"


class Tally:
    """Counts trials for the dashboard. Counted before the test asserts, so that a failure shows there, too."""

    def __init__(self, properties: list):
        self.properties = properties

    def __call__(self, kind: str, passed: int, made: int, **harm: int) -> None:
        """`passed` of `made` trials of a kind of GOALS or NIGHTLY (or another, shown below); `harm`: counts of ZEROS.

        lost: records once reported as saved; false: wrong numbers shown; ran: foreign code; leaked: secrets and
        restricted media; tracebacks: shown to a user for what was no bug.
        """
        assert set(harm) <= set(ZEROS), harm
        assert 0 <= passed <= made
        self.properties.append((PROPERTY, {"kind": kind, "passed": passed, "made": made, **harm}))


@pytest.fixture
def tally(request) -> Tally:
    return Tally(request.node.user_properties)


@pytest.fixture
def size(request):
    """size(full, ci): the number of trials of this run."""
    return lambda full, ci: full if request.config.getoption("--full-size") else ci


@pytest.fixture
def trials(request, size):
    """trials(full, ci): the same for what may be tried any number of times; `--times` multiplies the full number."""
    times = request.config.getoption("--times")
    return lambda full, ci: size(full * times, ci)


def pytest_terminal_summary(terminalreporter):
    """The dashboard, of all tests that counted; red where a trial failed or a zero is none."""
    passed, made, harm = Counter(), Counter(), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for name, counted in report.user_properties:
                if name == PROPERTY:
                    passed[counted["kind"]] += counted["passed"]
                    made[counted["kind"]] += counted["made"]
                    harm.update({z: counted.get(z, 0) for z in ZEROS})
    if not made:
        return
    full = terminalreporter.config.getoption("--full-size")
    boards = {n: g for n, g in {"survival": GOALS, "nightly": NIGHTLY}.items() if not made.keys().isdisjoint(g)}
    goals = {kind: goal for board in boards.values() for kind, goal in board.items()}
    short = {k for k, goal in goals.items() if full and made[k] < goal}
    bad = short or any(harm[z] for z in ZEROS) or any(passed[k] < made[k] for k in made)
    boards[""] = sorted(made.keys() - goals.keys())
    markup = {"red" if bad else "green": True}
    terminalreporter.write_line("")
    for name, kinds in boards.items():
        shown = [f"{k} {passed[k]}/{made[k]}" + (f" of {goals[k]}" if k in short else "") for k in kinds]
        if shown:
            terminalreporter.write_line(f"{name:10}" + " · ".join(shown), **markup)
    terminalreporter.write_line("          " + " · ".join(f"{z} {harm[z]}" for z in ZEROS), **markup)
