"""One HTTP server that is asked: where it is, the key it is sent, and a reply that is whole and in time, or a Fault."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from bench.text import mask, secrets
from bench.types import Error

CONNECTING = 5.0  # seconds
LARGEST = 4 * 2**20  # bytes of a reply
KEPT = 4096  # bytes of a reply that are shown
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")


class Fault(Exception):
    """A call that gave no answer: one of `bench.capabilities.FAILURES`, and what came instead.

    `again`: another try may fare better, after `wait` seconds where the server said so.
    """

    def __init__(self, failure: str, reply: str, again: bool = False, wait: float | None = None, status: int = 0):
        super().__init__(reply)
        self.failure, self.reply, self.again, self.wait, self.status = failure, reply, again, wait, status


class Server:
    """Raises Error for a URL that is none, and for a key that is missing or would travel in the open.

    The key goes to this host alone: redirects are not followed, and it is masked in everything that is said.
    """

    def __init__(self, url: str, credential: str = ""):
        self.host, self.port, self.path, self.secure = _parted(url)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.name = host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"
        self.credential, self._key = credential, _key(credential)
        if self._key and not self.secure and not _loopback(self.host):
            raise Error(f"endpoint: a key would travel to {self.host} in the open", hint="give an https URL")
        secrets().add(self._key)

    def post(self, path: str, body: bytes, seconds: float) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of a whole reply that came within `seconds`; raises Fault."""
        headers = {"Host": self.name, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"User-Agent": "touchstone"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        connection = http.client.HTTPConnection(self.host, self.port)
        late = threading.Event()
        try:
            connection.sock = sock = self._connect(min(CONNECTING, seconds))
            with _hung_up(sock, seconds, late):
                sock.settimeout(seconds)
                if self.secure:
                    sock.do_handshake()
                connection.request("POST", self.path + path, body, headers)
                response = connection.getresponse()
                data = bytearray()
                while piece := response.read1(65536):
                    data += piece
                    if len(data) > LARGEST:
                        raise Fault("BadReply", f"more than {LARGEST:,} bytes: {shown(bytes(data[:KEPT]))}")
            if late.is_set():  # what was cut off may look whole
                raise TimeoutError
            if response.length:
                raise Fault("Connection", f"the reply ended {response.length:,} bytes early", True)
            return response.status, response.headers, bytes(data)
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, TimeoutError) or late.is_set():
                raise Fault("Timeout", f"no whole reply within {seconds:g} s", True) from None
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
            raise Fault("Connection", shown(reason.encode("utf-8", "replace")), True) from None
        finally:
            connection.close()

    def _connect(self, seconds: float) -> socket.socket:
        sock = socket.create_connection((self.host, self.port), seconds)
        if not self.secure:
            return sock
        import ssl

        context = ssl.create_default_context()
        return context.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)


@contextlib.contextmanager
def _hung_up(sock: socket.socket, seconds: float, late: threading.Event) -> Iterator[None]:
    """Ends a connection when its time is over: a server that drips bytes never lets a socket's own time-out come."""

    def hang_up() -> None:
        late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, which the other thread is reading

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shown(data: bytes) -> str:
    """The beginning of what came, as text; secrets are masked before it is cut, so that no half of a key is left."""
    text = mask(data[: 2 * KEPT].decode("utf-8", "replace"))
    return text.encode()[:KEPT].decode("utf-8", "ignore")


def retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which may be a date; None where there is none that can be read."""
    if text is None:
        return None
    text = text.strip()
    if NUMBER.fullmatch(text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _parted(url: str) -> tuple[str, int, str, bool]:
    """Host, port, path and TLS of a base URL; raises Error for one that is not a plain http(s) URL."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        parts, port, host = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or any(c <= " " for c in url):
        raise Error("endpoint: url is not an http or https URL", hint="url=http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise Error("endpoint: url holds a user name or a query", hint="a key is named by credential=VARIABLE")
    secure = parts.scheme == "https"
    return host, port or (443 if secure else 80), parts.path.rstrip("/"), secure


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(credential: str) -> str:
    """The key that `credential` names. What was typed is never repeated: it may be the key itself."""
    if not credential:
        return ""
    if credential.startswith("file:"):
        try:
            key = Path(os.path.expanduser(credential[5:])).read_text("utf-8").strip()
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", "") or type(e).__name__
            raise Error(f"endpoint: the file that credential names cannot be read: {reason}") from None
    elif VARIABLE.fullmatch(credential):
        key = os.environ.get(credential, "").strip()
    else:
        hint = "credential=OPENAI_API_KEY, or credential=file:PATH; never the key itself"
        raise Error("endpoint: credential is not the name of an environment variable", hint=hint)
    if not key:
        raise Error("endpoint: the variable or file that credential names is empty", hint="set it, then try again")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Error("endpoint: the key has characters that no header can carry", hint="is it the right file?")
    return key
