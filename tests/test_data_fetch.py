"""Downloads and whole manifests against a server on this machine; what means harm is in tests/survival."""

import contextlib
import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from bench import manifest, manifest_verbs, manifest_weights
from bench.fetch import download
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


def test_without_a_hash_nothing_is_resumed(server, tmp_path):
    target = tmp_path / "w.pt"
    (tmp_path / "w.pt.part").write_bytes(CONTENT[:150_000])
    assert get(server, "/file", target, sha256="") == SHA256
    assert server.asked == [("/file", 0)]


def test_redirects_are_followed_a_few_times(server, tmp_path):
    get(server, "/chain?3", tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == CONTENT


def test_without_the_flag_for_tests_this_machine_and_plain_http_are_refused(server, tmp_path):
    for url in (server.url + "/file", f"https://127.0.0.1:{server.server_port}/file", "https://localhost/file"):
        with pytest.raises(Error):
            download(url, tmp_path / "w.pt", SHA256)
    assert server.asked == [] and left(tmp_path / "w.pt") == []


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
    said = manifest_verbs.fetch("toy", loopback=True)
    assert hashlib.sha256(picture(1)).hexdigest() in said and "bench data lock toy" in said
    root = place / "data/toy"
    assert left(root / "a.png") == ["a.png.unverified", "b.png.unverified"]
    with pytest.raises(Error, match="never locked"):
        manifest.load("toy").ids()
    manifest_verbs.lock("toy")
    assert manifest.load("toy").ids() == ("a.png", "b.png") and "2 items" in manifest_verbs.verify("toy")
    (root / "a.png").unlink()
    manifest_verbs.fetch("toy", loopback=True)  # locked now: each item has its hash
    assert "2 items" in manifest_verbs.verify("toy")
    server.files["/a.png"] = picture(3)
    (root / "a.png").unlink()
    manifest_verbs.fetch("toy", loopback=True)
    with pytest.raises(Error, match=r"a\.png changed"):
        manifest.load("toy").check()


def test_an_archive_with_a_known_hash_is_unpacked_and_then_locked(server, place):
    data = zipped(("val/a.png", picture(1)), ("val/b.png", picture(2)))
    sha256 = hashlib.sha256(data).hexdigest()
    table = fetch_table(server, "v.zip", data, sha256=f'"{sha256}"', bytes=len(data), unpack="{files=2, bytes=9999}")
    (place / "data_manifests/toy.toml").write_text(HEADER + table)
    assert "next: bench data lock toy" in manifest_verbs.fetch("toy", loopback=True)
    manifest_verbs.lock("toy")
    assert manifest.load("toy").ids() == ("val/a.png", "val/b.png")
    manifest_verbs.fetch("toy", loopback=True)
    assert len(server.asked) == 1  # unpacked as a whole, so it is not fetched again


def test_an_archive_nobody_vouched_for_is_unpacked_by_the_lock(server, place):
    table = fetch_table(server, "v.zip", zipped(("a.png", picture(1))), unpack="{files=2, bytes=9999}")
    (place / "data_manifests/toy.toml").write_text(HEADER + table)
    assert "Nobody vouches" in manifest_verbs.fetch("toy", loopback=True)
    assert left(place / "data/toy.download/x") == ["v.zip.unverified"]
    mine = place / "data/toy/mine.txt"
    mine.parent.mkdir()
    mine.write_text("of somebody else")
    with pytest.raises(Error, match="not empty"):
        manifest_verbs.lock("toy")
    assert mine.read_text() == "of somebody else"
    mine.unlink()
    manifest_verbs.fetch("toy", loopback=True)
    manifest_verbs.lock("toy")
    assert manifest.load("toy").ids() == ("a.png",) and not (place / "data/toy.download").exists()


def test_weights_with_a_hash_are_fetched_and_without_one_wait(server, place):
    server.files["/m.pt"] = CONTENT
    text = f'what = "x"\nsource = "y"\nlicense = "z"\nurl = "{server.url}/m.pt"\nfile = "m.pt"\n'
    toml = place / "data_manifests/weights/mine.toml"
    toml.write_text(text + f'sha256 = "{SHA256}"\nbytes = {len(CONTENT)}\nlocked = true\n')
    manifest_verbs.fetch("weights/mine", loopback=True)
    assert manifest_weights.weights_path("mine").read_bytes() == CONTENT
    manifest_weights.weights_path("mine").unlink()
    toml.write_text(text + "locked = false\n")
    assert SHA256 in manifest_verbs.fetch("weights/mine", loopback=True)
    assert left(place / "data/weights/x") == ["m.pt.unverified"]
    manifest_verbs.lock("weights/mine")
    assert manifest_weights.weights_path("mine").read_bytes() == CONTENT
    assert f'sha256 = "{SHA256}"' in toml.read_text() and f"bytes = {len(CONTENT)}" in toml.read_text()


def test_data_behind_a_licence_says_where_to_get_it(place):
    with pytest.raises(Error) as caught:
        manifest_verbs.fetch("imagenet-val")
    for word in ("image-net.org", "ILSVRC2012_img_val.tar", "$BENCH_DATA/imagenet/val", "bench data lock imagenet-val"):
        assert word in caught.value.hint


def test_hub_names_need_a_commit_and_files_their_hash(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    with pytest.raises(UsageError, match="must name a commit"):
        manifest_verbs.fetch("hf:owner/name@main")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc1234/vae"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    asked = {}

    def snapshot_download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(snapshot.parent)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(Error, match="no safetensors"):
        manifest_verbs.fetch("hf:owner/name@abc1234:vae")
    (blobs / SHA256).write_bytes(CONTENT)
    (snapshot / "model.safetensors").symlink_to(blobs / SHA256)
    assert str(snapshot) in manifest_verbs.fetch("hf:owner/name@abc1234:vae")
    assert asked["repo"] == "owner/name" and asked["revision"] == "abc1234"
    assert all(p.startswith("vae/") and not p.endswith((".bin", ".py", ".pt")) for p in asked["patterns"])
    (blobs / SHA256).write_bytes(OTHER)
    with pytest.raises(Error, match="damaged in the cache"):
        manifest_verbs.fetch("hf:owner/name@abc1234:vae")
