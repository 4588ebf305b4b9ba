"""GenEval's rules: counts, colours and places from synthetic boxes, and every entry of its metadata."""

import json
from pathlib import Path

import numpy as np
import pytest

from suites.generation import geneval
from suites.generation.geneval import Detection, judge, parse, relations

METADATA = Path(__file__).parents[2] / "../shared/data/generators/geneval/evaluation_metadata.jsonl"


def box(x, y, side=20):
    return (x, y, x + side, y + side)


def seen(label, x=0, y=0, score=0.95, colour="", side=20):
    return Detection(label, score, box(x, y, side), colour)


def want(label, count=1, **more):
    return {"class": label, "count": count, **more}


def right(task, *detections):
    return judge(task, detections)[0]


@pytest.mark.parametrize(
    "a, b, expected",
    [
        (box(0, 0), box(100, 0), {"left of"}),
        (box(100, 0), box(0, 0), {"right of"}),
        (box(0, 0), box(0, 100), {"above"}),  # y grows downwards
        (box(0, 100), box(0, 0), {"below"}),
        (box(0, 0), box(100, 100), {"left of", "above"}),
        (box(0, 0), box(3, 0), set()),  # 3 px is less than .1 (20 + 20)
        (box(0, 0), box(0, 0), set()),
        (box(0, 0), box(8, 0), set()),  # rest (8 - 4) / 8 is .5, which is not more than .5
        (box(0, 0), box(8.1, 0), {"left of"}),
        (box(0, 0), box(100, 60), {"left of"}),  # 56 / 116.6 above, 96 / 116.6 left
    ],
)
def test_relations_of_synthetic_boxes(a, b, expected):
    assert relations(a, b) == expected


def test_relations_follow_the_formula_on_random_boxes():
    """Written again from the definition with vectors: centres, |offset| - .1 (sides), over the length of the offset."""
    rng = np.random.default_rng(3)
    for _ in range(500):
        corners = rng.uniform(0, 200, (2, 2))
        sides = rng.uniform(1, 120, (2, 2))
        a, b = (tuple(np.r_[c, c + s]) for c, s in zip(corners, sides, strict=True))
        offset = (corners + sides / 2)[0] - (corners + sides / 2)[1]
        shrunk = np.maximum(np.abs(offset) - 0.1 * sides.sum(0), 0) * np.sign(offset)
        dx, dy = shrunk / np.linalg.norm(offset)
        expected = {
            name
            for name, holds in zip(geneval.RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
            if holds
        }
        assert relations(a, b) == (expected if np.abs(shrunk).max() >= 1e-3 else set())
        mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        assert relations(b, a) == {mirrored[r] for r in relations(a, b)}


def test_objects_count_above_their_score():
    task = parse("single_object", [want("dog")])
    assert right(task, seen("dog", score=0.31)) and not right(task, seen("dog", score=0.3))
    assert not right(task, seen("cat"))
    assert judge(task, [])[1] == "0 dog of 1"
    assert right(task, seen("dog"), seen("dog", 50), seen("cat"))  # more than asked for, and others, do no harm


def test_counting_is_exact_and_needs_surer_detections():
    task = parse("counting", [want("dog", 2)], [want("dog", 3)])
    dogs = [seen("dog", 30 * i) for i in range(4)]
    assert [right(task, *dogs[:n]) for n in range(5)] == [False, False, True, False, False]
    assert not right(task, seen("dog", score=0.9), seen("dog", 30))  # .9 is not above .9
    assert right(task, *dogs[:2], seen("dog", 90, score=0.8))  # the third is not sure enough to count


def test_at_most_sixteen_of_a_class_are_looked_at():
    task = parse("counting", [want("dog", 16)], [want("dog", 17)])
    assert right(task, *(seen("dog", i) for i in range(40)))


def test_colours_are_those_of_the_surest_objects():
    task = parse("colors", [want("dog", color="red")])
    assert right(task, seen("dog", colour="red"))
    assert not right(task, seen("dog", colour="blue"))
    assert right(task, seen("dog", colour="blue", score=0.4), seen("dog", 50, colour="red", score=0.9))
    assert not right(task, seen("dog", colour="blue", score=0.9), seen("dog", 50, colour="red", score=0.4))
    two = parse("color_attr", [want("dog", color="red"), want("cat", color="blue")])
    assert right(two, seen("dog", colour="red"), seen("cat", 50, colour="blue"))
    assert not right(two, seen("dog", colour="blue"), seen("cat", 50, colour="red"))


def test_positions_hold_between_all_objects_and_need_their_target():
    task = parse("position", [want("dog"), want("cat", position=["right of", 0])])
    assert right(task, seen("dog"), seen("cat", 100))
    assert not right(task, seen("dog", 100), seen("cat"))
    assert judge(task, [seen("cat", 100)])[1] == "0 dog of 1; nothing that cat could be right of"
    two = parse("position", [want("dog", 2), want("cat", position=["right of", 0])])
    assert right(two, seen("dog"), seen("dog", 40), seen("cat", 100))
    assert not right(two, seen("dog"), seen("dog", 200), seen("cat", 100))


def test_overall_is_the_plain_mean_of_six_tasks():
    tasks = dict(zip(geneval.TASKS, (0.97, 0.38, 0.35, 0.76, 0.04, 0.06), strict=True))  # SD 1.5 as published: .43
    assert geneval.overall(tasks) == pytest.approx(0.4267, abs=5e-5)
    with pytest.raises(ValueError, match="no picture of counting"):
        geneval.overall({k: v for k, v in tasks.items() if k != "counting"})


def test_every_entry_of_the_metadata_parses_and_is_answered_right_by_what_it_asks_for():
    if not METADATA.is_file():
        pytest.skip("the metadata of GenEval is not here")
    entries = [json.loads(line) for line in METADATA.read_text().splitlines()]
    assert len(entries) == 553
    counts = dict.fromkeys(geneval.TASKS, 0)
    for entry in entries:
        task = parse(entry["tag"], json.dumps(entry["include"]), entry.get("exclude"))
        counts[task.tag] += 1
        assert judge(task, ideal(task)) == (True, ""), entry["prompt"]
        assert not judge(task, [])[0]
        assert not judge(task, ideal(task)[:-1])[0], entry["prompt"]
    assert list(counts.values()) == [80, 99, 80, 94, 100, 100]


def ideal(task):
    """What a perfect picture would give: each group beside the first, in the direction that is asked for."""
    steps = {"left of": (-300, 0), "right of": (300, 0), "above": (0, -300), "below": (0, 300), "": (300, 0)}
    found = []
    for i, wanted in enumerate(task.include):
        dx, dy = steps[wanted.relation]
        at = [(30 * k + (dx if i else 0), dy if i else 0) for k in range(wanted.count)]
        found += [seen(wanted.label, *place, colour=wanted.colour) for place in at]
    return found


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("colours", [want("dog")]), "tag 'colours' is not one of"),
        ((None, [want("dog")]), "tag None"),
        (("colors", []), "include names no object"),
        (("colors", "{"), "include is no JSON"),
        (("colors", '{"class": "dog"}'), "include must be a list"),
        (("colors", [{"count": 1}]), "include 0 has no class"),
        (("colors", [want("dog", 0)]), "count is 0"),
        (("colors", [want("dog", color="mauve")]), "color 'mauve'"),
        (("position", [want("dog", position=["near", 0])]), "position"),
        (("position", [want("dog", position=["above", 0])]), "does not come before"),
        (("counting", [want("dog")], [want("dog", True)]), "exclude 0: count is True"),
        (("position", [want("dog", position=5)]), "include 0: position 5 is not"),
        (("position", [want("dog"), want("cat", position=["left of"])]), r"include 1: position \['left of'\] is not"),
        (("position", [want("dog"), want("cat", position={"a": 0})]), "include 1: position"),
        (("counting", "[" * 100_000), "include is no JSON"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(arguments, says):
    with pytest.raises(ValueError, match=says):
        parse(*arguments)
