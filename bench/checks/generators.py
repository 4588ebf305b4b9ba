"""Conformance of generators, and of pictures that are there already."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.checks.report import CLOSE, REPEAT, STEP, Report, batches, compare, form, is_picture, kept

PROMPTS = (
    *("a red house by a lake", "two cats", "a portrait of an old sailor", "an empty street at night"),
    *("", "a bowl of fruit on a wooden table", "snow", "a yellow bicycle leaning against a blue wall"),
)


def _generator(model: Any, report: Report, method: Callable, what: str, inputs: Sequence[Any]) -> None:
    n = len(inputs)
    seeds = report.seeds(n)
    first = report.call(what, method, list(inputs), list(seeds))
    if first is None:
        return
    shape = tuple(getattr(first, "shape", ()))
    if not is_picture(report, "pictures", first, (n, 3, *(shape[2:4] if len(shape) == 4 else ("H", "W"))), 0.0, 1.0):
        return
    copy = first.clone()
    again = report.call("same seed twice", method, list(inputs), list(seeds))
    compare(report, "same seed twice", copy, again, 0.0, REPEAT, "the same seed must give the same picture")
    batches(report, model, copy, lambda i: method([inputs[i]], [seeds[i]]))
    if report.elsewhere:
        half = slice(n // 2, n)
        theirs = report.call("another worker", report.elsewhere, method.__name__, inputs[half], seeds[half])
        far = math.inf if getattr(model, "batch_matters", False) else STEP
        why = "a picture must depend on its input and seed alone, not on the process that draws it"
        compare(report, "another worker", theirs, copy[half], CLOSE, far, why)
    turned = report.call("other order", method, list(inputs[::-1]), seeds[::-1])
    if getattr(turned, "shape", None) == copy.shape:
        far = math.inf if getattr(model, "batch_matters", False) else STEP
        why = "a picture must depend on its own input and seed alone, not on its place"
        compare(report, "other order", turned.flip(0), copy, CLOSE, far, why)
    other = report.call("other seeds", method, [inputs[0]] * 4, seeds[:4])
    if getattr(other, "shape", None) == copy[:4].shape:
        told_apart = all(float((other[0] - other[i]).abs().max()) > 0 for i in range(1, 4))
        report.judge("seeds matter", told_apart, "two seeds give the same picture")
    same = report.call("one seed", method, list(inputs[:4]), [seeds[0]] * 4)
    others = [i for i in range(4) if inputs[i] != inputs[0]]
    if others and getattr(same, "shape", None) == copy[:4].shape:
        told_apart = all(float((same[0] - same[i]).abs().max()) > 0 for i in others)
        report.judge(f"{what} matter", told_apart, "the picture is the same whatever is asked for", "warn")
    kept(report, "pictures", first, copy)


def text_to_image(model: Any, report: Report) -> None:
    _generator(model, report, model.generate, "prompts", PROMPTS)


def picture_set(model: Any, report: Report) -> None:
    """Names that stay, and the same pictures whoever asks for them in whatever order."""
    names = list(model.names())
    good = bool(names) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
    if not report.judge("names", good, "want texts, each once, at least one", fine=f"{len(names)}"):
        return
    report.judge("names stay", list(model.names()) == names, "a second call gives others, or another order")
    first = model.pictures(names[:2])
    good = len(first) == len(names[:2]) and all(
        isinstance(p, np.ndarray) and p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 and p.size for p in first
    )
    if report.judge("pictures", good, f"{[form(p) for p in first]} instead of uint8 [H, W, 3] arrays"):
        again = model.pictures(names[:2][::-1])[::-1]
        same = all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        report.judge("same pictures in another order", same, "a picture depends on what is asked for beside it")


def class_to_image(model: Any, report: Report) -> None:
    n = getattr(model, "num_classes", None)
    if type(n) is not int or n < 1:
        report.add("num_classes", "fail", f"{n!r} instead of a positive whole number")
        return
    report.add("num_classes", "ok", str(n))
    _generator(model, report, model.generate_classes, "labels", [i * (n - 1) // 7 for i in range(8)])
