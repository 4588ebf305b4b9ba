"""Servers and addresses that mean harm: never opened, never believed; a file is named when its hash is right."""

import hashlib
import re
import socket

import pytest
from corpus import toml_file
from test_data_fetch import CONTENT, OTHER, SHA256, left, server  # noqa: F401  (a fixture)
from toys import command

from bench import fetch
from bench.fetch import download
from bench.types import Error

# where a server must not be able to send us, straight or by redirect
ELSEWHERE = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/x",
    "gopher://127.0.0.1/x",
    "data:text/plain,x",
    "https://user:hunter2@example.org/x",
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/x",
    "http://192.168.1.1/x",
    "http://172.16.0.1/x",
    "http://100.64.0.1/x",
    "http://0.0.0.0/x",
    "http://[::]/x",
    "http://[fe80::1]/x",
    "http://[fc00::1]/x",
    "http://[::ffff:10.0.0.1]/x",
    "http://[64:ff9b::a00:1]/x",
    "http://[2002:a00:1::]/x",
    "http://224.0.0.1/x",
    "http://0x0a000001/x",
    "http:///x",
    "http://127.0.0.1:99999/x",
    "//",
]


@pytest.fixture
def opened(monkeypatch):
    """The addresses that are connected to from now on."""
    found = []
    real = socket.create_connection

    def watched(address, *args, **kwargs):
        found.append(address)
        return real(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", watched)
    return found


def refusal(url, target, **options):
    try:
        download(url, target, options.pop("sha256", SHA256), loopback=True, **options)
    except Error as e:
        return f"{e}\n{e.hint}"
    return ""


@pytest.mark.parametrize("url", ELSEWHERE)
def test_other_schemes_and_private_addresses_are_never_opened_even_by_redirect(server, tmp_path, tally, url, opened):  # noqa: F811
    target, passed = tmp_path / "w.pt", 0
    for start in (url, f"{server.url}/to?{url}"):
        said = refusal(start, target)
        assert [path for path, _ in server.asked][:1] == ([f"/to?{url}"] if start != url else [])  # it was served
        only_here = set(opened) <= {("127.0.0.1", server.server_port)}
        passed += bool(said) and "hunter2" not in said and "Traceback" not in said and only_here and left(target) == []
    tally("hostile files", passed, 2)
    assert passed == 2, (said, opened, left(target))


# path -> (options, a word of the refusal, what may lie there afterwards)
LIES = {
    "/loop": ({}, "more than 5 redirects", []),
    "/chain?9": ({}, "more than 5 redirects", []),
    "/redirect-without-target": ({}, "redirects", []),
    "/other": ({}, f"expected {SHA256}", []),
    "/file": ({"size": len(CONTENT) - 1}, "more than the 299,999 bytes", []),
    "/endless": ({"size": len(CONTENT) - 1}, "more than the 299,999 bytes", []),
    "/no-ranges": ({"size": len(CONTENT) + 1}, "ended after", ["w.pt.part"]),
    "/drip": ({}, "less than", ["w.pt.part"]),
    "/silent": ({}, "timed out", []),
    "/garbage": ({}, "garbage", []),
    "/absent": ({}, "404", []),
}


@pytest.mark.parametrize("path", LIES)
def test_a_server_that_lies_stalls_or_swells_is_refused_in_words(server, tmp_path, tally, path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fetch, "TIMEOUT", 1.0)
    monkeypatch.setattr(fetch, "WINDOW", 0.3)
    options, word, may_stay = LIES[path]
    target = tmp_path / "w.pt"
    said = refusal(server.url + path, target, **options)
    assert server.asked and server.asked[0][0] == path
    good = (
        word in said and path.partition("?")[0] in said and not target.exists() and set(left(target)) <= set(may_stay)
    )
    tally("hostile files", int(good), 1)
    assert good, (said, left(target))


@pytest.mark.parametrize("path", ["/file", "/no-ranges", "/wrong-range", "/range-refused", "/stops"])
def test_a_partial_download_resumes_or_restarts_and_is_never_mixed(server, tmp_path, tally, path):  # noqa: F811
    """Left from another file; left from this one, by a server that stops twice."""
    target = tmp_path / "w.pt"
    if path != "/stops":
        (tmp_path / "w.pt.part").write_bytes(OTHER[:150_000])
    else:
        assert all("ended after" in refusal(server.url + path, target) for _ in range(2))
        assert left(target) == ["w.pt.part"]
    said = refusal(server.url + path, target)
    offsets = [start for _, start in server.asked]
    assert max(offsets) > 0  # it did ask to go on
    good = not said and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256 and left(target) == ["w.pt"]
    tally("hostile files", int(good), 1)
    assert good, (said, offsets)


def test_a_name_is_checked_after_it_was_resolved_and_the_checked_address_is_the_one_opened(
    tmp_path, monkeypatch, tally
):
    """One private address among public ones; and a name that means another address the second time it is asked."""
    asked, opened = [], []

    def resolve(host, port, *args, **kwargs):
        asked.append(host)
        known = {"mixed.example": ["93.184.216.34", "10.0.0.7"], "turning.example": ["93.184.216.34"]}[host]
        known = ["10.0.0.7"] if asked.count("turning.example") > 1 else known
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]

    def connect(address, *args, **kwargs):
        opened.append(address[0])
        raise OSError("nobody is there")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    mixed = refusal("https://mixed.example/x", tmp_path / "w.pt")
    good = "10.0.0.7, which is not a public address" in mixed and not opened
    turning = refusal("https://turning.example/x", tmp_path / "w.pt")
    also = "nobody is there" in turning and opened == ["93.184.216.34"] and asked.count("turning.example") == 1
    tally("hostile files", good + also, 2)
    assert good and also, (mixed, turning, opened)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "http://127.0.0.1:PORT/file", "https://127.0.0.1:PORT/file", "https://u:hunter2@e.org/x"],
)
def test_a_command_that_fetches_opens_public_https_alone(server, tmp_path, url):  # noqa: F811
    """As a user meets it: a manifest of a stranger that points to this machine, a file, or carries a password."""
    header = {"kind": "images", "source": "s", "license": "l", "redistribute": True, "root": "toy", "locked": False}
    part = {"url": url.replace("PORT", str(server.server_port)), "file": "a.png", "sha256": SHA256}
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests/toy.toml").write_text(toml_file({**header, "fetch": [part]}))
    done = command(tmp_path, "data", "fetch", "toy", env={"BENCH_DATA": str(tmp_path / "data")})
    assert done.code == 1 and done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    assert "hunter2" not in done.err and len(done.err.splitlines()) <= 12
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f]", done.err) and server.asked == []
    assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file() and not p.name.endswith(".lock")]
