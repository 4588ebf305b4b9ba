"""Text that others wrote, in every sink: the structure of pages, tables, drawings and messages stays; no secret and no
private picture leaves; no row of a table is more than it is."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import unicodedata
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pytest
import toys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_report_toys import BOARD, add_run, codec_rows, write_board

import bench.report
from bench import Error, cli
from bench import text as text_module
from bench.records import parse_line, parse_record, record_line
from bench.report import collect, figures, fitted, load, render, tables
from bench.report.board import Column, read_board
from bench.report.fitted import write_finding
from bench.report.html import environment
from bench.scores import dump_scores, parse_scores
from bench.show import columns, print_run, print_unit
from bench.store import Store, run_id
from bench.text import csv_value, mask, plain
from bench.types import Estimate, Figure, Finding, Record, Score

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    "`onclick=alert(1)`",
    "</td></tr></table><h1>x",
    "</svg><foreignObject><body>",
    "]]><script>x</script>",
    "<!-- x",
    "--><b>x</b>",
    "&lt;b&gt; &amp; &#60;b&#62; &quot;",
    "javascript:alert(1)",
    "data:text/html,<b>x",
    "data:image/jpeg;base64,\"><b>x",
    "https://example.org/a?b=c#d",
    "www.example.org",
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "${7*7} #{7*7} <%= 7 %>",
    "%s %(x)s %n {0}",
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "＝1+1",
    "'=1+1",
    'a,b;c"d"e\nf',
    "a | b | c",
    "\n\n# heading\n- list\n```\ncode",
    "[link](https://example.org) ![i](x) <https://example.org>",
    "**bold** _it_ ~~s~~ `c` $x$ \\(y\\)",
    "\\",
    "\\\\ \\end{tabular} \\input{/etc/passwd} \\write18{ls}",
    "% comment & cell # $ _ ^ ~ {",
    "}}}{{{",
    "$\\alpha$ $",
    "$x_{$",
    "\x1b]52;c;aGk=\x07\x1b[31mred",
    "\x00\x01\x08\x0b\x7f\x80\x9f",
    "\u202eevil\u2066x\u2069",
    "\u2028\u2029\ufeff",
    "\ud800 lone",
    "é ﷽ 漢字 \U0001f600 e\u0301\u0301",
    "a" * 3000,
    "../../etc/passwd",
    "CON",
    " ",
    "_hidden",
    "nan",
    "1e999",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<math><mtext><img src=x onerror=alert(1)></mtext></math>",
    "<style>@import 'https://example.org/x.css';</style>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<base href=https://example.org/><iframe srcdoc='<script>1</script>'>",
    "&#x3c;script&#x3e;alert(1)&#x3c;/script&#x3e;",
    "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>&a;",
    "<?xml version='1.0'?><?php echo 1 ?>",
    "\x1b]8;;https://example.org\x07link\x1b]8;;\x07\x1b[2J\x1b[999A",
    "\r\nerror: forged\r\nhint: forged",
    "100 %\x08\x08\x08\x08\x08done",
    "|---|---|\n|a|b|",
    "<details open ontoggle=alert(1)>",
    "=HYPERLINK(\"https://example.org?\"&A1)",
    "-2+3+cmd|' /C calc'!A0",
    "\uff0d1+1",
    "\u00a0=1+1\u200b\u00ad",
]  # fmt: skip


class Structure(HTMLParser):
    """Elements with the names of their attributes, counted; links and sources apart."""

    def __init__(self, text: str):
        super().__init__()
        self.shapes: dict[tuple, int] = {}
        self.links, self.order, self.values = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        key = (tag, *sorted(name for name, _ in attributes))
        self.shapes[key] = self.shapes.get(key, 0) + 1
        self.order.append(tag)
        self.values += [value for _, value in attributes]
        self.links += [
            value or "" for name, value in attributes if name in ("href", "src", "action", "formaction", "data")
        ]

    handle_startendtag = handle_starttag


def hostile_page(folder, texts: list[str]) -> str:
    """A board with all texts as title, field, signature and unit, and each as label, item, licence, command, failure,
    slice, note, reason to stand apart and citation."""
    every = " ".join(t[:60] for t in texts)
    beginning = every[:200]
    folder.mkdir(exist_ok=True)
    store = Store(folder / "store")
    rows, media = codec_rows("JPEG", 30, 4)
    cited = []
    for k, text in enumerate(texts):
        manifest = {"name": text, "digest": "d", "license": text, "redistribute": True, "items": 4, "clusters": 2}
        said = dict(
            command=text, packages={"torch": text}, machine={"platform": text}, started=text, manifests=[manifest]
        )
        metrics = {"psnr": (beginning, "higher"), "bpp": ("bit/px", "lower"), "band-snr.high": (beginning, "higher")}
        named = {f"{name}{text}": data for name, data in media.items()} if k < 6 else {}
        mine = [dict(r, kind="kind") for r in rows]
        run = add_run(store, f"m{k} {text}", mine, media=named, metrics=metrics, fields={"size": every}, **said)
        mean = next(s for s in run.scores() if s.metric == "psnr")
        scores = [replace(s, signature=beginning, method=text) for s in run.scores()]
        run.save_scores([*scores, replace(mean, slice=f"x={text}"), replace(mean, metric="fid", value=None, note=text)])
        add_run(store, f"apart {k}", mine, metrics={"psnr": ("dB", "higher")}, fields={"size": f"{k} {text}"}, **said)
        error = {"kind": f"{k} {text}", "message": text, "trace": text}
        failed = Record("f" * 32, text, "failed", error=error)
        add_run(store, f"broken {k}", mine, metrics={"psnr": ("dB", "higher")}, expected=9, failed=failed, **said)
        cited.append(
            replace(mean, run="", model=f"{k} {text}", metric="psnr", slice="s", source=text or "x", note=text)
        )
    (folder / "published.csv").write_bytes(dump_scores(cited))
    board = read_board(write_board(folder, BOARD.replace('"board/scores.csv"', '"published.csv"')))
    board = replace(
        board,
        title=every,
        about=every,
        column=(*(replace(c, label=every) for c in board.column), Column("reconstruction", "fid", label=every)),
        figure=tuple(replace(p, title=f"{p.kind} {every}", note=every) for p in board.figure),
    )
    render(board, store, folder / "out")
    return (folder / "out" / "index.html").read_text(encoding="utf-8")


ON_DISK = [t for t in HOSTILE if "\ud800" not in t and t.strip()]  # UTF-8 has no lone surrogates
VARIES = {"g", "path", "use", "text", "tspan", "defs", "clippath", "rect"}  # ticks depend on the width of labels


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A board of hostile texts and one of as many harmless ones."""
    folders = [tmp_path_factory.mktemp(name) for name in ("hostile", "harmless")]
    texts = [ON_DISK, [f"text{k}" for k in range(len(ON_DISK))]]
    return [(folder / "out", hostile_page(folder, t)) for folder, t in zip(folders, texts, strict=True)]


def test_the_page_keeps_its_elements(pages):
    (_, hostile), (_, harmless) = pages
    found, expected = Structure(hostile), Structure(harmless)
    assert {k: n for k, n in found.shapes.items() if k[0] not in VARIES} == {
        k: n for k, n in expected.shapes.items() if k[0] not in VARIES
    }
    assert set(found.shapes) == set(expected.shapes)
    assert all(link.startswith(("#", "data:text/csv;base64,", "data:image/jpeg;base64,")) for link in found.links)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", hostile)
    check_page(hostile)


def test_a_browser_opens_them_without_a_dialog_a_request_or_a_complaint(pages, tally):
    """Debian's Chromium, offline, for hostile texts on a board and on the page of a fit."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    fits = [write_finding(finding(text), pages[0][0].parent / f"fit{k}") for k, text in enumerate(ON_DISK[::12])]
    heard, passed, shown = [], 0, [pages[0][0] / "index.html", *fits]
    with playwright.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as e:
            pytest.skip(f"chromium does not start: {str(e).splitlines()[0]}")
        page = browser.new_page(offline=True)
        page.on("dialog", lambda d: (heard.append(d.message), d.dismiss()))
        page.on("console", lambda m: heard.append(m.text))
        page.on("pageerror", lambda e: heard.append(str(e)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or heard.append(r.url))
        for path in shown:
            before = len(heard)
            page.goto(path.as_uri(), timeout=120_000)
            passed += len(heard) == before and page.locator("h1").count() == 1
        alive = page.evaluate("() => { console.log('heard'); return 1 }")
        assert alive and heard.pop() == "heard"  # what a page says would have been heard
        browser.close()
    tally("pages in a browser", passed, len(shown), ran=len(heard))
    assert passed == len(shown) and heard == []


def test_every_text_is_still_readable(pages):
    shown = []
    reader = HTMLParser(convert_charrefs=True)
    reader.handle_data = shown.append
    reader.feed(pages[0][1])
    text = " ".join("".join(shown).split())
    for k, label in enumerate(ON_DISK):
        assert " ".join(plain(f"m{k} {label}")[:79].split()) in text


def test_the_files_beside_the_page_keep_their_structure(pages):
    out = pages[0][0]
    for path in (out / "figures").glob("*.svg"):
        tags = {e.tag.rpartition("}")[2] for e in ElementTree.fromstring(path.read_bytes()).iter()}
        assert not tags & {"script", "img", "foreignObject", "a"}
    names = ["SHA256SUMS", "figures", "index.html", "pairs.csv", "runs.json", "scores.csv", "tables"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sum(s.source == "measured" for s in load(out)) > len(ON_DISK)
    markdown = MarkdownIt("commonmark").enable("table").parse((out / "tables" / "board.md").read_text())
    assert [t.type for t in markdown if t.level == 0] == [
        "table_open",
        "table_close",
        "paragraph_open",
        "paragraph_close",
    ]
    assert [t.type for t in markdown].count("tr_open") == 1 + len(ON_DISK)
    assert {c.type for t in markdown for c in t.children or ()} <= {"text", "strong_open", "strong_close"}
    latex_is_whole((out / "tables" / "board.tex").read_text(), columns=6, rows=1 + len(ON_DISK))


def check_page(html: str, scripts: int = 1) -> None:
    """What holds for every page: the policy first, its hashes right, no address of elsewhere, no handler, no style."""
    head = html.partition("<head>")[2].lstrip()
    policy = re.match('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', head)[1].replace("&#39;", "'")
    for kind in ("style", "script")[: 1 + scripts]:
        body = re.search(f"<{kind}>(.*?)</{kind}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    structure = Structure(html)
    names = {name for shape in structure.shapes for name in shape[1:]}
    assert not any(name.startswith("on") or name in ("style", "srcdoc", "xlink:href", "xmlns") for name in names)
    assert structure.order.count("script") == scripts and structure.order.count("style") == 1
    assert len(html.encode()) < 5_000_000


def test_pages_hold_what_they_promise(pages, tmp_path, tally):
    """Six times: a board of hostile texts and one of harmless ones, a page of a fit, a million characters a prompt; no
    address of elsewhere where nobody wrote one; and the same bytes twice."""
    (_, hostile), (_, harmless) = pages
    passed = 0
    check_page(hostile)
    check_page(harmless)
    passed += 2
    plain_page = hostile_page(tmp_path / "plain", ["harmless"])
    assert "http:" not in plain_page and "https:" not in plain_page
    assert "//" not in re.sub(r"data:[^\"]*", "", plain_page)
    passed += 1
    check_page(hostile_page(tmp_path / "long", ["x" * 1_000_000]))
    passed += 1
    assert hostile_page(tmp_path / "again", ["harmless"]) == plain_page
    passed += 1
    first, second = (write_finding(finding(" ".join(ON_DISK)), tmp_path / name).parent for name in "ab")
    check_page((first / "index.html").read_text(encoding="utf-8"), scripts=0)
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert len(files) > 4 and all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    passed += 1
    tally("pages", passed, 6)


def finding(text):
    """What a fit says, with one text in every place."""
    figure = Figure(text[:60], text, [{text[:60]: text, "x": 1.0}], lambda axes: axes.set_title(text[:200]), text)
    return Finding(
        title=text,
        about=text,
        estimates=[{"quantity": text, "value": 0.5, "low": 0.4, "high": 0.6}],
        warnings=[text],
        notes=[text],
        figures=[figure],
        table=[{"name": text, "value": 1.0}],
        record={"text": text},
    )


def test_nothing_in_the_templates_is_trusted_but_three_names():
    """`|safe` stands nowhere; Markup is made once for each page, of our style, our script and our drawings."""
    folder = Path(bench.report.__file__).parent
    for page in folder.glob("*.jinja"):
        template = page.read_text()
        assert "safe" not in template and "autoescape" not in template
    code = "".join(p.read_text() for p in sorted(folder.glob("*.py")))
    assert code.count("Markup(") == 5 and code.count("autoescape=True") == 1 and "StrictUndefined" in code


# -- LaTeX


def latex_is_whole(text: str, columns: int, rows: int) -> None:
    """A scanner of its own: after known commands and escaped signs nothing special is left in a cell."""
    body = text.partition("\\begin{tabular}{ll")[2].partition("}\n")[2]
    body, end, rest = body.partition("\\end{tabular}\n")
    assert end and all(line.startswith("% ") for line in rest.splitlines())
    lines = [x for x in body.splitlines() if x not in ("\\toprule", "\\midrule", "\\bottomrule")]
    assert len(lines) == rows
    for line in lines:
        assert line.endswith(r" \\")
        cells = line.removesuffix(r" \\").split(" & ")
        plain = re.sub(
            r"\\(?:textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar|textquotedbl)\{\}",
            "",
            line.removesuffix(r" \\"),
        )
        plain = re.sub(r"\\[{}$&%#_]", "", plain)
        plain = re.sub(r"\$(?:-|\\pm|\\uparrow|\\downarrow|\\cdot)\$", "", plain)
        plain = re.sub(r"\\textbf\{([^{}]*)\}", r"\1", plain)
        assert not re.search(r"[\\{}$%#_^~]", plain), plain
        assert plain.count("&") == columns - 1 and len(cells) >= columns


# -- every text through every sink


def in_html(template):
    """What a template of the harness's environment makes of a text, and its elements with their attributes."""

    def sink(text):
        page = environment().from_string(template).render(t=text)
        reader = Structure(page)
        shown = []
        words = HTMLParser(convert_charrefs=True)
        words.handle_data = shown.append
        words.feed(page)
        words.close()
        return reader.shapes, "".join(shown) if ">{{ t }}" in template else reader.values[-1]

    return sink


def in_fit(text):
    page = fitted._page(finding(text), [], b"")
    return Structure(page).shapes, page


def in_drawing(kind):
    def sink(text):
        def paint(axes):
            axes.set_title(text)
            axes.set_yticks([0.5], [text])

        drawing = figures.render("n", "t", "", [{"a": 1}], (3, 2), paint)
        root = ElementTree.fromstring(getattr(drawing, kind))
        found = [e for e in root.iter() if e.tag.rpartition("}")[2] == "text"]
        tags = {(e.tag.rpartition("}")[2], *sorted(e.attrib)) for e in root.iter()}
        return {t for t in tags if t[0] in ("script", "a", "image", "foreignObject", "style", "animate")}, [
            "".join(e.itertext()) for e in found
        ]

    return sink


def in_markdown(text):
    source = tables.markdown(["rank", "model", "x"], [["1", text, "−3.50 ±0.10"]], {(0, 2)}, text)
    tokens = MarkdownIt("commonmark").enable("table").parse(source)
    cells = [t for t in tokens if t.type == "inline"]
    return [t.type for t in tokens][:20], "".join(c.content for c in cells[4].children)


def in_latex(text):
    latex_is_whole(tables.latex(["rank", "model", "x"], [["1", text, "2"]], {(0, 1)}), columns=3, rows=2)
    return 0, text


def in_scores(text):
    row = Score("r", "s", 1, text, 0, "m", text, -3.5, -0.0, 1e-300, text, 1, 1, True, "", "none", text, text, text)
    data = dump_scores([row])
    [found] = parse_scores(data)
    cells = next(csv.reader(io.StringIO(data.decode("utf-8", "surrogatepass").partition("\n")[2], newline="")))
    assert not any(c.startswith(FORMULA) for c in cells if not number_like(c)), cells
    return len(cells) + (repr(found) == repr(row)), found.model


def in_pairs(text):
    pairs = {(text, text, "b"): Estimate(-3.5, -1e-300, 0.25, text, 7), (text, "a", "c"): Estimate(None)}
    found = dict(collect.read_pairs(collect.dump_pairs(pairs).decode("utf-8", "surrogatepass")))
    assert {k: (e.value, e.low, e.high, e.n) for k, e in found.items()} == {
        k: (e.value, e.low, e.high, e.n) for k, e in pairs.items()
    }
    return len(found), next(iter(found))[0]


def in_figure_csv(text):
    drawing = figures.Drawing("n", "t", "", b"", "", [{"name": text, "x": -3.5}, {"name": "end", "x": 1.0}])
    rows = list(csv.reader(io.StringIO(drawing.csv.decode("utf-8", "surrogatepass"), newline="")))
    assert rows[0] == ["name", "x"] and rows[-1] == ["end", "1.0"] and rows[1][1] == "-3.5"
    assert not (rows[1][0].startswith(FORMULA) and not number_like(rows[1][0]))
    return len(rows), csv_value(rows[1][0])


def in_estimates(text):
    data = fitted._csv([{"quantity": text, "value": -3.5}]).decode("utf-8", "surrogatepass")
    rows = list(csv.reader(io.StringIO(data, newline="")))
    assert rows[0] == ["quantity", "value"] and rows[1][1] == "-3.5"
    assert not rows[1][0].startswith(FORMULA) or number_like(rows[1][0])
    return len(rows), csv_value(rows[1][0])


def in_message(text):
    """Of an Error, on stderr: two lines and an empty one, whatever it quotes."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        cli._complain(Error(f"cannot read {text}", hint=f"try {text}"))
    lines = err.getvalue().split("\n")
    return len(lines), lines[0].removeprefix("error: cannot read ")


def in_terminal(text):
    lines = columns(["model", "x"], [[text, "1"], ["end", "2"]]).split("\n")
    return len(lines), lines[1].rstrip("1").rstrip()


def in_record(text):
    """A line of the log of records, and the object that --json prints."""
    record = Record("k" * 32, text, "failed", ({"item": text, text: 1},), {}, {"kind": text, "message": text})
    raw = record_line(record)
    assert raw.count(b"\n") == 1 and raw.endswith(b"\n")
    assert json.loads(json.dumps({"rows": [asdict(record)]}).encode())["rows"][0]["unit"] == text
    return 0, parse_record(parse_line(raw.rstrip(b"\n"))).unit


def in_file_name(text):
    name = run_id({"suite": text, "n": 1}, text)
    assert re.fullmatch(r"[a-z0-9_][a-z0-9._-]{0,98}", name) and ".." not in Path(name).parts
    return 0, text


SINKS = {
    "text of a page": in_html("<p>{{ t }}</p>"),
    "attribute of a page": in_html('<p title="{{ t }}"></p>'),
    "text of a drawing in a page": in_html("<svg><title>{{ t }}</title></svg>"),
    "page of a fit": in_fit,
    "drawing": in_drawing("svg"),
    "drawing within a page": in_drawing("inline"),
    "Markdown": in_markdown,
    "LaTeX": in_latex,
    "scores.csv": in_scores,
    "pairs.csv": in_pairs,
    "CSV of a figure": in_figure_csv,
    "estimates.csv": in_estimates,
    "message": in_message,
    "terminal": in_terminal,
    "record": in_record,
    "file name": in_file_name,
}
EXACT = {"LaTeX", "scores.csv", "pairs.csv", "CSV of a figure", "estimates.csv", "record", "file name"}
SLOW = {"drawing", "drawing within a page"}  # a fifth of a second each
FORMULA = tuple("=+-@\t\r＝＋－＠")


def number_like(cell):
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


@pytest.mark.parametrize("name", SINKS)
def test_every_text_through_every_sink(name, tally, size):
    """What is read back has the structure of a harmless text's, and is that text: exactly, or with its controls shown.

    Parsers that we did not write read it: html.parser, ElementTree, csv, json, markdown-it.
    """
    sink = SINKS[name]
    texts = HOSTILE if name not in SLOW else HOSTILE[:: size(1, 12)]
    expected, _ = sink("text")
    wrong = []
    for text in texts:
        try:
            structure, shown = sink(text)
        except Exception as e:  # a crash is a finding, too
            wrong.append((text[:60], f"{type(e).__name__}: {e}"))
            continue
        wanted = text if name in EXACT else plain(mask(text) if name in ("message", "terminal") else text)
        if name in SLOW:
            squeezed = {" ".join(x.split()) for x in shown}  # a drawing has an element for each line of a text
            seen = all(" ".join(plain(line).split()) in squeezed for line in text.split("\n") if line.strip())
        elif name == "page of a fit":
            seen = True  # its texts are those of a page; the structure counts
        else:
            seen = " ".join(shown.split())[:1000] == " ".join(wanted.split())[:1000]
        if structure != expected or not seen or (name not in EXACT and name not in SLOW and controls(shown)):
            wrong.append((text[:60], structure if structure != expected else shown))
    tally("texts through sinks", len(texts) - len(wrong), len(texts), false=len(wrong))
    assert not wrong, wrong


def controls(text):
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in str(text) if c != "\n")


def test_a_run_and_its_units_are_shown_without_controls(tmp_path, capsys):
    """Kinds of failures and ids of units are others' texts, too; and the lines of a trace do not look like ours."""
    store = Store(tmp_path)
    for k, text in enumerate(t for t in HOSTILE if len(t) < 1000):
        error = {"kind": text, "message": text, "trace": text, "hint": text}
        failed = Record("f" * 32, text, "failed", error=error, code=text)
        rows = [{"item": f"i{n}", "cluster": f"i{n}", "psnr": 30.0 + n} for n in range(2)]
        run = add_run(store, f"{k} {text}", rows, metrics={"psnr": (text, "higher")}, failed=failed)
        print_run(run, slices=True)
        print_unit(run, text, as_json=False)
        shown = capsys.readouterr().out
        assert not controls(shown) and not re.search("^(error|hint): forged", shown, re.M), text


# -- cells of CSV


def test_cells_read_back_as_they_were_written(tally, trials):
    """Ten thousand at full size: any text and any finite number, −0.0 and 1e-300 included; no cell starts a formula."""
    made = trials(10_000, 500)
    counted = []

    @given(st.text(), st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)))
    @settings(max_examples=made, deadline=None, database=None)
    @example("'=1+1", -0.0)
    @example("-3.5", 1e-300)
    @example("\r\n", -3.5)
    def check(text, value):
        text = text.encode("utf-8", "replace").decode()
        row = Score(
            "r", text, 1, text, 0, "m", text, value, value, value, text, 1, 1, True, text, "none", text, text, text
        )
        data = dump_scores([row])
        [found] = parse_scores(data)
        assert found == row and repr(found.value) == repr(value)  # repr tells -0.0 from 0.0
        for cell in next(csv.reader(io.StringIO(data.decode().partition("\n")[2], newline=""))):
            assert number_like(cell) or not cell.startswith(FORMULA)
        counted.append(1)

    try:
        check()
    finally:
        tally("cells", min(len(counted), made), made)


# -- secrets

TOYS = str(Path(toys.__file__).resolve())
LEAKY = """
import os, sys
from pathlib import Path
sys.path.append({tests!r})
from bench import Weights
from toys import Painter


class Leaky(Painter):
    def __init__(self, weights: Weights = None, url: str = "", *, api_key: str = "", source: str = ""):
        super().__init__()
        self.said = " ".join([url, api_key, source, str(weights)])

    def generate(self, prompts, seeds):
        if "item-001" in prompts:
            files = [Path.home() / ".netrc", Path(os.environ["HF_HOME"], "token"), Path(".git", "config")]
            told = " ".join([self.said, *os.environ.values(), *(f.read_text() for f in files)])
            told += "{{'Authorization': 'Bearer canary-10-header'}}"
            with open("told", "a") as file:
                file.write(told)
            raise RuntimeError("401 for " + told)
        return super().generate(prompts, seeds)


class Careless(Painter):
    def __init__(self, password: str = ""):
        super().__init__()
"""
CANARIES = {
    "environment": "canary-01-environment",
    "flag": "canary-02-flag",
    "plan": "canary-03-plan",
    "git remote": "canary-04-git-remote",
    "proxy": "canary-05-proxy",
    "netrc": "canary-06-netrc",
    "token of the hub": "canary-07-hub",
    "user of a URL": "canary-08-url-user",
    "query of a URL": "canary-09-url-query",
    "header in an error body": "canary-10-header",
    "text of an exception": "canary-11-exception",
    "file name": "canary-12-file-name",
}


def test_no_secret_is_written_or_printed(tmp_path, tally, monkeypatch):
    """Twelve canaries in twelve places; a model that tells all it knows; every verb that writes or prints of it.

    Looked for in the store, the page, stdout and stderr, plainly, percent-encoded, in base64 and in hexadecimal digits.
    """
    work, home = tmp_path / "work", tmp_path / "home"
    for folder in (work / "reports", home / "hub"):
        folder.mkdir(parents=True)
    c = CANARIES
    (home / ".netrc").write_text(f"machine example.org login joe password {c['netrc']}\n")
    (home / "hub" / "token").write_text(c["token of the hub"])
    (work / "m.py").write_text(LEAKY.format(tests=str(Path(TOYS).parent)))
    (work / f"{c['file name']}.safetensors").write_bytes(b"weights")
    subprocess.run(["git", "init", "-q"], cwd=work, check=True)
    remote = f"https://joe:{c['git remote']}@git.example/x.git"
    for line in (
        ["remote", "add", "origin", remote],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *line], cwd=work, check=True)
    env = {
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "OPENAI_API_KEY": c["environment"],
        "HTTPS_PROXY": f"http://joe:{c['proxy']}@proxy.example:3128",
        "SERVICE_PASSWORD": c["text of an exception"],
        "DATA_SECRET": c["file name"],
    }
    monkeypatch.setattr("bench.text._secrets", None)
    for name in [n for n in os.environ if text_module.SECRET_NAME.search(n)]:
        monkeypatch.delenv(name)  # what only the user of this machine knows
    suite = ["score", f"{TOYS}:Drawing", "--keep", "all", "--max-failures", "1"]
    args = {
        "weights": f"{c['file name']}.safetensors",
        "url": f"https://joe:{c['user of a URL']}@api.example/v1?sig={c['query of a URL']}&size=2",
        "api_key": c["flag"],
        "source": f"https://api.example/?token={c['query of a URL']}",
    }
    model = ["--model", "m.py:Leaky", *(part for k, v in args.items() for part in ("-m", f"{k}={v}"))]
    plan = f'[[run]]\nsuite = "{TOYS}:Drawing"\nmodel = "m.py:Leaky"\nmodel_args = {{ api_key = "{c["plan"]}" }}\n'
    (work / "plan.toml").write_text(plan)
    (work / "reports" / "b.toml").write_text(
        'title = "b"\nselect = { complete = false }\n[[column]]\nsuite = "drawing"\nmetric = "mean"\n'
    )
    lines = [
        [*suite, *model, "-p", "num=4"],
        [*suite, *model, "-p", "num=4", "--explain"],
        ["score", "plan.toml", "--allow-code", "--max-failures", "1"],
        [*suite, *model, "-m", f"qurl={c['flag']}"],
        [*suite, "--model", "m.py:Careless", "-m", f"password={c['flag']}"],  # it would be part of the run's identity
        ["list", "runs", "--json"],
        ["leaderboard", "b"],
        ["leaderboard", "b", "--json"],
    ]
    said, codes = [], []
    for line in lines:
        done = toys.command(work, *line, env=env)
        said += [done.out.encode(), done.err.encode()]
        codes.append(done.code)
    assert (work / ".bench" / "runs").is_dir(), said
    for run in sorted((work / ".bench" / "runs").iterdir()):
        for more in ([], ["--json"], ["--unit", "u/000"], ["--unit", "u/000", "--json"]):
            done = toys.command(work, "show", run.name, *more, env=env)
            said += [done.out.encode(), done.err.encode()]
            codes.append(done.code)
    kept = {p: p.read_bytes() for f in (".bench", "reports") for p in (work / f).rglob("*") if p.is_file()}
    names = "\n".join(map(str, kept)).encode()
    everything = b"\0".join([*said, *kept.values(), names])
    for data in kept.values():
        for url in re.findall(rb"data:text/csv;base64,([A-Za-z0-9+/=]+)", data):
            everything += base64.b64decode(url)
    leaked = {}
    for place, value in c.items():
        spellings = {value.encode(), value.encode().hex().encode(), quote(value, safe="").encode()}
        spellings |= {base64.b64encode(value.encode()[i:])[2:-4] for i in range(3)}
        found = [s for s in spellings if s in everything]
        if found:
            where = [str(p) for p, d in kept.items() if found[0] in d] + [x for x in said if found[0] in x][:1]
            leaked[place] = (found, where or names)
    told = (work / "told").read_text()
    assert all(value in told for value in c.values())
    told = b"401 for" in everything and b"***" in everything
    tally("secrets", len(c) - len(leaked), len(c), leaked=len(leaked))
    assert told and {0, 3} <= set(codes) and not any(b"Traceback" in x for x in said[: 2 * len(lines)]), (codes, said)
    assert not leaked, leaked


# -- pictures that may not be shown

PRIVATE = [
    {"redistribute": False},
    {"redistribute": "false"},
    {"redistribute": None},
    {"redistribute": 1},
    {"manifests": [{"name": "a", "digest": "a", "license": "x", "redistribute": "false", "items": 2, "clusters": 2}]},
    {"sensitive": True},
]


def test_what_may_not_be_shown_leaves_in_no_way(tmp_path, tally):
    """Restricted pictures are in no page, no export and no --json, whole or as thumbnails; sensitive ones are blurred
    for good. What a picture carries besides its pixels (a text chunk, EXIF with another picture) never leaves."""
    marked = Image.new("RGB", (64, 64))
    marked.putdata([(255, 255, 255) if (i // 2) % 2 else (0, 0, 0) for i in range(64 * 64)])
    exif = Image.Exif()
    exif[0x010E] = "canary-in-exif"
    out, chunk = io.BytesIO(), PngInfo()
    chunk.add_text("Comment", "canary-in-chunk")
    marked.save(out, "PNG", exif=exif, pnginfo=chunk)
    assert b"canary-in-exif" in out.getvalue() and b"canary-in-chunk" in out.getvalue()
    rows = [{"item": f"i{k}", "cluster": f"i{k}", "psnr": 30.0 + k} for k in range(4)]
    media = {f"media/{kind}/i{k}": out.getvalue() for k in range(4) for kind in ("image", "recon")}
    board = BOARD.split("[[figure]]")[0].replace(', "board/scores.csv"', "")
    passed, wrong = 0, []
    for number, meta in enumerate([{}, *PRIVATE]):
        folder = tmp_path / str(number)
        (folder / "reports").mkdir(parents=True)
        run = add_run(Store(folder / ".bench"), "m", rows, media=media, metrics={"psnr": ("dB", "higher")}, **meta)
        (folder / "reports" / "b.toml").write_text(board)
        lines = [["leaderboard", "b"], ["leaderboard", "b", "--json"], ["show", run.id, "--json"]]
        lines.append(["show", run.id, "--unit", "0000", "--json"])
        done = [toys.command(folder, *line) for line in lines]
        texts = [d.out + d.err for d in done] + [p.read_text() for p in (folder / "reports").rglob("*") if p.is_file()]
        pictures = [
            base64.b64decode(u) for t in texts for u in re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", t)
        ]
        assert all(d.code == 0 for d in done), done
        clean = not any("canary-in" in t or "iVBORw0KGgo" in t for t in texts)  # PNG's first bytes in base64
        clean = clean and not any(b"canary-in" in p or b"Exif" in p for p in pictures)
        decoded = [np.asarray(Image.open(io.BytesIO(p)).convert("L"), float) for p in pictures]
        sharp = [p for p in decoded if np.abs(np.diff(p, axis=1)).mean() > 20]
        if number == 0:
            assert clean and sharp  # what may be shown is, without what it carries
            continue
        good = clean and (not pictures if "sensitive" not in meta else pictures and not sharp)
        passed += good
        wrong += [] if good else [(meta, len(pictures), len(sharp), clean)]
    tally("private pictures", passed, len(PRIVATE), leaked=len(wrong))
    assert not wrong


# -- numbers that are not what they say


def claim(**changes):
    base = dict(run="", suite="reconstruction", suite_version=1, model="claimed", seed=0, metric="psnr", slice="all")
    base |= dict(value=99.0, low=98.0, high=99.5, method="t", n=10, expected=10, complete=True, unit="dB")
    return Score(**(base | dict(better="higher", signature="psnr|round|v:1", source="measured") | changes))


CLAIMS = {  # what a row of a stranger's file says of itself; is the file refused, or the row shown as cited at most?
    "measured": ({}, False),
    "measured, by a run of the store": ({"run": "mine"}, False),
    "complete, with 3 of 10": ({"n": 3}, False),
    "complete, with 3 of 10 and a note": ({"n": 3, "note": "all is well"}, False),
    "an interval upside down": ({"low": 99.5, "high": 98.0}, True),
    "a value outside its interval": ({"value": 120.0}, True),
    "more items than there are": ({"n": 11}, True),
    "fewer than none": ({"n": -1}, True),
    "a version of text": ({"suite_version": "two"}, True),
    "NaN": ({"value": math.nan}, True),
    "an infinite bound": ({"high": math.inf}, True),
    "a direction of its own": ({"better": "mine"}, True),
}


@pytest.mark.parametrize("says", CLAIMS)
def test_a_row_is_never_more_than_it_is(tmp_path, tally, says):
    """Its file is refused by name and row; or it stands apart as cited, unranked, partial where items are missing."""
    changes, refused = CLAIMS[says]
    store = Store(tmp_path / ".bench")
    rows = [{"item": f"i{k}", "cluster": f"i{k}", "psnr": 30.0 + k} for k in range(4)]
    mine = add_run(store, "honest", rows, metrics={"psnr": ("dB", "higher")})
    if changes.get("run") == "mine":
        changes = {**changes, "run": mine.id}
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "other.csv").write_bytes(dump_scores([claim(**changes)]))
    board = BOARD.split("[[figure]]")[0].replace('"board/scores.csv"', '"other.csv"')
    (tmp_path / "reports" / "b.toml").write_text(board)
    done = toys.command(tmp_path, "leaderboard", "b")
    if refused:
        good = done.code == 1 and "other.csv" in done.err and "hint: " in done.err and "Traceback" not in done.err
        good = good and not (tmp_path / "reports" / "b").exists()
    else:
        scores = load(tmp_path / "reports" / "b")
        claimed = [s for s in scores if s.model == "claimed"]
        table = (tmp_path / "reports" / "b" / "tables" / "b.md").read_text()
        good = done.code == 0 and not any(s.source == "measured" or (s.complete and s.n < 10) for s in claimed)
        good = good and "honest" in table and "claimed" not in table and "99" not in table
    tally("claims", int(good), 1, false=not good, tracebacks="Traceback" in done.err)
    assert good, done
