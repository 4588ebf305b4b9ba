"""Text that others wrote, in every sink of a board: the structure of the page, of tables and of drawings stays."""

import base64
import csv
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_report_toys import BOARD, add_run, codec_rows, write_board

from bench.report import collect, figures, load, render, tables
from bench.report.board import Column, read_board
from bench.store import Store, dump_scores, parse_scores
from bench.text import plain
from bench.types import Estimate, Record, Score

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


def check_page(html: str) -> None:
    """What holds for every page: the policy first, its hashes right, no address of elsewhere, no handler, no style."""
    head = html.partition("<head>")[2].lstrip()
    policy = re.match('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', head)[1].replace("&#39;", "'")
    for kind in ("style", "script"):
        body = re.search(f"<{kind}>(.*?)</{kind}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    structure = Structure(html)
    names = {name for shape in structure.shapes for name in shape[1:]}
    assert not any(name.startswith("on") or name in ("style", "srcdoc", "xlink:href", "xmlns") for name in names)
    assert structure.order.count("script") == 1 and structure.order.count("style") == 1
    assert len(html.encode()) < 5_000_000


def test_a_page_names_no_address(tmp_path):
    html = hostile_page(tmp_path, ["harmless"])
    assert "http:" not in html and "https:" not in html and "//" not in re.sub(r"data:[^\"]*", "", html)
    check_page(html)


def test_very_long_texts_do_not_swell_the_page(tmp_path):
    html = hostile_page(tmp_path, ["x" * 100_000])
    check_page(html)


def test_nothing_in_the_templates_is_trusted_but_three_names():
    """`|safe` stands nowhere; Markup is made once for each page, of our style, our script and our drawings."""
    from pathlib import Path

    import bench.report

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


# -- cells of CSV


@given(st.text(), st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)))
@settings(max_examples=300, deadline=None)
def test_scores_are_read_as_they_were_written(text, value):
    text = text.encode("utf-8", "replace").decode()
    row = Score(
        text, text, 1, text, 0, text, text, value, value, value, text, 1, 1, True, text, "none", text, text, text
    )
    data = dump_scores([row])
    [found] = parse_scores(data)
    assert found == row and repr(found.value) == repr(value)  # repr tells -0.0 from 0.0
    for cell in next(csv.reader(io.StringIO(data.decode().partition("\n")[2], newline=""))):
        try:
            float(cell)
        except ValueError:
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠"))


@pytest.mark.parametrize("text", [t for t in HOSTILE if "\ud800" not in t])
def test_pairs_are_read_as_they_were_written(text):
    pairs = {(text, text, "b"): Estimate(-3.5, -1e-300, 0.25, text, 7), (text, "a", "c"): Estimate(None)}
    found = dict(collect.read_pairs(collect.dump_pairs(pairs).decode()))
    assert {k: (e.value, e.low, e.high, e.method, e.n) for k, e in found.items()} == {
        k: (e.value, e.low, e.high, e.method, e.n) for k, e in pairs.items()
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_a_markdown_cell_stays_one_cell_and_reads_the_same(text):
    source = tables.markdown(["rank", "model", "x"], [["1", text, "−3.50 ±0.10"]], {(0, 2)})
    tokens = MarkdownIt("commonmark").enable("table").parse(source)
    cells = [t for t in tokens if t.type == "inline"]
    assert len(cells) == 6 and [t.type for t in tokens].count("tr_open") == 2
    shown = "".join(c.content for c in cells[4].children)
    assert shown == " ".join(plain(text).split())
    assert [c.type for c in cells[5].children][1] == "strong_open"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_latex_cell_stays_one_cell(text):
    latex_is_whole(tables.latex(["rank", "model", "x"], [["1", text, "2"]], {(0, 1)}), columns=3, rows=2)


@pytest.mark.parametrize("text", ["$x_{$", "<b>&\"'", "$\\frac$", "]]>", "_hidden"])
def test_text_in_a_drawing_is_text(text):
    drawing = figures.render("n", "t", "", [{"a": 1}], (3, 2), lambda axes: axes.set_title(text))
    found = ["".join(e.itertext()) for e in ElementTree.fromstring(drawing.svg).iter() if e.tag.endswith("}text")]
    assert text in found
    inline = ["".join(e.itertext()) for e in ElementTree.fromstring(drawing.inline).iter() if e.tag == "text"]
    assert text in inline
