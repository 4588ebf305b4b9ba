"""Conformance of a design that is trained at many sizes: its plans alone, nothing is trained."""

from __future__ import annotations

from typing import Any

from bench.checks.report import Report
from bench.recipe import Recipe

BUDGET = 1e11  # FLOPs
SIZES = (1e4, 2e4, 4e4, 8e4)  # parameters
CELL = {"channels": 4, "side": 8, "vocabulary": 64, "text": 1}
WITHIN = 0.05  # of the budget


def scalable(model: Any, report: Report) -> None:
    """One training for each size, sizes that rise, and budgets that are kept."""
    plans = report.call("trainings", model.trainings, BUDGET, SIZES, CELL, {})
    if plans is None:
        return
    good = len(plans) == len(SIZES) and all(isinstance(p, Recipe) and p.total > 0 for p in plans)
    if not report.judge("trainings", good, "want a Recipe with steps for each size", fine=f"{len(plans)}"):
        return
    facts = [report.call("facts", plan.facts, CELL) for plan in plans]
    if None in facts:
        return
    lacking = [name for name in ("params", "tokens", "flops") if any(not f.get(name, 0) > 0 for f in facts)]
    if not report.judge("facts", not lacking, f"{', '.join(lacking)}: missing or not positive"):
        return
    params = [f["params"] for f in facts]
    report.judge("sizes", params == sorted(set(params)), f"must rise, none twice: {params}", fine=f"{params}")
    off = max(abs(f["flops"] / BUDGET - 1) for f in facts)
    report.judge("budget", off <= WITHIN, f"missed by {100 * off:.1f} %", "warn", fine=f"within {100 * off:.2f} %")
