"""Batches made in a thread while the last one is measured, each in memory of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any


def owned(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches in memory of their own: a model may write into the last one while that is being measured."""
    for ids, media in batches:
        yield ids, {name: _copied(m) if hasattr(m, "shape") else m for name, m in media.items()}


def _copied(media: Any) -> Any:
    return media.clone() if hasattr(media, "clone") else media.copy()


@contextlib.contextmanager
def ahead(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """The same batches, the next one being made in a thread while the last is measured."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(1)
    leaving = threading.Event()

    def hand_over(kind: str, value: Any = None) -> None:
        while not leaving.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put((kind, value), timeout=0.05)

    def make() -> None:
        try:
            for batch in batches:
                hand_over("batch", batch)
                if leaving.is_set():
                    return
            hand_over("end")
        except BaseException as e:  # raised again where the batches are taken
            hand_over("error", e)

    def take() -> Iterator[Any]:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        yield take()
    except Exception:
        leaving.set()
        thread.join()  # the model must be idle before the next unit
        raise
    finally:
        leaving.set()
        thread.join(1.0)  # an interrupt waits no longer; the command line then ends the process as it is
