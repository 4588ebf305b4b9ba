"""Suite and Metric: what to run, what to measure, how to reduce it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from bench.types import Estimate, Figure, Item, Json, Media, Score, Table, Unit

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bench.recipe import Recipe


class Context(Protocol):
    """What `run` and `measure` may ask for. Images come decoded and checked; seeds have addresses."""

    device: torch.device

    def batches(self, unit: Unit) -> Iterator[list[str]]:
        """The unit's items, at most the current batch size at a time."""

    def item(self, id: str) -> Item: ...

    def picture(self, id: str) -> np.ndarray:
        """uint8 [H, W, 3]: the item's picture as it is stored."""

    def images(self, ids: Sequence[str], size: int, resize: str = "adm") -> torch.Tensor:
        """float32 [B, 3, size, size] in [-1, 1] on the device; `resize` names a function of `bench.images`."""

    def seed(self, item: str, stream: str = "latent") -> int:
        """63 bits from (root seed, suite, version, item, stream): the same on any engine, shard, batch or order."""

    def generator(self, item: str, stream: str) -> torch.Generator:
        """A CPU generator with that seed."""

    def judge(self, name: str) -> Any:
        """The adapter that the suite's field `name` (of type Model) names; opened once per worker."""

    def weights(self, name: str) -> Path:
        """The verified file of a weights manifest (`data_manifests/weights/<name>.toml`)."""

    def extractor(self, name: str) -> Mapping[str, Json]:
        """Its table `[extractor]`: which feature network the file is for, and what pictures that is fed."""

    def train(self, unit: Unit, recipe: Recipe) -> Path:
        """The folder that `bench train` would make of the recipe, with `recipe.json`; it goes on where a killed worker
        stopped, and is removed with the unit's scratch folder."""

    def scratch(self, unit: Unit) -> Path:
        """A folder that survives failure and is removed after success."""


class Metric(Protocol):
    """Measures per batch, reduces over all.

    A metric is a frozen dataclass: its fields are part of its signature.
    """

    name: str
    version: int
    unit: str
    better: Literal["higher", "lower", "none"]

    def prepare(self, ctx: Context) -> None:
        """Opens the networks that `measure` needs, before the first unit; may be left out.

        Raises Error where their weights are missing: that stops the run.
        """

    def identity(self, ctx: Context) -> str:
        """Which networks `measure` uses, by fingerprint; may be left out where `prepare` is.

        Shared units of a suite whose metric has `prepare` alone are measured again for every model.
        """

    def measure(self, media: Media, ctx: Context) -> Mapping[str, Sequence[Any] | np.ndarray]:
        """Lists of length B become columns of the rows; float arrays [B, d] become features."""

    def reduce(self, table: Table) -> Estimate | Mapping[str, Estimate]:
        """One estimate, or several by name: {"": psnr, "edge": ...} become scores `psnr` and `psnr.edge`."""

    def signature(self, table: Table) -> str:
        """What the number means, enough to compare or refuse it: `psnr|range:255|round|v:1`."""


@dataclass(frozen=True)
class Suite(ABC):
    """A suite is its configuration: its fields are its parameters, typed, with defaults. Class facts are ClassVar.

    `run` yields (ids, media): arrays or tensors [B, ...] are media; lists of length B become columns of the rows.
    Float pictures lie in `value_range`; uint8 pictures are [B, 3, H, W].
    """

    name: ClassVar[str]
    version: ClassVar[int]  # raise it when old records must not be reused
    requires: ClassVar[tuple[type, ...]] = ()  # capabilities of the model under test
    metrics: ClassVar[tuple[Metric, ...]] = ()  # or a property, where a field decides
    slices: ClassVar[tuple[str, ...]] = ()  # columns to disaggregate by
    sensitive: ClassVar[bool] = False  # galleries are blurred, media not exported
    value_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    patience: ClassVar[float] = 600.0  # seconds a unit may take while none is done; then ten times the others' median

    @abstractmethod
    def units(self, *data: Any) -> Iterator[Unit]:
        """`data` is the manifest that the field `data` names, or None where the suite has no such field.

        With several fields of type Data it takes one manifest for each, in their order; an item of any but the first
        is `field:id`. Where PictureSet is required, the names of the model's pictures follow, and an item is
        `generated:name`. Several rows of one item of the first manifest are `id#0`, `id#1`, ...
        """

    @abstractmethod
    def run(self, unit: Unit, model: Any, ctx: Context) -> Iterator[tuple[Sequence[str], Media]]: ...

    def score(self, table: Table) -> list[Score]:
        """Every metric over all rows and, for each column of `slices`, over the rows of each of its values."""
        return [
            score
            for name, part in self._parts(table)
            for metric in self.metrics
            for score in self._reduce(metric, name, part)
        ]

    def _parts(self, table: Table) -> Iterator[tuple[str, Table]]:
        """("all", table), then ("column=value", its rows) for each value of each column of `slices`."""
        yield "all", table
        for column in self.slices:
            for text, value in sorted({str(v): v for v in table.column(column) if v is not None}.items()):
                yield f"{column}={text}", table.where(column, value)

    def _reduce(self, metric: Metric, slice: str, table: Table) -> Iterator[Score]:
        """The scores of one metric over one part of a table."""
        found = metric.reduce(table)
        for suffix, estimate in (found if isinstance(found, Mapping) else {"": found}).items():
            yield Score(
                run="",
                suite=self.name,
                suite_version=self.version,
                model="",
                seed=table.seed,
                metric=f"{metric.name}.{suffix}" if suffix else metric.name,
                slice=slice,
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
                method=estimate.method,
                n=estimate.n,
                expected=table.expected,
                complete=len(table) == table.expected and (estimate.n == table.expected or bool(estimate.note)),
                unit=metric.unit,
                better=metric.better,
                signature=metric.signature(table),
                note=estimate.note or ("" if table.expected else "no items"),
            )

    def figures(self, table: Table) -> Iterator[Figure]:
        """Plots of one run; none by default."""
        return iter(())

    def artifacts(self, table: Table) -> Iterator[tuple[str, bytes]]:
        """Files to keep with the run (a gate card, a fit); none by default."""
        return iter(())
