"""Archives made to escape, to swell or to deceive: refused whole, nothing outside, the folder as it was before."""

import contextlib
import errno
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from corpus import toml_file
from test_data_fetch import CONTENT, zipped
from toys import command

from bench import fetch
from bench.fetch import unpack
from bench.types import Error

A = ("a.png", b"a")
MOST_FILES, MOST_BYTES = 50, 1_000_000


def tarred(*members, mode="w") -> bytes:
    """Members are (name, content), or (TarInfo, b'')."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as pack:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            pack.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def lying_zip() -> bytes:
    """The directory says 10 bytes, the stream holds two million."""
    data = bytearray(zipped(("a.png", b"0" * 2_000_000)))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(signature) + place
        data[start : start + 4] = struct.pack("<I", 10)
    return bytes(data)


def encrypted_zip() -> bytes:
    data = bytearray(zipped(("a.png", b"secret")))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + place] |= 1
    return bytes(data)


def archives(outside: Path) -> dict[str, tuple[str, bytes]]:
    """Name -> what a careless program would suffer from it, and its bytes. `outside` is beside the folder."""
    evil = ("../outside/evil", b"x")
    absolute = (str(outside / "evil"), b"x")
    link, into = special("link", tarfile.SYMTYPE, str(outside)), ("link/evil", b"x")
    twins = [A, ("A.PNG", b"x")]
    many = [(f"{i}", b"") for i in range(10_000)]
    bomb = ("a.png", b"0" * 2_000_000)
    return {
        "zip ..": ("escape", zipped(A, evil)),
        "zip deep ..": ("escape", zipped(A, ("x/../../outside/evil", b"x"))),
        "zip absolute": ("escape", zipped(A, absolute)),
        "zip link, then through it": ("escape", zipped(A, zip_link("link", str(outside)), into)),
        "tar ..": ("escape", tarred(A, evil)),
        "tar absolute": ("escape", tarred(A, absolute)),
        "tar link, then through it": ("escape", tarred(A, link, into)),
        "tar link within, then out": (
            "escape",
            tarred(
                A, special("x", tarfile.SYMTYPE, "."), special("x/l", tarfile.SYMTYPE, ".."), ("l/outside/evil", b"x")
            ),
        ),
        "tar hard link": ("special", tarred(A, special("link", tarfile.LNKTYPE, "../outside/secret"))),
        "tar link inside": ("special", tarred(A, special("link", tarfile.SYMTYPE, "a.png"))),
        "tar pipe": ("special", tarred(A, special("pipe", tarfile.FIFOTYPE))),
        "tar device": ("special", tarred(A, special("null", tarfile.CHRTYPE))),
        "zip of 10,000": ("many", zipped(*many)),
        "tar of 10,000": ("many", tarred(*many)),
        "zip bomb": ("bomb", zipped(bomb)),
        "zip that lies": ("bomb", lying_zip()),
        "tar.gz bomb": ("bomb", gzip.compress(tarred(bomb))),
        "tar.gz with a bomb behind": ("bomb", gzip.compress(tarred(A) + b"0" * 3_000_000)),
        "zip twice": ("twins", zipped(A, ("./a.png", b"2"))),
        "zip case twins": ("twins", zipped(*twins)),
        "tar twice": ("twins", tarred(A, A)),
        "tar case twins": ("twins", tarred(*twins)),
        "zip long name": ("name", zipped(A, ("n" * 256, b"x"))),
        "tar long name": ("name", tarred(A, ("n" * 256, b"x"))),
        "zip control": ("name", zipped(A, ("a\x1b[2Jb", b"x"))),
        "zip backslash": ("name", zipped(A, ("..\\evil", b"x"))),
        "zip drive": ("name", zipped(A, ("C:\\evil", b"x"))),
        "zip file as folder": ("name", zipped(A, ("a.png/b", b"x"))),
        "zip encrypted": ("damage", encrypted_zip()),
        "zip damaged": ("damage", zipped(("a.png", os.urandom(5000)))[:2000]),
        "zip crc": ("damage", zipped(("a.png", CONTENT[:5000])).replace(CONTENT[100:110], b"0123456789")),
        "zip without a name": ("damage", zipped(A).replace(b"a.png", b"\0.png")),
        "tar.gz damaged": ("damage", gzip.compress(tarred(A))[:-20]),
        "tar.gz wrong checksum": ("damage", gzip.compress(tarred(A))[:-8] + b"\0" * 8),
        "tar.xz damaged": ("damage", tarred(A, mode="w:xz")[:-40]),
        "nothing": ("damage", b""),
        "HTML": ("damage", b"<html>" * 100),
    }


def carelessly(archive: Path, folder: Path) -> None:
    """Unpacks as a program does that trusts names, links and kinds."""
    folder.mkdir()
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            for entry in pack.infolist():
                path = folder / entry.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                if stat.S_ISLNK(entry.external_attr >> 16):
                    path.symlink_to(pack.read(entry).decode())
                else:
                    path.write_bytes(pack.read(entry))
    else:
        with tarfile.open(archive) as pack:
            pack.extractall(folder, filter="fully_trusted")


def names_in(archive: Path) -> list[str]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            return pack.namelist()
    with tarfile.open(archive) as pack:
        return pack.getnames()


def is_live(harm: str, archive: Path, folder: Path, outside: Path) -> bool:
    """Does the harm come about where nobody looks? A refusal of what is harmless would prove nothing."""
    if harm in ("name", "many", "twins"):
        names = names_in(archive)
        odd = any(len(n) > 255 or not n.isprintable() or "\\" in n or n.startswith("a.png/") for n in names)
        twins = len({os.path.normpath(n).casefold() for n in names}) < len(names)
        return {"name": odd, "many": len(names) == 10_000, "twins": twins}[harm]
    if harm == "bomb":
        data = archive.read_bytes()
        return len(data) < MOST_BYTES / 100 and (data[:2] == b"PK" or len(gzip.decompress(data)) > MOST_BYTES)
    try:
        carelessly(archive, folder)
    except Exception as e:  # of the decoders; only root may make a device
        return harm == "damage" or (harm == "special" and isinstance(e, PermissionError))
    if harm == "escape":
        return (outside / "evil").exists()
    if harm == "special":
        found = [p for p in folder.rglob("*") if not p.is_dir()]
        return any(p.is_symlink() or not p.is_file() or p.stat().st_nlink > 1 for p in found)
    return True  # damaged, and nobody noticed


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(archive: Path, folder: Path) -> str:
    try:
        unpack(archive, folder, max_files=MOST_FILES, max_bytes=MOST_BYTES)
    except Error as e:
        return f"{e}\n{e.hint}" if e.hint else ""
    return ""


def test_archives_are_refused_whole(tally, tmp_path):
    outside = tmp_path / "careless/outside"
    outside.mkdir(parents=True)
    (outside / "secret").write_text("of somebody else")
    found = archives(outside)
    bad = []
    for i, (name, (harm, data)) in enumerate(found.items()):
        archive = tmp_path / "pack"
        archive.write_bytes(data)
        assert is_live(harm, archive, tmp_path / f"careless/{i}", outside), f"{name} would do no harm"
        (outside / "evil").unlink(missing_ok=True)
        place = tmp_path / f"careful/{i}"
        (place / "outside").mkdir(parents=True)
        before = tree(tmp_path / "careful") | tree(outside)
        said = refused(archive, place / "folder")
        unchanged = tree(tmp_path / "careful") | tree(outside) == before
        (place / "folder").mkdir()
        (place / "folder/kept").write_text("x")
        again = refused(archive, place / "folder")
        kept = [p.name for p in (place / "folder").iterdir()] == ["kept"] and len(list(place.iterdir())) == 2
        if not (said and again and unchanged and kept and archive.name in said and len(said) < 500):
            bad.append((name, said, unchanged, kept))
    tally("hostile files", len(found) - len(bad), len(found))
    assert not bad, bad


def test_a_command_that_unpacks_refuses_them_in_words(tally, size, tmp_path):
    """`bench data lock` of a manifest whose archive nobody vouched for: exit 1, and the data folder as it was."""
    header = {"kind": "images", "source": "s", "license": "l", "redistribute": True, "root": "toy", "locked": False}
    part = {"url": "https://example.org/v.zip", "file": "v.zip", "unpack": {"files": MOST_FILES, "bytes": MOST_BYTES}}
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests/toy.toml").write_text(toml_file({**header, "fetch": [part]}))
    waiting = tmp_path / "data/toy.download/v.zip.unverified"
    waiting.parent.mkdir(parents=True)
    passed, found = 0, list(archives(tmp_path).items())[:: size(1, 9)]
    for name, (_, data) in found:
        with contextlib.suppress(FileNotFoundError):
            waiting.with_name("v.zip").unlink()
        waiting.write_bytes(data)
        done = command(tmp_path, "data", "lock", "toy", env={"BENCH_DATA": str(tmp_path / "data")})
        few = "Traceback" not in done.err and len(done.err.splitlines()) <= 12 and "\x1b" not in done.err
        good = done.code == 1 and few and "v.zip" in done.err and "hint:" in done.err
        good = good and not (tmp_path / "data/toy").exists() and not (tmp_path / "evil").exists()
        passed += good
        assert good, (name, done)
    tally("archives by command", passed, len(found))


@pytest.mark.parametrize(
    "pack", [zipped, tarred, lambda *m: tarred(*m, mode="w:gz"), lambda *m: tarred(*m, mode="w:xz")]
)
def test_good_archives_are_unpacked_byte_for_byte(pack, tmp_path):
    members = [("a.png", CONTENT), ("sub/deep/b.png", b"b"), ("empty", b"")]
    archive, folder = tmp_path / "pack", tmp_path / "out"
    archive.write_bytes(pack(*members))
    assert unpack(archive, folder, max_files=3, max_bytes=len(CONTENT) + 1) == 3
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == dict(members)


def test_an_offset_before_the_beginning_is_damage(tmp_path):
    data = zipped(("a.png", CONTENT))
    end = data.rindex(b"PK\5\6")
    offset = int.from_bytes(data[end + 16 : end + 20], "little") + 1000
    (tmp_path / "odd.zip").write_bytes(data[: end + 16] + offset.to_bytes(4, "little") + data[end + 20 :])
    with pytest.raises(Error, match=r"odd.zip is damaged"):
        unpack(tmp_path / "odd.zip", tmp_path / "out", 10, 10**6)


def test_a_name_of_64_kilobytes_is_cut_in_the_message(tmp_path):
    data = zipped(("a" * 60_000, CONTENT))
    (tmp_path / "odd.zip").write_bytes(
        data.replace(b"a" * 60_000, b"b" * 60_000, 1)
    )  # in the header, not the directory
    with pytest.raises(Error) as caught:
        unpack(tmp_path / "odd.zip", tmp_path / "out", 10, 10**6)
    assert len(str(caught.value)) < 400


def test_a_full_disk_is_no_damaged_archive(tmp_path, monkeypatch):
    archive = tmp_path / "good.zip"
    archive.write_bytes(zipped(("a.png", CONTENT)))

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a file's write does: it names none

    monkeypatch.setattr(fetch, "open", lambda *args: Full(), raising=False)
    with pytest.raises(Error, match="No space left on device"):
        unpack(archive, tmp_path / "out", 10, 10**6)
    assert not (tmp_path / "out").exists()
