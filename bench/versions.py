"""What decides a number beside the model and the data: code and versions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

from bench import registry
from bench.identity import digest, file_digest
from bench.types import Error


@cache
def code_digest(cls: type) -> str:
    """Digest of the files of a suite and of the metrics: recorded with each record, not part of its key."""
    files = [*registry.package_files(cls), *sorted((Path(__file__).parent / "metrics").glob("*.py"))]
    return digest([[p.name, file_digest(p)] for p in files])[:16]


@cache
def versions_of(cls: type) -> Mapping[str, str]:
    """What decides a number beside model and data: workers that differ in it do not share a run."""
    root = Path(__file__).parent
    files = sorted(p for part in (".", "adapters", "mini") for p in (root / part).glob("*.py"))  # not those of reports
    harness = [[p.relative_to(root).as_posix(), file_digest(p)] for p in files]
    packages = {name: version(name) for name in ("touchstone-bench", "torch", "numpy", "pillow")}
    return {**packages, "the harness's code": digest(harness)[:16], "the suite's code": code_digest(cls)}


def refuse_other(drivers: Mapping[str, str], own: Mapping[str, str]) -> None:
    other = [name for name, value in drivers.items() if own.get(name) != value]
    if other:
        raise Error(
            f"this worker has {other[0]} {own.get(other[0])}, its driver {drivers[other[0]]}",
            hint="install the same versions everywhere, then run the same command again",
        )


@cache
def float_versions() -> list[str]:
    """Of what floats depend on beside our own code."""
    return [*map(version, ("torch", "numpy", "pillow")), file_digest(Path(__file__).with_name("images.py"))]
