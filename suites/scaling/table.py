"""A table of trainings: read from any CSV, JSON or JSONL, columns recognised or named, dropped rows with reasons.

One row is one evaluated checkpoint: parameters N, tokens D, training FLOPs C, loss. Two of N, D and C are enough; the
third follows from C = kappa N D and is marked as derived. Nothing is dropped in silence and nothing is guessed: a
column that could be two things, or a unit that does not fit the others, is an error that names both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from suites.scaling.columns import NUMBER, TableError, brief, listed, number, recognise

KAPPA = 6.0  # FLOPs per parameter and token
GAP = 0.15  # in ln C: a wider one separates budgets
WIDEST = 0.3  # in ln C: what is wider is no budget but a chain of them
FEWEST = 4  # sizes of what is called a budget where computes are scattered
TWIN = 0.01  # in ln N: closer rows of one budget are the same size
FEW_VALUES = 40  # of a column of text: with more it names runs rather than kinds of them
LONGEST_HEADING = 200  # characters; messages name columns
LARGEST = 1e60  # beyond it, and below its inverse, products and squares leave what a float can hold


@dataclass(frozen=True)
class Dropped:
    """A row that is not used, by its line in the source (the first row of data is 1), and why."""

    row: int
    run_id: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """Columns of the rows that are used, float64 [n]; `row` numbers them in the source, from 1.

    `budget` is the compute that a row belongs to: given, or the geometric mean of its cluster of C. `loose` marks rows
    of scattered computes, with too few others of about theirs for an isoFLOP curve. `derived` names the one of params,
    tokens and flops that followed from the others.
    """

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    loose: np.ndarray
    row: np.ndarray
    run_id: tuple[str, ...]
    loss_sd: np.ndarray | None = None
    derived: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)  # what each was read from
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    mixed: str = ""  # what tells apart rows of one size and tokens that have different losses

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def kappa(self) -> float:
        """FLOPs per parameter and token, the median of C / (N D)."""
        return float(np.median(self.flops / (self.params * self.tokens)))

    def take(self, index: np.ndarray) -> Runs:
        """The rows of an index or a mask."""
        index = np.flatnonzero(index) if np.asarray(index).dtype == bool else np.asarray(index)
        names = ("params", "tokens", "flops", "loss", "budget", "loose", "row")
        columns = {k: getattr(self, k)[index] for k in names}
        sd = None if self.loss_sd is None else self.loss_sd[index]
        return replace(self, **columns, run_id=tuple(self.run_id[i] for i in index), loss_sd=sd)

    def budgets(self) -> list[tuple[float, Runs]]:
        """(budget, its rows in order of size), from the smallest; without loose rows."""
        found = []
        for value in np.unique(self.budget[~self.loose]):
            part = self.take((self.budget == value) & ~self.loose)
            found.append((float(value), part.take(np.argsort(part.params, kind="stable"))))
        return found


def ingest(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    *,
    where: Mapping[str, str] | None = None,
    kappa: float = KAPPA,
    gap: float = GAP,
    best_of_lr: bool = True,
    best_of_twins: bool = True,
    final_only: bool = True,
    drop_highest: int = 0,
) -> Runs:
    """The rows that can be used, after the checks of a table of trainings; see the module's head.

    In order: `where` keeps rows whose column holds a text; values that are missing, not numbers, not positive or not
    finite; checkpoints that are not final, where a column says so; checkpoints younger than three warm-ups; all but the
    best of a sweep over learning rates; exact duplicates; rows of one budget and seed whose sizes differ by under 1 %.
    Budgets are the column `budget`, or clusters of ln C (`cluster_budgets`): rounding to a digit would put 1.8e19 and
    2.2e19 into one. `drop_highest` losses are left out on request, as published fits have done.

    Raises TableError: no loss, fewer than two of params, tokens and flops, C and kappa N D that differ by a power of a
    thousand, several conditions in one table, no row left.
    """
    if not rows:
        raise TableError("the table has no rows")
    notes: list[str] = []
    headings = list(dict.fromkeys(h for row in rows for h in row))
    if long := [h for h in headings if len(h) > LONGEST_HEADING]:
        raise TableError(f"the heading {brief(long[0])!r} has {len(long[0]):,} characters; at most {LONGEST_HEADING}")
    known = recognise(headings, columns)
    numbers = list(range(1, len(rows) + 1))
    dropped: list[Dropped] = []

    def run_id(i: int) -> str:
        heading = known.get("run_id", ("", 1.0))[0]
        return str(rows[i].get(heading, "")) if heading else ""

    def drop(i: int, reason: str) -> None:
        dropped.append(Dropped(numbers[i], run_id(i), reason))

    kept = list(range(len(rows)))
    for heading, text in (where or {}).items():
        if heading not in headings:
            raise TableError(f"there is no column {heading!r}; the columns are {listed(headings)}")
        left = [i for i in kept if str(rows[i].get(heading)) == text]
        if not left:
            values = sorted({str(rows[i].get(heading)) for i in kept})
            raise TableError(f"no row has {heading} = {text!r}; it holds {listed(values[:8])}")
        kept = left
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} of {len(rows)} rows left out by the selection")
    if "loss" not in known:
        raise TableError(f"no column is a loss; name it with loss=COLUMN. The columns are {listed(headings)}")
    have = [name for name in ("params", "tokens", "flops") if name in known]
    if len(have) < 2:
        raise TableError(
            f"two of params, tokens and flops are needed; recognised: {', '.join(have) or 'none'} "
            f"among {listed(headings)}"
        )
    numeric = [n for n in ("loss", *have, "budget", "lr", "loss_sd", "warmup_tokens") if n in known]
    values = {name: np.full(len(rows), np.nan) for name in numeric}
    usable = []
    for i in kept:
        bad = ""
        for name in numeric:
            heading, unit = known[name]
            try:
                values[name][i] = number(rows[i].get(heading)) * unit
            except ValueError:
                bad = f"{heading} is {str(rows[i].get(heading))[:30]!r}, no number"
                break
        for name in ("loss", *have):
            v, heading = values[name][i], known[name][0]
            if bad:
                break
            if math.isnan(v):
                bad = f"{heading} is missing"
            elif math.isinf(v) or v <= 0:
                bad = f"{heading} = {v:g} is not positive and finite"
            elif not 1 / LARGEST < v < LARGEST:
                bad = f"{heading} = {v:g} is no count and no loss"
        if bad:
            drop(i, bad)
        else:
            usable.append(i)
    kept = usable
    if final_only and "is_final" in known:
        heading = known["is_final"][0]
        final = [i for i in kept if str(rows[i].get(heading)).strip().lower() in ("true", "1", "yes", "1.0")]
        for i in sorted(set(kept) - set(final)):
            drop(i, "an intermediate checkpoint of a decaying schedule")
        kept = final
    derived = ""
    if len(have) == 2:
        derived = next(n for n in ("params", "tokens", "flops") if n not in have)
        with np.errstate(all="ignore"):  # of rows that were dropped, too
            if derived == "flops":
                values["flops"] = kappa * values["params"] * values["tokens"]
            else:
                other = "tokens" if derived == "params" else "params"
                values[derived] = values["flops"] / (kappa * values[other])
        notes.append(f"{derived} follows from C = {kappa:g} N D")
    elif kept:
        notes += _check_units(values, np.array(kept), kappa, known, [numbers[i] for i in kept])
    if "condition" in known:
        conditions = sorted({str(rows[i].get(known["condition"][0])) for i in kept})
        if len(conditions) > 1:
            raise TableError(
                f"the table holds {len(conditions)} conditions ({listed(conditions[:4])}), each with a law of its "
                f"own; choose one with where {known['condition'][0]}=…"
            )
    mixed = _mixed(rows, kept, values, [h for h in headings if h not in {heading for heading, _ in known.values()}])
    if "warmup_tokens" in known:
        early = [i for i in kept if values["tokens"][i] < 3 * values["warmup_tokens"][i]]
        for i in early:
            drop(i, "fewer tokens than three warm-ups")
        kept = [i for i in kept if i not in set(early)]
    if best_of_lr and "lr" in known:
        kept, more = _best_of_sweep(kept, values, drop)
        notes += more
    kept = _without_duplicates(kept, values, drop)
    for i in sorted(kept, key=lambda i: values["loss"][i], reverse=True)[:drop_highest]:
        drop(i, f"one of the {drop_highest} highest losses, left out as asked")
        kept.remove(i)
    if not kept:
        raise TableError(f"no row can be used: {brief(_summary(dropped), 600)}")
    index = np.array(kept)
    log_c = np.log(values["flops"][index])
    given = "budget" in known and np.isfinite(values["budget"][index]).all()
    loose, scattered = np.zeros(len(index), bool), np.zeros(len(index), bool)
    if given:
        budget = values["budget"][index]
    else:
        budget, scattered = cluster_budgets(log_c, gap)
        for one in np.unique(budget[scattered]):
            loose |= (budget == one) & (len(np.unique(values["params"][index[budget == one]])) < FEWEST)
        if loose.any():
            notes.append(
                f"{loose.sum()} of {len(index)} rows lie between budgets, their computes being scattered: "
                "they are used for the surface, not for isoFLOP curves"
            )
    if best_of_twins:
        seeds = [str(row.get(known["seed"][0], "")) if "seed" in known else "" for row in rows]
        keep = scattered.copy()  # where computes are scattered, two runs of a size are two runs
        keep[~scattered] = _without_twins(index[~scattered], budget[~scattered], values, seeds, drop)
        index, budget, loose = index[keep], budget[keep], loose[keep]
    sd = values["loss_sd"][index] if "loss_sd" in known else None
    return Runs(
        params=values["params"][index],
        tokens=values["tokens"][index],
        flops=values["flops"][index],
        loss=values["loss"][index],
        budget=budget,
        loose=loose,
        row=np.array([numbers[i] for i in index]),
        run_id=tuple(run_id(i) or str(numbers[i]) for i in index),
        loss_sd=sd if sd is not None and np.isfinite(sd).all() and (sd > 0).all() else None,
        derived=derived,
        columns={name: heading for name, (heading, _) in known.items()},
        dropped=tuple(sorted(dropped, key=lambda d: d.row)),
        notes=tuple(notes),
        mixed=mixed,
    )


def _mixed(
    rows: Sequence[Mapping[str, Any]], kept: list[int], values: Mapping[str, np.ndarray], headings: list[str]
) -> str:
    """Is this several tables in one? Rows of the same size and tokens whose losses differ by more than 2 %, and the
    columns of text that tell them apart."""
    cells: dict[tuple[int, int], list[int]] = {}
    for i in kept:
        cells.setdefault(tuple(round(100 * math.log(values[n][i])) for n in ("params", "tokens")), []).append(i)
    apart = [c for c in cells.values() if max(values["loss"][c]) > 1.02 * min(values["loss"][c])]
    telling = []
    for heading in headings:
        said = {str(rows[i].get(heading)) for i in kept}
        if not 2 <= len(said) <= FEW_VALUES or all(re.fullmatch(NUMBER, text) or not text for text in said):
            continue
        if sum(len({str(rows[i].get(heading)) for i in c}) > 1 for c in apart) > len(apart) / 4:
            telling.append(heading)
    if not telling:
        return ""
    number = sum(len(c) for c in apart)
    example = f"--where {telling[0]}={str(rows[apart[0][0]].get(telling[0]))[:40]}"
    return (
        f"{number} rows share their size and tokens with others of another loss, and differ in "
        f"{', '.join(repr(h) for h in telling[:4])}: several studies in one table? Choose one, as in {example}"
    )


def cluster_budgets(log_flops: np.ndarray, gap: float = GAP) -> tuple[np.ndarray, np.ndarray]:
    """For each ln C the geometric mean of its cluster, and whether it lies where computes are scattered.

    Neighbours further apart than `gap` are of different clusters. Where runs were also made between the budgets, such
    clusters are chains over decades: one that is wider than WIDEST is taken apart with half the gap, again if need be.
    """
    order = np.argsort(log_flops, kind="stable")
    label = np.zeros(len(order), int)
    label[order] = np.concatenate([[0], np.cumsum(np.diff(log_flops[order]) > gap)])
    means = np.exp(np.bincount(label, log_flops) / np.bincount(label))[label]
    scattered = np.zeros(len(order), bool)
    for one in range(label.max() + 1):
        rows = np.flatnonzero(label == one)
        if np.ptp(log_flops[rows]) > WIDEST:
            means[rows], _ = cluster_budgets(log_flops[rows], gap / 2)
            scattered[rows] = True
    return means, scattered


def _check_units(
    values: Mapping[str, np.ndarray], index: np.ndarray, kappa: float, known: Mapping[str, Any], rows: list[int]
) -> list[str]:
    """Notes on C over N D; raises TableError where a unit must be wrong."""
    ratio = values["flops"][index] / (values["params"][index] * values["tokens"][index])
    middle = float(np.median(ratio))
    power = round(math.log10(middle / kappa) / 3)
    if power and abs(math.log10(middle / kappa) - 3 * power) < 1.0:
        names = ", ".join(repr(known[n][0]) for n in ("params", "tokens", "flops"))
        raise TableError(
            f"C / (N D) is {middle:.2g} where about {kappa:g} is expected: "
            f"a unit among {names} is off by 1e{3 * power:+d}"
        )
    odd = np.flatnonzero(np.abs(np.log(ratio / middle)) > math.log(30))
    if len(odd):
        raise TableError(
            f"C / (N D) is {middle:.3g} in most rows and {ratio[odd[0]]:.3g} in row {rows[odd[0]]}"
            + (f" ({len(odd)} such rows)" if len(odd) > 1 else "")
            + ": a unit or a column is wrong there"
        )
    spread = float(ratio.max() / ratio.min())
    if spread > 1.02 or not 0.98 < middle / kappa < 1.02:
        return [f"C / (N D) lies between {ratio.min():.3g} and {ratio.max():.3g}: FLOPs are counted, not {kappa:g} N D"]
    return []


def _best_of_sweep(kept: list[int], values: Mapping[str, np.ndarray], drop: Any) -> tuple[list[int], list[str]]:
    """Of rows that differ in their learning rate alone, the one with the least loss; and how many sweeps end there."""
    cells: dict[tuple[float, float], list[int]] = {}
    for i in kept:
        cells.setdefault((values["params"][i], values["tokens"][i]), []).append(i)
    found, edges, sweeps = [], 0, 0
    for cell in cells.values():
        rates = sorted({values["lr"][i] for i in cell})
        if len(rates) < 2:
            found += cell
            continue
        sweeps += 1
        best = min(cell, key=lambda i: values["loss"][i])
        edges += values["lr"][best] in (rates[0], rates[-1])
        found.append(best)
        for i in cell:
            if i != best:
                drop(i, "a worse learning rate of the same size and tokens")
    notes = [
        f"{sweeps} sweeps over learning rates reduced to their best; {edges} of these lie at an end of their sweep"
    ]
    return sorted(found), notes if sweeps else []


def _without_duplicates(kept: list[int], values: Mapping[str, np.ndarray], drop: Any) -> list[int]:
    seen: dict[tuple[float, ...], int] = {}
    found = []
    for i in kept:
        key = tuple(float(values[n][i]) for n in ("params", "tokens", "flops", "loss"))
        if key in seen:
            drop(i, f"the same as row {seen[key] + 1}")
        else:
            seen[key] = i
            found.append(i)
    return found


def _without_twins(
    index: np.ndarray, budget: np.ndarray, values: Mapping[str, np.ndarray], seeds: Sequence[str], drop: Any
) -> np.ndarray:
    """Of rows of one budget, size and seed the one whose C is nearest the budget (the best loss, where equally near).

    A size that was trained with several seeds is a replicate: choosing the best of them would bend the curve.
    """
    keep = np.ones(len(index), bool)
    seed = np.array(seeds)[index]
    for value, one in sorted(set(zip(budget.tolist(), seed.tolist(), strict=True))):
        rows = np.flatnonzero((budget == value) & (seed == one))
        rows = rows[np.argsort(values["params"][index[rows]], kind="stable")]
        group = [rows[0]]
        for k in [*rows[1:], None]:
            last = index[group[-1]]
            if k is not None and math.log(values["params"][index[k]] / values["params"][last]) <= TWIN:
                group.append(k)
                continue
            if len(group) > 1:
                best = min(
                    group,
                    key=lambda g: (
                        round(abs(math.log(values["flops"][index[g]] / value)), 3),
                        values["loss"][index[g]],
                    ),
                )
                for g in group:
                    if g != best:
                        keep[g] = False
                        drop(int(index[g]), f"the same size and budget as row {index[best] + 1}, which is kept")
            if k is not None:
                group = [k]
    return keep


def _summary(dropped: Sequence[Dropped]) -> str:
    """The reasons, each with how many rows it dropped and the first of them."""
    reasons: dict[str, list[int]] = {}
    for one in dropped:
        reasons.setdefault(one.reason, []).append(one.row)
    return "; ".join(
        f"{reason} (row {rows[0]}" + (f" and {len(rows) - 1} more)" if len(rows) > 1 else ")")
        for reason, rows in reasons.items()
    )


def dropped_lines(runs: Runs) -> list[str]:
    """One line for each reason, with its rows; the first twelve are numbered."""
    reasons: dict[str, list[int]] = {}
    for one in runs.dropped:
        reasons.setdefault(one.reason, []).append(one.row)
    lines = []
    for reason, rows in reasons.items():
        named = ", ".join(map(str, rows[:12])) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
        lines.append(f"row{'s' if len(rows) > 1 else ''} {named}: {reason}")
    return lines
