"""The store holds what it was given: through crashes, damage, full disks and second writers."""

import errno
import json
import os
import shutil
import zlib
from dataclasses import fields, replace
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import door
from bench.identity import digest
from bench.records import heal, line, parse_line, read_lines, record_line
from bench.scores import COLUMNS, dump_scores, parse_scores
from bench.store import Run, Store
from bench.types import Error, Record, Score, Stop, Unit

SPEC = {"suite": "drawing", "suite_version": 1, "fields": {"num": 4}, "data": None, "seed": 0, "limit": None}
META = {"model": "painter", "units": 4, "items": 8, "manifests": [], "suite_ref": "drawing", "suite_fields": {}}
HOSTILE = ["=1+1", "'quoted", "a,b", 'say "hi"', "line\nline", "carriage\rreturn", "\r\n", "\x00\x1b[31m", "\ud800",
           "\u202e", "", '{"a":1,"crc":"00000000"}', "−5", "-5", "+5", "true", " padded ", "\ufeff", "😀"]  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def run(store):
    return store.open(SPEC, META)


def record(run, number, status="ok", **more):
    unit = Unit(f"u{number}", (f"i{number}",))
    rows = ({"item": f"i{number}", "text": HOSTILE[number % len(HOSTILE)], "psnr": number / 7, "bits": None},)
    error = {"kind": "E", "message": "m", "trace": "t\n"} if status == "failed" else None
    return Record(run.key(unit), unit.id, status, rows if status == "ok" else (), error=error, **more)


def fill(run, count=8):
    records = [record(run, i) for i in range(count)]
    with run.writer() as log:
        for one in records:
            log.append(record_line(one))
    return {r.key: r for r in records}


# -- lines


def test_a_line_ends_with_the_crc_of_what_stands_before_it(run):
    raw = record_line(record(run, 3))
    body, tail = raw[:-19], raw[-19:]
    assert tail == b',"crc":"%08x"}\n' % zlib.crc32(body)
    assert json.loads(raw)["rows"][0]["text"] == HOSTILE[3]


def test_records_come_back_as_they_were(run):
    written = fill(run, len(HOSTILE))
    assert Run(run.store, run.path).records() == written


def test_ok_beats_failed_and_later_beats_earlier(run):
    with run.writer() as log:
        for status, attempt in (("failed", 1), ("failed", 2), ("ok", 3), ("failed", 4), ("ok", 5)):
            log.append(record_line(record(run, 0, status, attempt=attempt)))
        log.append(record_line(record(run, 1, "failed", attempt=1)))
        log.append(record_line(record(run, 1, "failed", attempt=2)))
    found = {r.unit: (r.status, r.attempt) for r in run.records().values()}
    assert found == {"u0": ("ok", 5), "u1": ("failed", 2)}
    assert [r.unit for r in run.failures()] == ["u1"]
    assert [u.id for u in run.pending([Unit("u0", ("i0",)), Unit("u1", ("i1",)), Unit("u2", ("i2",))])] == ["u1", "u2"]


def test_readers_take_the_files_of_all_shards(run):
    for i, shard in enumerate(("0/3", "1/3", "2/3", "")):
        with run.writer(shard) as log:
            log.append(record_line(record(run, i)))
    names = sorted(p.name for p in run.path.glob("units*.jsonl"))
    assert names == ["units.0of3.jsonl", "units.1of3.jsonl", "units.2of3.jsonl", "units.jsonl"]
    assert [row["item"] for row in run.table().rows] == ["i0", "i1", "i2", "i3"]


@pytest.mark.parametrize(
    "bodies", [(b'{"a":1},{"b":2',), (b'{"a":1},{"b":2', b'{"x":[{"y":1', b'{"z":1}]'), (b'{"crc":5},{"b":2', b"[1")]
)
def test_lines_that_are_no_objects_are_none_together_either(run, bodies):
    """Each has its checksum; joined with commas they would be objects."""
    path = run.log("")
    path.write_bytes(b"".join(body + b',"crc":"%08x"}\n' % zlib.crc32(body) for body in bodies))
    assert read_lines(path)[0] == []
    heal(path)
    assert len(path.read_bytes().splitlines()) == len(bodies)


NO_RECORDS = [
    {"note": "by hand"},
    {"key": ["k"], "unit": "u", "status": "ok"},
    {"key": "k", "unit": "u", "status": "done"},
    {"key": "k", "unit": "u", "status": "ok", "rows": 5},
    {"key": "k", "unit": "u", "status": "ok", "rows": ["a"]},
    {"key": "k", "unit": "u", "status": "ok", "blobs": {"media/x": 1}},
    {"key": "k", "unit": "u", "status": "failed", "error": "text"},
]


def test_an_object_that_is_no_record_is_passed_over(run):
    written = fill(run, 2)
    with run.writer() as log:
        for value in NO_RECORDS:
            log.append(line(value))
    assert run.records() == written and len(run.table().rows) == 2


@pytest.mark.parametrize(
    "change",
    [{"key": ["k"]}, {"columns": None}, {"columns": {"y": 1}}, {"columns": {"y": []}}, {"blobs": [1]}, {"metric": 3}],
)
def test_what_was_measured_later_is_used_where_it_fits_the_record(run, change):
    (key,) = fill(run, 1)
    path = run.path / "extra" / "m.jsonl"
    door.make_folder(path.parent)
    good = {"key": key, "columns": {"x": [0.5]}, "blobs": {}, "metric": "m"}
    path.write_bytes(line(good) + line({**good, **change}) + line({"key": key}))
    (row,) = run.table().rows
    assert row["x"] == 0.5 and "y" not in row


# -- damage


def test_a_torn_last_line_is_cut_wherever_it_was_torn(run):
    written = fill(run, 3)
    path = run.log("")
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in [*range(start, len(whole), 4), *range(len(whole) - 4, len(whole))]:
        path.write_bytes(whole[:cut])
        said = []
        with run.writer("", said.append):
            pass
        kept = run.records()
        if cut == len(whole) - 1:  # all but the newline: the record is whole
            assert kept == written and path.read_bytes() == whole and not said
        else:
            assert kept == dict(list(written.items())[:2]) and path.read_bytes() == whole[:start]
            assert len(said) == (cut > start)
    assert not path.with_name("units.jsonl.bad").exists()


def test_a_damaged_middle_line_is_set_aside_once_and_nothing_after_it_is_dropped(run):
    written = fill(run)
    path = run.log("")
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"psnr", b"psnl")
    lines[5] = lines[5][:40]
    path.write_bytes(b"\n".join(lines))
    units = [Unit(r.unit, (f"i{r.unit[1:]}",)) for r in written.values()]
    assert [u.id for u in run.pending(units)] == ["u2", "u5"]
    said = []
    with run.writer("", said.append):
        pass
    (text,) = said
    assert "2 damaged lines" in text and "units.jsonl.bad" in text
    assert [u.id for u in run.pending(units)] == ["u2", "u5"]
    assert path.with_name("units.jsonl.bad").read_bytes() == lines[2] + b"\n" + lines[5] + b"\n"
    healed = path.read_bytes()
    with run.writer("", said.append):
        pass
    assert len(said) == 1 and path.read_bytes() == healed  # healed twice = healed once
    assert path.with_name("units.jsonl.bad").read_bytes() == lines[2] + b"\n" + lines[5] + b"\n"


def test_a_healing_that_was_killed_half_way_is_done_again_with_the_same_result(run, monkeypatch):
    fill(run)
    path = run.log("")
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"psnr", b"psnl")
    path.write_bytes(b"\n".join(lines) + b"torn")
    real, calls = door.replace, []

    def once(target, data, mode=0o666):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(target, data, mode)

    monkeypatch.setattr(door, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        heal(path)
    monkeypatch.undo()
    heal(path)
    assert path.with_name("units.jsonl.bad").read_bytes() == lines[1] + b"\n"
    assert len(run.records()) == 7 and heal(path) == type(heal(path))()


def test_lines_joined_by_a_lost_newline_are_both_kept(run):
    written = fill(run)
    path = run.log("")
    whole = path.read_bytes()
    first = whole.index(b"\n")
    path.write_bytes(whole[:first] + whole[first + 1 :])
    assert run.records() == written
    heal(path)
    assert path.read_bytes() == whole


def test_whole_lines_before_a_torn_one_that_lost_their_newlines_are_kept(run):
    written = fill(run)
    path = run.log("")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"")[:-5])
    kept = list(written.values())[:-1]
    assert list(run.records().values()) == kept
    assert heal(path).bad and path.read_bytes() == b"".join(map(record_line, kept))
    assert heal(path) == type(heal(path))()


# -- run.json


@pytest.mark.parametrize(
    "text, says",
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"[1]", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format": 999}', "has format 999; this version reads 1"),
        (b'{"format": "' + b"9" * 5000 + b'"}', "has format 9{60}; this version"),
        (b'{"format": 1}', "it has no spec"),
        (b'{"format": 1, "spec": [], "model": "m"}', "it has no spec"),
        (json.dumps({"format": 1, "spec": SPEC, **META, "manifests": [1]}).encode(), "manifests are no tables"),
    ],
)
def test_a_run_json_that_cannot_be_read_is_refused_by_name_and_left_alone(run, text, says):
    (run.path / "run.json").write_bytes(text)
    with pytest.raises(Error, match=says) as caught:
        Run(run.store, run.path)
    assert "run.json" in str(caught.value) and caught.value.hint
    with pytest.raises(Error, match=says):
        run.store.open(SPEC, META)
    assert (run.path / "run.json").read_bytes() == text


def test_a_damaged_run_does_not_hide_the_others(store, run):
    other = store.open({**SPEC, "seed": 1}, META)
    (run.path / "run.json").write_bytes(b"{")
    with pytest.raises(Error, match="is damaged"):
        list(store.runs())
    broken = []
    assert [r.id for r in store.runs(broken=lambda name, e: broken.append(name))] == [other.id]
    assert broken == [run.id]


def test_the_same_specification_is_the_same_run_and_another_is_refused_its_folder(store, run):
    assert store.open(SPEC, {**META, "model": "painter"}).path == run.path
    body = json.loads((run.path / "run.json").read_text())
    body["spec"]["seed"] = 5
    (run.path / "run.json").write_text(json.dumps(body))
    with pytest.raises(Error, match="holds another run"):
        store.open(SPEC, META)


def test_fresh_moves_the_old_folder_aside_every_time_and_waits_for_no_writer(store, run):
    fill(run)
    for expected in (1, 2, 3):
        new = store.open(SPEC, META, fresh=True)
        assert not new.records() and len(list((store.root / "runs").glob("*.old"))) == expected
        assert [r.id for r in store.runs()] == [run.id]
    aside = min((store.root / "runs").glob("*.old"), key=lambda p: (len(p.name), p.name))
    assert (aside / "units.jsonl").read_bytes().count(b"\n") == 8
    with new.writer(), pytest.raises(Error, match=r"is being written by .* pid"):
        store.open(SPEC, META, fresh=True)
    assert len(list((store.root / "runs").glob("*.old"))) == 3


def test_a_run_is_found_by_an_unambiguous_part(store, run):
    other = store.open({**SPEC, "seed": 1}, META)
    assert store.run(run.id).id == run.id and store.run(other.id[-6:]).id == other.id
    with pytest.raises(Error, match="ambiguous"):
        store.run("drawing")
    with pytest.raises(Error, match="no run 'drawings'") as caught:
        store.run("drawings")
    assert caught.value.hint


# -- blobs


def test_put_and_get(store):
    address = store.put(b"data", ".bin")
    assert address == digest(b"data") + ".bin" and store.get(address) == b"data"
    assert store.put(b"data", ".bin") == address


@pytest.mark.parametrize("suffix", ["", ".exe", "/../x", ".PNG", "png", ".tar.gz"])
def test_put_takes_suffixes_from_a_closed_list(store, suffix):
    with pytest.raises(ValueError, match="suffix"):
        store.put(b"data", suffix)
    assert not store.root.exists()


@pytest.mark.parametrize("address", ["", "..", "ab/cd", "a" * 64, "a" * 64 + "/../../x.png", "A" * 64 + ".png"])
def test_no_path_is_built_from_a_text_that_is_no_content_address(store, address):
    with pytest.raises(Error, match="no content address"):
        store.get(address)


def test_a_blob_that_is_missing_cut_or_wrong_is_refused_by_name_and_mended_by_putting_it_again(store):
    address = store.put(b"0123456789", ".npy")
    path = store.path(address)
    for data in (None, b"", b"01234", b"9876543210"):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(Error, match=address) as caught:
            store.get(address)
        assert caught.value.hint
        store.put(b"0123456789", ".npy")
        assert store.get(address) == b"0123456789"


def test_a_unit_whose_blob_is_gone_is_pending_again(store, run):
    address = store.put(b"pixels", ".png")
    with run.writer() as log:
        log.append(record_line(replace(record(run, 0), blobs={"media/x/i0": address})))
    unit = Unit("u0", ("i0",))
    assert run.pending([unit]) == []
    store.path(address).unlink()
    assert run.pending([unit]) == [unit]


def test_features_follow_the_order_of_the_rows_and_a_damaged_one_is_an_error_by_name(store, run):
    addresses = []
    with run.writer() as log:
        for i in (2, 0, 1):
            path = store.root / "x.npy"
            np.save(path, np.full((1, 2), i, np.float32))
            addresses.append(store.put(path.read_bytes(), ".npy"))
            log.append(record_line(replace(record(run, i), blobs={"features/f": addresses[-1]})))
    assert run.table().features("f").tolist() == [[0, 0], [1, 1], [2, 2]]
    with pytest.raises(KeyError):
        run.table().features("g")
    store.path(addresses[0]).write_bytes(b"")
    with pytest.raises(Error, match=addresses[0]):
        run.table().features("f")


# -- remembered digests


def test_remembered_digests_survive_and_damage_to_them_is_harmless(store, tmp_path):
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"weights")
    os.utime(weights, (1, 1))
    path = store.root / "fingerprints.json"
    with store.digests() as digests:
        digests.YOUNG_NS = -(10**18)  # believe it at once
        true = digests.of(weights)
    kept = path.read_bytes()
    with store.digests() as digests:
        assert digests.entries[str(weights)][4] == true == digest(b"weights")
    odd = [line({str(weights): entry}) for entry in (1, [], {"a": 1}, [0, 0])]
    for damaged in (b"", b"[]", kept[:-5], kept.replace(true[:8].encode(), b"00000000"), b"\xff", b"{}\n", *odd):
        path.write_bytes(damaged)
        with store.digests() as digests:
            assert digests.of(weights) == true


@pytest.mark.parametrize("kept", [{}, {"rows": []}, {"rows": 1, "blobs": {}}, {"rows": [], "blobs": {"a": "odd"}}])
def test_what_a_unit_without_a_model_gave_is_made_again_where_it_is_something_else(store, kept):
    address = "0" * 64
    store.remember(address, [{"x": 1}], {})
    assert store.recall(address)["rows"] == [{"x": 1}]
    store._shared(address).write_bytes(line(kept))
    assert store.recall(address) is None


# -- two writers


def _hold(root, ready, go):
    run = next(Store(root).runs())
    with run.writer():
        ready.set()
        go.wait(30)
        os._exit(0)  # dies with the lock in its hand


def test_the_second_writer_is_told_host_and_pid_and_the_next_one_starts_after_a_death(run):
    import socket

    spawn = get_context("fork")
    ready, go = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(run.store.root, ready, go))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(Error, match=f"{socket.gethostname()} pid {holder.pid}") as caught, run.writer():
        pass
    assert "nothing was changed" in caught.value.hint and caught.value.exit_code == 1
    with pytest.raises(Error, match=f"pid {holder.pid}"):
        run.check_free()
    with run.writer("0/2"):  # another shard is another file
        pass
    go.set()
    holder.join(30)
    run.check_free()
    with run.writer() as log:
        log.append(record_line(record(run, 0)))
    assert len(run.records()) == 1


def test_without_flock_an_exclusive_file_stands_in_and_a_stale_one_is_taken_over(run, monkeypatch):
    import fcntl

    def refuse(fd, operation):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    stand_in = run.path / "units.exclusive"
    with run.writer():
        assert f"pid {os.getpid()}" in stand_in.read_text()
        with pytest.raises(Error, match=f"pid {os.getpid()}"), run.writer():
            pass
    assert not stand_in.exists()
    import socket

    stand_in.write_text(f"{socket.gethostname()} pid {os.getpid()} another-boot/123")  # the pid was reused
    with run.writer():
        pass
    stand_in.write_text("elsewhere pid 1 boot/1")
    with pytest.raises(Error, match="elsewhere pid 1") as caught, run.writer():
        pass
    assert "units.exclusive" in caught.value.hint


# -- the door under failing system calls


def failing(monkeypatch, name, code, after=0, short=None):
    """Makes os.<name> fail after some calls; returns the list of calls that were made."""
    real, calls = getattr(os, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) <= after:
            return real(*args, **kwargs)
        if short and len(calls) == after + 1:
            return real(args[0], bytes(args[1])[:short])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_failed_append_stops_leaves_what_was_there_and_is_not_tried_again(run, monkeypatch, name, code):
    before = fill(run, 2)
    whole = run.log("").read_bytes()
    with run.writer() as log:
        calls = failing(monkeypatch, name, code, short=10 if name == "write" else None)
        with pytest.raises(Stop, match=os.strerror(code)) as caught:
            log.append(record_line(record(run, 2)))
        assert str(run.log("")) in str(caught.value) and "same command" in caught.value.hint
        assert caught.value.exit_code == 1
        assert len(calls) == (2 if name == "write" else 1)
        with pytest.raises(Stop, match="closed after a failed write"):
            log.append(record_line(record(run, 3)))
        assert len(calls) == (2 if name == "write" else 1)  # no second try on a descriptor that failed
        monkeypatch.undo()
    assert run.log("").read_bytes().startswith(whole)
    assert before.items() <= run.records().items()
    with run.writer() as log:
        log.append(record_line(record(run, 2)))
    healed = {r.unit for r in run.records().values()}
    assert healed == {"u0", "u1", "u2"}


def test_a_short_write_is_continued(run, monkeypatch):
    real = os.write
    with run.writer() as log:
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
        log.append(record_line(record(run, 0)))
        monkeypatch.undo()
    assert read_lines(run.log(""))[1] == type(read_lines(run.log(""))[1])()
    assert len(run.records()) == 1


@pytest.mark.parametrize("name", ["write", "fsync", "rename", "open"])
def test_a_failed_replace_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, name):
    path = tmp_path / "scores.csv"
    door.replace(path, b"old")
    failing(monkeypatch, name, errno.ENOSPC)
    with pytest.raises(Stop, match="No space left"):
        door.replace(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["scores.csv"]


def test_the_name_of_a_new_file_is_made_durable(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    door.replace(tmp_path / "a", b"data")
    assert synced[-1] == str(tmp_path) and len(synced) == 2
    synced.clear()
    door.Appender(tmp_path / "log").close()
    assert synced == [str(tmp_path)]
    synced.clear()
    door.make_folder(tmp_path / "x" / "y")
    assert synced == [str(tmp_path), str(tmp_path / "x")]
    synced.clear()
    door.rename(tmp_path / "a", tmp_path / "b")
    assert synced == [str(tmp_path)]
    synced.clear()
    door.replace_folder(tmp_path / "x", lambda folder: (folder / "f").write_bytes(b"1") and None)
    assert str(tmp_path) in synced and any(s.endswith("/f") for s in synced)


def test_replace_folder_swaps_a_whole_folder_or_keeps_the_old_one(tmp_path):
    target = tmp_path / "page"
    door.replace_folder(target, lambda folder: (folder / "a").write_text("1") and None)
    with pytest.raises(RuntimeError):
        door.replace_folder(target, lambda folder: (_ for _ in ()).throw(RuntimeError("half way")))
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["page"]
    door.replace_folder(target, lambda folder: (folder / "b").write_text("1") and None)
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["page"]


def test_the_log_is_not_followed_through_a_link(run, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    run.log("").symlink_to(victim)
    with pytest.raises(Stop), run.writer():
        pass
    assert victim.read_bytes() == b""


def test_a_store_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(Error, match=f"store {tmp_path}/store is not a folder"):
        Store(tmp_path / "store").open(SPEC, META)


# -- scores.csv

text = st.text(st.characters(), max_size=20) | st.sampled_from(HOSTILE)
number = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([-0.0, 1e-323, 1.7e308, 0.1 + 0.2])
scores = st.builds(
    Score, run=text, suite=text, suite_version=st.integers(), model=text, seed=st.integers(), metric=text, slice=text,
    value=st.none() | number, low=st.none() | number, high=st.none() | number, method=text, n=st.integers(),
    expected=st.integers(), complete=st.booleans(), unit=text, better=text, signature=text, source=text, note=text,
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.lists(scores, max_size=3))
def test_scores_csv_reads_back_exactly(found):
    data = dump_scores(found)
    back = parse_scores(data)
    assert back == found
    assert [str(s.value) for s in back] == [str(s.value) for s in found]  # -0.0 is not 0.0
    assert dump_scores(back) == data


def test_scores_csv_is_read_by_others_and_holds_no_formula():
    import csv
    import io

    score = Score(
        "r", "s", 1, "=HYPERLINK(1)", 0, "a\rb", "all", -3.5, None, 1e-300, "t", 3, 3, True, "dB", "higher", "x"
    )
    rows = list(csv.reader(io.StringIO(dump_scores([score]).decode(), newline="")))
    assert rows[0] == list(COLUMNS) == [f.name for f in fields(Score)] and len(rows) == 2
    cells = dict(zip(*rows, strict=True))
    assert cells["model"] == "'=HYPERLINK(1)" and cells["metric"] == "a\rb"
    assert (cells["value"], cells["low"], cells["high"], cells["complete"]) == ("-3.5", "", "1e-300", "true")


@pytest.mark.parametrize(
    "data, says",
    [
        (b"run\nx\n", "line 2"),
        (b"\xff\xfe\n", "line"),
        (",".join(COLUMNS).encode() + b"\nr,s\n", "line 2"),
        (",".join(COLUMNS).encode() + b"\nr,s,one\n", "line 2"),
        (",".join(COLUMNS).encode() + b'\n"' + b"x" * 200_000 + b'"\n', "line"),
    ],
)
def test_a_damaged_scores_csv_is_refused_by_file_and_line(data, says):
    with pytest.raises(Error, match=says) as caught:
        parse_scores(data, "published.csv")
    assert "published.csv" in str(caught.value) and "columns" in caught.value.hint


def test_scores_are_derived_and_may_be_deleted(run):
    assert run.scores() == []
    shutil.rmtree(run.path / "extra", ignore_errors=True)
    assert parse_line(b"") is None and parse_line(b'{"crc":"00000000"}') is None
