"""Measuring later, over kept media and without the model."""

from pathlib import Path

import pytest
import toys
from toys import Drawing, DrawingJudged, DrawingTwice, Painter, command

from bench import Error, Store, UsageError, execute
from bench.config import How
from bench.reduction import derive
from bench.rescore import open_metric, remeasure

TOYS = str(Path(toys.__file__).resolve())
DOUBLED = f"{TOYS}:Doubled"


def go(folder, suite, ref, keep="all"):
    how = How(devices="cpu", threads=1, keep=keep)
    return execute(suite, Painter(), store=Store(folder), identity={"name": "p"}, how=how, suite_ref=f"{TOYS}:{ref}",
                   extra_meta={"suite_ref": f"{TOYS}:{ref}", "again": "bench score again"})  # fmt: skip


def values(scores):
    return {(s.metric, s.slice): (s.value, s.n, s.expected, s.complete, s.signature) for s in scores}


def test_a_metric_measured_later_equals_one_that_was_there_from_the_start(tmp_path):
    later, start = go(tmp_path / "a", Drawing(), "Drawing"), go(tmp_path / "b", DrawingTwice(), "DrawingTwice")
    log = later.log("").read_bytes()
    assert remeasure(later, DOUBLED) == 3
    found = values(derive(later, Drawing()))
    assert found == values(start.scores()) and len(found) == 6  # slices, too
    assert later.log("").read_bytes() == log  # records are never rewritten
    assert remeasure(later, DOUBLED) == 0 and values(later.scores()) == found
    with pytest.raises(Error, match="writes 'doubled', which the run has already"):
        remeasure(later, f"{DOUBLED}?scale=3")
    assert values(derive(later, Drawing())) == found


def test_a_torn_line_of_what_was_measured_later_is_measured_again(tmp_path):
    run = go(tmp_path, Drawing(), "Drawing")
    remeasure(run, DOUBLED)
    whole = values(derive(run, Drawing()))
    (path,) = (run.path / "extra").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-30])
    assert values(derive(run, Drawing())) != whole
    assert remeasure(run, DOUBLED) == 1
    assert values(derive(run, Drawing())) == whole


def test_media_that_were_not_kept_are_refused_with_the_line_that_keeps_them(tmp_path):
    run = go(tmp_path, Drawing(), "Drawing", keep="none")
    with pytest.raises(Error, match="kept no media of item 'item-000'") as caught:
        remeasure(run, DOUBLED)
    assert caught.value.hint == "bench score again --keep all --fresh keeps them"


def test_a_kept_picture_that_is_damaged_is_refused_by_name(tmp_path):
    run = go(tmp_path, Drawing(), "Drawing")
    address = next(a for r in run.records().values() for n, a in r.blobs.items() if n.startswith("media/"))
    run.store.path(address).write_bytes(b"another picture")
    with pytest.raises(Error, match=address):
        remeasure(run, DOUBLED)


def test_nulls_of_a_judge_are_measured_again_and_nothing_else_changes(tmp_path):
    silent = tmp_path / "silent"
    silent.touch()
    suite = DrawingJudged(silent=str(silent))
    run = go(tmp_path / "a", suite, "DrawingJudged")
    before = {r["item"]: r["judged"] for r in run.table().rows}
    judged = next(s for s in run.scores() if s.metric == "judged" and s.slice == "all")
    assert None in before.values() and not run.complete() and judged.n < judged.expected == 6
    assert remeasure(run, None) == 0  # the judge is still silent
    silent.unlink()
    assert remeasure(run, None) == sum(any(before[i] is None for i in items) for items in _units(run))
    derive(run, suite)
    after = {r["item"]: r["judged"] for r in run.table().rows}
    assert run.complete() and all(after[i] == v for i, v in before.items() if v is not None)
    undisturbed = go(tmp_path / "b", suite, "DrawingJudged")
    assert values(run.scores()) == values(undisturbed.scores())
    assert remeasure(run, None) == 0


def _units(run):
    return [[row["item"] for row in r.rows] for r in run.records().values()]


def test_a_metric_of_the_suite_cannot_be_added_and_its_columns_are_its_own(tmp_path):
    run = go(tmp_path, Drawing(), "Drawing")
    with pytest.raises(UsageError, match="drawing measures mean already"):
        remeasure(run, f"{TOYS}:Mean")
    (tmp_path / "m.py").write_text(
        f"import sys\nsys.path.append({str(Path(TOYS).parent)!r})\nfrom dataclasses import dataclass\nimport toys\n"
        "@dataclass(frozen=True)\nclass Thief(toys.Doubled):\n    name = 'thief'\n"
        "    def measure(self, media, ctx):\n        return {'mean': [0.0] * len(media['picture'])}\n"
    )
    with pytest.raises(Error, match="writes 'mean', which the run has already"):
        remeasure(run, f"{tmp_path}/m.py:Thief")
    assert [r["mean"] for r in run.table().rows] != [0.0] * 6


@pytest.mark.parametrize(
    "text, says",
    [
        ("bench.metrics:Nothing", "no metric 'bench.metrics:Nothing'"),
        ("nowhere:X", "no metric"),
        ("", "no metric"),
        ("bench.types:Item", "is no metric"),
        (f"{TOYS}:Painter", "is no metric"),
        (f"{DOUBLED}?sacle=2", "has no parameter 'sacle'"),
        (f"{DOUBLED}?scale=two", "scale: 'two' is not a finite number"),
    ],
)
def test_a_metric_that_is_none(text, says):
    with pytest.raises(UsageError) as caught:
        open_metric(text)
    assert says in str(caught.value)


def test_a_metric_by_name():
    assert open_metric(f"{DOUBLED}?scale=4").scale == 4.0
    assert open_metric("bench.metrics:PSNR").name == "psnr"


def test_the_verb(tmp_path):
    go(tmp_path / ".bench", Drawing(), "Drawing")
    done = command(tmp_path, "rescore", "drawing", "--metric", DOUBLED)
    assert done.code == 0 and "3 units measured" in done.err and "doubled" in done.out, done.err
    shown = command(tmp_path, "show", "drawing", "--slices")
    assert shown.out.count("doubled") == 6
