"""Downloads against a server on this machine that lies, stops and redirects; archives made to escape."""

import contextlib
import gzip
import hashlib
import io
import os
import socket
import stat
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from bench import fetch, manifest
from bench.fetch import download, unpack
from bench.types import Error, UsageError

CONTENT = np.random.default_rng(5).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = CONTENT[:1000] + b"x" + CONTENT[1001:]


class Handler(BaseHTTPRequestHandler):
    """Answers by path; keeps what was asked."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if "Range" in self.headers else 0
        server.asked.append((self.path, start))
        path, _, query = self.path.partition("?")
        if path == "/to":
            return self.answer(302, b"", Location=query)
        if path == "/loop":
            return self.answer(302, b"", Location="/loop")
        if path == "/chain":
            return self.answer(302, b"", Location=f"/chain?{int(query) - 1}" if int(query) else "/file")
        if path == "/redirect-without-target":
            return self.answer(302, b"")
        if path == "/file":
            return self.part(CONTENT, start)
        if path == "/other":
            return self.part(OTHER, start)
        if path == "/no-ranges":
            return self.answer(200, CONTENT)
        if path == "/wrong-range":
            return self.answer(206, CONTENT, **{"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"})
        if path == "/range-refused" and start:
            return self.answer(416, b"")
        if path == "/range-refused":
            return self.answer(200, CONTENT)
        if path == "/stops" and len(server.asked) < 3:
            return self.part(CONTENT, start, stop=100_000)
        if path == "/stops":
            return self.part(CONTENT, start)
        if path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(CONTENT)
            return None
        if path == "/drip":
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):
                while not server.done.wait(0.02):
                    self.wfile.write(b"x")
            return None
        if path == "/silent":
            self.close_connection = True
            server.done.wait(30)
            return None
        if path == "/garbage":
            self.wfile.write(b"\x00\x01 not HTTP\r\n\r\n")
            self.close_connection = True
            return None
        if path in server.files:
            return self.part(server.files[path], start)
        return self.answer(404, b"nothing here")

    def part(self, data, start, stop=None):
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, data[start:], stop, **headers)

    def answer(self, status, data, stop=None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data[:stop])
        self.close_connection = stop is not None


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.done, server.files = [], threading.Event(), {}
    server.handle_error = lambda *args: None  # clients that hang up are what is tested
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.done.set()
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, path, target, **options):
    return download(server.url + path, target, loopback=True, **{"sha256": SHA256, **options})


def left(target):
    return sorted(p.name for p in target.parent.iterdir() if not p.name.endswith(".lock"))


# -- what a download promises


def test_the_file_appears_under_its_name_when_the_hash_matches(server, tmp_path):
    seen = []
    target = tmp_path / "new/folder/w.pt"
    assert get(server, "/file", target, size=len(CONTENT), progress=lambda *a: seen.append(a)) == SHA256
    assert target.read_bytes() == CONTENT and left(target) == ["w.pt"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    get(server, "/file", target)
    assert len(server.asked) == 1  # there and right: not asked again


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    target = tmp_path / "w.pt"
    with pytest.raises(Error, match=f"expected {SHA256}"):
        get(server, "/other", target)
    assert left(target) == []
    target.write_bytes(b"older")
    with pytest.raises(Error):
        get(server, "/other", target)
    assert target.read_bytes() == b"older"


def test_a_broken_download_resumes_and_ends_with_the_whole_file(server, tmp_path):
    target = tmp_path / "w.pt"
    with pytest.raises(Error, match="ended after 100,000 of 300,000") as caught:
        get(server, "/stops", target)
    assert "run the same command again" in caught.value.hint and left(target) == ["w.pt.part"]
    with pytest.raises(Error, match="ended after 200,000"):
        get(server, "/stops", target)
    get(server, "/stops", target)
    assert target.read_bytes() == CONTENT and [start for _, start in server.asked] == [0, 100_000, 200_000]
    assert left(target) == ["w.pt"]


@pytest.mark.parametrize("path", ["/file", "/no-ranges", "/wrong-range", "/range-refused"])
def test_a_partial_of_another_file_is_never_mixed_in(server, tmp_path, path):
    target = tmp_path / "w.pt"
    (tmp_path / "w.pt.part").write_bytes(OTHER[:150_000])
    get(server, path, target)
    assert target.read_bytes() == CONTENT and left(target) == ["w.pt"]


def test_without_a_hash_nothing_is_resumed(server, tmp_path):
    target = tmp_path / "w.pt"
    (tmp_path / "w.pt.part").write_bytes(CONTENT[:150_000])
    assert get(server, "/file", target, sha256="") == SHA256
    assert server.asked == [("/file", 0)]


def test_more_or_less_than_declared_is_refused(server, tmp_path):
    target = tmp_path / "w.pt"
    for path in ("/file", "/endless"):
        with pytest.raises(Error, match="more than the 299,999 bytes"):
            get(server, path, target, size=299_999)
    assert left(target) == []
    with pytest.raises(Error, match="ended after"):
        get(server, "/file", target, size=300_001)
    assert not target.exists()


def test_redirects_are_followed_a_few_times(server, tmp_path):
    get(server, "/chain?3", tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == CONTENT
    for path in ("/loop", "/chain?9", "/redirect-without-target"):
        with pytest.raises(Error):
            get(server, path, tmp_path / "x.pt")


ELSEWHERE = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/x",
    "gopher://127.0.0.1/x",
    "https://user:secret@example.org/x",
    "http://169.254.169.254/latest/meta-data",
    "http://10.0.0.1/x",
    "http://192.168.1.1/x",
    "http://172.16.0.1/x",
    "http://100.64.0.1/x",
    "http://0.0.0.0/x",
    "http://[fe80::1]/x",
    "http://[fc00::1]/x",
    "http://[::ffff:10.0.0.1]/x",
    "http://224.0.0.1/x",
    "http://2130706433.example.invalid/x",
    "http:///x",
    "http://127.0.0.1:99999/x",
    "//",
]


@pytest.mark.parametrize("url", ELSEWHERE)
def test_other_schemes_and_private_addresses_are_never_opened_even_by_redirect(server, tmp_path, url, monkeypatch):
    opened = []
    real = socket.create_connection

    def watched(address, *args, **kwargs):
        opened.append(address)
        return real(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", watched)
    for start in (url, f"{server.url}/to?{url}"):
        with pytest.raises(Error) as caught:
            download(start, tmp_path / "w.pt", SHA256, loopback=True)
        assert "secret" not in str(caught.value)
    assert set(opened) <= {("127.0.0.1", server.server_port)} and left(tmp_path / "w.pt") == []


def test_without_the_flag_for_tests_this_machine_and_plain_http_are_refused(server, tmp_path):
    for url in (server.url + "/file", f"https://127.0.0.1:{server.server_port}/file", "https://localhost/file"):
        with pytest.raises(Error):
            download(url, tmp_path / "w.pt", SHA256)
    assert server.asked == [] and left(tmp_path / "w.pt") == []


def test_a_name_with_one_private_address_among_public_ones_is_refused(monkeypatch, tmp_path):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 443)) for a in ("93.184.216.34", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(Error, match=r"10\.0\.0\.7, which is not a public address"):
        download("https://example.org/x", tmp_path / "w.pt", SHA256)


def test_slow_silent_and_broken_servers_end_in_words(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    monkeypatch.setattr(fetch, "WINDOW", 0.3)
    for path, reason in {"/drip": "less than", "/silent": "timed out", "/garbage": "garbage", "/absent": "404"}.items():
        with pytest.raises(Error, match=reason) as caught:
            get(server, path, tmp_path / "w.pt")
        assert path in str(caught.value)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Error, match="refused"):
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/x", tmp_path / "w.pt", SHA256, loopback=True)
    assert not (tmp_path / "w.pt").exists()


def test_keys_in_redirected_urls_do_not_reach_messages(server, tmp_path):
    with pytest.raises(Error) as caught:
        get(server, f"/to?{server.url}/absent?signature=SECRET", tmp_path / "w.pt")
    assert "SECRET" not in str(caught.value) and "SECRET" not in caught.value.hint


def test_two_at_once_do_not_write_one_file(server, tmp_path):
    from bench import door

    with door.lock(tmp_path / ".w.pt.lock", "w.pt"), pytest.raises(Error, match="is being written by"):
        get(server, "/file", tmp_path / "w.pt")


# -- archives


def zipped(*members, **options) -> bytes:
    """Members are (name, content) or (ZipInfo, content)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, **options) as pack:
        for name, content in members:
            pack.writestr(name, content)
    return file.getvalue()


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


def tarred(*members, mode="w") -> bytes:
    """Members are (name, content), or (TarInfo, b'')."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as pack:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
    return file.getvalue()


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def lying_zip() -> bytes:
    """The directory says 10 bytes, the stream holds a million."""
    data = bytearray(zipped(("a.png", b"0" * 1_000_000)))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(signature) + place
        data[start : start + 4] = struct.pack("<I", 10)
    return bytes(data)


def encrypted_zip() -> bytes:
    data = bytearray(zipped(("a.png", b"secret")))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + place] |= 1
    return bytes(data)


A = ("a.png", b"a")
ESCAPES = {
    "zip ..": zipped(A, ("../evil", b"x")),
    "zip deep ..": zipped(A, ("x/../../evil", b"x")),
    "zip absolute": zipped(A, ("/tmp/evil", b"x")),
    "zip backslash": zipped(A, ("..\\evil", b"x")),
    "zip drive": zipped(A, ("C:\\evil", b"x")),
    "zip link": zipped(A, zip_link("link", "/etc"), ("link/evil", b"x")),
    "zip control": zipped(A, ("a\x1b[2Jb", b"x")),
    "zip twice": zipped(A, ("b", b"1"), ("b/../a.png", b"2")),
    "zip case twins": zipped(A, ("A.PNG", b"x")),
    "zip long name": zipped(A, ("n" * 256, b"x")),
    "zip many": zipped(*((f"{i}", b"") for i in range(1001))),
    "zip bomb": zipped(("a.png", b"0" * 2_000_000)),
    "zip that lies": lying_zip(),
    "zip encrypted": encrypted_zip(),
    "zip damaged": zipped(("a.png", os.urandom(5000)))[:2000],
    "zip crc": zipped(("a.png", CONTENT[:5000])).replace(CONTENT[100:110], b"0123456789"),
    "zip file as folder": zipped(A, ("a.png/b", b"x")),
    "tar ..": tarred(A, ("../evil", b"x")),
    "tar absolute": tarred(A, ("/tmp/evil", b"x")),
    "tar link": tarred(A, special("link", tarfile.SYMTYPE, "/etc"), ("link/evil", b"x")),
    "tar link inside": tarred(A, special("link", tarfile.SYMTYPE, "a.png")),
    "tar hard link": tarred(A, special("link", tarfile.LNKTYPE, "../../etc/passwd")),
    "tar pipe": tarred(A, special("pipe", tarfile.FIFOTYPE)),
    "tar device": tarred(A, special("null", tarfile.CHRTYPE)),
    "tar twice": tarred(A, A),
    "tar.gz bomb": gzip.compress(tarred(("a.png", b"0" * 2_000_000))),
    "tar.gz damaged": gzip.compress(tarred(A))[:-20],
    "tar.gz wrong checksum": gzip.compress(tarred(A))[:-8] + b"\0" * 8,
    "tar.gz with a bomb behind": gzip.compress(tarred(A) + b"0" * 3_000_000),
    "tar.xz damaged": tarred(A, mode="w:xz")[:-40],
    "nothing": b"",
    "HTML": b"<html>" * 100,
}


@pytest.mark.parametrize("name", ESCAPES)
def test_archives_are_refused_whole(name, tmp_path):
    archive, folder = tmp_path / "in/pack", tmp_path / "out"
    archive.parent.mkdir()
    archive.write_bytes(ESCAPES[name])
    with pytest.raises(Error) as caught:
        unpack(archive, folder, max_files=1000, max_bytes=1_000_000)
    assert not folder.exists() and sorted(p.name for p in tmp_path.rglob("*")) == ["in", "pack"]
    assert caught.value.hint
    folder.mkdir()
    (folder / "kept").write_text("x")
    with pytest.raises(Error):
        unpack(archive, folder, max_files=1000, max_bytes=1_000_000)
    assert [p.name for p in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "pack", [zipped, tarred, lambda *m: tarred(*m, mode="w:gz"), lambda *m: tarred(*m, mode="w:xz")]
)
def test_good_archives_are_unpacked_byte_for_byte(pack, tmp_path):
    members = [("a.png", CONTENT), ("sub/deep/b.png", b"b"), ("empty", b"")]
    archive, folder = tmp_path / "pack", tmp_path / "out"
    archive.write_bytes(pack(*members))
    assert unpack(archive, folder, max_files=3, max_bytes=len(CONTENT) + 1) == 3
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == dict(members)


# -- whole manifests

HEADER = 'kind = "images"\nsource = "s"\nlicense = "l"\nredistribute = true\nroot = "toy"\nlocked = false\n'


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "data"))
    (tmp_path / "data_manifests/weights").mkdir(parents=True)
    return tmp_path


def fetch_table(server, file, data, **more):
    server.files[f"/{file}"] = data
    extra = "".join(f"{key} = {value}\n" for key, value in more.items())
    return f'[[fetch]]\nurl = "{server.url}/{file}"\nfile = "{file}"\n{extra}'


def test_pictures_nobody_vouched_for_wait_until_they_are_locked(server, place):
    toml = place / "data_manifests/toy.toml"
    toml.write_text(HEADER + fetch_table(server, "a.png", picture(1)) + fetch_table(server, "b.png", picture(2)))
    said = manifest.fetch("toy", loopback=True)
    assert hashlib.sha256(picture(1)).hexdigest() in said and "bench data lock toy" in said
    root = place / "data/toy"
    assert left(root / "a.png") == ["a.png.unverified", "b.png.unverified"]
    with pytest.raises(Error, match="never locked"):
        manifest.load("toy").ids()
    manifest.lock("toy")
    assert manifest.load("toy").ids() == ("a.png", "b.png") and "2 items" in manifest.verify("toy")
    (root / "a.png").unlink()
    manifest.fetch("toy", loopback=True)  # locked now: each item has its hash
    assert "2 items" in manifest.verify("toy")
    server.files["/a.png"] = picture(3)
    (root / "a.png").unlink()
    manifest.fetch("toy", loopback=True)
    with pytest.raises(Error, match=r"a\.png changed"):
        manifest.load("toy").check()


def test_an_archive_with_a_known_hash_is_unpacked_and_then_locked(server, place):
    data = zipped(("val/a.png", picture(1)), ("val/b.png", picture(2)))
    sha256 = hashlib.sha256(data).hexdigest()
    table = fetch_table(server, "v.zip", data, sha256=f'"{sha256}"', bytes=len(data), unpack="{files=2, bytes=9999}")
    (place / "data_manifests/toy.toml").write_text(HEADER + table)
    assert "next: bench data lock toy" in manifest.fetch("toy", loopback=True)
    manifest.lock("toy")
    assert manifest.load("toy").ids() == ("val/a.png", "val/b.png")
    manifest.fetch("toy", loopback=True)
    assert len(server.asked) == 1  # unpacked as a whole, so it is not fetched again


def test_an_archive_nobody_vouched_for_is_unpacked_by_the_lock(server, place):
    table = fetch_table(server, "v.zip", zipped(("a.png", picture(1))), unpack="{files=2, bytes=9999}")
    (place / "data_manifests/toy.toml").write_text(HEADER + table)
    assert "Nobody vouches" in manifest.fetch("toy", loopback=True)
    assert left(place / "data/toy.download/x") == ["v.zip.unverified"]
    mine = place / "data/toy/mine.txt"
    mine.parent.mkdir()
    mine.write_text("of somebody else")
    with pytest.raises(Error, match="not empty"):
        manifest.lock("toy")
    assert mine.read_text() == "of somebody else"
    mine.unlink()
    manifest.fetch("toy", loopback=True)
    manifest.lock("toy")
    assert manifest.load("toy").ids() == ("a.png",) and not (place / "data/toy.download").exists()


def test_weights_with_a_hash_are_fetched_and_without_one_wait(server, place):
    server.files["/m.pt"] = CONTENT
    text = f'what = "x"\nsource = "y"\nlicense = "z"\nurl = "{server.url}/m.pt"\nfile = "m.pt"\n'
    toml = place / "data_manifests/weights/mine.toml"
    toml.write_text(text + f'sha256 = "{SHA256}"\nbytes = {len(CONTENT)}\nlocked = true\n')
    manifest.fetch("weights/mine", loopback=True)
    assert manifest.weights_path("mine").read_bytes() == CONTENT
    manifest.weights_path("mine").unlink()
    toml.write_text(text + "locked = false\n")
    assert SHA256 in manifest.fetch("weights/mine", loopback=True)
    assert left(place / "data/weights/x") == ["m.pt.unverified"]
    manifest.lock("weights/mine")
    assert manifest.weights_path("mine").read_bytes() == CONTENT
    assert f'sha256 = "{SHA256}"' in toml.read_text() and f"bytes = {len(CONTENT)}" in toml.read_text()


def test_data_behind_a_licence_says_where_to_get_it(place):
    with pytest.raises(Error) as caught:
        manifest.fetch("imagenet-val")
    for word in ("image-net.org", "ILSVRC2012_img_val.tar", "$BENCH_DATA/imagenet/val", "bench data lock imagenet-val"):
        assert word in caught.value.hint


def test_hub_names_need_a_commit_and_files_their_hash(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    with pytest.raises(UsageError, match="must name a commit"):
        manifest.fetch("hf:owner/name@main")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc1234/vae"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    asked = {}

    def snapshot_download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(snapshot.parent)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(Error, match="no safetensors"):
        manifest.fetch("hf:owner/name@abc1234:vae")
    (blobs / SHA256).write_bytes(CONTENT)
    (snapshot / "model.safetensors").symlink_to(blobs / SHA256)
    assert str(snapshot) in manifest.fetch("hf:owner/name@abc1234:vae")
    assert asked["repo"] == "owner/name" and asked["revision"] == "abc1234"
    assert all(p.startswith("vae/") and not p.endswith((".bin", ".py", ".pt")) for p in asked["patterns"])
    (blobs / SHA256).write_bytes(OTHER)
    with pytest.raises(Error, match="damaged in the cache"):
        manifest.fetch("hf:owner/name@abc1234:vae")
