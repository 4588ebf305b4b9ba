"""Manifests: the embedded set, folders, locking; wrong files, refused in words (tests/survival has thousands)."""

import hashlib
import json
import os
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench import images, manifest, manifest_format, manifest_places, manifest_verbs, manifest_weights
from bench.identity import FileDigests
from bench.manifest import load
from bench.manifest_verbs import lock, verify
from bench.types import Error, UsageError

HEADER = """
# a comment that stays
kind = "images"
source = "drawn here"
license = "CC0"
redistribute = true
sensitive = false
root = "toy/val"
locked = false
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a manifest `toy` of four pictures that was not locked yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "data"))
    root = tmp_path / "data/toy/val"
    (root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png", "d.PNG"):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(root / name, "PNG")
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests/toy.toml").write_text(HEADER)
    return tmp_path


# -- photographs


def test_photographs_are_259_crops_of_18_clusters():
    data = load("photographs")
    data.check()
    assert len(data.ids()) == len(set(data.ids())) == 259
    assert data.num_clusters() == 18 and data.locked and data.redistribute and not data.sensitive
    items = [data.item(id) for id in data.ids()]
    kinds = {
        kind: sum(item.attributes["kind"] == kind for item in items) for kind in ("scene", "texture", "grey", "medical")
    }
    assert kinds == {"scene": 126, "texture": 48, "grey": 38, "medical": 47}
    assert max(Counter(item.path for item in items).values()) == 16
    pair = {item.cluster for item in items if "motorcycle" in item.path.name}
    assert pair == {"motorcycle"} and len({i.path for i in items if i.cluster == "motorcycle"}) == 2
    assert {"china", "flower"} <= {item.cluster for item in items}


def test_photographs_are_the_pixels_that_the_packages_show():
    skimage = pytest.importorskip("skimage.data")
    sklearn = pytest.importorskip("sklearn.datasets")
    data = load("photographs")
    peers = {
        "astronaut": skimage.astronaut(),
        "china": sklearn.load_sample_image("china.jpg"),
        "brick": skimage.brick(),
    }
    for name, peer in peers.items():
        peer = np.repeat(peer[..., None], 3, axis=2) if peer.ndim == 2 else peer
        ids = [id for id in data.ids() if id.startswith(f"{name}-x")]
        assert len(ids) >= 15
        for id in ids:
            left, top = int(id[-10:-6]), int(id[-4:])
            assert np.array_equal(data.read(id), peer[top : top + 256, left : left + 256])
    assert {data.read(id).shape for id in data.ids()} == {(256, 256, 3)}


def test_a_picture_that_another_release_moved_or_changed_is_named_with_the_version_to_install(tmp_path, monkeypatch):
    real = manifest.package_file
    data = load("photographs")
    changed = tmp_path / "brick.png"
    changed.write_bytes(real("skimage/data/brick.png").read_bytes() + b"x")
    monkeypatch.setattr(manifest, "package_file", lambda name: changed if name.endswith("brick.png") else real(name))
    for act in (Manifest_check, lambda d: d.read("brick-x0000-y0000"), lambda d: d.item("brick-x0000-y0000")):
        with pytest.raises(Error) as caught:
            act(load("photographs"))
        assert "brick.png" in str(caught.value) and "7966caf324f6" in str(caught.value)
        assert "scikit-image==0.26.0" in caught.value.hint
    changed.unlink()
    for act in (Manifest_check, lambda d: d.read("brick-x0000-y0000")):
        with pytest.raises(Error, match="missing") as caught:
            act(load("photographs"))
        assert "scikit-image==0.26.0" in caught.value.hint
    assert load("photographs").digest == data.digest  # the digest is of what should be there


def Manifest_check(data):
    data.check()


@given(
    width=st.integers(1, 1500),
    height=st.integers(1, 1500),
    size=st.integers(1, 300),
    stride=st.integers(1, 300),
    limit=st.integers(1, 30),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_crops_lie_inside_keep_their_distance_and_reach_the_edges(width, height, size, stride, limit):
    boxes = manifest_format.crop_boxes(width, height, size, stride, limit)
    assert (not boxes) == (min(width, height) < size) and len(boxes) <= limit and len(set(boxes)) == len(boxes)
    columns, rows = sorted({b[0] for b in boxes}), sorted({b[1] for b in boxes})
    for starts, extent in ((columns, width), (rows, height)) if boxes else ():
        assert all(b - a >= stride for a, b in pairwise(starts))
        assert starts[0] >= 0 and starts[-1] + size <= extent
        if len(starts) > 1:
            assert starts[0] == 0 and starts[-1] + size == extent
        else:
            assert abs(starts[0] - (extent - size - starts[0])) <= 1  # the centre


# -- items, chunks, subsets


def test_lock_then_load_then_verify(place):
    with pytest.raises(Error, match="never locked") as caught:
        load("toy").ids()
    assert "bench data fetch toy" in caught.value.hint and "bench data lock toy" in caught.value.hint
    assert lock("toy") == place / "data_manifests/toy.toml"
    text = (place / "data_manifests/toy.toml").read_text()
    assert "# a comment that stays" in text and "locked = true" in text
    data = load("toy")
    assert data.ids() == ("a.png", "b.png", "d.PNG", "sub/c.png")
    digest = hashlib.sha256((place / "data/toy/val/sub/c.png").read_bytes()).hexdigest()
    assert f"sub/c.png,{digest},12,9" in (place / "data_manifests/toy.items.csv").read_text()
    assert data.digest == json.loads(json.dumps(data.digest)) and data.digest in text
    assert data.read("a.png").shape == (9, 12, 3) and data.item("a.png").path == place / "data/toy/val/a.png"
    assert "4 items" in verify("toy")
    lock("toy")
    assert (place / "data_manifests/toy.toml").read_text() == text  # once more changes nothing


def test_a_changed_or_missing_file_is_found_by_check_item_and_read(place):
    lock("toy")
    path = place / "data/toy/val/b.png"
    path.write_bytes(path.read_bytes() + b"x")
    for act in (Manifest_check, lambda d: d.read("b.png"), lambda d: d.item("b.png")):
        with pytest.raises(Error, match=r"b\.png changed"):
            act(load("toy"))
    path.unlink()
    for act in (Manifest_check, lambda d: d.read("b.png"), lambda d: d.item("b.png")):
        with pytest.raises(Error, match=r"b\.png is missing") as caught:
            act(load("toy"))
        assert "bench data fetch toy" in caught.value.hint


def test_a_picture_that_cannot_be_decoded_stops_the_lock_and_changes_nothing(place):
    (place / "data/toy/val/b.png").write_bytes(b"<html>")
    with pytest.raises(Error, match=r"b\.png"):
        lock("toy")
    assert (place / "data_manifests/toy.toml").read_text() == HEADER
    assert not (place / "data_manifests/toy.items.csv").exists()


def test_columns_become_labels_texts_clusters_and_attributes_and_survive_a_lock(place):
    (place / "data_manifests/toy.items.csv").write_text(
        'id,path,label,text,cluster,kind\none,a.png,3,"a cat, asleep",x,pet\ntwo,sub/c.png,,,x,\n'
    )
    lock("toy")
    data = load("toy")
    one, two = data.item("one"), data.item("two")
    assert (one.label, one.text, one.cluster, one.attributes) == (3, "a cat, asleep", "x", {"kind": "pet"})
    assert (two.label, two.text, two.attributes) == (None, None, {}) and data.num_clusters() == 1


def test_prompts_are_items_without_files(place):
    (place / "data_manifests/words.toml").write_text(HEADER.replace("images", "prompts"))
    (place / "data_manifests/words.items.csv").write_text("id,text\np1,a red cube\np2,\u202ea blue one\n")
    lock("words")
    data = load("words")
    data.check()
    assert [data.item(id).text for id in data.ids()] == ["a red cube", "\u202ea blue one"]
    with pytest.raises(Error, match="no picture"):
        data.read("p1")


def test_any_edit_of_rows_or_preparation_is_noticed_but_not_of_the_licence_text(place):
    lock("toy")
    toml, items = place / "data_manifests/toy.toml", place / "data_manifests/toy.items.csv"
    before = load("toy").digest
    toml.write_text(toml.read_text().replace("CC0", "CC0 1.0"))
    assert load("toy").digest == before
    for path, old, new in ((items, "a.png", "e.png"), (toml, "sensitive", 'prepare = "x"\nsensitive')):
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(Error, match="digest"):
            load("toy")
        path.write_text(text)
    items.unlink()
    with pytest.raises(Error, match=r"toy\.items\.csv is missing"):
        load("toy")


def test_chunks_and_subsets():
    data = load("photographs")
    chunks = list(data.chunks(128))
    assert [len(c) for c in chunks] == [128, 128, 3] and sum(chunks, ()) == data.ids()
    few, more = data.subset(10), data.subset(50)
    assert len(few) == 10 and set(few.ids()) < set(more.ids()) < set(data.ids())
    ranked = sorted(data.ids(), key=lambda id: hashlib.sha256(f'["subset","{id}"]'.encode()).hexdigest())
    assert set(few.ids()) == set(ranked[:10])
    assert few.ids() == data.subset(10).ids() and few.digest != more.digest != data.digest
    assert data.subset(259) is data
    assert np.array_equal(few.read(few.ids()[0]), data.read(few.ids()[0]))
    for bad in (0, -1):
        with pytest.raises(UsageError):
            data.subset(bad)
        with pytest.raises(UsageError):
            list(data.chunks(bad))
    with pytest.raises(Error, match="did you mean"):
        data.item("astronaut-x0000-y0001")


# -- folders


def test_a_folder_is_the_same_data_wherever_and_whenever_it_lies(place):
    source = place / "data/toy/val"
    (source / ".hidden.png").write_bytes(b"x")
    (source / "notes.txt").write_text("x")
    data = load(f"image-folder:{source}")
    assert data.ids() == ("a.png", "b.png", "d.PNG", "sub/c.png") and data.locked
    copy = place / "copy"
    for name in reversed(data.ids()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy / name)
        os.utime(copy / name, (1, 1))
    other = load(f"image-folder:{copy}")
    assert other.digest == data.digest and other.ids() == data.ids()
    assert np.array_equal(other.read("sub/c.png"), np.asarray(Image.open(source / "sub/c.png")))
    (copy / "a.png").rename(copy / "e.png")
    assert load(f"image-folder:{copy}").digest != data.digest
    (copy / "e.png").rename(copy / "a.png")
    (copy / "a.png").write_bytes((copy / "b.png").read_bytes())
    assert load(f"image-folder:{copy}").digest != data.digest


def test_a_warm_start_hashes_nothing_again(place, monkeypatch):
    source = place / "data/toy/val"
    for path in source.rglob("*.png"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(FileDigests, "YOUNG_NS", -1)
    remembered = FileDigests()
    first = load(f"image-folder:{source}", digests=remembered)
    assert len(remembered.entries) == 4
    monkeypatch.setattr("bench.identity.file_digest", lambda path: pytest.fail(f"{path} was hashed again"))
    again = load(f"image-folder:{source}", digests=FileDigests(remembered.entries))
    again.check()
    assert again.digest == first.digest


def test_folders_name_what_cannot_be_read(place):
    source = place / "data/toy/val"
    (source / "link.png").symlink_to(source / "a.png")
    os.mkfifo(source / "pipe.png")
    (source / "new\nline.png").write_bytes(b"x")
    with pytest.raises(Error, match=r"link\.png is a link"):
        (source / "new\nline.png").rename(source / "line.txt")
        load(f"image-folder:{source}")
    (source / "link.png").unlink()
    with pytest.raises(Error, match=r"pipe\.png is not a regular file"):
        load(f"image-folder:{source}")
    (source / "pipe.png").unlink()
    (source / "line.txt").rename(source / "new\nline.png")
    with pytest.raises(Error, match=r"new\\nline\.png"):
        load(f"image-folder:{source}")
    (source / "new\nline.png").unlink()
    (source / "broken.png").write_bytes(b"x")
    data = load(f"image-folder:{source}")
    with pytest.raises(Error, match=r"broken\.png is not a picture"):
        data.read("broken.png")
    for name in ("image-folder:", "image-folder:/nonexistent", f"image-folder:{source / 'a.png'}"):
        with pytest.raises((UsageError, Error)):
            load(name) if name != "image-folder:" else load(f"image-folder:{place / 'nothing'}")
    (place / "empty").mkdir()
    with pytest.raises(Error, match="no pictures"):
        load(f"image-folder:{place / 'empty'}")


# -- names


def test_unknown_names_are_answered_with_suggestions(place):
    with pytest.raises(UsageError, match="did you mean 'photographs'"):
        load("photograph")
    for name in (
        "",
        ".",
        "../toy",
        "/etc/passwd",
        "toy/../toy",
        "weights/../toy",
        "T OY",
        "x" * 5000,
        "toy\0",
        "weights/",
    ):
        with pytest.raises(UsageError):
            load(name)


def test_names_lists_what_is_there_and_says_what_is_broken(place):
    (place / "data_manifests/bad.toml").write_text("kind = [")
    listed = dict(manifest_verbs.names())
    assert listed["photographs"] == {**listed["photographs"], "items": "259", "state": "ready"}
    assert listed["toy"]["state"] == "not locked" and "bad.toml" in listed["bad"]["state"]
    assert {"imagenet-val", "coco-val2017", "mjhq-30k", "div2k", "kodak"} <= set(listed)
    for name, row in listed.items():
        assert set(row) == {"items", "state", "license"}, name


def test_the_working_folder_comes_first(place):
    assert manifest_places.shared_folder("data_manifests")[0] == place / "data_manifests"
    checkout = Path(manifest.__file__).resolve().parents[1] / "data_manifests"
    assert checkout in manifest_places.shared_folder("data_manifests")
    (place / "data_manifests/photographs.toml").write_text(HEADER)
    assert load("photographs").source == "drawn here"


def test_every_manifest_that_comes_along_says_whose_it_is_and_how_to_get_it():
    for name, row in manifest_verbs.names():
        assert row["license"] and not row["state"].startswith("broken"), name
        if not name.startswith("weights/"):
            data = load(name)
            assert data.source and (images.RULES in data.prepare or data.kind in ("prompts", "world"))
            if not data.locked:
                with pytest.raises(Error) as caught:
                    data.ids()
                assert f"bench data lock {name}" in caught.value.hint


# -- weights


def test_weights_are_found_in_installed_packages_or_below_bench_data(place):
    path = manifest_weights.weights_path("lpips-alex-lin")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("df73285e35b2")
    with pytest.raises(Error, match="missing") as caught:
        manifest_weights.weights_path("lpips-alex-backbone")
    assert caught.value.hint == "bench data fetch weights/lpips-alex-backbone"
    folder = place / "data/weights"
    folder.mkdir()
    (folder / "alexnet-owt-7be5be79.pth").write_bytes(b"something else")
    with pytest.raises(Error, match="not the locked file"):
        manifest_weights.weights_path("lpips-alex-backbone")


def test_weights_of_one_s_own_are_locked_then_found(place):
    (place / "data_manifests/weights").mkdir()
    toml = place / "data_manifests/weights/mine.toml"
    text = 'what = "x"\nsource = "y"\nlicense = "z"\nurl = "https://example.org/m"\nfile = "m.pt"\nlocked = false\n'
    toml.write_text(text)
    with pytest.raises(Error, match="not locked") as caught:
        manifest_weights.weights_path("mine")
    assert caught.value.hint == "bench data fetch weights/mine; then bench data lock weights/mine"
    with pytest.raises(Error, match="missing"):
        lock("weights/mine")
    (place / "data/weights").mkdir()
    (place / "data/weights/m.pt").write_bytes(b"123")
    lock("weights/mine")
    assert manifest_weights.weights_path("mine") == place / "data/weights/m.pt"
    assert "as locked" in verify("weights/mine")
    (place / "data/weights/m.pt").write_bytes(b"124")
    with pytest.raises(Error, match="not the locked file"):
        verify("weights/mine")
    toml.write_text(text.replace("false", "true"))
    with pytest.raises(Error, match="sha256"):
        manifest_weights.weights_path("mine")


def test_the_pinned_hashes_agree_with_the_names_that_publishers_chose():
    """torchvision and pytorch-fid put the first 8 hex digits of the SHA-256 into the file's name."""
    checked = 0
    for name, _ in manifest_verbs.names():
        if name.startswith("weights/"):
            header = manifest_format.read_weights(manifest_places.find(name))
            stem = Path(header["url"]).stem.rpartition("-")[2]
            if len(stem) == 8 and set(stem) <= set("0123456789abcdef"):
                assert header["sha256"].startswith(stem), name
                checked += 1
    assert checked == 3


def test_the_lpips_heads_are_those_of_the_published_table():
    origin = Path(__file__).parents[2] / "shared/data/weights/lpips_lin/ORIGIN.md"
    if not origin.is_file():
        pytest.skip("shared/data is not here")
    text = origin.read_text()
    for name in ("lpips-alex-lin", "lpips-vgg-lin"):
        header = manifest_format.read_weights(manifest_places.find(f"weights/{name}"))
        assert f"{header['bytes']} | {header['sha256']}" in text


# -- files that others wrote

WRONG = {
    "redistribute must be true or false": HEADER.replace("redistribute = true", 'redistribute = "false"'),
    "sensitive must be true or false": HEADER.replace("sensitive = false", "sensitive = 0"),
    "did you mean 'license'": HEADER + 'licence = "CC0"\n',
    "license is missing": HEADER.replace('license = "CC0"', ""),
    "kind is 'image'; did you mean 'images'": HEADER.replace('"images"', '"image"'),
    "root '../../etc'": HEADER.replace("toy/val", "../../etc"),
    "root '/etc'": HEADER.replace("toy/val", "/etc"),
    "root 'C:": HEADER.replace("toy/val", "C:\\\\x"),
    "digest must be": HEADER + 'digest = "abc"\n',
    "at line": HEADER + "x = = 1\n",
    "nested too deeply": "x = " + "[" * 100_000,
    "fetch[0]: url is missing": HEADER + '[[fetch]]\nfile = "x"\n',
    "fetch[0]: file '../x'": HEADER + '[[fetch]]\nurl = "https://e.org"\nfile = "../x"\n',
    "fetch[0]: sha256 must be": HEADER + '[[fetch]]\nurl = "https://e.org"\nfile = "x"\nsha256 = "12"\n',
    "fetch[0]: bytes must be a whole number": HEADER + '[[fetch]]\nurl = "u"\nfile = "x"\nbytes = "9"\n',
    "an archive takes the place of root": HEADER
    + 2 * '[[fetch]]\nurl = "u"\nfile = "x"\nunpack = {files = 1, bytes = 1}\n',
    "unpack: files is missing": HEADER + '[[fetch]]\nurl = "u"\nfile = "x"\nunpack = {}\n',
    "[crops] belongs to": HEADER + "[crops]\nsize = 1\nstride = 1\nlimit = 1\n",
    "crops.stride is 0": HEADER.replace("images", "package-crops") + "[crops]\nsize = 1\nstride = 0\nlimit = 1\n",
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_headers_are_refused_with_file_and_field(place, reason):
    path = place / "data_manifests/toy.toml"
    path.write_text(WRONG[reason])
    with pytest.raises(Error) as caught:
        load("toy")
    assert str(path) in str(caught.value) and reason in str(caught.value), str(caught.value)


def test_headers_that_are_no_utf8_or_too_long_are_refused(place):
    path = place / "data_manifests/toy.toml"
    path.write_bytes(HEADER.encode() + b'prepare = "\xff"\n')
    with pytest.raises(Error, match="not UTF-8"):
        load("toy")
    path.write_bytes(b"#" * (manifest_format.MAX_TEXT + 1))
    with pytest.raises(Error, match="larger than"):
        load("toy")
    path.write_text(HEADER + "sensitive = " + "9" * 5000 + "\n")
    with pytest.raises(Error):
        load("toy")


WRONG_ROWS = {
    "name the columns": "path,label\na.png,1\n",
    "each once": "id,path,path\na,a.png,b.png\n",
    ":3: id 'a' appears twice": "id,path\na,a.png\na,b.png\n",
    ":2: 1 cells, expected 2": "id,path\na\n",
    "path '../../../etc/passwd'": "id,path\na,../../../etc/passwd\n",
    "path '/etc/passwd'": "id,path\na,/etc/passwd\n",
    "id '../a'": "id,path\n../a,a.png\n",
    "id ''": "id,path\n,a.png\n",
    "id 'a\\x1b[2J'": "id,path\na\x1b[2J,a.png\n",
    "label must be a whole number": "id,path,label\na,a.png,-1\n",
    "unexpected end": 'id,path\na,"a.png\n',
}


@pytest.mark.parametrize("reason", WRONG_ROWS)
def test_wrong_rows_are_refused_with_file_and_line_or_item(place, reason):
    path = place / "data_manifests/toy.items.csv"
    path.write_text(WRONG_ROWS[reason])
    with pytest.raises(Error) as caught:
        load("toy")
    assert str(path) in str(caught.value) and reason in str(caught.value), str(caught.value)


def test_a_locked_row_needs_its_hash(place):
    lock("toy")
    items = place / "data_manifests/toy.items.csv"
    rows = manifest_format.read_rows(items)
    rows[0]["sha256"] = "F" * 64
    items.write_bytes(manifest_verbs.csv_bytes(rows))
    header = manifest_format.read_header(place / "data_manifests/toy.toml")
    digest = manifest_format.content_digest(header, rows)
    toml = place / "data_manifests/toy.toml"
    toml.write_text(toml.read_text().replace(header["digest"], f"sha256:{digest}"))
    with pytest.raises(Error, match="sha256 must be 64 hex digits"):
        load("toy")
