"""Figures of a board: drawn once with matplotlib, written as files, and set into the page in its own colours."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from bench.report.board import Plot
from bench.report.collect import Cell, Collection
from bench.report.rank import Differences

# Sentinels that the page replaces by its own colours, so that one drawing serves light and dark.
INK, MUTED, LINE, PAPER = "#1b1f24", "#667080", "#d5dae1", "#ffffff"
# One hue per family, told apart by lightness too; the page has lighter ones for the dark.
COLOURS = ("#2f6db5", "#cf5c36", "#2c8c69", "#9a4f96", "#b5851d", "#5b7386", "#bd3f54", "#6a62b7")
ROLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(COLOURS, 1)
}
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
WHISKER = 0.45  # opacity
MOST = 40  # models in a forest, and lines in a profile stay readable below MOST_LINES
MOST_LINES = 8
MOST_FAMILIES = 16  # named in a scatter; the rest are grey points


@dataclass(frozen=True)
class Drawing:
    """One figure: `svg` as a file, `inline` for the page, `rows` for the CSV beside it."""

    name: str
    title: str
    note: str
    svg: bytes
    inline: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def csv(self) -> bytes:
        from bench.text import csv_cell

        out = io.StringIO()
        names = list(dict.fromkeys(k for row in self.rows for k in row))
        writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(map(csv_cell, names))
        for row in self.rows:
            writer.writerow([csv_cell(v) if isinstance(v, str) else v for v in (row.get(k) for k in names)])
        return out.getvalue().encode("utf-8", "surrogatepass")


def family(label: str) -> str:
    """A label without the trailing number that orders its models: `jpeg-75` and `jpeg q50` -> `jpeg`."""
    shorter = re.sub(r"[\s_:=@·-]*(?:q|quality|bpp)?[\s_:=@·-]*\d+(?:\.\d+)?\s*$", "", label, flags=re.I)
    return shorter or label


def draw_all(found: Collection, order: Sequence[str], differences: Differences) -> list[Drawing]:
    """Every figure of the board that has something to show. `order` lists the row labels, best first."""
    drawings = []
    for i, plot in enumerate(found.board.figure, 1):
        rows, size, paint = KINDS[plot.kind](plot, found, order, differences)
        if rows:
            name = f"{i:02d}-{re.sub(r'[^a-z0-9]+', '-', plot.title.lower()).strip('-')[:50] or plot.kind}"
            drawings.append(render(name, plot.title, plot.note, rows, size, paint))
    return drawings


def render(
    name: str,
    title: str,
    note: str,
    rows: Sequence[Mapping[str, Any]],
    size: tuple[float, float],
    paint: Callable[[Any], None],
) -> Drawing:
    """Paints on an axes of `size` (inches) and keeps the SVG without date, version or random ids."""
    import warnings

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from bench.text import plain

    style = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.major.width": 0.8,
        "ytick.major.width": 0.8,
        "xtick.minor.width": 0.5,
        "ytick.minor.width": 0.5,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font may have it
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # long labels
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        _make_plain(figure)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = "\n".join(map(plain, out.getvalue().split("\n"))).encode()  # XML allows no control characters
    return Drawing(name, title, note, svg, inline(svg, name, title), list(rows))


def _make_plain(figure: Any) -> None:
    """Texts of a drawing without half characters, on which matplotlib fails; tick labels are made while it draws."""
    from matplotlib.text import Text

    from bench.text import plain

    def whole(text: str) -> str:
        return "\n".join(map(plain, text.split("\n")))

    def labels(make: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
        return lambda values: [whole(label) for label in make(values)]

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        formatter = axis.get_major_formatter()
        formatter.format_ticks = labels(formatter.format_ticks)
    for text in figure.findobj(Text):
        text.set_text(whole(text.get_text()))


def inline(svg: bytes, name: str, title: str) -> str:
    """The drawing as an element for the page: no style attribute (its policy forbids them), no namespace, ids of its
    own, colours by role. Text stays text and is escaped again on writing."""
    from bench.text import plain

    root = ElementTree.fromstring(svg)
    prefix = re.sub(r"[^a-z0-9]", "", name.lower())
    _rewrite(root, prefix)
    root.attrib.pop("version", None)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", plain(title))
    root.set("class", "figure")
    width = float(root.get("viewBox", "0 0 1 1").split()[2])
    if width < 1:
        raise ValueError("a drawing without a view box")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


DROPPED = {"metadata", "style", "title"}
TEXT_STYLE = re.compile(r"(?:(?:[a-z-]+|\d+)\s+)*(?P<size>[\d.]+)px")


def _rewrite(element: ElementTree.Element, prefix: str) -> None:
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        if child.tag.rpartition("}")[2] in DROPPED:
            element.remove(child)
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "style":
            attributes.update(_presentation(value))
        elif key == "id":
            attributes["id"] = f"{prefix}-{value}"
        elif key == "href":
            attributes["href"] = f"#{prefix}-{value.lstrip('#')}"
        elif key not in ("type",):
            attributes[key] = value
    for key, value in attributes.items():
        attributes[key] = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", ROLES.get(value, value))
    element.attrib.clear()
    element.attrib.update(attributes)
    for child in element:
        _rewrite(child, prefix)


def _presentation(style: str) -> dict[str, str]:
    """A style attribute as presentation attributes."""
    found = {}
    for part in style.split(";"):
        name, _, value = (s.strip() for s in part.partition(":"))
        if name == "font":
            match = TEXT_STYLE.match(value)
            found["font-size"] = match["size"] if match else "9"
        elif name in ("font-size", "font-family", "font-weight", "font-style"):
            if name == "font-size":
                found[name] = value.removesuffix("px")
        elif name and value:
            found[name] = value
    return found


# -- what is drawn

Painted = tuple[list, tuple[float, float], Callable]  # rows for the CSV, inches, what paints on axes


def _cells(found: Collection, suite: str, metric: str) -> dict[str, Cell]:
    """Label of a row -> its score of a metric over all items, under the protocol and signature of the columns."""
    from bench.report.collect import most_common

    run_of = {
        c.score.run: row.label for row in found.rows for c in row.cells if c is not None and c.score.suite == suite
    }
    scores = [
        s for s in found.scores if s.run in run_of and s.metric == metric and s.slice == "all" and s.value is not None
    ]
    signature = most_common(s.signature for s in scores)
    return {run_of[s.run]: Cell(s, found.facts[s.run]) for s in scores if s.signature == signature}


def _axis(cell: Cell, found: Collection) -> str:
    from bench.text import plain

    score = cell.score
    column = next(
        (c for c in found.board.column if (c.metric, c.suite, c.slice) == (score.metric, score.suite, "all")), None
    )
    label = column.title if column else score.metric
    unit = f" ({score.unit})" if score.unit and score.unit not in ("1", label) else ""
    return _shorter(plain(label + unit), 60) + {"higher": "  ↑", "lower": "  ↓"}.get(score.better, "")


def _shorter(text: str, limit: int = 32) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _span(cell: Cell) -> tuple[float, float]:
    """Distances from the value to the ends of its interval, none below zero."""
    s = cell.score
    return max(0.0, s.value - (s.value if s.low is None else s.low)), max(
        0.0, (s.value if s.high is None else s.high) - s.value
    )


def _row(label: str, *cells: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"model": label}
    for c in cells:
        name = c.score.metric
        row |= {name: c.score.value, f"{name} low": c.score.low, f"{name} high": c.score.high, f"{name} n": c.score.n}
    return row


def palette(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Family -> colour and marker, the same in every figure of a page."""
    return {
        f: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, f in enumerate(sorted({family(x) for x in labels}))
    }


def _scatter(plot: Plot, found: Collection, order: Sequence[str], differences: Differences) -> Painted:
    xs, ys = _cells(found, plot.suite, plot.x), _cells(found, plot.suite, plot.y)
    labels = sorted((k for k in xs if k in ys), key=lambda k: (family(k), xs[k].score.value, k))
    rows = [_row(k, xs[k], ys[k]) for k in labels]
    colours = palette(order)

    def paint(axes: Any) -> None:
        axes.grid(True)
        groups: dict[str, list[str]] = {}
        for k in labels:
            groups.setdefault(family(k), []).append(k)
        tags = []
        loud = list(dict.fromkeys(family(k) for k in order if family(k) in groups))[:MOST_FAMILIES]
        quiet = [k for name, members in groups.items() if name not in loud for k in members]
        axes.scatter([xs[k].score.value for k in quiet], [ys[k].score.value for k in quiet], s=6, color=MUTED, zorder=1)
        for name in sorted(loud):
            members = groups[name]
            colour, marker = colours[name]
            x, y = ([v[k].score.value for k in members] for v in (xs, ys))
            spans = [list(zip(*(_span(v[k]) for k in members), strict=True)) for v in (xs, ys)]
            _points(axes, x, y, colour, marker, xerr=spans[0], yerr=spans[1])
            tags.append((x[-1], y[-1], name if len(members) > 1 else members[0], colour))
        _log_where_wide(axes, [xs[k].score.value for k in labels])
        axes.set_xlabel(_axis(xs[labels[0]], found))
        axes.set_ylabel(_axis(ys[labels[0]], found))
        axes.margins(x=0.06, y=0.08)
        _tag(axes, tags, rise=5.0)

    return rows, (6.4, 4.2), paint


def _profile(plot: Plot, found: Collection, order: Sequence[str], differences: Differences) -> Painted:
    from bench.text import plain

    prefix = plot.metric + "."
    names = list(dict.fromkeys(s.metric for s in found.scores if s.suite == plot.suite and s.metric.startswith(prefix)))
    series = {name: _cells(found, plot.suite, name) for name in names}
    names = [n for n in names if series[n]]
    labels = [k for k in order if any(k in series[n] for n in names)]
    rows = [
        {
            "model": k,
            "part": n.removeprefix(prefix),
            "value": c.score.value,
            "low": c.score.low,
            "high": c.score.high,
            "n": c.score.n,
        }
        for k in labels
        for n in names
        if (c := series[n].get(k))
    ]
    colours = palette(order)

    def paint(axes: Any) -> None:
        axes.grid(True, axis="y")
        tags = []
        for i, k in reversed(list(enumerate(labels))):
            colour, marker = colours[family(k)]
            points = [(j, series[n][k]) for j, n in enumerate(names) if k in series[n]]
            loud = i < MOST_LINES
            beside = (
                (i - (min(len(labels), MOST_LINES) - 1) / 2) * 0.02 if loud else 0.0
            )  # whiskers do not cover each other
            x, y = [j + beside for j, _ in points], [c.score.value for _, c in points]
            whiskers = list(zip(*(_span(c) for _, c in points), strict=True))
            if loud:
                _points(axes, x, y, colour, marker, yerr=whiskers)
            else:
                axes.plot(x, y, color=LINE, linewidth=0.8, zorder=1)
            if loud:
                tags.append((len(names) - 0.9, y[-1], k, colour))
        first = next(iter(series[names[0]].values()))
        axes.set_xticks(range(len(names)), [plain(n.removeprefix(prefix)) for n in names])
        axes.set_ylabel(_axis(first, found).replace(first.score.metric, plot.metric))
        axes.margins(x=0.04, y=0.08)
        _tag(axes, tags)

    return rows, (6.4, 4.2), paint


def _forest(plot: Plot, found: Collection, order: Sequence[str], differences: Differences) -> Painted:
    cells = _cells(found, plot.suite, plot.metric)
    labels = list(cells)
    if labels:
        sign = -1 if cells[labels[0]].score.better == "higher" else 1
        labels = sorted(labels, key=lambda k: (sign * cells[k].score.value, k))
    shown = labels[:MOST]
    colours = palette(order)

    def paint(axes: Any) -> None:
        axes.grid(True, axis="x")
        for y, k in enumerate(shown):
            colour, marker = colours[family(k)]
            low, high = _span(cells[k])
            _points(axes, [cells[k].score.value], [y], colour, marker, xerr=[[low], [high]], size=5.5, width=1.4)
        axes.set_yticks(range(len(shown)), [_shorter(k) for k in shown])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel(_axis(cells[shown[0]], found))

    return [_row(k, cells[k]) for k in labels], (6.4, 0.9 + 0.24 * len(shown)), paint


def _tradeoff(plot: Plot, found: Collection, order: Sequence[str], differences: Differences) -> Painted:
    ys = _cells(found, plot.suite, plot.y)
    xs = _cells(found, plot.suite, plot.x) if plot.x else ys
    settings = {k: c.facts.adapter_args.get(plot.vary) for k, c in ys.items()}
    numbers = {k: float(v) for k, v in settings.items() if type(v) in (int, float) and k in xs}
    labels = sorted(numbers, key=lambda k: (_without(k, settings[k]), numbers[k], k))
    best = _chosen(plot, differences, xs, ys, labels)
    rows = [
        {**_row(k, *([xs[k], ys[k]] if plot.x else [ys[k]])), plot.vary: numbers[k], "front": k in best} for k in labels
    ]
    groups: dict[str, list[str]] = {}
    for k in labels:
        groups.setdefault(_without(k, settings[k]), []).append(k)

    def paint(axes: Any) -> None:
        axes.grid(True)
        tags = []
        for i, (name, members) in enumerate(groups.items()):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            y = [ys[k].score.value for k in members]
            x = [xs[k].score.value for k in members] if plot.x else [numbers[k] for k in members]
            spans = [list(zip(*(_span(v[k]) for k in members), strict=True)) for v in (xs, ys)]
            _points(axes, x, y, colour, marker, xerr=spans[0] if plot.x else None, yerr=spans[1])
            front = [(a, b) for a, b, k in zip(x, y, members, strict=True) if k in best]
            if front:
                axes.scatter(*zip(*front, strict=True), s=110, facecolors="none", edgecolors=INK, linewidths=0.9)
            for a, b, k in zip(x, y, members, strict=True) if plot.x else ():
                axes.annotate(f"{numbers[k]:g}", (a, b), xytext=(0, -14), textcoords="offset points", color=MUTED,
                              ha="center", va="center", fontsize=7.5)  # fmt: skip
            tags.append((x[-1], y[-1], name, colour))
        if not plot.x:
            _log_where_wide(axes, [numbers[k] for k in labels])
        first = labels[0]
        axes.set_xlabel(_axis(xs[first], found) if plot.x else plot.vary)
        axes.set_ylabel(_axis(ys[first], found))
        axes.margins(x=0.08, y=0.12)
        _tag(axes, tags, rise=5.0)

    return rows, (6.4, 4.2), paint


def _without(label: str, setting: Any) -> str:
    """A model's label without the value of one of its arguments."""
    parts = label.split("-")
    return "-".join(p for p in parts if p != str(setting)) or label


def _chosen(
    plot: Plot, differences: Differences, xs: Mapping[str, Cell], ys: Mapping[str, Cell], labels: Sequence[str]
) -> set[str]:
    """What a circle marks: with two metrics the Pareto front, with one the best and what is not distinct from it."""
    signs = [{"higher": 1, "lower": -1}.get(v[k].score.better, 0) for v in (xs, ys) for k in labels[:1]]
    if 0 in signs or not labels:
        return set()
    values = {k: tuple(sign * v[k].score.value for sign, v in zip(signs, (xs, ys), strict=True)) for k in labels}
    if plot.x:
        return {labels[i] for i in pareto([values[k] for k in labels])}
    best = max(labels, key=lambda k: values[k])
    tied = {k for k in labels if k != best and not differences.distinct(f"{plot.suite}:{plot.y}", ys[best], ys[k])}
    return {best, *tied}


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """The points that no other one beats in one coordinate without losing in the other; larger is better."""
    return {i for i, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)}


def _log_where_wide(axes: Any, values: Sequence[float]) -> None:
    """Positive values that span more than a factor of eight are drawn over their logarithm."""
    if not (min(values) > 0 and max(values) / min(values) > 8):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


KINDS = {"scatter": _scatter, "profile": _profile, "forest": _forest, "tradeoff": _tradeoff}


def _points(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    marker: str,
    xerr: Any = None,
    yerr: Any = None,
    size: float = 5.0,
    width: float = 0.8,
) -> None:
    """Points of one family joined by a line, their intervals quiet behind them."""
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=colour, elinewidth=width, alpha=WHISKER, zorder=2)
    axes.plot(x, y, color=colour, marker=marker, markersize=size, linewidth=1.5, zorder=3,
              markeredgecolor=PAPER, markeredgewidth=0.7)  # fmt: skip


def _tag(axes: Any, tags: Sequence[tuple[float, float, str, str]], rise: float = 0.0) -> None:
    """Names at the right of the last points, `rise` points above them, moved apart where they would meet."""
    if not tags:
        return
    axes.figure.draw_without_rendering()  # the scales are known from here on
    pixel = axes.figure.dpi / 72
    gap, placed = 10.5 * pixel, []
    for x, y, text, colour in sorted(tags, key=lambda t: tuple(axes.transData.transform(t[:2])[::-1])):
        text = _shorter(text)
        px, start = axes.transData.transform((x, y))
        py, width = start, (5.0 * len(text) + 6) * pixel
        for other_x, other_y, other_width in sorted(placed, key=lambda p: p[1]):
            if px < other_x + other_width and other_x < px + width and abs(py - other_y) < gap:
                py = other_y + gap
        placed.append((px, py, width))
        axes.annotate(
            text, (x, y), xytext=(7, (py - start) / pixel + rise), textcoords="offset points", color=colour,
            va="center", annotation_clip=False, fontsize=8.5, zorder=4,
        )  # fmt: skip
