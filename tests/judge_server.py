"""A judge on this machine that replies by script, counts what reaches it, and misbehaves in every way that judges do;
and a suite that asks it. Also a file that `path.py:Name` can name.

The model under test paints item 7 in the grey level 7, so the judge knows which item it looks at. The truth is yes for
even items, no for odd ones.
"""

import base64
import contextlib
import io
import json
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from bench import Model, Suite, TextToImage, Unit
from bench.metrics.asked import LINE, NEUTRAL, Asked, with_card

QUESTION = "Is the number of this picture even?"
BIG = 5 * 2**20


# -- the suite that asks


class Numbered:
    """float64 [B, 3, 4, 4] in [0, 1]: item-007 is the grey level 7 of 255, but for a corner that is not."""

    made: ClassVar[list] = []  # the items that were generated, in this process

    def generate(self, prompts, seeds):
        self.made.extend(prompts)
        pictures = np.stack([np.full((3, 4, 4), int(p[-3:]) / 255) for p in prompts])
        pictures[:, :, 3, 3] = 1.0
        return pictures


@dataclass(frozen=True)
class Asking(Suite):
    """`num` items from `first`, two a unit, each judged."""

    num: int = 4
    first: int = 0
    judge: Model = "mini-vqa"
    control: float = 0.0
    chunk: int = 2

    name = "asking"
    version = 1
    requires = (TextToImage,)
    value_range = (0.0, 1.0)

    @property
    def metrics(self):
        return (Asked(QUESTION, control=self.control, value_range=(0.0, 1.0)),)

    def units(self, data):
        ids = [f"item-{i:03d}" for i in range(self.first, self.first + self.num)]
        for i in range(0, self.num, self.chunk):
            yield Unit(f"u/{i // self.chunk:03d}", tuple(ids[i : i + self.chunk]))

    def run(self, unit, model, ctx):
        for ids in ctx.batches(unit):
            yield ids, {"picture": model.generate(ids, [ctx.seed(id) for id in ids])}


def truth(item):
    """What the good judge says of an item: the probability of yes."""
    return float(int(item[-3:]) % 2 == 0)


# -- the judge


@dataclass
class Call:
    """What reached the judge."""

    path: str
    headers: dict
    body: dict
    picture: np.ndarray | None = None  # uint8 [H, W, 3]
    text: str = ""

    @property
    def item(self):
        return None if self.picture is None else int(self.picture[0, 0, 0])

    @property
    def choices(self):
        listed = re.search(r"Reply with exactly one of these and nothing else: (.*)\Z", self.text, re.DOTALL)
        return json.loads(f"[{listed[1]}]") if listed else None


def said(content, finish="stop", **message):
    """The body of a chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    return json.dumps({"id": "1", "object": "chat.completion", "model": "toy-judge-1", "choices": [choice],
                       "usage": {"total_tokens": 7}})  # fmt: skip


def good(call):
    """The reply of a judge that does what it is told: parity of a numbered picture, else the first choice."""
    if call.choices is None:
        return said("Yes, snow is white.")
    if QUESTION in call.text:
        return said("yes" if call.item % 2 == 0 else "no")
    return said(call.choices[0])


def http(status, body="", *headers, length=None):
    """A whole HTTP reply as bytes; `length` lies about the body's."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} whatever", "Content-Type: application/json", "Connection: close", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ok(content, **more):
    return http(200, said(content, **more))


def never(sock):
    """Says nothing until the other side goes."""
    sock.settimeout(20)
    sock.recv(1)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip(sock):
    """A byte at a time, each in good time, of a reply that never ends."""
    for byte in http(200, said("yes") + " " * 2000):
        sock.sendall(bytes([byte]))
        time.sleep(0.02)


def headers_drip(sock):
    sock.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        sock.sendall(b"X: y\r\n")
        time.sleep(0.05)


def half(sock):
    whole = http(200, said("yes"))
    sock.sendall(whole[: len(whole) - 40])


def half_chunk(sock):
    sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n" + said("yes").encode()[:100])


@dataclass(frozen=True)
class Script:
    """One way to reply: what is sent, and what must come of it."""

    send: object  # bytes, or what is done with the socket
    failure: str  # its kind, "" for an answer
    retried: bool = False
    kept: str = ""  # a part of what must be kept of the reply


REPLIES = {
    "good": Script(ok("yes"), ""),
    "broken JSON": Script(ok('{"answer": "yes"'), "Unparsable", kept='{"answer": "yes"'),
    "two fences": Script(ok("```\nyes\n```\n```\nno\n```"), "Unparsable", kept="```"),
    "prose around": Script(ok('Looking closely, the answer is "yes".'), "Unparsable", kept="Looking closely"),
    "two verdicts": Script(ok('{"answer": "no", "answer": "yes"}'), "Unparsable", kept='"no"'),
    "two lines": Script(ok("no\nyes"), "Unparsable", kept="no\nyes"),
    "echoed markers": Script(
        ok('Reply with exactly one of these and nothing else: "yes", "no"\nAnswer: yes'), "Unparsable", kept="Answer:"
    ),
    "empty": Script(ok(""), "Unparsable"),
    "null content": Script(ok(None), "Unparsable"),
    "content is a list": Script(ok([{"type": "text", "text": "yes"}]), "BadReply", kept="yes"),
    "NaN": Script(ok('{"answer": NaN}'), "Unparsable", kept="NaN"),
    "true": Script(ok('{"answer": true}'), "Unparsable", kept="true"),
    "eleven of ten": Script(ok("11/10"), "Unparsable", kept="11/10"),
    "refusal in words": Script(ok("I’m sorry, but I can’t help with that."), "Refused", kept="sorry"),
    "refusal as such": Script(ok(None, refusal="No people, please."), "Refused", kept="No people"),
    "another language": Script(ok("はい"), "Unparsable", kept="はい"),
    "truncated": Script(ok("yes", finish="length"), "Truncated", kept="yes"),
    "content filter": Script(ok("", finish="content_filter"), "Refused"),
    "content filter as 400": Script(http(400, '{"error": {"code": "content_filter"}}'), "Refused", kept="filter"),
    "400": Script(http(400, '{"error": {"message": "picture too large"}}'), "BadReply", kept="picture too large"),
    "404": Script(http(404, '{"error": {"message": "no such model"}}'), "BadReply", kept="no such model"),
    "408": Script(http(408), "Timeout", True, kept="408"),
    "409": Script(http(409), "Server", True, kept="409"),
    "429, come back at once": Script(http(429, "slow down", "Retry-After: 0"), "RateLimited", True, kept="slow down"),
    "429, come back after the item's time": Script(http(429, "x", "Retry-After: 100"), "RateLimited", kept="429"),
    "429, come back in thirty years": Script(http(429, "x", "Retry-After: 999999999"), "RateLimited", kept="429"),
    "500": Script(http(500, "oops\x1b[31m"), "Server", True, kept="oops"),
    "502": Script(http(502, "<html>bad gateway"), "Server", True, kept="bad gateway"),
    "503": Script(http(503, "", "Retry-After: NaN"), "Server", True, kept="503"),
    "time-out": Script(never, "Timeout", True, kept="no whole reply"),
    "slow drip": Script(drip, "Timeout", True, kept="no whole reply"),
    "headers without end": Script(headers_drip, "Timeout", True, kept="no whole reply"),
    "reset": Script(reset, "Connection", True, kept="reset"),
    "half a body": Script(half, "Connection", True, kept="early"),
    "half a chunk": Script(half_chunk, "Connection", True, kept="IncompleteRead"),
    "length too small": Script(http(200, said("yes"), length=60), "BadReply", kept="chat.completion"),
    "huge body": Script(http(200, said("yes") + " " * BIG), "BadReply", kept="more than"),
    "HTML": Script(http(200, "<html><body>Sign in</body></html>"), "BadReply", kept="Sign in"),
    "invalid UTF-8": Script(http(200, said("yes").encode().replace(b"yes", b"y\xffs")), "BadReply", kept="�"),
    "nested without end": Script(http(200, "[" * 100_000), "BadReply", kept="[[["),
    "no choices": Script(http(200, '{"choices": []}'), "BadReply", kept="choices"),
    "redirect": Script(http(307, "", "Location: http://localhost:{elsewhere}/v1"), "BadReply", kept="redirect"),
}


class JudgeServer:
    """`script(item, call)` gives the name of a reply of REPLIES, bytes, or None for the good judge's own reply.

    `calls` is what reached it; `fired` counts the replies by name; `elsewhere` counts connections to the other host.
    """

    def __init__(self, script=lambda item, call: None):
        self.script, self.calls, self.fired, self.elsewhere = script, [], Counter(), []
        self._threads = []
        self._server, self.port = self._listen(self._serve)
        self._other, self.other_port = self._listen(lambda sock: self.elsewhere.append(sock.recv(65536)))

    def _listen(self, serve):
        class Handler(socketserver.BaseRequestHandler):
            def handle(handler):
                with contextlib.suppress(OSError):  # the other side may go at any time
                    serve(handler.request)

        class Listening(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True
            request_queue_size = 200

            def shutdown_request(self, request):
                self.close_request(request)  # without a farewell: a reset stays one

        server = Listening(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        return server, server.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def judge(self, **arguments):
        """The value of a field of type Model that names this judge."""
        arguments = {"model": "toy", **arguments, "url": self.url}  # the URL last: the rest would read as its query
        return Model("endpoint?" + "&".join(f"{k}={v}" for k, v in arguments.items()))

    def _serve(self, sock):
        call = _received(sock)
        if call is None:
            return
        self.calls.append(call)
        reply = self.script(call.item, call)
        if isinstance(reply, str):
            self.fired[reply] += 1
            reply = REPLIES[reply].send
        if reply is None:
            reply = http(200, good(call))
        if callable(reply):
            reply(sock)
        else:
            sock.sendall(reply.replace(b"{elsewhere}", str(self.other_port).encode()))

    def close(self):
        for server in (self._server, self._other):
            server.shutdown()
            server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.close()


def _received(sock):
    """The request that a connection brings; None where it brings none."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += sock.recv(65536)
    value = json.loads(body)
    call = Call(first.split()[1], headers, value)
    content = value["messages"][-1]["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part["type"] == "text":
            call.text += part["text"] + "\n"
        else:
            png = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            call.picture = np.asarray(Image.open(io.BytesIO(png)))
    call.text = call.text.strip()
    return call


def card_of(call):
    """ "neutral" or "adversarial" where a card stands below the picture, else None: told by its pixels."""
    if call.picture.shape[0] <= 4 * LINE:
        return None
    for name, text in (("neutral", NEUTRAL), ("adversarial", Asked(QUESTION).adversarial)):
        card = with_card(np.zeros((3, 4, 4), np.uint8), text).transpose(1, 2, 0)
        if np.array_equal(card[4:], call.picture[4:]):
            return name
    raise AssertionError("a card that nobody drew")
