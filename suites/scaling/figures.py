"""Figures of what was found as data: (name, title, note, rows, draw), where draw(axes) paints with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from suites.scaling.analysis import Analysis
from suites.scaling.published import LAWS
from suites.shared.correlation import Correlations, Scores

COLOURS = ("#2f6db5", "#cf5c36", "#2c8c69", "#9a4f96", "#b5851d", "#5b7386", "#bd3f54", "#6a62b7")
INK, MUTED, LINE = "#1b1f24", "#667080", "#d5dae1"
CURVE = 60  # points of a drawn curve
REACH = {"params": 100.0, "tokens": 100.0, "loss": 1.5}  # a cited law is drawn within this factor of what was fitted


class Drawn(NamedTuple):
    name: str
    title: str
    note: str
    rows: Sequence[Mapping[str, Any]]
    draw: Callable[[Any], None]


def figures(found: Analysis) -> list[Drawn]:
    """Those that have something to show."""
    made = [isoflop(found)]
    made += [along_compute(found, quantity) for quantity in ("params", "tokens", "loss")]
    made += [residuals(found), floor_profile(found), tested(found), exponents(found)]
    return [one for one in made if one is not None and one.rows]


def isoflop(found: Analysis) -> Drawn:
    """Each budget's runs, the fitted surface along it, and the vertex of its parabola with its interval."""
    parts = found.runs.budgets()
    rows: list[dict[str, Any]] = []
    for (budget, part), vertex in zip(parts, found.profiles.vertices, strict=True):
        rows += [
            {"budget": budget, "params": n, "loss": y, "what": "run"}
            for n, y in zip(part.params.tolist(), part.loss.tolist(), strict=True)
        ]
        if not vertex.problem:
            rows.append(
                {
                    "budget": budget,
                    "params": vertex.params,
                    "loss": vertex.loss,
                    "what": "vertex",
                    "low": vertex.low,
                    "high": vertex.high if math.isfinite(vertex.high) else None,
                }
            )

    def draw(axes: Any) -> None:
        for i, ((budget, part), vertex) in enumerate(zip(parts, found.profiles.vertices, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(part.params, part.loss, "o", color=colour, markersize=3.2, alpha=0.75, label=f"{budget:.2g}")
            if found.fit is not None and len(part) > 1:
                n = np.geomspace(part.params.min(), part.params.max(), CURVE)
                ratio = np.median(part.flops / (part.params * part.tokens))
                curve = found.fit.surface.loss(n, budget / (ratio * n))
                axes.plot(n, curve, color=colour, linewidth=1.0, alpha=0.9)
            if not vertex.problem:
                if math.isfinite(vertex.high) and vertex.low > 0:
                    axes.plot([vertex.low, vertex.high], [vertex.loss] * 2, color=INK, linewidth=0.9)
                axes.plot([vertex.params], [vertex.loss], "D", color=INK, markersize=4, fillstyle="none")
        _log(axes.xaxis)
        _log(axes.yaxis, dense=True)
        axes.set_xlabel("parameters N")
        axes.set_ylabel("loss")
        axes.grid(True)
        if len(parts) <= 12:
            axes.legend(title="budget (FLOPs)", frameon=False, fontsize=7, title_fontsize=7, ncols=2)

    note = "Points: runs. Lines: the surface along each budget. Diamonds: vertices of parabolas with 95 % intervals."
    return Drawn("isoflop", "Loss against size for each budget", note, rows, draw)


def along_compute(found: Analysis, quantity: str) -> Drawn | None:
    """N*, D* or L* against compute with its band, the vertices, and published lines of the same quantity."""
    band = found.bands.get(quantity)
    used = [v for v in found.profiles.vertices if not v.problem]
    if band is None and not used:
        return None
    symbol = {"params": "N*", "tokens": "D*", "loss": "L*"}[quantity]
    name = {"params": "Optimal size", "tokens": "Optimal tokens", "loss": "Least loss"}[quantity]
    of_vertex = {"params": lambda v: v.params, "tokens": lambda v: v.tokens, "loss": lambda v: v.loss}[quantity]
    rows: list[dict[str, Any]] = [
        {"flops": v.budget, "value": of_vertex(v), "what": "vertex of a parabola"} for v in used
    ]
    if band is not None:
        for k, c in enumerate(band.flops.tolist()):
            row = {"flops": c, "value": band.value[k], "low": band.low[k], "high": band.high[k], "what": "surface"}
            if band.prediction_low is not None:
                row |= {"prediction_low": band.prediction_low[k], "prediction_high": band.prediction_high[k]}
            rows.append({key: float(v) if isinstance(v, np.floating) else v for key, v in row.items()})
    largest = float(found.runs.flops.max())

    def draw(axes: Any) -> None:
        if band is not None:
            if band.prediction_low is not None:
                axes.fill_between(band.flops, band.prediction_low, band.prediction_high, color=COLOURS[0], alpha=0.10)
            axes.fill_between(band.flops, band.low, band.high, color=COLOURS[0], alpha=0.22, linewidth=0)
            axes.plot(band.flops, band.value, color=COLOURS[0], label="surface, 95 % band")
        if used:
            c, y = [v.budget for v in used], [of_vertex(v) for v in used]
            axes.plot(c, y, "D", color=INK, fillstyle="none", markersize=4, label="vertices")
        c = np.geomspace(*axes.get_xlim(), 50) if axes.get_xlim()[0] > 0 else found.runs.flops
        if band is not None:
            c = band.flops
        levels = band.value if band is not None else np.array([of_vertex(v) for v in used])
        shown = 0
        for law in LAWS:
            if law.quantity != quantity:
                continue
            y = law.coefficient * c**law.exponent
            if y.min() > levels.max() * REACH[quantity] or y.max() < levels.min() / REACH[quantity]:
                continue
            shown += 1
            axes.plot(c, y, "--", color=COLOURS[shown], linewidth=0.9, label=f"{law.name} (cited)")
        if c[-1] > largest * 1.05:
            axes.axvline(largest, color=MUTED, linewidth=0.7, linestyle=":")
        _log(axes.xaxis)
        _log(axes.yaxis, dense=quantity == "loss")
        axes.set_xlabel("compute C (FLOPs)")
        axes.set_ylabel(symbol)
        axes.grid(True)
        axes.legend(frameon=False, fontsize=7)

    note = "Right of the dotted line nothing was measured."
    if quantity == "loss":
        note += " The paler band is for a new run."
    if any(law.quantity == quantity for law in LAWS):
        note += " Dashed: printed elsewhere, for other data and losses; not measured here."
    return Drawn(quantity, f"{name} {symbol} against compute", note, rows, draw)


def residuals(found: Analysis) -> Drawn | None:
    if found.fit is None:
        return None
    r = found.fit.residuals
    rows = [
        {"row": int(row), "flops": float(c), "params": float(n), "tokens": float(d), "residual": float(e)}
        for row, c, n, d, e in zip(
            found.runs.row, found.runs.flops, found.runs.params, found.runs.tokens, r, strict=True
        )
    ]

    def draw(axes: Any) -> None:
        loose = found.runs.loose
        axes.plot(found.runs.params[loose], r[loose], "o", color=MUTED, markersize=2.4)
        for i, (_, part) in enumerate(found.runs.budgets()):
            at = np.isin(found.runs.row, part.row)
            axes.plot(found.runs.params[at], r[at], "o", color=COLOURS[i % len(COLOURS)], markersize=3.2)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        for k in (-1, 1):
            axes.axhline(k * 1.96 * found.fit.sigma, color=MUTED, linewidth=0.7, linestyle=":")
        _log(axes.xaxis)
        axes.set_xlabel("parameters N")
        axes.set_ylabel("ln model - ln loss" if found.fit.objective != "ls_raw" else "model - loss")

    note = "Coloured by budget, as above; grey between budgets. Dotted: 1.96 sigma."
    return Drawn("residuals", "Residuals of the surface", note, rows, draw)


def floor_profile(found: Analysis) -> Drawn | None:
    if found.fit is None or not len(found.fit.profile[0]):
        return None
    floors, values = found.fit.profile
    rows = [{"E": float(e), "objective": float(v)} for e, v in zip(floors, values, strict=True)]

    def draw(axes: Any) -> None:
        axes.plot(floors, values, color=COLOURS[0], marker="o", markersize=2)
        axes.axvline(found.fit.surface.E, color=INK, linewidth=0.8)
        if found.fit.floor_interval:
            axes.axvspan(*found.fit.floor_interval, color=COLOURS[0], alpha=0.15, linewidth=0)
        _log(axes.yaxis)
        axes.set_xlabel("E")
        axes.set_ylabel("least objective with E held")

    note = "How well the rows tell the floor: the line is the fit, the band its 95 % profile interval."
    return Drawn("floor", "Profile of the irreducible loss E", note, rows, draw)


def tested(found: Analysis) -> Drawn | None:
    test = found.back_test
    if test is None:
        return None
    rows = [
        {"largest_fitted": float(a), "predicted": float(b), "log_error": float(e), "covered": float(c)}
        for a, b, e, c in zip(test.largest, test.budget, test.error, test.covered, strict=True)
    ]

    def draw(axes: Any) -> None:
        ratio = test.budget / test.largest
        for good, colour, label in (
            (True, COLOURS[0], "90 % of its runs inside, or more"),
            (False, COLOURS[1], "fewer"),
        ):
            at = (test.covered >= 0.9) == good
            axes.plot(ratio[at], 100 * np.expm1(test.error[at]), "o", color=colour, markersize=4, label=label)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        _log(axes.xaxis, dense=True)
        axes.set_xlabel("predicted budget over the largest fitted")
        axes.set_ylabel("observed over predicted loss - 1 (%)")
        axes.legend(title="95 % prediction interval", frameon=False, fontsize=7, title_fontsize=7)

    note = f"Fits to small budgets predict the larger ones; bands here are widened {test.inflate:.2g} times for it."
    return Drawn("back-test", "Rolling back-test", note, rows, draw)


def exponents(found: Analysis) -> Drawn | None:
    """The exponent of N* by each approach, with its resamples."""
    parts = []
    if found.resamples is not None and len(found.resamples) > 1:
        parts.append(("surface", found.fit.surface.a, found.resamples.derive(lambda s: s.a)[:, 0]))
    known = found.profile_exponents[np.isfinite(found.profile_exponents)]
    if found.profiles.params is not None and len(known) > 20:
        parts.append(("isoFLOP parabolas", found.profiles.params.exponent, known))
    if found.corrected is not None:
        parts.append(("parabolas, corrected", found.corrected.exponent, np.empty(0)))
    if len(parts) < 2:
        return None
    rows = []
    for name, value, drawn in parts:
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if len(drawn) else (None, None)
        rows.append({"approach": name, "a": float(value), "low": low, "high": high})

    def draw(axes: Any) -> None:
        for i, row in enumerate(rows):
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [i, i], color=COLOURS[i], linewidth=2)
            axes.plot([row["a"]], [i], "o", color=COLOURS[i])
        axes.set_yticks(range(len(rows)), [row["approach"] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("exponent a of N* in C")
        axes.grid(True, axis="x")

    return Drawn("exponents", "The exponent by each approach", "95 % intervals of resamples.", rows, draw)


def _log(axis: Any, dense: bool = False) -> None:
    """A logarithmic axis with plain text for labels; `dense` for what spans little more than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    if dense:
        axis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if 1e-2 < v < 1e4 else _power(v)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def agreement(found: Correlations) -> Drawn:
    """Rank agreement of loss and FID at each guidance scale."""
    shown = ("spearman", "kendall", "partial")
    rows = [
        {"guidance": w, "statistic": name, "value": s[name].value, "low": s[name].low, "high": s[name].high}
        for w, s in zip(found.guidance, found.statistics, strict=True)
        for name in shown
    ]

    def draw(axes: Any) -> None:
        for i, name in enumerate(shown):
            own = [r for r in rows if r["statistic"] == name]
            w = np.array([r["guidance"] for r in own]) * 1.02 ** (i - 1)  # side by side
            y, low, high = (np.array([r[k] for r in own], float) for k in ("value", "low", "high"))
            axes.plot(w, y, "o-", color=COLOURS[i], markersize=3.5, linewidth=1, label=name)
            axes.vlines(w, low, high, color=COLOURS[i], linewidth=1)
        axes.axhline(0.0, color=INK, linewidth=0.6)
        axes.set_xscale("log")
        axes.set_xticks(found.guidance, [f"{w:g}" for w in found.guidance])
        axes.minorticks_off()
        axes.set_xlabel("guidance scale")
        axes.set_ylabel("correlation of loss and ln FID")
        axes.legend(frameon=False, fontsize=7)

    note = "1: the lower loss always has the better pictures. Lines up and down: 95 %, runs drawn whole."
    return Drawn("agreement", "Does the loss tell how good pictures are?", note, rows, draw)


def loss_against_value(s: Scores, name: str) -> Drawn:
    """FID against loss, a colour for each guidance scale."""
    rows = [
        {"run": s.names[r], "guidance": float(w), "loss": float(x), "value": float(y)}
        for r, w, x, y in zip(s.run, s.guidance, s.loss, s.value, strict=True)
    ]

    def draw(axes: Any) -> None:
        for i, w in enumerate(np.unique(s.guidance)):
            at = s.guidance == w
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(s.loss[at], s.value[at], "o", color=colour, markersize=3, alpha=0.8, label=f"{w:g}")
        axes.set_yscale("log")
        axes.set_xlabel("loss")
        axes.set_ylabel(name)
        axes.legend(title="guidance", frameon=False, fontsize=7, title_fontsize=7)

    return Drawn("loss-against-value", f"{name} against loss", "One point for each checkpoint and scale.", rows, draw)
