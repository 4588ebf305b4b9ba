"""Metrics against peers, in one process on one thread: python tests/perf/metrics.py [--quick]."""

import io
import os
import warnings

import distances
import networks
import pictures
from measure import Row, save, write

PEERS = ["torch-fidelity", "torchmetrics", "clean-fid", "pytorch-fid", "scikit-image", "piq", "prdc", "lpips"]
ABOUT = (
    "One process, one thread; we and the peers take turns on the same input, and the least CPU seconds of the rounds "
    "count. Features are synthetic, networks have random weights; the input is made before the clock runs. A number as "
    "goal is the least ratio peer / ours."
)


def main() -> None:
    import torch
    from threadpoolctl import threadpool_limits

    warnings.simplefilter("ignore")  # peers warn of what their own versions deprecate
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that measure memory
    found = []
    with threadpool_limits(1):
        for module in (pictures, distances, networks):
            for race in module.RACES:
                found += race.run(module.__name__)
        found += networks.imports()
    write("metrics", "Metrics against peers", found, ABOUT, PEERS)
    save("metrics.svg", figure(found))


def figure(rows: list[Row]) -> bytes:
    """Every ratio on one logarithmic axis: a bar from 1, a mark where the goal is."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in rows if row.ratio][::-1]
    with matplotlib.rc_context({"svg.hashsalt": "perf", "svg.fonttype": "none"}):
        plot = Figure(figsize=(9, 0.24 * len(rows) + 0.9), layout="constrained")
        axes = plot.add_subplot()
        for i, row in enumerate(rows):
            missed = row.met is False
            axes.barh(i, row.ratio - 1, left=1, height=0.7, color="#b5533c" if missed else "#4a7a8c")
            axes.text(1.01, i, f"{row.ratio:.3g}", transform=axes.get_yaxis_transform(), va="center", size=7)
            if not isinstance(row.goal, str):
                axes.plot([row.goal, row.goal], [i - 0.45, i + 0.45], color="black", linewidth=1.6)
        axes.set_xscale("log")
        axes.set_xlim(min(0.5, *(row.ratio * 0.8 for row in rows)), max(row.ratio for row in rows) * 1.3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(rows)), [f"{row.what} — {row.peer}" for row in rows], size=7)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel("peer / ours (black marks: goals; red: a goal missed)")
        axes.spines[["top", "right"]].set_visible(False)
        out = io.BytesIO()
        plot.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


if __name__ == "__main__":
    main()
