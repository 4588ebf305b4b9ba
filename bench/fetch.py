"""Bytes from elsewhere: downloads that get their name only after their hash, and archives unpacked member by member."""

from __future__ import annotations

import errno
import http.client
import ipaddress
import lzma
import os
import re
import socket
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urljoin, urlsplit

from bench import door
from bench.identity import file_digest, hub_id
from bench.text import brief
from bench.types import Error, UsageError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where known

HOPS = 5  # redirects
TIMEOUT = 30.0  # seconds without a byte
WINDOW = 60.0  # seconds in which a server must send at least WINDOW * LEAST_RATE bytes
LEAST_RATE = 1024  # bytes per second
LARGEST = 500 * 10**9  # bytes of a download whose size nobody declared
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PIECE = 4 * 2**20  # bytes between two syncs


def download(
    url: str,
    target: Path,
    sha256: str = "",
    size: int = 0,
    progress: Progress | None = None,
    loopback: bool = False,
) -> str:
    """Downloads to `target`, which appears only when the SHA-256 is right; returns the SHA-256 found.

    An interrupted download is continued from `<target>.part` if a hash is known to check it by, else begun anew.
    https only; no private address, at any redirect (`loopback` allows http to this machine, for tests). Raises Error.
    """
    door.make_folder(target.parent)
    part = target.with_name(target.name + ".part")
    with door.lock(target.with_name(f".{target.name}.lock"), str(target)):
        if sha256 and target.is_file() and file_digest(target) == sha256:
            return sha256
        if not sha256:
            part.unlink(missing_ok=True)
        continued = part.exists()
        found = _transfer(url, part, size, progress, loopback)
        if sha256 and found != sha256 and continued:  # the old beginning may be of another file
            part.unlink()
            found = _transfer(url, part, size, progress, loopback)
        if sha256 and found != sha256:
            part.unlink()
            message = f"{_shown(url)}: sha256 is {found}, expected {sha256}; not kept"
            raise Error(message, hint="try again; if it stays so, the publisher changed the file")
        os.replace(part, target)
        door.sync_folder(target.parent)
    return found


def _transfer(url: str, part: Path, size: int, progress: Progress | None, loopback: bool) -> str:
    """Appends what is missing to `part`; returns the SHA-256 of the whole."""
    have = part.stat().st_size if part.exists() else 0
    try:
        connection, reply = _request(url, have, loopback)
        try:
            if have and not _continues(reply, have):
                part.unlink()
                have = 0
                if reply.status != http.client.OK:
                    connection.close()
                    connection, reply = _request(url, 0, loopback)
            if reply.status not in (http.client.OK, http.client.PARTIAL_CONTENT):
                raise Error(f"{_shown(url)}: the server answered {reply.status} {reply.reason}")
            _receive(url, reply, part, have, size, progress)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        hint = f"run the same command again to go on, or put the file at {part.with_suffix('')} yourself"
        raise Error(f"{_shown(url)}: {reason}", hint=hint) from None
    return file_digest(part)


def _continues(reply: http.client.HTTPResponse, have: int) -> bool:
    said = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    return reply.status == http.client.PARTIAL_CONTENT and said is not None and int(said[1]) == have


def _receive(url: str, reply, part: Path, have: int, size: int, progress: Progress | None) -> None:
    announced = have + reply.length if reply.length is not None else 0
    limit = size or LARGEST
    if announced > limit:
        raise _too_long(url, limit)
    file = door.Appender(part)
    try:
        pending = bytearray()
        start, received = time.monotonic(), 0
        while data := reply.read1(65536):
            have += len(data)
            received += len(data)
            if have > limit:
                file.close()
                part.unlink()
                raise _too_long(url, limit)
            pending += data
            if len(pending) >= PIECE:
                file.append(bytes(pending))
                pending.clear()
                if progress:
                    progress(have, size or announced or None)
            if time.monotonic() - start > WINDOW:
                if received < WINDOW * LEAST_RATE:
                    raise Error(f"{_shown(url)}: the server sends less than {LEAST_RATE} bytes a second")
                start, received = time.monotonic(), 0
        if pending or not have:
            file.append(bytes(pending))
        if progress:
            progress(have, size or announced or None)
    finally:
        file.close()
    if (announced and have < announced) or (size and have < size):
        total = size or announced
        raise Error(
            f"{_shown(url)}: ended after {have:,} of {total:,} bytes", hint="run the same command again to go on"
        )


def _too_long(url: str, limit: int) -> Error:
    return Error(
        f"{_shown(url)}: more than the {limit:,} bytes that were declared", hint="the publisher changed the file"
    )


def _shown(url: str) -> str:
    """Without query and user name: keys are carried there."""
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])


def _request(url: str, offset: int, loopback: bool) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    for _ in range(HOPS + 1):
        connection, reply = _get(url, offset, loopback)
        if reply.status not in (301, 302, 303, 307, 308):
            return connection, reply
        connection.close()
        url = urljoin(url, reply.headers.get("Location", ""))
    raise Error(f"{_shown(url)}: more than {HOPS} redirects")


def _get(url: str, offset: int, loopback: bool) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Connects to an address that was checked, not to a name that may resolve to another one a moment later."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Error(f"{_shown(url)} is not a URL") from None
    allowed = ("https", "http") if loopback else ("https",)
    if parts.scheme not in allowed or not parts.hostname or parts.username is not None:
        raise Error(f"{_shown(url)}: only https URLs without a user name are fetched")
    if not url.isascii() or any(c <= " " for c in url):
        raise Error(f"{_shown(url)!r}: the URL has characters that must be escaped")
    port = port or (443 if parts.scheme == "https" else 80)
    plain = socket.create_connection((_address(parts.hostname, port, loopback), port), TIMEOUT)
    try:
        if parts.scheme == "https":
            import ssl

            plain = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=TIMEOUT)
        connection.sock = plain
        headers = {"Host": parts.netloc, "User-Agent": "touchstone", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=headers)
        return connection, connection.getresponse()
    except BaseException:
        plain.close()
        raise


def _address(host: str, port: int, loopback: bool) -> str:
    """The first address of a host, all of which must be public."""
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        if address.version == 6:  # addresses that carry another one: mapped, 6to4, and of a NAT64 gateway
            inner = address.ipv4_mapped or address.sixtofour
            if address in NAT64:
                inner = ipaddress.ip_address(int(address) % 2**32)
            address = inner or address
        if not ((address.is_global and not address.is_multicast) or (loopback and address.is_loopback)):
            raise Error(f"{host} is at {text}, which is not a public address; nothing was fetched")
    return found[0]


def unpack(archive: Path, folder: Path, max_files: int, max_bytes: int) -> int:
    """Unpacks a zip or tar in place of `folder`, all of it or nothing; returns the number of files.

    Regular files only: a link, a device, a path that leaves the folder, a name that appears twice (also in another
    case), or more than was allowed raises Error, and `folder` is as it was.
    """
    count = 0

    def fill(place: Path) -> None:
        nonlocal count
        seen: dict[str, bool] = {}  # name -> is it a folder?
        room = max_bytes
        for name, size, stream in _members(archive, max_bytes):
            _check_member(archive, name, seen)
            count += 1
            if count > max_files:
                raise Error(f"{archive.name}: more than {max_files:,} files", hint="it is not the archive expected")
            if size > room:
                raise _bomb(archive, max_bytes)
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with stream, open(path, "xb") as file:
                while data := stream.read(min(2**20, room + 1)):
                    room -= len(data)
                    if room < 0:  # what a member says of its size need not be true
                        raise _bomb(archive, max_bytes)
                    file.write(data)

    # what the libraries raise on damaged archives
    broken = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError)
    broken += (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        door.replace_folder(folder, fill)
    except Error as e:
        cause = e.__cause__  # gzip and bz2 report damage without a number, zip seeks before the beginning
        if isinstance(cause, OSError) and not cause.filename and cause.errno in (None, errno.EINVAL):
            raise Error(f"{archive.name} is damaged: {brief(cause)}", hint="fetch it again") from None
        raise
    except broken as e:
        raise Error(f"{archive.name} is damaged or of an unknown kind: {brief(e)}", hint="fetch it again") from None
    return count


def _members(archive: Path, max_bytes: int) -> Iterator[tuple[str, int, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as pack:
            for entry in pack.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if entry.is_dir():
                    continue
                if kind not in (0, stat.S_IFREG) or entry.flag_bits & 1:
                    raise _odd(archive, entry.filename)
                yield entry.filename, entry.file_size, pack.open(entry)
    else:
        with tarfile.open(archive, "r:*") as pack:
            for entry in pack:
                if entry.isdir():
                    continue
                stream = pack.extractfile(entry) if entry.isreg() and not entry.issparse() else None
                if stream is None:
                    raise _odd(archive, entry.name)
                yield entry.name.removeprefix("./"), entry.size, stream
            rest = 0
            while data := pack.fileobj.read(2**20):  # only at its end does a compressed stream show its checksum
                rest += len(data)
                if rest > max_bytes:
                    raise _bomb(archive, max_bytes)


def _check_member(archive: Path, name: str, seen: dict[str, bool]) -> None:
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(p in ("", ".", "..") or len(os.fsencode(p)) > 255 for p in parts):
        raise _odd(archive, name)
    same = name.casefold().split("/")
    above = ["/".join(same[:i]) for i in range(1, len(same))]
    if "/".join(same) in seen or any(not seen.setdefault(folder, True) for folder in above):
        raise Error(f"{archive.name}: {name!r} appears twice, or as file and folder", hint="nothing was unpacked")
    seen["/".join(same)] = False


def _odd(archive: Path, name: str) -> Error:
    what = "is not a plain file below the folder"
    return Error(f"{archive.name}: member {name[:100]!r} {what}", hint="nothing was unpacked; do not trust the archive")


def _bomb(archive: Path, max_bytes: int) -> Error:
    return Error(f"{archive.name}: unpacks to more than {max_bytes:,} bytes", hint="it is not the archive expected")


def hub(name: str) -> Path:
    """Brings `hf:owner/name@commit[:subfolder]` into the cache of huggingface_hub; returns the folder.

    Only safetensors and text are taken: no pickles, no code. Each file's hash is computed again. Raises Error.
    """
    match = hub_id(name)
    if match is None:
        raise UsageError(f"{name!r} is not a hub id", hint="hf:owner/name@<commit>")
    from huggingface_hub import snapshot_download

    inside = f"{match['subfolder'].strip('/')}/" if match["subfolder"] else ""
    patterns = [f"{inside}*{suffix}" for suffix in (".safetensors", ".json", ".txt", ".model")]
    try:
        folder = Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns))
    except (OSError, ValueError) as e:
        raise Error(f"{name}: {str(e).splitlines()[0]}", hint="check the name, the commit and the network") from None
    place = folder / inside
    files = [p for p in place.rglob("*") if p.is_file()]
    if not any(p.suffix == ".safetensors" for p in files):
        raise Error(f"{name} has no safetensors file", hint="choose a repository or commit that has one")
    for path in files:
        expected = path.resolve().name  # the cache names large files by their SHA-256
        if re.fullmatch(r"[0-9a-f]{64}", expected) and file_digest(path) != expected:
            raise Error(f"{name}: {path.name} is damaged in the cache", hint=f"remove {path.resolve()} and fetch again")
    return place
