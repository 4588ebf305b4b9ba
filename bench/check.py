"""Conformance of an adapter: what its capabilities promise, tried on a few inputs and reported line by line.

Nothing here judges quality. A `fail` breaks the contract and would spoil scores; a `warn` is worth a look.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bench.capabilities import CAPABILITIES, held, methods
from bench.checks.autoencoders import autoencoder, video_autoencoder
from bench.checks.denoiser import denoiser_access
from bench.checks.generators import class_to_image, picture_set, text_to_image
from bench.checks.report import Finding, Report
from bench.checks.scalable import scalable
from bench.checks.talk import chat_model, vqa_model

TESTS: dict[str, Callable[[Any, Report], None]] = {
    "TextToImage": text_to_image,
    "ClassToImage": class_to_image,
    "PictureSet": picture_set,
    "Autoencoder": autoencoder,
    "VideoAutoencoder": video_autoencoder,
    "DenoiserAccess": denoiser_access,
    "ChatModel": chat_model,
    "VQAModel": vqa_model,
    "Scalable": scalable,
}


def check(
    model: Any,
    *,
    size: int = 64,
    seed: int = 0,
    device: str | None = None,
    elsewhere: Callable[[str, Sequence[Any], Sequence[int]], Any] | None = None,
) -> list[Finding]:
    """Tries every capability that an object holds, on pictures of `size` px; a fault of the model is a finding.

    `device` is where inputs lie and pictures must come back; by default the model's own `device`, or the CPU.
    `elsewhere` calls a method of generators in another worker, see `second_worker`.
    """
    report = Report(str(device or getattr(model, "device", None) or "cpu"), size, seed, elsewhere)
    names = held(model)
    for capability in CAPABILITIES:
        present = [m for m in methods(capability) if callable(getattr(model, m, None))]
        missing = sorted(set(methods(capability)) - set(present))
        if present and missing and len(present) >= len(missing):
            report.add(capability.__name__, "warn", f"not held: {', '.join(present)} but no {', '.join(missing)}")
    if not names:
        report.add("capabilities", "fail", f"none; known: {', '.join(c.__name__ for c in CAPABILITIES)}")
    before = _global_state()
    if "PictureSet" in names:  # what is there already can be looked up, not asked for
        names = tuple(name for name in names if name != "TextToImage")
    for name in names:
        report.about = name
        report.call("conformance", TESTS[name], model, report)
    report.about = ""
    same = before == _global_state()
    note = (
        "untouched" if same else "changed: the model draws from global random state, or seeds it; use the seeds given"
    )
    report.add("global random state", "ok" if same else "warn", note)
    return report.findings


@contextlib.contextmanager
def second_worker(
    name: str, what: Mapping[str, Any], how: Mapping[str, Any], device: str
) -> Iterator[Callable[[str, Sequence[Any], Sequence[int]], Any]]:
    """A process that opens the model a second time when it is first asked for pictures, as another worker would."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def call(method: str, inputs: Sequence[Any], seeds: Sequence[int]) -> Any:
            import torch

            work = (name, dict(what), dict(how), device, method, list(inputs), list(seeds))
            return torch.from_numpy(pool.submit(_made_elsewhere, *work).result()).to(device)

        yield call


def _made_elsewhere(name, what, how, device, method, inputs, seeds) -> np.ndarray:
    from bench.models import open_model

    return getattr(open_model(name, what, how, device), method)(inputs, seeds).detach().cpu().numpy()


def _global_state() -> tuple[Any, ...]:
    """Of the generators that everybody shares."""
    import torch

    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), tuple(rest), torch.get_rng_state().numpy().tobytes()
