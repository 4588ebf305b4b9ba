"""Two sets of pictures, generated and reference: how near are their distributions?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from bench import images
from bench.capabilities import PictureSet
from bench.suite import Metric, Suite
from bench.types import Data, Error, Estimate, Score, Table, Unit, UsageError
from suites.images import flags, protocols

SMALLEST = 64  # px, side that the embedded network needs


@dataclass(frozen=True)
class Images(Suite):
    """Fréchet and kernel distances, precision and recall of pictures against a reference, as a named protocol defines.

    Raises UsageError for an unknown protocol or resize, a size below 1, and a chunk below 1.
    """

    reference: Data = "photographs"
    protocol: str = "embedded"  # which numbers on which features, as in `suites.images.protocols`
    size: int | None = None  # px, of the squares that both sets are brought to; none: as stored, networks resize
    resize: str = "adm"  # how, where a size is given: a name of `bench.images.RESIZES`
    chunk: int = 64  # pictures per unit: what a crash can cost

    name = "images"
    version = 2
    requires = (PictureSet,)

    def __post_init__(self):
        try:
            p = protocols.get(self.protocol)
        except ValueError as e:
            raise UsageError(str(e), hint=f"one of {', '.join(protocols.PRESETS)}") from None
        if self.resize not in images.RESIZES:
            raise UsageError(f"resize = {self.resize!r} is unknown", hint=f"one of {', '.join(images.RESIZES)}")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size = {self.size} must be 1 px or more")
        if self.size is not None and self.size < SMALLEST and "embedded" in p.extractors():
            raise UsageError(
                f"size = {self.size}: the embedded network needs {SMALLEST} px",
                hint=f"take {SMALLEST}, or another protocol",
            )
        if self.chunk < 1:
            raise UsageError(f"chunk = {self.chunk} must be 1 or more")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        from bench import metrics

        p = protocols.get(self.protocol)
        sides = {"fake": "output", "real": "reference"}  # a batch holds one of them
        found: list[Metric] = []
        if p.frechet:
            found.append(metrics.Frechet(extractor=p.frechet, covariance=p.covariance, **sides))
        if p.spatial:
            found.append(metrics.Frechet(extractor=p.spatial, covariance=p.covariance, **sides))
        if p.kid:
            found.append(metrics.KID(extractor=p.kid, protocol=p.kid_protocol, **sides))
        if p.cmmd:
            found.append(metrics.CMMD(extractor=p.cmmd, **sides))
        if p.prdc:
            found.append(metrics.PRDC(extractor=p.prdc, k=p.k, radius=p.radius, **sides))
        if p.inception_score:
            found.append(metrics.InceptionScore(extractor=p.inception_score, protocol=p.splits, **sides))
        return (*found, Overlap())

    def units(self, reference: Any, names: Sequence[str]) -> Iterator[Unit]:
        if len(names) < 2 or len(reference.ids()) < 2:
            which = "generated" if len(names) < 2 else "reference"
            raise Error(f"the {which} set has one picture", hint="a distribution needs two, an interval hundreds")
        for side, chunks in (
            (flags.GENERATED, _chunks([f"{flags.GENERATED}:{name}" for name in names], self.chunk)),
            (flags.REFERENCE, reference.chunks(self.chunk)),
        ):
            for i, ids in enumerate(chunks):
                yield Unit(f"{side}/{i:04d}", tuple(ids), {"side": side}, len(ids), shared=side == flags.REFERENCE)

    def run(self, unit: Unit, model: Any, ctx: Any) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        import torch

        side = str(unit.params["side"])
        for ids in ctx.batches(unit):
            found = [self._prepared(one, side) for one in _read(ids, side, model, ctx)]
            found.sort(key=lambda one: one["pixels"].shape)  # a tensor holds one size
            for _, group in groupby(found, key=lambda one: one["pixels"].shape):
                part = list(group)
                pixels = torch.from_numpy(np.stack([one.pop("pixels") for one in part])).permute(0, 3, 1, 2)
                media = {name: [one[name] for one in part] for name in part[0]}
                key = "output" if side == flags.GENERATED else "reference"
                yield media.pop("item"), {**media, key: pixels.contiguous().to(ctx.device)}

    def score(self, table: Table) -> list[Score]:
        """With whatever else could explain a distance between the sets as its note."""
        found = super().score(table)
        if len(table) < table.expected:  # a note would say that nothing is missing
            return found
        said = "; ".join(flags.sentences(table.rows, self.size))
        return [s if s.metric.startswith("pictures.") else _noted(s, said) for s in found]

    def artifacts(self, table: Table) -> Iterator[tuple[str, bytes]]:
        """The whole definition behind the numbers, so that they can be compared in years."""
        p = protocols.get(self.protocol)
        about = {"name": p.name, "hash": p.hash(), "source": p.source, "departs": p.departs}
        record = {**about, "definition": p.definition(), "flags": flags.sentences(table.rows, self.size)}
        yield "protocol.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()

    def _prepared(self, one: dict[str, Any], side: str) -> dict[str, Any]:
        """A picture as it is scored, with the columns that tell what it was."""
        picture = one["pixels"]
        height, width = picture.shape[:2]
        if self.size is not None:
            picture = images.RESIZES[self.resize](picture, self.size)
        elif min(height, width) < SMALLEST and "embedded" in protocols.get(self.protocol).extractors():
            raise Error(
                f"{one['item']} has {width}x{height} px; the embedded network needs {SMALLEST}",
                hint=f"-p size={SMALLEST} brings both sets there, or choose another protocol",
            )
        content = flags.content(picture)
        columns = {"side": side, "width": width, "height": height, "content": content}
        # equal pictures stay rows of their own: as a cluster they would not count as the few modes that they show
        return {**one, **columns, "pixels": picture}


def _read(ids: Sequence[str], side: str, model: Any, ctx: Any) -> Iterator[dict[str, Any]]:
    """Item, pixels, format and cluster of each picture; Error names the one that cannot be read."""
    if side == flags.GENERATED:
        names = [id.partition(":")[2] for id in ids]
        formats = model.formats(names) if hasattr(model, "formats") else [None] * len(ids)
        for id, picture, format in zip(ids, model.pictures(names), formats, strict=True):
            yield {"item": id, "pixels": picture, "format": format, "cluster": ""}
        return
    for id in ids:
        item = ctx.item(id)
        format = None if item.path is None else images.format_of(item.path)
        yield {"item": id, "pixels": ctx.picture(id), "format": format, "cluster": item.cluster}


def _chunks(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _noted(score: Score, said: str) -> Score:
    return replace(score, note="; ".join(text for text in (score.note, said) if text))


@dataclass(frozen=True)
class Overlap:
    """How many pictures have an equal one: within the generated set, within the reference, and across."""

    name = "pictures"
    version = 1
    unit = "pictures"
    better = "none"

    def measure(self, media, ctx):
        return {}  # the suite's columns are enough

    def reduce(self, table):
        found = flags.overlap(table.column("side"), table.column("content"))
        n = len(table)
        return {
            "repeated": Estimate(float(found[flags.GENERATED]), method="count", n=n),
            "repeated-reference": Estimate(float(found[flags.REFERENCE]), method="count", n=n),
            "shared": Estimate(float(found["shared"]), method="count", n=n),
        }

    def signature(self, table):
        return f"pictures|equal pixels|v:{self.version}"
