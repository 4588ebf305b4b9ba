"""Boards: what stands where, ranks against SciPy's paired test, pages without a store, numbers that read back."""

import base64
import csv
import io
import json
import math
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy import stats as peer
from test_report_toys import BOARD, METRICS, add_run, codec_rows, codec_store, png, write_board

from bench.report import collect, figures, find_board, gallery, load, numbers, rank, render
from bench.report.board import Board, Column, Rank, read_board
from bench.scores import dump_scores
from bench.store import Store
from bench.types import Error, Estimate, Record, Score, UsageError


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    """A rendered board over six codecs; tests read it and leave it alone."""
    root = tmp_path_factory.mktemp("codecs")
    store = codec_store(root / "store")
    summary = render(write_board(root), store, root / "board")
    return root, store, summary


def normal_rows(mean: float, spread: float, n: int = 20, shared: float = 1.0, seed: int = 0):
    """Rows whose psnr is a common item effect plus noise of a model's own; every item its own cluster."""
    items = np.random.default_rng(99).normal(0, shared, n)
    own = np.random.default_rng(seed).normal(mean, spread, n)
    return [{"item": f"i{k}", "cluster": f"i{k}", "psnr": float(v)} for k, v in enumerate(items + own)]


PSNR = {"psnr": ("dB", "higher")}


def psnr_board(**changes) -> Board:
    column = Column("reconstruction", "psnr")
    return replace(Board("b", "A board", column=(column,), rank=Rank(column.key)), **changes)


# -- board files


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('titel = "x"', "unknown key 'titel'", "title"),
        ('title = "x"\n[[column]]\nsuite = "s"\nmetrik = "psnr"', "[[column]] 1: unknown key 'metrik'", "metric"),
        ('title = "x"\n[[column]]\nsuite = "s"', "'metric' is missing", ""),
        ('title = "x"', "no column", "[[column]]"),
        ("title = 3", "title = 3 must be a string", ""),
        ('title = "x"\n[[column]]\nsuite = "s"\nmetric = "m"\ndigits = "two"', "digits = 'two' must be int", ""),
        (
            'title = "x"\n[[column]]\nsuite = "s"\nmetric = "m"\n[rank]\nby = "s:n"',
            "rank.by = 's:n' is no column",
            "s:m",
        ),
        ('title = "x"\nsources = 3\n[[column]]\nsuite = "s"\nmetric = "m"', "sources must be a list of strings", ""),
        ('title = "x"\n[column]\nsuite = "s"', "column must be written [[column]]", ""),
        ('title = "x"\n' + '[[column]]\nsuite = "s"\nmetric = "m"\n' * 2, "column s:m stands twice", ""),
        (
            'title = "x"\n[[column]]\nsuite="s"\nmetric="m"\n[[figure]]\nkind="scater"\nsuite="s"\ntitle="t"',
            "figure kind 'scater'",
            "scatter",
        ),
        (
            'title = "x"\n[[column]]\nsuite="s"\nmetric="m"\n[[figure]]\nkind="scatter"\nsuite="s"\ntitle="t"\nx="m"',
            "figure 't' has no y",
            "x and y",
        ),
        ('title = "x"\n[[column]]\nsuite="s"\nmetric="m"\n[gallery]\nitems = 49', "gallery.items = 49", "48"),
        ("title = ", "Invalid value", "TOML"),
        ("x = " + "[" * 5000, "", "TOML"),
        ("x = " + "9" * 5000, "", "TOML"),
    ],
)
def test_board_errors_name_file_key_and_mend(tmp_path, text, message, hint):
    path = write_board(tmp_path, text)
    with pytest.raises(Error) as caught:
        read_board(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert hint in caught.value.hint


def test_boards_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    mine = write_board(tmp_path / "reports", name="mine")
    assert find_board("mine") == mine and find_board("a/b.toml").name == "b.toml"
    with pytest.raises(UsageError) as caught:
        find_board("mime")
    assert "mine" in caught.value.hint


def test_the_boards_that_come_with_the_project_can_be_read_and_their_published_rows_too():
    from pathlib import Path

    folder = Path(__file__).parents[1] / "reports"
    boards = [read_board(p) for p in sorted(folder.glob("*.toml"))]
    assert "reconstruction" in [b.name for b in boards]
    for board in boards:
        for source in board.sources:
            if source.startswith("published/"):
                scores = load(folder / source)
                assert len(scores) > 100
                assert all(s.source and s.source != "measured" and s.value is not None for s in scores)


# -- what stands on the page


def test_scores_read_back_exactly(codecs):
    root, store, summary = codecs
    stored = [s for run in store.runs() for s in run.scores()]
    assert sorted(load(root / "board"), key=repr) == sorted(stored, key=repr)
    assert (summary.models, summary.metrics) == (6, 3)
    assert "6 models, 3 metrics" in str(summary)


class Cells(HTMLParser):
    """The first table of the page as rows of text."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside, self.tables = [], False, 0

    def handle_starttag(self, tag, attributes):
        self.tables += tag == "table"
        if self.tables == 1 and tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th") or (self.inside and tag not in ("td", "th", "tr"))
        if self.tables == 1 and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tables == 1 and self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_table_shows_values_intervals_and_shared_ranks(codecs):
    root, store, _ = codecs
    parser = Cells()
    parser.feed((root / "board" / "index.html").read_text())
    head, *body = parser.rows
    psnr = {run.meta["model"]: run.scores()[0] for run in store.runs()}
    assert [r[1] for r in body] == sorted(psnr, key=lambda m: -psnr[m].value)
    for row in body:
        s = psnr[row[1]]
        assert row[2] == f"{s.value:.2f}±{(s.high - s.low) / 2:.2f}"
    assert "PSNR ↑" in head[2] and "dB" in head[2]


def test_the_same_scores_give_the_same_bytes(codecs, tmp_path):
    root, store, _ = codecs
    render(root / "board.toml", store, tmp_path / "board")
    first = {p.relative_to(root / "board"): p.read_bytes() for p in (root / "board").rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path / "board"): p.read_bytes() for p in (tmp_path / "board").rglob("*") if p.is_file()}
    assert first == again and len(first) == 6 + 6 + 2 - 1


def test_what_an_earlier_page_drew_goes_and_what_others_put_there_stays(codecs, tmp_path):
    root, store, _ = codecs
    shutil.copytree(root / "board", tmp_path / "board")
    mine, old = tmp_path / "board" / "figures" / "mine.svg", tmp_path / "board" / "tables" / "old.md"
    mine.write_text("<svg/>"), old.write_text("drawn before")
    sums = tmp_path / "board" / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  tables/old.md\n{'0' * 64}  ../outside.md\n")
    (tmp_path / "outside.md").write_text("not ours")
    render(root / "board.toml", store, tmp_path / "board")
    assert mine.exists() and (tmp_path / "outside.md").exists() and not old.exists()


def test_a_clone_without_a_store_draws_the_same_page(codecs, tmp_path):
    root, _, _ = codecs
    shutil.copytree(root / "board", tmp_path / "board")
    shutil.copy(root / "board.toml", tmp_path)
    (tmp_path / "board" / "index.html").unlink()
    render(tmp_path / "board.toml", None, tmp_path / "board")
    for path in sorted((root / "board").rglob("*")):
        if path.is_file():
            assert (tmp_path / "board" / path.relative_to(root / "board")).read_bytes() == path.read_bytes(), path.name


def test_rows_of_a_touched_file_are_cited(codecs, tmp_path):
    root, _, _ = codecs
    shutil.copytree(root / "board", tmp_path / "board")
    shutil.copy(root / "board.toml", tmp_path)
    file = tmp_path / "board" / "scores.csv"
    file.write_text(file.read_text().replace("webp-80", "mine-80"))
    assert {s.source for s in load(tmp_path / "board")} == {"read from scores.csv"}
    summary = render(tmp_path / "board.toml", None, tmp_path / "board")
    assert summary.models == 0 and summary.cited > 0
    assert "mine-80" in (tmp_path / "board" / "index.html").read_text()


def test_the_digests_can_be_checked_by_sha256sum(codecs):
    import hashlib

    folder = codecs[0] / "board"
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def score(**changes) -> Score:
    base = Score(
        "r", "reconstruction", 1, "m", 0, "psnr", "all", 30.0, 29.0, 31.0, "t", 10, 10, True, "dB", "higher", "psnr|v:1"
    )
    return replace(base, **changes)


def test_a_strangers_file_is_cited_whatever_it_says(tmp_path):
    file = tmp_path / "scores.csv"
    file.write_bytes(dump_scores([score(), score(source="Doe 2020"), score(n=3)]))
    found = load(file)
    assert [s.source for s in found] == ["read from scores.csv", "Doe 2020", "read from scores.csv"]
    assert [s.complete for s in found] == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(low=31.0, high=29.0), "row 2: the interval of psnr, 31.0 to 29.0, is upside down"),
        (dict(better="up"), "row 2: better = 'up'"),
        (dict(value=math.nan), "row 2: value is nan"),
        (dict(high=math.inf), "row 2: high is inf"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(tmp_path, changes, message):
    (tmp_path / "other.csv").write_bytes(dump_scores([score(), score(**changes)]))
    with pytest.raises(Error, match=r"other\.csv") as caught:
        load(tmp_path / "other.csv")
    assert message in str(caught.value)


def test_files_that_are_no_scores_are_refused(tmp_path):
    for data in (b"\xff\xfe\x00", b"run,suite\na,b\n", b'a,"b\n'):
        (tmp_path / "bad.csv").write_bytes(data)
        with pytest.raises(Error):
            load(tmp_path / "bad.csv")
    with pytest.raises(Error, match="cannot be read"):
        load(tmp_path / "absent.csv")


def test_cited_numbers_stand_apart_and_are_never_ranked(tmp_path):
    store = Store(tmp_path / "store")
    for k in range(2):
        add_run(store, f"m{k}", normal_rows(30 + k, 0.1, seed=k), metrics=PSNR)
    cited = [
        score(run="", model="famous", value=99.0, low=None, high=None, source="Doe 2020, Table 3", slice="ImageNet val")
    ]
    (tmp_path / "published.csv").write_bytes(dump_scores(cited))
    path = write_board(
        tmp_path,
        'title = "x"\nsources = ["store", "published.csv"]\n[[column]]\nsuite = "reconstruction"\nmetric = "psnr"\n'
        '[rank]\nby = "reconstruction:psnr"\n',
    )
    summary = render(path, store, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    table, _, rest = text.partition('id="published"')
    assert summary.models == 2 and "famous" not in table.split("<main>")[1]
    assert "famous" in rest and "Doe 2020, Table 3" in rest and "cited" in rest
    assert [s.source for s in load(tmp_path / "out") if s.model == "famous"] == ["Doe 2020, Table 3"]


def test_only_one_protocol_stands_in_a_column(tmp_path):
    store = Store(tmp_path)
    rows = normal_rows(30, 1)
    for k in range(3):
        add_run(store, f"m{k}", normal_rows(30 + k, 1, seed=k), metrics=PSNR)
    add_run(store, "older", rows, metrics=PSNR, version=0)
    add_run(store, "larger", rows, metrics=PSNR, fields={"size": 128, "data": "drawn"})
    add_run(store, "elsewhere", rows, metrics=PSNR, manifests=[{"name": "kodak", "digest": "e" * 64}])
    add_run(store, "changed", rows, metrics=PSNR, manifests=[{"name": "drawn", "digest": "f" * 64}])
    other = add_run(store, "otherwise", rows, metrics=PSNR)
    other.save_scores([replace(s, signature="psnr|trunc|v:1") for s in other.scores()])
    add_run(store, "limited", rows, metrics=PSNR, limit=4)
    found = collect.collect(psnr_board(), store, tmp_path / "out")
    assert [r.label for r in found.rows] == ["m0", "m1", "m2"]
    assert {a.label: a.reason for a in found.apart} == {
        "older": "version 0 of the suite, the column has 1",
        "larger": "size = 128, the column has 64",
        "elsewhere": "data kodak, the column has drawn",
        "changed": "other content of drawn",
        "otherwise": "signature psnr|trunc|v:1, the column has psnr|round|v:1",
    }
    assert len(found.limited) == 1 and all(s.model != "limited" for s in found.scores)


def test_partial_runs_are_counted_and_shown_unranked_when_asked(tmp_path):
    store = Store(tmp_path / "store")
    add_run(store, "whole", normal_rows(30, 1), metrics=PSNR)
    failed = Record(
        "f" * 32, "0001", "failed", error={"kind": "OutOfMemory", "message": "no room", "trace": "line <1>"}
    )
    add_run(store, "part", normal_rows(40, 1), metrics=PSNR, expected=30, failed=failed)
    page_text = {}
    for complete in (True, False):
        board = psnr_board()
        board = replace(board, select=replace(board.select, complete=complete))
        summary = render(board, store, tmp_path / str(complete))
        page_text[complete] = (tmp_path / str(complete) / "index.html").read_text()
        assert summary.models == (1 if complete else 2) and summary.partial == (1 if complete else 0)
        assert "1 × OutOfMemory" in page_text[complete] and "line &lt;1&gt;" in page_text[complete]
    assert "1 partial run left out" in page_text[True]
    assert "partial, 20 of 30" in page_text[False] and '<td class="rank" data-v="">–</td>' in page_text[False]


def test_models_of_one_label_are_told_apart(tmp_path):
    store = Store(tmp_path)
    for seed in (0, 1):
        add_run(store, "same", normal_rows(30, 1, seed=seed), metrics=PSNR, seed=seed)
    found = collect.collect(psnr_board(), store, tmp_path / "out")
    assert [r.label for r in found.rows] == ["same · seed 0", "same · seed 1"]


def test_nothing_selected_says_what_to_do(tmp_path):
    with pytest.raises(Error, match="nothing to show") as caught:
        render(write_board(tmp_path), Store(tmp_path / "none"), tmp_path / "out")
    assert caught.value.hint.startswith("score a model first")


def test_a_withheld_value_is_said_not_drawn_as_zero(tmp_path):
    store = Store(tmp_path / "store")
    none = score(
        metric="fid",
        value=None,
        low=None,
        high=None,
        method="none",
        note="n = 20 is not more than d = 64",
        better="lower",
    )
    run = add_run(store, "m", normal_rows(30, 1), metrics=PSNR)
    run.save_scores([*run.scores(), replace(none, run=run.id, n=20, expected=20)])
    board = psnr_board(column=(Column("reconstruction", "psnr"), Column("reconstruction", "fid")))
    render(board, store, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "withheld" in text and "n = 20 is not more than d = 64" in text


# -- ranks


def test_ties_are_where_scipys_paired_interval_covers_zero(tmp_path):
    """Every pair of eight models: shared rank or not, against scipy.stats.ttest_rel."""
    store = Store(tmp_path)
    means = [30, 30.05, 30.1, 30.4, 30.5, 31, 31.02, 33]
    rows = {f"m{k}": normal_rows(m, 0.3, seed=k, shared=5) for k, m in enumerate(means)}
    for model, r in rows.items():
        add_run(store, model, r, metrics=PSNR)
    found = collect.collect(psnr_board(), store, tmp_path / "out")
    differences = rank.Differences(found)
    cells = {r.label: r.cells[0] for r in found.rows}
    ties = 0
    for a in rows:
        for b in rows:
            if a < b:
                x, y = (np.array([r["psnr"] for r in rows[m]]) for m in (a, b))
                low, high = peer.ttest_rel(x, y).confidence_interval(0.95)
                assert differences.distinct("c", cells[a], cells[b]) == (not low <= 0 <= high)
                ties += low <= 0 <= high
    assert 0 < ties < 28
    for (_, a, b), e in differences.pairs.items():
        a, b = (store.run(r).meta["model"] for r in (a, b))
        x, y = (np.array([r["psnr"] for r in rows[m]]) for m in (a, b))
        interval = peer.ttest_rel(x, y).confidence_interval(0.95)
        np.testing.assert_allclose([e.value, e.low, e.high], [np.mean(x - y), *interval], rtol=1e-9)


def test_pairing_separates_what_single_intervals_cannot(tmp_path):
    """A common item effect of 5 dB hides a difference of 0.5 dB from two intervals, and not from the paired one."""
    store = Store(tmp_path)
    for k in range(2):
        add_run(store, f"m{k}", normal_rows(30 + 0.5 * k, 0.05, seed=k, shared=5), metrics=PSNR)
    found = collect.collect(psnr_board(), store, tmp_path / "out")
    a, b = (r.cells[0] for r in found.rows)
    assert a.score.high > b.score.low
    assert rank.ranks(rank.Differences(found), "c", [a, b]) == [(2, 2), (1, 1)]
    assert rank.best(rank.Differences(found), "c", [a, b]) == 1


def test_rows_are_read_only_where_intervals_touch(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for k in range(30):
        add_run(store, f"m{k:02d}", normal_rows(30 + 3.0 * (k // 2), 0.3, seed=k, shared=0.5), metrics=PSNR)
    found = collect.collect(psnr_board(), store, tmp_path / "out")
    read = []
    original = type(next(iter(found.runs.values()))).table
    monkeypatch.setattr("bench.store.Run.table", lambda run: read.append(run.id) or original(run))
    ranks = rank.ranks(rank.Differences(found), "c", [r.cells[0] for r in found.rows])
    assert len(read) == len(set(read)) == 30  # each once: fifteen pairs of neighbours, no more
    assert sorted(ranks)[0][0] == 1 and sorted(ranks)[-1][1] == 30


def test_a_score_without_rows_falls_back_to_its_own_interval(tmp_path):
    store = Store(tmp_path)
    for k, (value, low, high) in enumerate([(5.0, 4.0, 6.0), (5.5, 4.5, 6.5), (9.0, 8.0, 10.0), (9.5, None, None)]):
        run = add_run(store, f"m{k}", normal_rows(30, 1), metrics=PSNR)
        run.save_scores(
            [
                replace(
                    score(),
                    run=run.id,
                    model=f"m{k}",
                    metric="fid",
                    value=value,
                    low=low,
                    high=high,
                    better="lower",
                    n=20,
                    expected=20,
                )
            ]
        )
    board = psnr_board(column=(Column("reconstruction", "fid"),), rank=Rank("reconstruction:fid"))
    found = collect.collect(board, store, tmp_path / "out")
    assert rank.ranks(rank.Differences(found), "c", [r.cells[0] for r in found.rows]) == [
        (1, 2),
        (1, 2),
        (3, 4),
        (3, 4),
    ]


def test_a_column_of_another_mean_is_not_taken_for_the_score(tmp_path):
    store = Store(tmp_path)
    cells = []
    for k in range(2):
        run = add_run(store, f"m{k}", normal_rows(30 + k, 1, seed=k), metrics=PSNR)
        run.save_scores([replace(s, value=s.value + 1) for s in run.scores()])
    found = collect.collect(psnr_board(), store, tmp_path / "out")
    cells = [r.cells[0] for r in found.rows]
    assert rank.Differences(found)._paired(*cells) is None


# -- numbers as text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (31.4159, 2, "31.42"),
        (-3.5, 1, "−3.5"),
        (-0.0, 2, "0.00"),
        (-0.001, 2, "0.00"),
        (1234.5, 0, "1,234"),
        (3e9, 1, "3.0e+09"),
        (2e-6, 2, "2.00e−06"),
    ],
)
def test_numbers(value, digits, text):
    assert numbers.number(value, digits) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (29.0, 31.0, "±1.00"),
        (29.0, 31.5, "29.00–31.50"),
        (29.9999, 30.0001, "±0.0001"),
        (30.0, 30.0, "±0.00"),
        (None, None, ""),
        (30.5, 31.0, "30.50–31.00"),
    ],
)
def test_intervals(low, high, text):
    assert numbers.interval(score(low=low, high=high), 2) == text


def test_digits_follow_the_interval_or_the_board():
    cell = collect.Cell(score(low=29.93, high=30.07), None)
    assert numbers.digits_for(Column("s", "m"), [cell]) == 3
    assert numbers.digits_for(Column("s", "m", digits=1), [cell]) == 1
    assert numbers.digits_for(Column("s", "m"), [collect.Cell(score(value=0.0123, low=None, high=None), None)]) == 4


# -- figures


def test_figure_data_are_the_scores(codecs):
    root, store, _ = codecs
    scores = {(s.model, s.metric): s for run in store.runs() for s in run.scores() if s.slice == "all"}
    rows = list(csv.DictReader((root / "board/figures/01-rate-and-distortion.csv").open()))
    assert [r["model"] for r in rows] == ["jpeg-20", "jpeg-50", "jpeg-80", "webp-20", "webp-50", "webp-80"]
    for r in rows:
        for metric in ("bpp", "psnr"):
            s = scores[r["model"], metric]
            assert [float(r[metric]), float(r[f"{metric} low"]), float(r[f"{metric} high"])] == [s.value, s.low, s.high]
    parts = list(csv.DictReader((root / "board/figures/02-signal-to-noise-by-band.csv").open()))
    assert {r["part"] for r in parts} == {"low", "mid", "high"} and len(parts) == 18


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("jpeg-75", "jpeg"),
        ("codec-webp-q50", "codec-webp"),
        ("mini-ae-16", "mini-ae"),
        ("jpeg 2000", "jpeg"),
        ("42", "42"),
        ("vae", "vae"),
        ("ae·3.5", "ae"),
    ],
)
def test_families(label, name):
    assert figures.family(label) == name


def test_figure_files_are_svg_without_a_date(codecs):
    from xml.etree import ElementTree

    for path in sorted((codecs[0] / "board/figures").glob("*.svg")):
        text = path.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "<dc:date>" not in text and "matplotlib.org" not in text.partition("<defs>")[0].partition("DTD")[
            2
        ].replace("http://www.w3.org", "")


# -- gallery


def decoded(url: str) -> Image.Image:
    assert url.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_differences_are_absolute_and_amplified():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(2))
    found = np.asarray(gallery.difference(Image.fromarray(a), Image.fromarray(b)))
    expected = np.minimum(np.abs(a.astype(int) - b.astype(int)) * gallery.GAIN, 255)
    assert np.array_equal(found, expected)


def test_items_are_chosen_by_hash(codecs):
    root, _, _ = codecs
    from bench.identity import digest

    tiles = json.loads((root / "board/runs.json").read_text())["tiles"]
    ids = sorted((f"item-{i:03d}" for i in range(12)), key=lambda i: digest(["gallery", i]))[:8]
    assert len(tiles) == 6 and all(sorted(t) == sorted(ids) for t in tiles.values())
    tile = tiles[next(iter(tiles))][ids[0]]
    assert set(tile) == {"original", "output", "difference"}
    assert all(max(decoded(u).size) <= gallery.SIDE and not decoded(u).getexif() for u in tile.values())


def stripes() -> bytes:
    """Finest detail there is: columns black and white in turn."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2] = 255
    return png(Image.fromarray(image))


@pytest.mark.parametrize(
    ("meta", "shown", "sharp"),
    [
        ({}, True, True),
        ({"sensitive": True}, True, False),
        ({"sensitive": "false"}, True, False),
        ({"sensitive": None}, True, False),
        ({"redistribute": False}, False, False),
        ({"redistribute": "false"}, False, False),
        ({"redistribute": "true"}, False, False),
        ({"redistribute": None}, False, False),
        ({"manifests": [{"name": "a", "digest": "a", "redistribute": "false"}]}, False, False),
        ({"manifests": [{"name": "a", "digest": "a", "sensitive": True}]}, True, False),
    ],
)
def test_what_may_not_be_shown_is_not_in_the_files(tmp_path, meta, shown, sharp):
    store = Store(tmp_path / "store")
    media = {"media/image/i0": stripes(), "media/recon/i0": stripes()}
    add_run(store, "m", normal_rows(30, 1), metrics=PSNR, media=media, **meta)
    render(psnr_board(), store, tmp_path / "out")
    texts = [p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert any("data:image/" in t for t in texts) == shown
    tiles = json.loads((tmp_path / "out/runs.json").read_text())["tiles"]
    if shown:
        [tile] = tiles.values()
        grey = np.asarray(decoded(tile["i0"]["output"]).convert("L"), float)
        assert (np.abs(np.diff(grey, axis=1)).mean() > 100) == sharp
        assert sharp or grey.std() < 20  # of 127
    else:
        assert not tiles and "may not be redistributed" in texts[[("<html" in t) for t in texts].index(True)]


def test_a_large_board_stays_a_small_page(tmp_path):
    """120 models: the gallery keeps to 48 tiles, a forest to its most, and every model stands in the table."""
    store = Store(tmp_path / "store")
    media = {f"media/{k}/i{i}": stripes() for i in range(20) for k in ("image", "recon")}
    for k in range(120):
        add_run(store, f"m-{k:03d}", normal_rows(30 + k / 10, 1, seed=k), metrics=PSNR, media=media)
    board = read_board(write_board(tmp_path, BOARD.replace("items = 8", "items = 48")))
    summary = render(board, store, tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    assert summary.models == 120 and text.count('<th scope="row" class="name"') >= 120
    assert text.count("data:image/") <= 48 * 3 and len(text) < 5_000_000


def test_secrets_of_this_process_reach_no_file(tmp_path, monkeypatch):
    from bench import text

    secrets = text.Secrets()
    secrets.add("canary-7531")
    monkeypatch.setattr(text, "_secrets", secrets)
    said = "x canary-7531 https://user:password@host/p?token=canary-7531"
    failed = Record("f" * 32, said, "failed", error={"kind": said, "message": said, "trace": said})
    where = {
        "command": said,
        "git": {"commit": said},
        "packages": {said: said},
        "machine": {"a": [said]},
        "started": "x",
    }
    manifests = [{"name": "drawn", "digest": "d", "license": said, "redistribute": True}]
    store = Store(tmp_path / "store")
    add_run(store, "m", normal_rows(30, 1), metrics=PSNR, manifests=manifests, **where)
    add_run(store, "part", normal_rows(30, 1), metrics=PSNR, expected=30, failed=failed, manifests=manifests, **where)
    render(psnr_board(), store, tmp_path / "out")
    files = [p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert any("***" in t for t in files)
    assert not [t for t in files if "canary-7531" in t or "password" in t]


def test_slices_stand_with_their_own_n(codecs):
    text = (codecs[0] / "board/index.html").read_text().partition('id="slices"')[2].partition("</section>")[0]
    assert "kind=grain" in text and "n 9" in text and "kind=smooth" in text and "n 3" in text


def test_a_column_of_a_slice(tmp_path):
    store = Store(tmp_path / "store")
    for k, quality in enumerate((30, 80)):
        add_run(store, f"jpeg-{quality}", codec_rows("JPEG", quality)[0], metrics=METRICS, seed=k)
    board = psnr_board(
        column=(Column("reconstruction", "psnr", slice="kind=smooth"),), rank=Rank("reconstruction:psnr@kind=smooth")
    )
    found = collect.collect(board, store, tmp_path / "out")
    differences = rank.Differences(found)
    assert rank.ranks(differences, "c", [r.cells[0] for r in found.rows]) in ([(2, 2), (1, 1)], [(1, 2), (1, 2)])
    e = next(iter(differences.pairs.values()), None) or differences._paired(*[r.cells[0] for r in found.rows])
    assert isinstance(e, Estimate) and e.n == 3


def test_importing_reports_is_light():
    import subprocess
    import sys

    heavy = "torch pandas scipy matplotlib jinja2 PIL"
    code = f"import sys, bench.report; print([m for m in '{heavy}'.split() if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
