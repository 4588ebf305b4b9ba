"""Reports: boards in, pages out. `load` reads scores; `render` draws a board."""

from __future__ import annotations

from bench.report.board import find_board
from bench.report.collect import load
from bench.report.page import Summary, render

__all__ = ["Summary", "find_board", "load", "render"]
