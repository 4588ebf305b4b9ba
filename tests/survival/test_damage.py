"""Damage that nobody announced: bytes of a log cut, changed, put in or taken out; kept files missing or replaced; a run
of another version. A score never changes for it; what was lost is measured again or refused by name."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from faults import Wordy, measure, the_run, truth
from toys import Doubled, Drawing

from bench.config import How
from bench.records import Lines, heal, line, parse_line, read_lines, record_line
from bench.reduction import derive
from bench.rescore import remeasure
from bench.store import Run
from bench.types import Error

SUITE = Wordy(num=8)
FIXTURES = Path(__file__).with_name("formats")


@pytest.fixture
def run(memory, quick):
    return measure(memory / "store", SUITE)


def check(run, path, true, log, touched):
    """Reads a damaged log and heals it twice. Gives what is wrong: changed records, or good ones that are gone."""
    wrong = []
    found = truth(run)
    if any(true.get(key) != value for key, value in found.items()):
        wrong.append("a record changed")
    good = {json.loads(raw)["key"] for i, raw in enumerate(log) if i not in touched}
    if not good <= found.keys():
        wrong.append("a good record is gone")
    heal(path)
    healed = path.read_bytes()
    if truth(run) != found:
        wrong.append("healing changed what is read")
    heal(path)
    if path.read_bytes() != healed or (healed and not healed.endswith(b"\n")):
        wrong.append("healed twice is not healed once")
    return wrong


def test_a_log_that_is_cut_at_any_byte(run, tally, size):
    path = run.log("")
    whole, true = path.read_bytes(), truth(run)
    log = whole.splitlines(keepends=True)
    start = len(b"".join(log[:-2]))
    cuts = range(start, len(whole), size(1, 29))
    failures = []
    for cut in cuts:
        path.write_bytes(whole[:cut])
        kept = sum(len(b"".join(log[: i + 1])) - 1 <= cut for i in range(len(log)))  # the newline alone may be lost
        wrong = check(run, path, true, log, set(range(kept, len(log))))
        if wrong or len(truth(run)) != kept:
            failures.append((cut, wrong))
    tally("damaged logs", len(cuts) - len(failures), len(cuts), lost=len(failures))
    print(f"{len(cuts)} cuts")
    assert not failures, failures[:5]


@pytest.mark.parametrize("kind", ["change", "insert", "delete"])
def test_a_log_with_a_byte_that_is_wrong(run, tally, trials, kind):
    seed = 20261205
    print("seed", seed)
    rng = random.Random(f"{seed}{kind}")
    path, scores = run.log(""), (run.path / "scores.csv").read_bytes()
    whole, true = path.read_bytes(), truth(run)
    log = whole.splitlines(keepends=True)
    records = {r.key: r for r in run.records().values()}
    goal, failures, hit = trials(600, 60), [], 0
    for number in range(goal):
        data = bytearray(whole)
        ends = [i for i, byte in enumerate(whole) if byte == 10]
        at = (
            rng.choice(ends[:-1]) if number % 10 == 0 else rng.randrange(len(whole))
        )  # newlines more often than they are
        number_of_line = whole[:at].count(b"\n")
        if kind == "change":
            data[at] = rng.choice([b for b in b'\n{}"\x00' + bytes([rng.randrange(256)]) if b != data[at]])
        elif kind == "insert":
            data.insert(at, rng.choice(b'\n{}"\x00' + bytes([rng.randrange(256)])))
        else:
            del data[at]
        path.write_bytes(data)
        joined = whole[at] == 10 and kind != "insert"
        touched = set() if joined else {number_of_line}  # a line that lost its newline alone is whole
        wrong = check(run, path, true, log, touched)
        lost = true.keys() - truth(run).keys()
        hit += bool(lost) or bytes(data) != whole
        if number % 20 == 0:  # what was lost is measured again, to the same bytes
            with run.writer() as appender:
                for key in sorted(lost):
                    appender.append(record_line(records[key]))
            derive(run, SUITE)
            if (run.path / "scores.csv").read_bytes() != scores:
                wrong.append("other scores")
        if wrong:
            failures.append((at, bytes(data[max(0, at - 5) : at + 5]), wrong))
        path.with_name("units.jsonl.bad").unlink(missing_ok=True)
    tally("damaged logs", goal - len(failures), goal, false=len(failures))
    assert not failures, failures[:5]
    assert hit == goal


def test_a_long_damaged_line_full_of_braces_is_read_in_time_that_grows_with_its_length(memory):
    """A line of some megabytes that fails its checksum, with a hundred thousand places where another might begin."""
    path = memory / "units.jsonl"
    whole = line({"key": "k", "n": 1}).rstrip(b"\n")
    path.write_bytes(b"{" * 200_000 + b'{"a":1' * 100_000 + whole + b"\n" + whole + b"\n")
    lines = Lines(path)
    assert list(lines) == [whole] and len(lines.damage.bad) == 1
    assert heal(path).bad and read_lines(path)[0] == [{"key": "k", "n": 1}]


# -- kept files


def replaced(path, how, other):
    """Does to a kept file what `how` says."""
    data = path.read_bytes()
    path.unlink()
    if how == "other content":
        path.write_bytes(other)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a link":
        target = path.with_name("target")
        target.write_bytes(other)
        path.symlink_to(target)
    elif how == "a link to itself":
        path.symlink_to(path)
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    elif how == "one bit":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


HOW = ("missing", "other content", "empty", "one bit", "a link", "a link to itself", "a pipe", "a folder")


@pytest.mark.parametrize("how", HOW)
def test_kept_features_that_are_not_what_they_were(memory, quick, tally, how):
    """Measured again by the same command, or refused by name with what to do; then the scores are as before."""
    run = measure(memory / "store", SUITE)
    scores, true = (run.path / "scores.csv").read_bytes(), truth(run)
    first, second = sorted(run.records().values(), key=lambda r: r.unit)[:2]
    address = first.blobs["features/pair"]
    path = run.store.path(address)
    replaced(path, how, run.store.get(second.blobs["features/pair"]))
    (run.path / "scores.csv").unlink()
    try:
        measure(memory / "store", SUITE)
    except Error as e:
        assert str(path) in f"{e} {e.hint}" and not (run.path / "scores.csv").exists()
        assert how in ("other content", "empty", "one bit", "a folder")
        path.rmdir() if how == "a folder" else path.unlink()
        measure(memory / "store", SUITE)
    passed = (run.path / "scores.csv").read_bytes() == scores and truth(run) == true
    tally("kept files", int(passed), 1, false=int(not passed))
    assert passed


@pytest.mark.parametrize("how", HOW)
def test_kept_pictures_that_are_not_what_they_were(memory, quick, tally, how):
    """`rescore` refuses them by name; a page shows a gap, never another picture."""
    from bench.report import gallery

    suite = Drawing(num=4)
    run = measure(memory / "store", suite, how=How(devices="cpu", threads=1, keep="all"))
    media = {n: a for r in run.records().values() for n, a in r.blobs.items() if n.startswith("media/")}
    address, other = media["media/picture/item-000"], media["media/picture/item-001"]
    assert gallery._tile(run.store, {"picture": address}, False)["output"]
    replaced(run.store.path(address), how, run.store.get(other))
    assert gallery._tile(run.store, {"picture": address}, False) == {}
    patch = pytest.MonkeyPatch()
    patch.setattr("bench.reduction.suite_of", lambda run: suite)
    with pytest.raises(Error, match=address) as caught:
        remeasure(run, f"{Path(__file__).parents[1] / 'toys.py'}:{Doubled.__name__}")
    patch.undo()
    tally("kept files", 1, 1)
    assert "measure its unit again" in caught.value.hint
    assert not any(p.stat().st_size for p in (run.path / "extra").glob("*.jsonl"))
    if how in ("missing", "a link", "a link to itself", "a pipe"):  # the others are seen when they are looked at
        again = measure(memory / "store", suite, how=How(devices="cpu", threads=1, keep="all"))
        assert again.store.get(address)


# -- versions


@pytest.mark.parametrize("format", [0, 2, 999, "1", None, 1.5, True])
def test_a_run_of_another_format_is_refused_and_nothing_is_written(memory, quick, tally, format):
    run = measure(memory / "store", SUITE)
    body = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**body, "format": format}))
    before = {p: p.read_bytes() for p in (memory / "store").rglob("*") if p.is_file()}
    refused = 0
    for act in (lambda: Run(run.store, run.path), lambda: measure(memory / "store", SUITE)):
        with pytest.raises(Error, match=r"run\.json") as caught:
            act()
        refused += bool(caught.value.hint)
    same = before == {p: p.read_bytes() for p in (memory / "store").rglob("*") if p.is_file()}
    tally("versions", int(refused == 2 and same), 1)
    assert refused == 2 and same


@pytest.mark.parametrize("name", sorted(p.name for p in FIXTURES.iterdir()))
def test_a_run_of_every_released_format_is_read_and_continued(memory, quick, tally, name):
    """The folder holds a run that the release wrote, of eight items with the last unit missing."""
    shutil.copytree(FIXTURES / name, memory / "store")
    run = the_run(memory / "store")
    assert len(run.records()) == 3 and run.meta["format"] == int(re.sub(r"\D", "", name))
    before = run.records()
    for record in before.values():  # features are not stored with it
        for address in record.blobs.values():
            assert not run.store.has(address)
    table = [row["mean"] for row in run.table().rows]
    fresh = measure(memory / "fresh", SUITE)
    expected = {r.unit: [row["mean"] for row in r.rows] for r in fresh.records().values()}
    same = table == [v for r in sorted(before.values(), key=lambda r: r.unit) for v in expected[r.unit]]
    again = measure(memory / "store", SUITE)
    same = same and again.id == run.id and again.complete() and truth(again) == truth(fresh)
    same = same and (again.path / "scores.csv").read_bytes() == (fresh.path / "scores.csv").read_bytes()
    tally("versions", int(same), 1)
    assert same


def test_a_record_of_a_later_release_with_fields_unknown_here_is_read(run):
    (log,) = run.path.glob("units.jsonl")
    values = [parse_line(raw) for raw in log.read_bytes().splitlines()]
    true = truth(run)
    log.write_bytes(b"".join(line({**v, "energy": 3.5}) for v in values))
    assert truth(run) == true
