"""Recipe: a training core that the command line can run by name, resume after a kill, and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch


class TrainContext(ABC):
    """What a recipe may ask for while it trains."""

    device: torch.device

    @abstractmethod
    def restore(self, **parts: Any) -> int:
        """Name everything that must survive a kill (objects with state_dict and load_state_dict, each by a keyword).

        Loads the newest whole state into them and returns the step to begin with: 0 when there is none. Call it once.
        The runner saves these parts between steps.
        """

    @abstractmethod
    def seed(self, step: int, stream: str) -> int:
        """The seed of one random stream of one step: addressed, so that nothing needs to be replayed on resume."""

    @abstractmethod
    def generator(self, step: int, stream: str) -> torch.Generator:
        """A CPU generator with that seed."""

    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The items of the manifest that the recipe's field `data` names."""

    @abstractmethod
    def images(self, ids: list[str], size: int) -> torch.Tensor:
        """float32 [B, 3, size, size] in [-1, 1] of those items."""


@dataclass(frozen=True)
class Recipe(ABC):
    """A recipe is its configuration: its fields are its parameters. Facts of the class are ClassVar."""

    name: ClassVar[str]
    version: ClassVar[int]
    starts_from: ClassVar[tuple[type, ...]] = ()  # capabilities of the model it edits; () = from scratch

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of steps, for the bar."""

    @abstractmethod
    def train(self, model: Any, ctx: TrainContext) -> Generator[Mapping[str, float], None, Any]:
        """Yields each step's losses and returns the trained model."""

    @abstractmethod
    def export(self, model: Any, folder: Path) -> None:
        """Writes what the ecosystem loads without us (a diffusers folder, safetensors) into an empty folder."""

    def checks(self, model: Any, ctx: TrainContext) -> Iterator[tuple[str, float]]:
        """Figures of merit of the finished model, for `recipe.json`; none by default."""
        return iter(())
