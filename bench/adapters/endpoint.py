"""A model behind any server that speaks OpenAI's chat completions, with one owner of time-outs and retries.

    endpoint?model=qwen2.5-vl-7b&url=http://localhost:8000/v1
    endpoint?model=gpt-4o&url=https://api.openai.com/v1&credential=OPENAI_API_KEY

The URL stands last: what followed it would read as its query, and be masked wherever it is shown.

An item that gets no answer that counts is a failure with its kind (`bench.capabilities.FAILURES`), what came instead,
and the calls it took; never a zero. Tried again are 408, 409, 429, 500 and above, time-outs and broken connections,
after 0.5 s doubling to 8 s, or what Retry-After says; while a judge is down, once an item. A refused key stops the run
at once. What a server refuses to take (log-probabilities, a schema, `max_tokens`, a seed) is left out from then on: a
schema is said in words anyway.
"""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.adapters import said
from bench.adapters.server import Fault, Server, retry_after, shown
from bench.capabilities import Answer, Completion
from bench.pictures import rgb
from bench.text import mask
from bench.types import Error, Stop

if TYPE_CHECKING:
    from torch import Tensor

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before the second try; doubling up to
LONGEST_ASKED = 120.0  # seconds of Retry-After that are waited for
OPTIONAL = ("response_format", "logprobs", "max_tokens", "seed")  # what servers differ in
ANSWER_TOKENS = 64  # of a choice
DOWN = ("Connection", "Timeout", "Server")
SILENT = 3  # items in a row that failed so, after which an item is tried once, until one gets a reply


class Reply(NamedTuple):
    """The first choice of a reply, checked for its form."""

    text: str | None
    finish: str
    refusal: str
    logprobs: Any
    served: dict[str, Any]


class Endpoint:
    """`complete` and `answer` over POST {url}/chat/completions. Safe to call from several threads."""

    def __init__(
        self,
        model: str,
        temperature: float | None = 0.0,  # none: not sent, for servers that refuse it
        top_p: float | None = 1.0,
        *,
        url: str,
        credential: str = "",  # name of an environment variable, or file:PATH; "": no key
        tries: int = 5,  # calls an item
        seconds: float = 300.0,  # an item, waits included
        timeout: float = 120.0,  # seconds of one call, from connecting to the last byte
        calls: int = 0,  # of this process in all, after which the run stops; 0: no limit
        run_seconds: float = 0.0,  # in calls and waits of this process, likewise
    ):
        if tries < 1 or min(seconds, timeout) <= 0 or min(calls, run_seconds) < 0:
            raise Error("endpoint: tries, seconds and timeout must be above 0, calls and run_seconds not below")
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.server = Server(url, credential)
        self.tries, self.seconds, self.timeout = tries, seconds, timeout
        self.calls, self.run_seconds = calls, run_seconds
        self.clock, self.sleep, self.random = time.monotonic, time.sleep, random.Random()
        self._made, self._spent = 0, 0.0  # calls; seconds
        self._left_out: set[str] = set()  # of OPTIONAL, what the server does not take
        self._silent = 0  # items in a row without a reply
        self._lock = threading.Lock()

    def answer(self, image: Tensor, question: str, choices: Sequence[str]) -> Answer:
        """Probabilities from the server's log-probabilities where it gives them; else what was said is certain."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        found = self.complete([{"role": "user", "content": content}], choices=choices, max_tokens=ANSWER_TOKENS)
        weights = None if found.choices is None else [found.choices[c] for c in choices]
        return Answer(weights, failure=found.failure, reply=found.reply, tries=found.tries)

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema: Any = None,
        choices: Sequence[str] | None = None,
        seed: int = 0,
        max_tokens: int = 512,
    ) -> Completion:
        if not messages or (choices is not None and schema is not None):
            raise Error("a model is asked by messages, and replies with one of the choices or by a schema, not both")
        if choices is not None:
            said.check_choices(choices)
        if schema is not None:
            said.check_schema(schema)
        plain = [{"role": str(m["role"]), "content": _content(m["content"])} for m in messages]
        begin, tries, doubted = self.clock(), 0, set()
        most = 1 if self._silent >= SILENT else self.tries  # a judge that is down does not hold up a long run
        try:
            while True:
                tries += 1
                try:
                    reply = self._call(self._request(plain, schema, choices, seed, max_tokens), begin)
                except Fault as e:
                    if tries < most and self._may_try_again(e, tries, begin, doubted):
                        continue
                    if e.status in (400, 422):
                        self._left_out -= doubted  # it was not that
                    self._silent = self._silent + 1 if e.failure in DOWN else 0
                    return _failed(e.failure, e.reply, tries)
                self._silent = 0
                return self._read(reply, schema, choices, tries)
        finally:
            with self._lock:
                self._spent += self.clock() - begin

    # -- one item

    def _request(self, messages: list, schema: Any, choices: Any, seed: int, max_tokens: int) -> dict[str, Any]:
        """The body of a call, without what the server has refused to take."""
        body: dict[str, Any] = {"model": self.model, "messages": messages, "seed": seed % 2**31}
        body |= {name: v for name in ("temperature", "top_p") if (v := getattr(self, name)) is not None}
        body["max_completion_tokens" if "max_tokens" in self._left_out else "max_tokens"] = max_tokens
        if choices is not None:
            listed = ", ".join(json.dumps(c, ensure_ascii=False) for c in choices)
            body["messages"] = _told(messages, f"Reply with exactly one of these and nothing else: {listed}")
            body |= {} if "logprobs" in self._left_out else {"logprobs": True, "top_logprobs": 20}
        if schema is not None:
            text = json.dumps(schema, ensure_ascii=False)
            body["messages"] = _told(messages, f"Reply with JSON that fits this schema and nothing else: {text}")
            form = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return {k: v for k, v in body.items() if k not in self._left_out}

    def _may_try_again(self, fault: Fault, tries: int, begin: float, doubted: set[str]) -> bool:
        """Waits before the next try; False where there shall be none: it cannot help, or the item's time is over."""
        if fault.status in (400, 422):
            named = [n for n in OPTIONAL if n in fault.reply and n not in self._left_out]
            doubted |= set(named[:1])
            self._left_out |= set(named[:1])
            return bool(named)
        if not fault.again or (fault.wait or 0.0) > LONGEST_ASKED:
            return False
        step = min(FIRST_WAIT * 2 ** (tries - 1), LONGEST_WAIT)
        spread = step / 2 * (1 + self.random.random())  # clients that failed together do not come back together
        seconds = spread if fault.wait is None else fault.wait + spread
        if self.clock() - begin + seconds >= self.seconds:
            return False
        self.sleep(seconds)
        return True

    def _read(self, reply: Reply, schema: Any, choices: Any, tries: int) -> Completion:
        """A completion of a reply: an answer, or the failure that it is."""
        text = reply.text or ""
        if reply.refusal or reply.finish == "content_filter":
            return _failed("Refused", reply.refusal or text, tries, reply)
        if reply.finish == "length":
            return _failed("Truncated", text, tries, reply)
        unread = "Refused" if said.refuses(text) else "Unparsable"
        parsed = weights = None
        if not text.strip():
            return _failed(unread, text, tries, reply)
        if choices is not None:
            chosen = said.choice_of(text, choices)
            if chosen is None:
                return _failed(unread, text, tries, reply)
            weights = said.weigh(reply.logprobs, choices, chosen)
        if schema is not None:
            try:
                parsed = said.object_of(text, schema)
            except ValueError:
                return _failed(unread, text, tries, reply)
        return Completion(mask(text), parsed, weights, reply.finish, tries=tries, served=reply.served)

    # -- one call

    def _call(self, request: Mapping[str, Any], begin: float) -> Reply:
        """Raises Fault for a call that fails; Stop where every later one would: no key, no budget."""
        self._spend(begin)
        left = self.seconds - (self.clock() - begin)
        body = json.dumps(request, allow_nan=False).encode()
        status, headers, data = self.server.post("/chat/completions", body, max(0.001, min(self.timeout, left)))
        text = f"HTTP {status}: {shown(data)}"
        if status in (401, 403):
            hint = f"look at the key that credential={self.server.credential or '(none)'} names, and at its rights"
            raise Stop(f"the judge at {self.server.host} refused us: {text[:300]}", hint=hint)
        if status in (408, 409, 429) or status >= 500:
            failure = {408: "Timeout", 429: "RateLimited"}.get(status, "Server")
            raise Fault(failure, text, True, retry_after(headers.get("Retry-After")))
        if 300 <= status < 400:
            raise Fault("BadReply", f"HTTP {status}: a redirect, which is not followed")
        if status != 200:
            filtered = "content_filter" in text or "content_policy" in text
            raise Fault("Refused", text) if filtered else Fault("BadReply", text, status=status)
        return _form(data)

    def _spend(self, begin: float) -> None:
        """Counts a call; raises Stop where the run has none left."""
        with self._lock:
            spent = self._spent + self.clock() - begin
            over = f"{self.calls} calls" if self.calls and self._made >= self.calls else ""
            over = over or (f"{self.run_seconds:g} s" if self.run_seconds and spent >= self.run_seconds else "")
            if over:
                hint = "what was measured is on disk; the same command goes on with a new budget"
                raise Stop(f"the judge's budget of {over} is spent", hint=hint)
            self._made += 1


def _form(data: bytes) -> Reply:
    """The first choice of a reply's body; raises Fault for what is no chat completion."""
    try:
        body = said.strict_json(data.decode("utf-8"))
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message["content"], message.get("refusal") or ""
        finish = choice.get("finish_reason") or "stop"
        if not (text is None or isinstance(text, str)) or not isinstance(refusal, str) or not isinstance(finish, str):
            raise ValueError("content is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Fault("BadReply", shown(data)) from None
    served = {name: body[name] for name in ("model", "system_fingerprint", "usage") if body.get(name) is not None}
    return Reply(text, finish, refusal, choice.get("logprobs"), served)


def _failed(failure: str, text: str, tries: int, reply: Reply | None = None) -> Completion:
    kept, served = shown(text.encode("utf-8", "replace")), reply.served if reply else {}
    return Completion("", finish=reply.finish if reply else "", failure=failure, reply=kept, tries=tries, served=served)


def _told(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with a line at the end of the last one."""
    *before, last = messages
    content = last["content"]
    content = f"{content}\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*before, {**last, "content": content}]


def _content(content: Any) -> Any:
    """A message's content as the wire wants it: pictures as PNG in a data URL."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.get("type") == "image":
            from PIL import Image

            out = io.BytesIO()
            Image.fromarray(rgb(part["image"])).save(out, "PNG")
            url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif part.get("type") == "text":
            parts.append({"type": "text", "text": str(part["text"])})
        else:
            raise Error(f"a message has a part of type {part.get('type')!r}", hint="text, or image with an array")
    return parts
