"""Items of a manifest that are drawn when asked for, not read: pictures of the small world from a seed and a count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from bench.mini import world
from bench.types import Error, Item

FIRST = 64  # pictures that are compared with what was locked before each run
BLOCK = 1000  # pictures drawn at a time


class WorldItems(Mapping[str, Item]):
    """Captioned pictures by id ("000000", "000001", ...); `attributes` hold what is true of each, as words, and
    "composition": "seen" or "held out"."""

    def __init__(self, table: Mapping[str, object]):
        self.seed: int = table["seed"]
        self.num: int = table["items"]
        self.held_out: str = table["held_out"]

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[str]:
        return (f"{number:06d}" for number in range(self.num))

    def __getitem__(self, id: str) -> Item:
        number = self._number(id)
        return self._item(number, *world.sample(1, self.seed, held_out=self.held_out, first=number))

    def picture(self, id: str) -> np.ndarray:
        """uint8 [32, 32, 3]"""
        pictures = world.sample(1, self.seed, held_out=self.held_out, first=self._number(id))
        return world.draw(pictures)[0]

    def digest(self, limit: int | None = None) -> str:
        """SHA-256 of the pixels and captions of all items, or of the first `limit`."""
        found = hashlib.sha256()
        for start, pictures in self._blocks(min(self.num, limit or self.num)):
            found.update(world.draw(pictures).tobytes())
            found.update("\n".join(self._caption(start + i, p) for i, p in enumerate(pictures)).encode())
        return found.hexdigest()

    def _blocks(self, stop: int) -> Iterator[tuple[int, list[world.Picture]]]:
        for start in range(0, stop, BLOCK):
            yield start, world.sample(min(BLOCK, stop - start), self.seed, held_out=self.held_out, first=start)

    def _item(self, number: int, picture: world.Picture) -> Item:
        composition = "held out" if picture.held_out else "seen"
        attributes = {**picture.attributes(), "composition": composition}
        return Item(f"{number:06d}", text=self._caption(number, picture), attributes=attributes)

    def _caption(self, number: int, picture: world.Picture) -> str:
        return world.caption(picture, np.random.default_rng([self.seed, number]))

    def _number(self, id: str) -> int:
        if not (len(id) == 6 and id.isdecimal() and int(id) < self.num):
            raise KeyError(id)
        return int(id)


def check_world(where: str, table: Mapping[str, object]) -> None:
    """Raises Error where a value of the table [world] lies outside its range."""
    if not 0 <= table["seed"] < 2**63:
        raise Error(f"{where}: world.seed must lie between 0 and 2^63 - 1")
    if not 1 <= table["items"] <= 1_000_000:
        raise Error(f"{where}: world.items is {table['items']}; it must lie between 1 and 1,000,000")
    if table["held_out"] not in ("exclude", "only", "any"):
        raise Error(f"{where}: world.held_out is {table['held_out']!r}", hint="one of exclude, only, any")
