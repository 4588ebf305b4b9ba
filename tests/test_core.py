"""Worker and execution: the same records and scores whatever the batch, the shard, the order or the interruption."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from toys import Doubled, Drawing, DrawingTwice, Faulty, Mean, Painter, Scratching, WhiteBox

from bench import Error, Store, UsageError, execute, execution
from bench.config import How, bind
from bench.execution import Observer, parse_shard, resolve_devices
from bench.identity import seed_for, unit_key
from bench.prepare import prepare
from bench.reduction import derive
from bench.scores import parse_scores

TOYS = str(Path(toys.__file__).resolve())
CPU = How(devices="cpu", threads=1)


class Quiet(Observer):
    """Remembers what it was told."""

    def __init__(self):
        self.said, self.records, self.pending = [], [], []

    def begin(self, run, units, pending):
        self.pending = [u.id for u in pending]

    def done(self, unit, record):
        self.records.append(record)

    def say(self, text):
        self.said.append(text)


def go(folder, suite=None, model=None, quiet=None, how=CPU, **more):
    """A run of a live model in this process."""
    suite, model = suite or Drawing(), model or Painter()
    identity = more.pop("identity", {"name": "painter"})
    return execute(suite, model, store=Store(folder), identity=identity, how=how, observer=quiet or Quiet(), **more)


def score(*more, suite="Drawing", model="Painter"):
    return ["score", f"{TOYS}:{suite}", "--model", f"{TOYS}:{model}", *more]


def only(folder):
    (path,) = (p for p in (Path(folder) / "runs").iterdir() if p.suffix != ".old")
    return path


def outcome(run):
    """What may not depend on how a run was done."""
    return {r.key: (r.unit, r.status, r.rows, dict(r.blobs)) for r in run.records().values()}


# -- what a run is


def test_a_run_by_hand(tmp_path):
    run = go(tmp_path, Drawing(num=3, chunk=2))
    expected = []
    for item in ("item-000", "item-001", "item-002"):
        seed = seed_for(0, "drawing", 1, item, "latent")
        expected.append(np.floor(np.random.default_rng(seed).random((3, 4, 4)) * 255 + 0.5).mean() / 255)
    rows = run.table().rows
    assert [r["item"] for r in rows] == ["item-000", "item-001", "item-002"]
    assert np.allclose([r["mean"] for r in rows], expected, rtol=0, atol=1e-12)
    assert [r["parity"] for r in rows] == ["even", "odd", "even"]
    overall, even, odd = run.scores()
    assert (overall.slice, even.slice, odd.slice) == ("all", "parity=even", "parity=odd")
    assert abs(overall.value - np.mean(expected)) < 1e-12 and abs(odd.value - expected[1]) < 1e-12
    assert (overall.n, overall.expected, overall.complete, overall.signature) == (3, 3, True, "mean|scale:1.0|v:1")
    assert overall.run == run.id and overall.model == "painter" and overall.source == "measured"
    assert run.complete() and run.table().features("pair").shape == (3, 2)


def test_keys_are_stable_and_take_in_what_decides_the_outcome(tmp_path):
    text = '["%s","u/1",["a","b"],{"x":1}]' % ("ab" * 32)
    assert unit_key("ab" * 32, "u/1", ("a", "b"), {"x": 1}) == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert unit_key("ab" * 32, "u/1", ("a", "b"), {"x": 1}) == "f39d7c29af057c5fd9aeb1fbb2cd4d90"
    base = unit_key("s", "u", ("a",), {"x": 1})
    others = [("t", "u", ("a",), {"x": 1}), ("s", "v", ("a",), {"x": 1}), ("s", "u", ("b",), {"x": 1})]
    others += [("s", "u", ("a",), {"x": 2}), ("s", "u", ("a",), {}), ("s", "u", ("a", "b"), {"x": 1})]
    assert base not in {unit_key(*o) for o in others}


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_the_batch_changes_nothing(tmp_path, batch):
    small = go(tmp_path / "a", Drawing(num=9, chunk=5), how=replace(CPU, batch=3))
    other = go(tmp_path / "b", Drawing(num=9, chunk=5), how=replace(CPU, batch=batch))
    assert small.id == other.id and outcome(small) == outcome(other)
    assert (small.path / "scores.csv").read_bytes() == (other.path / "scores.csv").read_bytes()
    assert {r.batch for r in other.records().values()} == {batch}


def test_shards_in_any_order_make_the_same_run(tmp_path):
    whole = go(tmp_path / "whole", Drawing(num=10))
    for order in ((0, 1, 2), (2, 0, 1)):
        folder = tmp_path / "".join(map(str, order))
        seen = []
        for k in order:
            quiet = Quiet()
            run = go(folder, Drawing(num=10), shard=f"{k}/3", quiet=quiet)
            seen += quiet.pending
        assert sorted(seen) == sorted({r.unit for r in whole.records().values()})
        assert run.id == whole.id and outcome(run) == outcome(whole)
        assert (run.path / "scores.csv").read_bytes() == (whole.path / "scores.csv").read_bytes()
        quiet = Quiet()
        go(folder, Drawing(num=10), quiet=quiet)
        assert quiet.pending == []


def test_another_shard_count_finishes_what_one_began(tmp_path):
    whole = go(tmp_path / "whole", Drawing(num=10))
    go(tmp_path / "b", Drawing(num=10), shard="1/3")
    go(tmp_path / "b", Drawing(num=10), shard="0/2")
    run = go(tmp_path / "b", Drawing(num=10))
    assert outcome(run) == outcome(whole)
    assert sum(len(p.read_bytes().splitlines()) for p in run.path.glob("units*.jsonl")) == len(outcome(whole))


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/2", "1/0", "a/b", "1/2/3", "½/2"])
def test_a_shard_is_k_of_n_from_zero(text):
    with pytest.raises(UsageError, match="0 <= k < n"):
        parse_shard(text)


def test_scores_count_all_shards_even_when_two_end_together(tmp_path):
    go(tmp_path, Drawing(num=4), shard="0/2")

    class Late(Drawing):
        def score(self, table):
            found = super().score(table)
            if len(table) == 2:  # while these are reduced, the other shard appends and reduces
                go(tmp_path, Drawing(num=4), shard="1/2")
            return found

    run = next(Store(tmp_path).runs())
    (run.path / "scores.csv").unlink()
    assert derive(run, Late(num=4))[0].n == 4 == run.scores()[0].n


# -- identity


def test_what_is_another_run_and_what_is_not(tmp_path):
    store = Store(tmp_path)
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"first")

    def ident(suite=None, seed=0, limit=None, **flags):
        given = {k: str(v) for k, v in flags.items()}
        arguments = bind(Painter, f"{TOYS}:Painter", {}, given)
        plan = prepare(suite or Drawing(), f"{TOYS}:Painter", arguments, store=store, seed=seed, limit=limit)
        return json.dumps(plan.spec, sort_keys=True)

    base = ident()
    assert ident(speed=3) == base  # after the star: how fast
    assert ident(bright=0.0) == base
    with_weights = ident(weights=weights)
    others = [base, with_weights, ident(bright=0.5), ident(Drawing(num=7)), ident(Drawing(colour="red"))]
    others += [ident(seed=1), ident(limit=2), ident(DrawingTwiceNamed())]
    weights.write_bytes(b"second")  # in place
    others.append(ident(weights=weights))
    assert len(set(others)) == len(others)
    weights.write_bytes(b"first")
    (tmp_path / "elsewhere").mkdir()
    weights.rename(tmp_path / "elsewhere" / "w.bin")
    assert ident(weights=tmp_path / "elsewhere" / "w.bin") == with_weights  # the bytes count, not the place


class DrawingTwiceNamed(Drawing):
    """Another version of the suite."""

    version = 2


def test_a_file_that_is_named_as_the_model_is_part_of_the_identity(tmp_path):
    ids = []
    for folder, bright in (("a", 0.0), ("b", 0.5), ("c", 0.0)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "model.py"
        text = f"import sys; sys.path.insert(0, {str(Path(TOYS).parent)!r})\nfrom toys import Painter\n"
        file.write_text(text + f"class Mine(Painter):\n    def __init__(self): super().__init__({bright})\n")
        ids.append(prepare(Drawing(), f"{file}:Mine", store=Store(tmp_path)).spec["adapter"])
    assert ids[0] == ids[2] != ids[1] and ids[0].startswith("model.py:Mine@")


def test_how_the_work_is_done_is_no_part_of_the_identity(tmp_path, monkeypatch):
    base = go(tmp_path / "a")
    for i, how in enumerate((replace(CPU, keep="none"), replace(CPU, batch=1), replace(CPU, max_failures=1.0))):
        run = go(tmp_path / f"b{i}", how=how)
        assert run.id == base.id and run.spec == base.spec
        assert {k for k in outcome(run)} == set(outcome(base))


def test_a_live_model_needs_an_identity_that_tells_it_from_others(tmp_path):
    with pytest.raises(Error, match="live model") as caught:
        execute(Drawing(), Painter(), store=Store(tmp_path), how=CPU)
    assert "identity=" in caught.value.hint and not (tmp_path / "runs").exists()
    assert go(tmp_path, identity={"step": 1}).id != go(tmp_path, identity={"step": 2}).id
    with pytest.raises(Error, match="cannot be written as JSON"):
        go(tmp_path, identity={"step": object()})
    with pytest.raises(Error, match="this process only"):
        go(tmp_path, identity={"step": 3}, how=replace(CPU, isolate=True))


def test_a_limit_takes_the_first_units_where_there_is_no_manifest(tmp_path):
    assert len(go(tmp_path, Drawing(num=10, chunk=2), limit=3).table()) == 4  # whole units
    assert len(go(tmp_path, Drawing(num=10, chunk=2), limit=100).table()) == 10
    with pytest.raises(UsageError, match="limit is 0"):
        go(tmp_path, limit=0)


def test_a_missing_capability_is_said_before_anything_is_opened(tmp_path):
    with pytest.raises(Error) as caught:
        go(tmp_path, WhiteBox())
    assert str(caught.value) == "suite `white-box` needs DenoiserAccess; `Painter` has TextToImage"
    assert caught.value.hint == "suites that run on `Painter`: generation" and not (tmp_path / "runs").exists()


# -- failures


def test_a_failed_unit_is_recorded_the_others_go_on_and_a_retry_mends_it(tmp_path):
    until = tmp_path / "mended"
    faulty = Faulty("raises", at="item-003", until=str(until))
    run = go(tmp_path, Drawing(num=8), faulty)
    (failure,) = run.failures()
    assert (
        failure.unit == "u/001"
        and failure.attempt == 1
        and failure.rows == ()
        and failure.error["kind"] == "RuntimeError"
    )
    assert failure.error["message"] == "the model gave up\\x1b[31m on purpose"
    assert "in raises" in failure.error["trace"] and len(run.table()) == 6
    score = run.scores()[0]
    assert (score.n, score.expected, score.complete) == (6, 8, False) and not run.complete()
    go(tmp_path, Drawing(num=8), faulty)
    assert run.failures()[0].attempt == 2
    until.touch()
    quiet = Quiet()
    go(tmp_path, Drawing(num=8), faulty, quiet)
    assert quiet.pending == ["u/001"] and quiet.records[0].attempt == 3 and run.complete()
    undisturbed = go(tmp_path / "other", Drawing(num=8))
    assert (run.path / "scores.csv").read_bytes() == (undisturbed.path / "scores.csv").read_bytes()


@pytest.mark.parametrize(
    "fault, kind, says",
    [
        ("nan", "NonFinite", "picture holds NaN or infinity in 1 of 2 pictures, item 'item-003' first"),
        ("infinite", "NonFinite", "item 'item-003' first"),
        ("fewer", "BadOutput", "picture has 1 pictures for 2 items"),
        ("empty", "BadOutput", "picture is empty: (2, 3, 0, 4)"),
        ("none", "BadOutput", "run: picture is NoneType, not a list or an array"),
        ("stops", "SystemExit", "0"),
        ("memory_always", "RuntimeError", "out of memory"),
        ("surrogate", "RuntimeError", "half a character: \\ud800"),
    ],
)
def test_a_bad_output_fails_its_unit_by_name(tmp_path, fault, kind, says):
    run = go(tmp_path, Drawing(num=6), Faulty(fault, at="item-003"))
    (failure,) = run.failures()
    assert failure.unit == "u/001" and failure.error["kind"] == kind and says in failure.error["message"]
    assert len(run.table()) == 4


class Wrong(Drawing):
    """Answers with other items than were asked for, or with columns of another length."""

    def run(self, unit, model, ctx):
        for ids, media in super().run(unit, model, ctx):
            match self.colour:
                case "twice":
                    yield ids, media
                    yield ids, media
                case "missing":
                    yield ids[:1], {k: v[:1] for k, v in media.items()}
                case "foreign":
                    yield ["other", *ids[1:]], media
                case "short":
                    yield ids, {**media, "parity": media["parity"][:1]}
                case "column":
                    yield ids, {**media, "item": ids}
                case "unwritable":
                    yield ids, {**media, "thing": [object() for _ in ids]}
                case "hidden-nan":
                    yield ids, {**media, "list": [[float("nan")] for _ in ids]}


@pytest.mark.parametrize(
    "colour, says",
    [
        ("twice", "run() returned item 'item-000' twice"),
        ("missing", "run() left out 1 of 2 items, 'item-001' first"),
        ("foreign", "run() returned item 'other', which is not in unit 'u/000'"),
        ("short", "run: parity has 1 values for 2 items"),
        ("column", "'item' is a column of the harness"),
        ("unwritable", "cannot be written as JSON"),
        ("hidden-nan", "cannot be written as JSON"),
    ],
)
def test_a_suite_that_answers_wrongly_fails_its_unit_by_name(tmp_path, colour, says):
    run = go(tmp_path, Wrong(num=2, colour=colour))
    (failure,) = run.failures()
    assert says in failure.error["message"]


class Measured(Drawing):
    """A column with a value that is not finite."""

    def run(self, unit, model, ctx):
        for ids, media in super().run(unit, model, ctx):
            yield (
                ids,
                {**media, "loss": [float("nan"), np.float32("inf")], "count": np.arange(2), "text": ["\ud800", "ok"]},
            )


def test_what_is_not_finite_is_null_and_any_text_is_kept(tmp_path):
    run = go(tmp_path, Measured(num=2))
    rows = run.table().rows
    assert [r["loss"] for r in rows] == [None, None] and [r["count"] for r in rows] == [0, 1]
    assert rows[0]["text"] == "\ud800" and run.complete()


class Infinite(Mean):
    """A reduction that overflows."""

    def reduce(self, table):
        return replace(super().reduce(table), value=float("inf"), low=1.0, high=float("nan"))


class Overflowing(Drawing):
    """With that metric."""

    metrics = (Infinite(),)


def test_a_score_that_is_not_finite_is_null_with_a_reason(tmp_path):
    score = go(tmp_path, Overflowing()).scores()[0]
    assert (score.value, score.low, score.high, score.complete) == (None, None, None, False)
    assert "not finite" in score.note


def test_flat_pictures_are_scored_and_flagged(tmp_path):
    run = go(tmp_path, TwoPictures(), Faulty("flat", at="item-003"))
    assert [row.get("flat") for row in run.table().rows] == [None, None, None, ["picture"], None, None]
    assert run.complete()


class TwoPictures(Drawing):
    """A picture beside one that is never flat."""

    def run(self, unit, model, ctx):
        for ids, media in super().run(unit, model, ctx):
            yield ids, {**media, "other": np.stack([np.linspace(0, 1, 48).reshape(3, 4, 4) for _ in ids])}


def test_the_run_stops_early_when_the_rest_would_fail_too(tmp_path):
    with pytest.raises(Error, match="stopped: 4 of 4 units failed") as caught:
        go(tmp_path, Drawing(num=20), Faulty("raises"))
    assert "--max-failures" in str(caught.value) and "bench show drawing-" in caught.value.hint
    run = next(Store(tmp_path).runs())
    assert len(run.failures()) == 4 and caught.value.exit_code == 1
    quiet = Quiet()
    run = go(tmp_path / "b", Drawing(num=20), Faulty("raises"), quiet, how=replace(CPU, max_failures=1.0))
    assert len(quiet.records) == 10 == len(run.failures())


def test_out_of_memory_halves_the_batch_and_records_it(tmp_path):
    run = go(tmp_path, Drawing(num=16, chunk=8), Faulty("memory", at="item-00"), how=replace(CPU, batch=8))
    assert {r.unit: r.batch for r in run.records().values()} == {"u/000": 2, "u/001": 2} and run.complete()
    assert outcome(run) == outcome(go(tmp_path / "b", Drawing(num=16, chunk=8)))


def test_scratch_survives_a_failure_and_is_removed_after_success(tmp_path):
    run = go(tmp_path, Scratching(num=4), how=replace(CPU, max_failures=1.0))
    assert len(run.failures()) == 2 and len(list((tmp_path / "scratch").rglob("note.txt"))) == 2
    run = go(tmp_path, Scratching(num=4))
    assert run.complete() and not list((tmp_path / "scratch").rglob("note.txt"))


def test_scratch_stays_below_the_store_whatever_the_model_is_called(tmp_path):
    how = replace(CPU, max_failures=1.0)
    go(tmp_path / "s", Scratching(num=2), identity={"name": "../../../escape"}, how=how)
    notes = list(tmp_path.rglob("note.txt"))
    assert notes and all(n.resolve().is_relative_to(tmp_path / "s" / "scratch") for n in notes)


# -- before the first unit


def test_a_long_run_tries_two_items_first_and_records_nothing_when_they_fail(tmp_path):
    many, how = Drawing(num=51 * 3, chunk=3), replace(CPU, keep="none")
    with pytest.raises(Error, match="a trial of two items failed: RuntimeError") as caught:
        go(tmp_path, many, Faulty("raises", at="item-000"), how=how)
    assert "nothing was recorded" in caught.value.hint and not list((tmp_path / "runs").iterdir())
    quiet = Quiet()
    go(tmp_path, Drawing(num=50 * 3, chunk=3), Faulty("raises", at="item-000"), quiet, how=how)
    assert len(quiet.records) == 50  # a run that is not long finds out unit by unit
    counted = Counting()
    go(tmp_path / "b", many, counted, how=how)
    assert counted.items == 51 * 3 + 2


class Counting(Painter):
    items = 0

    def generate(self, prompts, seeds):
        self.items += len(prompts)
        return super().generate(prompts, seeds)


def test_too_little_room_is_said_before_the_first_unit(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(Error, match="5 MB free"):
        go(tmp_path)


def test_fresh_moves_aside_and_shards_may_not(tmp_path):
    run = go(tmp_path)
    quiet = Quiet()
    again = go(tmp_path, quiet=quiet, fresh=True)
    assert again.id == run.id and len(quiet.records) == 3 and len(list((tmp_path / "runs").glob("*.old"))) == 1
    with pytest.raises(UsageError, match="other shards"):
        go(tmp_path, fresh=True, shard="0/2")


@pytest.mark.parametrize("keep, kept", [("none", 0), ("sample", 6), ("all", 6), ("auto", 6)])
def test_media_are_kept_as_asked_and_features_always(tmp_path, keep, kept):
    run = go(tmp_path, how=replace(CPU, keep=keep))
    names = [name for r in run.records().values() for name in r.blobs]
    assert sum(n.startswith("media/picture/") for n in names) == kept
    assert sum(n == "features/pair" for n in names) == 3 and run.complete()


def test_a_sample_is_chosen_by_hash_and_is_64_items_whatever_the_units(tmp_path, monkeypatch):
    plans = [prepare(Drawing(num=100, chunk=c), Painter(), store=Store(tmp_path), identity={}) for c in (10, 50)]
    kept = [execution._kept("sample", plan) for plan in plans]
    assert len(kept[0]) == 64 and kept[0] == kept[1] != {f"item-{i:03d}" for i in range(64)}
    monkeypatch.setattr(execution, "SAMPLE", 2)
    run = go(tmp_path, how=replace(CPU, keep="sample"))
    assert len([n for r in run.records().values() for n in r.blobs if n.startswith("media/")]) == 2


@pytest.mark.parametrize("text, devices", [("cpu", ("cpu",)), ("cpu, cpu", ("cpu", "cpu")), ("1", ("cuda:1",))])
def test_devices(text, devices):
    assert resolve_devices(text) == devices


def test_an_unknown_device_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        resolve_devices("gpu")


def test_a_missing_or_damaged_blob_makes_its_unit_pending_or_is_named(tmp_path):
    run = go(tmp_path)
    record = run.records()[next(iter(run.records()))]
    path = run.store.path(record.blobs["features/pair"])
    path.unlink()
    quiet = Quiet()
    go(tmp_path, quiet=quiet)
    assert quiet.pending == [record.unit] and path.is_file() and run.complete()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(Error, match=record.blobs["features/pair"]) as caught:
        go(tmp_path)
    assert str(path) in caught.value.hint
    path.unlink()
    assert go(tmp_path).complete() and path.read_bytes() == whole


def test_a_damaged_scores_csv_is_derived_again(tmp_path):
    run = go(tmp_path)
    path = run.path / "scores.csv"
    whole = path.read_bytes()
    for damaged in (b"", b"\xff\xfe", whole[:-9], b"run,suite\nx\n"):
        path.write_bytes(damaged)
        go(tmp_path)
        assert path.read_bytes() == whole


# -- interruptions of the command


def test_a_signal_in_the_middle_of_an_append_waits_until_the_record_is_whole_and_counted(
    tmp_path, monkeypatch, request
):
    real, sent = os.write, []

    def interrupted(fd, data):
        if "units.jsonl" in os.readlink(f"/proc/self/fd/{fd}") and not sent:
            sent.append(real(fd, bytes(data)[:20]))
            os.kill(os.getpid(), signal.SIGINT)
            return sent[0]
        return real(fd, data)

    monkeypatch.setattr(os, "write", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    quiet = Quiet()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, quiet=quiet)
    log = next(Store(tmp_path).runs()).log("").read_bytes()
    assert sent and log.count(b"\n") == 1 == len(quiet.records) and log.endswith(b"}\n")


def test_a_disk_that_fills_stops_the_run_and_the_same_command_completes_it(tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", Drawing(num=10))
    real, calls = os.fsync, []

    def full(fd):
        if "units.jsonl" in os.readlink(f"/proc/self/fd/{fd}"):
            calls.append(fd)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Error, match=r"cannot append to .*units.jsonl: No space left on device") as caught:
        go(tmp_path / "b", Drawing(num=10))
    assert caught.value.exit_code == 1 and len(calls) == 3
    assert len(next(Store(tmp_path / "b").runs()).records()) >= 2
    monkeypatch.undo()
    run = go(tmp_path / "b", Drawing(num=10))
    assert (run.path / "scores.csv").read_bytes() == (whole.path / "scores.csv").read_bytes()
    assert parse_scores((run.path / "scores.csv").read_bytes()) == whole.scores()


def test_two_metrics_from_the_start(tmp_path):
    run = go(tmp_path, DrawingTwice())
    assert [s.metric for s in run.scores() if s.slice == "all"] == [Mean.name, Doubled.name]
