"""What models that talk have said, recorded and replayed: the same question to the same model is asked once.

<store>/replies/replies.<k>.jsonl      one reply a line, with the request it answers; each writer has a file of its own

A reply is found by a digest of the request: the model and what decides its replies, messages with each picture as the
SHA-256 of its pixels, choices, schema, seed, limits, and the index of the sample; not by where the server is. Failures
are never replayed: they are asked again. Secrets are masked before anything is written.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import door
from bench.capabilities import Answer, ChatModel, Completion, VQAModel, has
from bench.identity import canonical, digest
from bench.records import heal, line, parse_line
from bench.types import Error, Json, Stop, UsageError

MODES = {
    "record": "what was said is replayed, what is new is asked and recorded",
    "replay": "what was said is replayed, what is new is asked and not recorded",
    "replay-strict": "what is new stops the run: nothing is asked",
    "refresh": "everything is asked and recorded anew",
    "off": "everything is asked, nothing is recorded",
}
VERSION = 1
NEAREST = 2_000  # recorded requests that a missing one is compared with


class Replies:
    """The replies of one store; safe to use from several threads and processes."""

    def __init__(self, folder: Path, mode: str = "record"):
        if mode not in MODES:
            raise UsageError(f"replies is {mode!r}", hint="; ".join(f"{m}: {what}" for m, what in MODES.items()))
        self.folder, self.mode = folder, mode
        self._places: dict[str, tuple[Path, int]] | None = None  # key -> file and offset
        self._log: door.Appender | None = None
        self._held = contextlib.ExitStack()  # the lock of the file that is ours
        self._busy = threading.RLock()

    def around(self, model: Any, identity: Callable[[], Json]) -> Any:
        """The model, what it says recorded and replayed; one that does not talk as it is, and `identity` not asked."""
        return Recorded(model, identity(), self) if has(model, ChatModel) or has(model, VQAModel) else model

    def recall(self, request: Mapping[str, Json]) -> Mapping[str, Json] | None:
        """What was said to a request, in a mode that replays; raises Stop for a new one where nothing may be asked."""
        if self.mode in ("refresh", "off"):
            return None
        key = digest(request)
        with self._busy:
            found = self._read(key)
            if found is None and self.mode == "replay-strict":
                raise Stop(f"no reply is recorded for {self._unlike(request)}", hint="--replies record asks the model")
        return None if found is None else found["reply"]

    def keep(self, request: Mapping[str, Json], reply: Mapping[str, Json], seconds: float) -> None:
        """Records a reply durably, in a mode that records."""
        if self.mode not in ("record", "refresh"):
            return
        value = {"key": digest(request), "request": request, "reply": reply, "seconds": round(seconds, 3)}
        value = _masked({**value, "date": datetime.now(UTC).isoformat(timespec="microseconds")})
        with self._busy:
            log = self._open()
            place = (log.path, log.path.stat().st_size)
            log.append(line(value))
            self._index()[value["key"]] = place

    def _open(self) -> door.Appender:
        """The first file that no other process writes, healed."""
        if self._log is None:
            door.make_folder(self.folder)
            for k in range(10_000):
                path = self.folder / f"replies.{k}.jsonl"
                try:
                    self._held.enter_context(door.lock(path.with_suffix(".lock"), "the replies"))
                except Stop:
                    raise
                except Error:
                    continue
                heal(path)
                self._log, self._places = door.Appender(path), None  # healing moves lines
                break
        assert self._log is not None
        return self._log

    def _index(self) -> dict[str, tuple[Path, int]]:
        """Where each reply stands; a later one of a key is the one that counts."""
        if self._places is None:
            self._places = {}
            dates: dict[str, str] = {}
            for path, offset, value in self._lines():
                key, date = str(value.get("key")), str(value.get("date"))
                if date >= dates.get(key, ""):
                    self._places[key], dates[key] = (path, offset), date
        return self._places

    def _lines(self) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """Every whole line of every file, with its file and offset; damaged ones are passed over."""
        for path in sorted(self.folder.glob("replies.*.jsonl")):
            with open(path, "rb") as file:
                offset = 0
                for raw in file:
                    value = _told(raw)
                    if value is not None:
                        yield path, offset, value
                    offset += len(raw)

    def _read(self, key: str) -> dict[str, Any] | None:
        for _ in range(2):
            place = self._index().get(key)
            if place is None:
                return None
            with contextlib.suppress(OSError), open(place[0], "rb") as file:
                file.seek(place[1])
                value = _told(file.readline())
                if value is not None and value.get("key") == key:
                    return value
            self._places = None  # another process healed its file: lines have moved
        return None

    def _unlike(self, request: Mapping[str, Json]) -> str:
        """What sets a request apart from the recorded one that is most like it."""
        best: list[str] | None = None
        for i, (_, _, value) in enumerate(self._lines()):
            other = value.get("request", {})
            names = [n for n in sorted({*request, *other}) if request.get(n) != other.get(n)]
            if i < NEAREST and (best is None or len(names) < len(best)):
                best = names
                nearest = other
        if not best:
            return f"this request: {self.folder} holds none"
        told = [f"{n} is {canonical(request.get(n))[:120]}, not {canonical(nearest.get(n))[:120]}" for n in best]
        return f"a request that differs from the nearest in {'; '.join(told)}"


class Recorded:
    """A model that talks, with its replies recorded: `complete` and `answer` as it has them, all else as it is.

    Both also take `sample_index`, which tells repeated samples of one request apart.
    """

    def __init__(self, model: Any, identity: Json, replies: Replies):
        self._model, self._replies = model, replies
        own = model.identity() if callable(getattr(model, "identity", None)) else None
        self._identity = [identity, own]
        if has(model, ChatModel):
            self.complete = self._complete
        if has(model, VQAModel):
            self.answer = self._answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def _complete(self, messages: Sequence[Mapping[str, Any]], *, sample_index: int = 0, **asked: Any) -> Completion:
        def part(value: Any) -> Any:
            return {"type": "image", "image": _pixels(value["image"])} if value.get("type") == "image" else dict(value)

        told = [
            {**m, "content": m["content"] if isinstance(m["content"], str) else [part(p) for p in m["content"]]}
            for m in messages
        ]
        request = self._request("chat", sample_index, messages=told, **{"seed": 0, "max_tokens": 512, **asked})
        return self._said(request, Completion, lambda: self._model.complete(messages, **asked))

    def _answer(self, image: Any, question: str, choices: Sequence[str], *, sample_index: int = 0) -> Answer:
        about = {"image": _pixels(image), "question": question, "choices": list(choices)}
        request = self._request("vqa", sample_index, **about)
        return self._said(request, Answer, lambda: self._model.answer(image, question, choices))

    def _request(self, role: str, sample_index: int, **parts: Any) -> dict[str, Json]:
        fixed = {"v": VERSION, "role": role, "model": self._identity, "sample_index": sample_index}
        parts = {k: list(v) if isinstance(v, tuple) else v for k, v in parts.items() if v is not None}
        return {**fixed, **parts}

    def _said(self, request: dict[str, Json], kind: type, ask: Callable[[], Any]) -> Any:
        key = digest(request)
        known = self._replies.recall(request)
        if known is not None:
            return kind(**{**known, "key": key})
        begin = time.monotonic()
        found = ask()
        if not isinstance(found, kind) or found.failure:
            return found
        found = replace(found, key=key)
        reply = {k: v for k, v in asdict(found).items() if k != "key"}
        if "probabilities" in reply and reply["probabilities"] is not None:
            reply["probabilities"] = [float(p) for p in reply["probabilities"]]
        self._replies.keep(request, reply, time.monotonic() - begin)
        return found


def _told(raw: bytes) -> dict[str, Any] | None:
    """What a line holds of a request and its reply; None where it is damaged or holds something else."""
    value = parse_line(raw.rstrip(b"\n"))
    whole = value is not None and isinstance(value.get("request"), dict) and isinstance(value.get("reply"), dict)
    return value if whole else None


def _pixels(image: Any) -> dict[str, Json]:
    """A picture by its pixels: SHA-256 over 8-bit RGB, and its size."""
    from bench.pictures import rgb

    pixels = rgb(image)
    return {"sha256": digest(pixels.tobytes()), "size": list(pixels.shape[:2])}


def _masked(value: Any) -> Any:
    """Every text of a value with its secrets masked."""
    from bench.text import mask

    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {k: _masked(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(v) for v in value]
    return value
