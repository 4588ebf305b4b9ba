"""Models opened by name, and the settings of a process that measures."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import registry
from bench.capabilities import has, held
from bench.config import How, file_arguments
from bench.identity import fingerprint
from bench.store import Store
from bench.suite import Suite
from bench.types import Error, Json


def parse_model(text: str) -> tuple[str, dict[str, str]]:
    """`name?key=value&key=value` as (name, arguments)."""
    name, _, query = text.partition("?")
    return name, dict(part.split("=", 1) for part in query.split("&") if "=" in part)


def open_model(name: str, what: Mapping[str, Any], how: Mapping[str, Any], device: str) -> Any:
    """The adapter of a name, opened. Anything that goes wrong is an Error: it stops the run and blames no unit."""
    import inspect

    factory = registry.find("adapters", name)
    how = dict(how)
    if "device" in inspect.signature(factory).parameters:
        how.setdefault("device", device)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return factory(**what, **how)
    except Error:
        raise
    except Exception as e:  # a foreign constructor may raise anything
        from bench.text import mask, plain

        trace = traceback.extract_tb(e.__traceback__)[-1]
        raise Error(
            f"model {name!r} cannot be opened: {type(e).__name__}: {plain(mask(str(e)))[:500]}",
            hint=f"raised at {Path(trace.filename).name}:{trace.lineno}; bench check --model {name} tries it alone",
        ) from e


def identity_of(name: str, what: Mapping[str, Any], store: Store) -> Json:
    """An adapter by its name, its file where it is one, and the arguments that decide what it says."""
    from bench.weights import resolve

    files = file_arguments(registry.find("adapters", name))
    with store.digests() as digests:
        given = {k: fingerprint(resolve(str(v)), digests) if k in files and v else v for k, v in what.items()}
    return [registry.identity(name), given]


def require(suite: Suite, obj: Any, name: str) -> None:
    """Raises Error when a model, or its class before it is opened, lacks what the suite needs."""
    lacking = [c.__name__ for c in suite.requires if not has(obj, c)]
    if lacking:
        fitting = sorted(
            e.name
            for e, cls, _ in registry.describe("suites")
            if cls is not None and all(has(obj, c) for c in cls.requires) and cls.requires
        )
        raise Error(
            f"suite `{suite.name}` needs {', '.join(lacking)}; `{name}` has {', '.join(held(obj)) or 'no capability'}",
            hint=f"suites that run on `{name}`: {', '.join(fitting) or 'none'}",
        )


@contextlib.contextmanager
def settings(how: How, device: str) -> Iterator[None]:
    """Threads, TF32 and determinism as `how` says, for as long as a worker lives; then as they were before.

    One thread unless told otherwise, so that sums have the same order on any machine and under any engine.
    """
    import os

    from threadpoolctl import threadpool_limits

    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise Error(
                f"device {device} is not available", hint="--devices cpu, or install a driver that torch can use"
            )
    with contextlib.ExitStack() as stack:
        stack.enter_context(threadpool_limits(how.threads))
        if device == "cpu" and not how.strict and "torch" not in sys.modules:
            old = os.environ.get("OMP_NUM_THREADS")
            os.environ["OMP_NUM_THREADS"] = str(how.threads)  # read when torch is imported, if suite or model need it
            stack.callback(os.environ.pop if old is None else os.environ.__setitem__, "OMP_NUM_THREADS", old)
            yield
            return
        import torch

        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        stack.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
        stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        torch.set_num_threads(how.threads)
        if how.strict:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
        yield


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.getdevice_name(device)
    import platform

    return f"{device} {platform.machine()}"


def out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "OutOfMemory" in type(error).__name__
    )


def free_memory() -> None:
    import gc

    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()
