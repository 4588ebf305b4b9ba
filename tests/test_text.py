"""Text safety against parsers that we did not write: csv, unicodedata, and canaries in every place secrets hide."""

import csv
import io
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.text import Secrets, closest, csv_cell, csv_value, duration, mask, plain

BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(st.text(st.characters()))
@example("a\x1b]52;c;aGk=\x07b")
@example("\udcff\u2028\u202e\x9b31m")
def test_plain_leaves_no_control_and_can_be_encoded(text):
    shown = plain(text)
    shown.encode("utf-8")
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") for c in shown)
    assert not any(unicodedata.bidirectional(c) in BIDI for c in shown)
    assert plain(shown) == shown


def test_plain_shows_what_was_there():
    assert plain("a\x1b[2Jb\n") == "a\\x1b[2Jb\\x0a"
    assert plain("naïve 日本語 🙂 \\x1b") == "naïve 日本語 🙂 \\x1b"
    assert plain("\u202egpj.exe") == "\\u202egpj.exe"


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("'=1+1")
@example("''")
@example("-3.5e")
@example("+1e999")
@example(";'=1+1")
@example("';=1;\n''-1\r\n@A1")
def test_csv_cells_round_trip_and_start_no_formula(text):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerow([csv_cell(text), "end"])
    buffer.seek(0)
    [[cell, end]] = list(csv.reader(buffer))
    assert end == "end"
    assert csv_value(cell) == text
    if cell[:1] in set("=+-@\t\r\n＝＋－＠"):
        assert math.isfinite(float(cell))


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(-3.5)
@example(1e-300)
@example(-0.0)
@example(1.7976931348623157e308)
def test_finite_numbers_are_not_touched(number):
    assert csv_cell(repr(number)) == repr(number)


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t1", "\r1", "－1", "-inf", "+nan"]
)
def test_formulas_are_neutral(text):
    assert csv_cell(text) == "'" + text


@pytest.mark.parametrize("separator", [";", "\t", "\n", "\r\n"])
def test_formulas_are_neutral_where_another_separator_begins_a_cell(separator):
    """A spreadsheet set to semicolons opens a CSV with commas, too, and quotes within its cells end none."""
    assert csv_cell(f"x{separator}=1+1") == f"x{separator}'=1+1"
    assert csv_cell(f"x{separator} y, a-1") == f"x{separator} y, a-1"


@pytest.fixture
def canaries(tmp_path):
    """A home and an environment with a secret in every place that is searched."""
    (tmp_path / ".netrc").write_text("machine example.org login joe password canary-netrc-1\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("canary-hub-2\n")
    environ = {
        "OPENAI_API_KEY": "canary-environment-3",
        "my_password": "canary lower 4/ü",
        "https_proxy": "http://joe:canary%2Dproxy-5@proxy.example:3128",
        "SOME_SETTING": "see https://example.org/x?sig=canary-query-6&size=12",
        "HF_HOME": str(tmp_path / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return Secrets.collect(environ, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "error 401: wrong key canary-environment-3!",
        "canary-netrc-1",
        "canary-hub-2canary-hub-2",
        "canary lower 4/ü and canary%20lower%204%2F%C3%BC",
        '{"password": "canary lower 4/\\u00fc"}',
        "proxy canary-proxy-5 or canary%2Dproxy-5",
        "/tmp/canary-query-6.png",
        "git@host: https://x:canary-unseen-7@git.example/repo.git",
        "https://canary-unseen-8@git.example/repo",
        "GET https://bucket.example/a?X-Signature=canary-unseen-9&b=canary-unseen-10#f",
        "Authorization: Bearer canary-unseen-11",
        "Basic am9lOmNhbmFyeS1wcm94eS01",
    ],
)
def test_secrets_are_masked_wherever_they_appear(canaries, text):
    masked = canaries.mask(text)
    assert "canary" not in masked and "am9lOmNhbmFyeS1wcm94eS01" not in masked
    assert "***" in masked


def test_masking_leaves_the_rest(canaries):
    for text in (
        "psnr 24.51 n 12 false",
        "hf:owner/name@31f26fdeee",
        "codec?quality=50",
        "https://example.org/a#b",
        "",
    ):
        assert canaries.mask(text) == text
    assert canaries.mask("a canary-netrc-1 b") == "a *** b"


def test_longer_secret_wins():
    secrets = Secrets()
    secrets.add("abcdef")
    secrets.add("abcdefghi")
    assert secrets.mask("abcdefghi abcdef") == "*** ***"


def test_flag_values_can_be_added_and_short_ones_are_let_go():
    secrets = Secrets()
    secrets.add_named("api_key", "typed-at-the-prompt")
    secrets.add_named("quality", "fifty-five")
    secrets.add_named("key", "12345")
    assert secrets.mask("typed-at-the-prompt fifty-five 12345") == "*** fifty-five 12345"


def test_unreadable_sources_are_no_secrets(tmp_path):
    (tmp_path / ".netrc").write_bytes(b"\xff\xfe machine")
    assert Secrets.collect({"HF_HOME": str(tmp_path / "absent")}, tmp_path).values == set()


@given(st.text(st.characters()))
def test_masking_twice_is_masking_once(text):
    secrets = Secrets()
    secrets.add("secret-value")
    once = secrets.mask(text + "secret-value" + text)
    assert "secret-value" not in once
    assert secrets.mask(once) == once


def test_this_process_reads_its_own_environment(monkeypatch):
    monkeypatch.setenv("TOUCHSTONE_TEST_TOKEN", "canary-process-12")
    monkeypatch.setenv("HOME", str(Path("/nonexistent")))
    monkeypatch.setattr("bench.text._secrets", None)
    assert mask("x canary-process-12") == "x ***"


def test_closest_name():
    assert closest("pnsr", ["psnr", "ssim", "lpips"]) == "did you mean psnr?"
    assert closest("zzz", ["b", "a"]) == "choose from a, b"
    assert closest("x", []) == "there are none"


def test_duration():
    assert [duration(s) for s in (0, 7.4, 94, 7390, -1, float("nan"))] == ["0:00", "0:07", "1:34", "2:03:10", "?", "?"]
