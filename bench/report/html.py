"""What every page is made with: templates that escape, and a policy that lets nothing in from outside."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

LONGEST = 4000  # characters of one text on the page
INLINE_CSV = 1 << 19  # bytes; larger files are named, not linked


def environment() -> Any:
    """The templates beside this file; whatever they print is escaped, unknown names are errors."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from bench.text import plain

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize(plain),
    )


def _finalize(plain: Any) -> Any:
    """Strings that the template prints lose control characters and excess length; markup of our own passes."""

    def show(value: Any) -> Any:
        if type(value) is not str:
            return value
        whole = len(value) <= LONGEST or value.startswith("data:")
        return plain(value if whole else value[:LONGEST] + "…")

    return show


def policy(style: str, script: str) -> str:
    """The content security policy: nothing from anywhere but this file; an empty script allows none."""
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def data_url(data: bytes) -> str:
    return "data:text/csv;base64," + base64.b64encode(data).decode() if len(data) <= INLINE_CSV else ""
