"""Text that others wrote, made safe to show: control characters, secrets, CSV cells; and the wording of hints."""

from __future__ import annotations

import base64
import difflib
import json
import math
import netrc
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from bench.types import Error

MAX_TOML = 2**20  # bytes
MAX_DOTS = 10**7  # sum over lines of the square of their dots: what dotted keys cost to read

# C0, DEL, C1; Arabic letter mark, bidi marks, line separators, embeddings, isolates; byte order mark; surrogates
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
SHORTEST = 6  # characters; what is shorter would mask innocent text
URL = re.compile(r"(?P<head>[A-Za-z][A-Za-z0-9+.-]*://)(?:(?P<user>[^/?#\s'\"<>]*)@)?(?P<rest>[^\s'\"<>]*)")
QUERY = re.compile(r"(?<=[?&;])([^=&;#\s]+)=([^&;#\s]*)")
HEADER = re.compile(r"\b(Bearer|Basic)(\s+)[\w.~+/=-]{6,}", re.IGNORECASE)
MASK = "***"

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
BEGINS = re.compile(f"(?<=[;\t\r\n])(?='*[{re.escape(''.join(FORMULA[:4] + FORMULA[7:]))}])")  # within a text
BEGUN = re.compile(BEGINS.pattern.replace("(?='*", "'(?='*"))


def plain(text: str) -> str:
    """One line without control characters: they become visible, a newline `\\x0a`, a bidi override `\\u202e`.

    For the terminal and the log; split into lines first what shall stay several lines.
    """
    return UNSAFE.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


class Secrets:
    """Values that must not be written or printed, and their spellings (percent-encoded, in JSON, as Basic header)."""

    def __init__(self) -> None:
        self.values: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    @classmethod
    def collect(cls, environ: Mapping[str, str], home: Path) -> Secrets:
        """From the environment (by name; URLs in any value), ~/.netrc and the token file of the model hub."""
        found = cls()
        for name, value in environ.items():
            found.add_named(name, value)
            found.add_url(value)
        hub = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface")
        for path in (environ.get("HF_TOKEN_PATH") or hub / "token", home / ".huggingface" / "token"):
            found.add(_read(Path(path)).strip())
        path = Path(environ.get("NETRC") or home / ".netrc")
        try:
            hosts = netrc.netrc(path).hosts.values()
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            hosts = []
        for _, _, password in hosts:
            found.add(password or "")
        return found

    def add(self, value: str) -> None:
        """Remembers a secret of at least six characters; shorter ones are let go."""
        if len(value) >= SHORTEST:
            spellings = {value, unquote(value), quote(value, safe=""), quote(value)}
            spellings |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            self.values |= {s for s in spellings if len(s) >= SHORTEST}
            self._pattern = None

    def add_named(self, name: str, value: str) -> None:
        """Remembers a value whose name contains KEY, TOKEN, SECRET or PASSWORD in any case."""
        if SECRET_NAME.search(name):
            self.add(value.strip())

    def add_url(self, text: str) -> None:
        """Remembers the password (or the user, when alone) and the query values of every URL in a text."""
        for match in URL.finditer(text):
            if match["user"]:
                user, _, password = match["user"].partition(":")
                self.add(password or user)
                self.add(base64.b64encode(unquote(match["user"]).encode("utf-8", "surrogatepass")).decode())
            for _, value in QUERY.findall(match["rest"]):
                self.add(value)

    def mask(self, text: str) -> str:
        """The text with every secret, the userinfo and query values of URLs, and authorisation headers as `***`."""
        if self.values:
            if self._pattern is None:
                longest_first = sorted(self.values, key=lambda v: (-len(v), v))
                self._pattern = re.compile("|".join(map(re.escape, longest_first)))
            text = self._pattern.sub(MASK, text)
        if "://" in text:
            text = URL.sub(_mask_url, text)
        return HEADER.sub(rf"\1\2{MASK}", text)


def mask(text: str) -> str:
    """Masks with the secrets of this process, collected at the first call; see `secrets`."""
    return secrets().mask(text)


def secrets() -> Secrets:
    """The secrets of this process: `secrets().add_named(name, value)` for what was typed as a flag."""
    global _secrets
    if _secrets is None:
        _secrets = Secrets.collect(os.environ, Path(os.path.expanduser("~")))
    return _secrets


_secrets: Secrets | None = None


def say(text: str = "") -> None:
    """A line for the reader: to stderr, without control characters, secrets masked."""
    for part in text.split("\n"):
        print(plain(mask(part)), file=sys.stderr)


def csv_cell(text: str) -> str:
    """A cell that no spreadsheet computes: text that could be a formula gets a `'` before it; finite numbers do not.

    So does what follows a semicolon, a tab or a newline: a cell begins there for those who read by other separators.
    """
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return text
    text = BEGINS.sub("'", text)
    return "'" + text if text.startswith((*FORMULA, "'")) else text


def csv_value(cell: str) -> str:
    """What `csv_cell` was given: takes exactly one `'` off wherever it may have put one."""
    return BEGUN.sub("", cell.removeprefix("'"))


def csv_line(cells: Iterable[str]) -> str:
    """A line with its newline. csv.writer before Python 3.13 leaves a carriage return bare, and readers end there."""
    quoted = ('"' + c.replace('"', '""') + '"' if any(x in c for x in ',"\r\n') else c for c in cells)
    return ",".join(quoted) + "\n"


def closest(name: str, names: Iterable[str]) -> str:
    """The sentence after an unknown name: `did you mean psnr?`, or the choices there are."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(known[:20])}{' ...' if len(known) > 20 else ''}" if known else "there are none"


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """A TOML file of at most 1 MB in strict UTF-8, with numbers of at most 64 bits and without dates.

    Raises Error with the file and, where known, the line; `hint` says what such a file holds.
    """
    try:
        if not path.is_file():
            raise Error(f"{path} cannot be read: {'it is no regular file' if path.exists() else 'No such file'}", hint)
        if path.stat().st_size > MAX_TOML:
            raise Error(f"{path} is larger than {MAX_TOML:,} bytes", hint)
        text = path.read_bytes().decode("utf-8")
        if sum(line.count(".") ** 2 for line in text.splitlines()) > MAX_DOTS:
            raise Error(f"{path}: keys are nested too deeply", hint)
        found = tomllib.loads(text)
        for place, value in _leaves(found):
            if not isinstance(value, str | bool | int | float):
                raise Error(f"{path}: {place!r} is a date or a time, which nothing here takes", hint)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise Error(f"{path}: {place!r} is a number of more than 64 bits", hint)
        return found
    except UnicodeDecodeError as e:
        raise Error(f"{path} is not UTF-8 at byte {e.start}", hint="save it as UTF-8") from None
    except OSError as e:
        raise Error(f"{path} cannot be read: {e.strerror or e}", hint) from None
    except RecursionError:
        raise Error(f"{path}: nested too deeply", hint) from None
    except Error:
        raise
    except ValueError as e:
        raise Error(f"{path}: {brief(e)}", hint) from None


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree that are no table and no list, each with the last key above it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, brief(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, place)
    else:
        yield place, value


def brief(value: Any, limit: int = 100) -> str:
    """What others wrote, for a message: its beginning."""
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def duration(seconds: float) -> str:
    """`0:07`, `1:34`, `2:03:10`; `?` where it is not known (None is not a duration: pass NaN)."""
    if not 0 <= seconds < 1e9:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _mask_url(match: re.Match[str]) -> str:
    user = f"{MASK}@" if match["user"] is not None else ""
    return match["head"] + user + QUERY.sub(rf"\1={MASK}", match["rest"])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape") if path.is_file() else ""
    except OSError:
        return ""
