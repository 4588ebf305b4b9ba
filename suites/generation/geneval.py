"""GenEval: does a picture show the objects, counts, colours and places that its prompt asks for?

Ghosh, Hajishirzi and Schmidt 2023, arXiv 2310.11513. A detector finds objects; what they must be like is decided here,
from boxes alone. Nothing of the harness is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SCORE = 0.3  # a detection counts above it
COUNTING_SCORE = 0.9  # in the task of counting
MOST = 16  # detections of one class that are looked at
SHRINK = 0.1  # of the sum of two boxes' sides: nearer centres are neither left nor right
LEANING = 0.5  # share of the offset that a direction needs


@dataclass(frozen=True)
class Detection:
    """One object: its class, how sure the detector is (0 to 1), its corners in px, and its colour of COLOURS or ""."""

    label: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom; y grows downwards
    colour: str = ""


class Detector(Protocol):
    """What finds objects in pictures: any adapter with this method."""

    def detect(
        self, images: Any, labels: Sequence[Sequence[str]], colours: Sequence[str]
    ) -> Sequence[Sequence[Detection]]:
        """For each of uint8 [B, 3, H, W] its objects of the classes labels[i], each with one of `colours`.

        The original's colours are CLIP's, zero-shot, of the object cut out on grey #999.
        """


@dataclass(frozen=True)
class Wanted:
    """`count` objects of a class; of a colour, or in a relation to those of an earlier entry, where they are given."""

    label: str
    count: int
    colour: str = ""
    relation: str = ""
    target: int = 0  # index of the entry that the relation is to


@dataclass(frozen=True)
class Task:
    tag: str  # one of TASKS
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()  # at least `count` of these make a picture wrong

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that decide, once each."""
        return tuple(dict.fromkeys(wanted.label for wanted in (*self.include, *self.exclude)))


def parse(tag: str | None, include: Any, exclude: Any = ()) -> Task:
    """A task from one entry of GenEval's metadata; lists may be given as JSON text.

    Raises ValueError naming what is wrong.
    """
    if tag not in TASKS:
        raise ValueError(f"tag {tag!r} is not one of {', '.join(TASKS)}")
    wanted = _entries("include", include)
    if not wanted:
        raise ValueError("include names no object")
    for i, one in enumerate(wanted):
        if one.relation and one.target >= i:
            raise ValueError(f"include {i}: {one.relation} entry {one.target}, which does not come before it")
    return Task(tag, wanted, _entries("exclude", exclude))


def _entries(name: str, value: Any) -> tuple[Wanted, ...]:
    try:
        value = json.loads(value) if isinstance(value, str) and value else value or ()
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name} is no JSON: {e}") from None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a list")
    return tuple(_wanted(f"{name} {i}", entry) for i, entry in enumerate(value))


def _wanted(at: str, entry: Any) -> Wanted:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
        raise ValueError(f"{at} has no class")
    count, colour = entry.get("count"), entry.get("color", "")
    if type(count) is not int or count < 1:
        raise ValueError(f"{at}: count is {count!r}, it must be 1 or more")
    if colour and colour not in COLOURS:
        raise ValueError(f"{at}: color {colour!r} is not one of {', '.join(COLOURS)}")
    place = entry.get("position") or ("", 0)
    relation, target = place if isinstance(place, list | tuple) and len(place) == 2 else (place, -1)
    if relation and (relation not in RELATIONS or type(target) is not int or target < 0):
        raise ValueError(f"{at}: position {place!r} is not [one of {', '.join(RELATIONS)}, an index]")
    return Wanted(entry["class"], count, colour, relation, target)


def judge(task: Task, detections: Sequence[Detection]) -> tuple[bool, str]:
    """Is the picture right, and if not, what was found instead.

    Of a class the surest `count` objects are looked at: each must have the colour, and stand in the relation to every
    object of the other entry. An entry that another refers to must be right itself.
    """
    found = {label: _seen(task.tag, label, detections) for label in task.labels}
    faults: list[str] = []
    groups: list[list[Detection] | None] = []
    for wanted in task.include:
        group = found[wanted.label][: wanted.count]
        fault = _fault(wanted, group, groups)
        faults += [fault] if fault else []
        groups.append(None if fault else group)
    for unwanted in task.exclude:
        if len(found[unwanted.label]) >= unwanted.count:
            faults.append(f"{len(found[unwanted.label])} {unwanted.label}, fewer than {unwanted.count} wanted")
    return not faults, "; ".join(faults)


def _seen(tag: str, label: str, detections: Sequence[Detection]) -> list[Detection]:
    """The detections of a class that count, the surest first."""
    least = COUNTING_SCORE if tag == "counting" else SCORE
    sure = [d for d in detections if d.label == label and d.score > least]
    return sorted(sure, key=lambda d: -d.score)[:MOST]


def _fault(wanted: Wanted, group: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]) -> str:
    """What is wrong with the objects of one entry; "" if nothing."""
    if len(group) < wanted.count:
        return f"{len(group)} {wanted.label} of {wanted.count}"
    if wanted.colour and any(d.colour != wanted.colour for d in group):
        return f"{wanted.label} is {', '.join(d.colour or 'of no colour' for d in group)}, not {wanted.colour}"
    if wanted.relation:
        targets = groups[wanted.target]
        if targets is None:
            return f"nothing that {wanted.label} could be {wanted.relation}"
        for one in group:
            for target in targets:
                if wanted.relation not in relations(one.box, target.box):
                    return f"{wanted.label} is not {wanted.relation} {target.label}"
    return ""


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Which of RELATIONS hold of a to b; boxes are left, top, right, bottom.

    The offset of the centres is shrunk on each axis by SHRINK times both boxes' sides, and divided by its length before
    that; a direction holds where more than LEANING is left.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sides = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    length = math.hypot(*offset)
    rest = [max(abs(o) - SHRINK * side, 0.0) for o, side in zip(offset, sides, strict=True)]
    if max(rest) < 1e-3:  # px
        return set()
    found = set()
    for o, r, (less, more) in zip(offset, rest, (RELATIONS[:2], RELATIONS[2:]), strict=True):
        if r / length > LEANING:
            found.add(less if o < 0 else more)
    return found


def overall(tasks: Mapping[str, float]) -> float:
    """The plain mean of the six tasks, whatever the number of their pictures; ValueError where one is missing."""
    missing = [task for task in TASKS if task not in tasks]
    if missing:
        raise ValueError(f"no picture of {', '.join(missing)}")
    return sum(tasks[task] for task in TASKS) / len(TASKS)
