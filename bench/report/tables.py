"""The board's table as Markdown and LaTeX, with every cell's text kept from being read as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "·": r"$\cdot$",
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~$^=:&\-.@])")


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: on one line, every sign of markup behind a backslash, < and & as entities."""
    from bench.text import plain

    text = _one_line(plain(text))
    escaped = _MARKDOWN.sub(r"\\\1", text)
    return escaped.replace("\\&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it is: no command, group, comment or cell separator comes from it."""
    from bench.text import plain

    return "".join(_LATEX.get(c, c) for c in _one_line(plain(text)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], bold: set[tuple[int, int]] = frozenset(), note: str = ""
) -> str:
    """A table; the first two columns to the left, numbers to the right. `bold` names cells by (row, column)."""
    lines = ["| " + " | ".join(map(_cell_text, head)) + " |"]
    lines.append("|" + "|".join(" :--- " if i < 2 else " ---: " for i in range(len(head))) + "|")
    for r, row in enumerate(rows):
        cells = [f"**{_cell_text(c)}**" if (r, i) in bold else _cell_text(c) for i, c in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + (f"\n{markdown_text(note)}\n" if note else "")


def _cell_text(text: str) -> str:
    """Plain numbers stay readable in the source; all else is escaped."""
    return text if re.fullmatch(r"[−-]?[\d.]+(?: ±[\d.]+)?|", text) else markdown_text(text)


def latex(
    head: Sequence[str], rows: Sequence[Sequence[str]], bold: set[tuple[int, int]] = frozenset(), note: str = ""
) -> str:
    """A tabular for booktabs (`\\usepackage{booktabs}`), ready for `\\input`."""
    lines = [r"\begin{tabular}{ll" + "r" * (len(head) - 2) + "}", r"\toprule"]
    lines.append(" & ".join(map(latex_text, head)) + r" \\")
    lines.append(r"\midrule")
    for r, row in enumerate(rows):
        cells = [rf"\textbf{{{latex_text(c)}}}" if (r, i) in bold else latex_text(c) for i, c in enumerate(row)]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n" + (f"% {latex_text(note)}\n" if note else "")
