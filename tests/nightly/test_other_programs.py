"""What others wrote, in programs that others wrote: a spreadsheet computes none of it, a terminal obeys none of it."""

import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import spreadsheets
import terminals
import toys
from corpus import toml_of
from test_output import ON_DISK, finding, hostile_page
from test_report_toys import add_run, codec_rows

import bench.scores
import bench.text
from bench.report import collect, figures
from bench.report.fitted import write_finding
from bench.scores import dump_scores
from bench.store import Store
from bench.text import FORMULA, NUMBER, csv_line
from bench.train import loss_table
from bench.types import Estimate, Record, Score

pytestmark = pytest.mark.nightly

# -- a spreadsheet

FORMULAS = [  # besides those of HOSTILE; what an address reaches must not matter: there is no network
    '=WEBSERVICE("http://127.0.0.1:9/")',
    '=DDE("soffice";"/etc/passwd";"a")',
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    '+HYPERLINK("http://127.0.0.1:9/")',
    "=1+1\n",
    "\n=1+1",
    "==1",
    " =1+1",
    "{=1+1}",
    "=A1;=B1",
    "x;=1+1;y",
    "x\t=1+1\ty",
    "x\r\n=1+1\r\ny",
    "x\n'=1+1",
    ';"=1+1";',
]
NUMBERS = (-3.5, -0.0, 1e-300, 0.1 + 0.2, 1.7e308, 7)


def tables(texts):
    """Each CSV that the harness writes, with every text wherever a text may be, beside numbers."""
    row = Score("r", "s", 1, "m", 0, "m", "all", -3.5, -0.0, 1e-300, "t", 1, 1, True, "", "none", "s", "measured", "")
    text_fields = [k for k, v in vars(row).items() if isinstance(v, str)]
    rows = [dict(zip("abcdef", NUMBERS, strict=True)) | {"name": t, t or "x": t} for t in texts]
    return {
        "scores": dump_scores([replace(row, **dict.fromkeys(text_fields, t)) for t in texts]),
        "pairs": collect.dump_pairs({(t, t, str(i)): Estimate(*NUMBERS[:3], t, 7) for i, t in enumerate(texts)}),
        "figure": figures.Drawing("n", "t", "", b"", "", rows).csv,
        "loss": loss_table([{t: 0.5 for t in texts}, {t: math.nan for t in texts}, {t: -1e-300 for t in texts}]),
    }


def files_of(folder, texts):
    """The same from files: of a board, and of fits."""
    folder.mkdir()
    hostile_page(folder / "board", texts)
    made = {p.stem: p for p in (folder / "board" / "out").rglob("*.csv")}
    for k, text in enumerate(texts):
        out = write_finding(finding(text), folder / f"fit-{k}").parent
        made |= {f"fit-{k}-{p.stem}": p for p in out.rglob("*.csv")}
    return {name: path.read_bytes() for name, path in made.items()}


def computed(cells):
    return [c for rows in cells.values() for row in rows for c in row if c.formula]


def is_number(text):
    return bool(NUMBER.fullmatch(text)) and math.isfinite(float(text))


def test_a_spreadsheet_computes_no_cell(tmp_path, tally, size):
    """And every number is that number there. Read with commas, as written; with semicolons and tabs, as many set it."""
    if lacks := spreadsheets.missing():
        pytest.skip(lacks)
    texts = [*(t for t in ON_DISK if len(t) < 1000), *FORMULAS]
    assert sum(t.lstrip().startswith(FORMULA) for t in texts) >= 13
    files = tables(texts) | files_of(tmp_path / "files", texts[:: size(4, 40)])
    found, active = spreadsheets.opened(files, tmp_path / "commas")
    made = passed = false = 0
    wrong = [*active]
    for name, data in files.items():
        expected, seen = spreadsheets.written(data), found[name]
        assert len(seen) >= len(expected), name
        for mine, its in zip(expected, seen, strict=False):
            assert len(its) >= len(mine) or not any(mine[len(its) :]), (name, mine[:3])
            for text, cell in zip(mine, its, strict=False):
                if not text:
                    continue
                good = not cell.formula
                if is_number(text):
                    same = cell.kind == "float" and math.isclose(float(cell.value), float(text), rel_tol=1e-14)
                    good, false = good and same, false + (not same)
                elif text.startswith("'"):
                    good = good and cell.kind == "string"
                made, passed = made + 1, passed + good
                wrong += [] if good else [(name, text[:60], cell)]
    for separator in ";\t":
        others, active = spreadsheets.opened(tables(texts), tmp_path / f"other-{ord(separator)}", separator)
        cells = sum(len([c for c in row if c.kind]) for rows in others.values() for row in rows)
        made, passed = made + cells, passed + cells - len(computed(others))
        wrong += [*active, *computed(others)]
    tally("spreadsheet cells", passed - len(active), made, ran=len(active), false=false)
    print(f"{len(texts)} texts, {len(files)} files, {made} cells")
    assert not wrong, wrong[:20]


def test_a_spreadsheet_would_compute_them(tmp_path, monkeypatch):
    """Without the guard: the check above sees formulas, and what they fetched; also with another separator."""
    if lacks := spreadsheets.missing():
        pytest.skip(lacks)
    for module in (bench.text, bench.scores):
        monkeypatch.setattr(module, "csv_cell", lambda text: text)
    files = tables([*(t for t in ON_DISK if len(t) < 1000), *FORMULAS])
    found, active = spreadsheets.opened(files, tmp_path / "commas")
    for name in files:
        assert {"of:=1+1", "of:==1"} <= {c.formula for c in computed({name: found[name]})}, name
    assert any("WEBSERVICE" in c.formula for c in computed(found)) and any("dde" in a for a in active)
    for separator in ";\t":
        others, _ = spreadsheets.opened({"scores": files["scores"]}, tmp_path / f"other-{ord(separator)}", separator)
        assert "of:=1+1" in {c.formula for c in computed(others)}, separator


# -- a terminal

OWNED = "owned"  # what the title and the clipboard must not become
LIVE = {  # sequences that change what a terminal keeps: one that is written as it is must be seen to do so, in both
    "title": f"\x1b]0;{OWNED}\x07",
    "clipboard": "\x1b]52;c;b3duZWQ=\x07",
    "alternate screen": "\x1b[?1049h",
    "bracketed paste": "\x1b[?2004h",
    "mouse": "\x1b[?1003h\x1b[?1006h",
    "character set": "\x1b(0",
    "the other set": "\x1b(B\x1b)0\x0e",
    "cursor": "\x1b[?25l",
    "insert": "\x1b[4h",
    "wrap": "\x1b[?7l",
    "margins": "\x1b[5;10r",
    "keypad": "\x1b=",
    "tab stops": "\x1b[3g",
    "colours": "\x1b[1;31m",
    "what is typed": "\x1b[6n",
    "origin": "\x1b[?6h",
}
MORE = {  # that change something in one of them, or nothing that can be asked for
    "back from the alternate screen": "\x1b[?1049l",
    "all of it": "\x1bc",
    "title by C1": f"\x9d0;{OWNED}\x9c",
    "title of screen": f"\x1bk{OWNED}\x1b\\",
    "through tmux": f"\x1bPtmux;\x1b\x1b]0;{OWNED}\x07\x1b\\",
    "size": "\x1b[8;30;100t",
    "icon": "\x1b[2t",
    "reverse": "\x1b[?5h",
    "palette": "\x1b]4;1;rgb:11/22/33\x07\x1b]10;rgb:11/22/33\x07",
    "shape of the cursor": "\x1b[4 q",
    "history": "\x1b[3J",
    "answerback": "\x05",
    "link": "\x1b]8;;https://example.org\x07link\x1b]8;;\x07",
    "markup": "[bold red]x[/] [link=https://example.org]y[/link] [/]",
}
FORGED = [
    "\r\nerror: forged\r\nhint: forged",
    "\x1b[2K\rcomplete. forged",
    "\x1b[1A\x1b[2K\rinterrupted. forged",
    "\x85error: forged",
    "\x0b\rerror: forged",
    "\x1bEstopped. forged",
    "x" * 20 + "\x08" * 20 + "error: forged   ",
    "\u2028error: forged",
]
ITS_OWN = re.compile(r"^(error: |hint: |complete\. |interrupted\. |stopped\. )forged", re.M)
TERMINAL = [*LIVE.values(), *MORE.values(), *FORGED, *(t for t in ON_DISK if len(t) < 1000 and "\0" not in t)]

MODEL = """
import sys
sys.path.append({tests!r})
from toys import Drawing, Painter

TEXTS = {texts!r}


class Hostile(Painter):
    def __init__(self, said: str = "", number: int = 0):
        super().__init__()

    def generate(self, prompts, seeds):
        number = prompts[0][-3:]
        raise RuntimeError(TEXTS[int(number)] if number.isdigit() else " ".join(TEXTS))


class Slow(Drawing):
    name = "slow"
"""
RECIPE = """
import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import Recipe
from model import TEXTS


@dataclass(frozen=True)
class Wordy(Recipe):
    name: ClassVar[str] = "wordy"
    version: ClassVar[int] = 1

    @property
    def total(self):
        return 10

    def train(self, model, ctx):
        net = torch.nn.Linear(1, 1)
        for step in range(ctx.restore(net=net), self.total):
            time.sleep(0.15)  # so that the bar is drawn
            yield {name: 0.5 if step < 9 else math.nan for name in TEXTS}
        return net

    def export(self, trained, folder):
        pass
"""


def said_everywhere(folder):
    """What the real command line says in a folder of hostile names, texts and failures: {what: argv}."""
    folder.mkdir()
    tests = str(Path(toys.__file__).resolve().parent)
    (folder / "model.py").write_text(MODEL.format(tests=tests, texts=TERMINAL))
    every = " ".join(t[:60] for t in TERMINAL)
    rows, _ = codec_rows("JPEG", 30, 4)
    store = Store(folder / ".bench")
    runs = []
    for k, text in enumerate(TERMINAL):
        mine = [dict(r, kind=text) for r in rows]
        error = {"kind": text, "message": text, "trace": text, "hint": text}
        failed = Record("f" * 32, text, "failed", error=error)
        metrics = {"psnr": (text, "higher"), text or "x": ("dB", "higher")}
        mine = [{**r, text or "x": 0.5} for r in mine]
        run = add_run(store, f"m{k:03d} {text}", mine, metrics=metrics, failed=failed, suite=text or "x")
        other = add_run(store, f"n{k:03d} {text}", mine, metrics=metrics, suite=text or "x")
        runs.append((run.id, other.id, text))
    (folder / "reports").mkdir()
    column = f"suite = {toml_of(TERMINAL[0])}\nmetric = {toml_of(every)}\n"
    toml = f"title = {toml_of(every)}\nabout = {toml_of(every)}\n[[column]]\n{column}"
    (folder / "reports" / "b.toml").write_text(toml)
    (folder / "table.csv").write_text(csv_line(["params", *LIVE.values()]) + csv_line("1" * (1 + len(LIVE))))
    (folder / "loss.py").write_text(RECIPE)
    bench = [sys.executable, "-m", "bench"]
    shows = [shlex.join([*bench, "show", id]) for id, _, _ in runs[::8]]
    model = ["--model", "model.py:Hostile", "--devices", "cpu", "--keep", "none"]
    units = ["-p", "chunk=1", "-p", f"num={len(TERMINAL)}"]
    said = ["-m", f"said={every}"]
    score = [*bench, "score", "model.py:Slow", *model, *units, "--max-failures", "1"]
    return {
        "a run and its failures": score,
        "--explain": [*score, *said, "--explain"],
        "the log of a run": ["sh", "-c", f"{shlex.join([*score, *said])} > log 2>&1; cat log"],
        "list runs": [*bench, "list", "runs"],
        "a run": [*bench, "show", runs[0][0], "--slices"],
        "more runs": ["sh", "-c", "\n".join(shows)],
        "a unit and its trace": [*bench, "show", runs[0][0], "--unit", runs[0][2]],
        "a comparison": [*bench, "compare", *runs[0][:2]],
        "a board": [*bench, "leaderboard", "b"],
        "a table that does not fit": [*bench, "fit", "table.csv"],
        "a training": [*bench, "train", "loss.py:Wordy", "--out", "trained"],
        "findings": [*bench, "check", "--model", "model.py:Hostile"],
        "a name that nobody knows": [*bench, "score", every, "--model", every],
        "an argument that nobody knows": [*bench, "score", "slow", *model, "-m", f"{every}=1", f"--{every}"],
        "data": [*bench, "data", "verify", every],
    }


def written_raw(text):
    """A program that writes a text as it is."""
    code = "import sys; sys.stdout.buffer.write(bytes.fromhex(sys.argv[1]))"
    return [sys.executable, "-c", code, text.encode().hex()]


def changed(result):
    """What of the terminal's state is another after a command than before it."""
    return {k: (v, result["after"][k]) for k, v in result["before"].items() if result["after"][k] != v}


@pytest.mark.parametrize("kind", terminals.PROGRAMS)
def test_a_terminal_is_left_as_it_was(tmp_path, tally, kind):
    """By all that the command line says of hostile texts; and no line of theirs looks as one of the harness does."""
    if lacks := terminals.missing(kind):
        pytest.skip(lacks)
    outputs = said_everywhere(tmp_path / "work")
    jobs = [{"argv": argv, "cwd": str(tmp_path / "work")} for argv in outputs.values()]
    results = dict(zip(outputs, terminals.run(kind, jobs, tmp_path / "terminal"), strict=True))
    wrong, forged = {}, 0
    for name, result in results.items():
        print(name, result["code"], len(result["screen"]))
        found = {**changed(result), **({"forged": m[0]} if (m := ITS_OWN.search(result["screen"])) else {})}
        forged += "forged" in found
        wrong |= {name: found} if found else {}
    tally("terminal outputs", len(outputs) - len(wrong), len(outputs), ran=len(wrong) - forged, false=forged)
    if kind == "tmux":
        shown = [name for name, result in results.items() if "\\x" in result["screen"]]
        assert set(results) - set(shown) == {"list runs"}  # which prints ids alone; all others said what is hostile
        assert not any("Traceback" in result["screen"] for result in results.values())
    assert not wrong, wrong


@pytest.mark.parametrize("kind", terminals.PROGRAMS)
def test_a_terminal_would_obey(tmp_path, kind):
    """What is written as it is changes the state that the check above looks at, and forges lines."""
    if lacks := terminals.missing(kind):
        pytest.skip(lacks)
    jobs = [{"argv": written_raw(text), "cwd": str(tmp_path)} for text in [*FORGED, *LIVE.values()]]
    results = terminals.run(kind, jobs, tmp_path / "terminal")
    seen = dict(zip(LIVE, map(changed, results[len(FORGED) :]), strict=True))
    assert all(seen.values()), [name for name, found in seen.items() if not found]
    assert OWNED in str(seen["title"]) and OWNED in str(seen["clipboard"])
    if kind == "tmux":
        assert sum(bool(ITS_OWN.search(r["screen"])) for r in results[: len(FORGED)]) >= 5
