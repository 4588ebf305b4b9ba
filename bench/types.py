"""What travels through the harness: units of work, their records, estimates, scores, and the error a user sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Media: TypeAlias = Mapping[str, Any]


class Error(ValueError):
    """Something the user can mend: says what is wrong, and in `hint` what to do next. Never shown with a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


class Stop(Error):
    """The whole run must stop, whatever unit is being measured: the disk is full, a key was refused."""


class BadOutput(Error):
    """The model returned something that cannot be scored: its unit fails, the run goes on."""


class NonFinite(BadOutput):
    """The model returned NaN or infinity."""


class UsageError(Error):
    """The command line itself is wrong: an unknown name, a value of the wrong type (exit code 2)."""

    exit_code = 2


class Weights(str):
    """Weights named by the user: a file, a folder, or `hf:owner/name@revision`; a run is keyed by their fingerprint."""


class Data(str):
    """The name of a data manifest: `photographs`, or `image-folder:PATH` for one's own pictures."""


class Model(str):
    """Another adapter (a judge) named by a suite's field: `name` or `name?key=value&key=value`."""


@dataclass(frozen=True)
class Item:
    """One entry of a manifest. `cluster` names what it shares with others that are not independent of it."""

    id: str
    path: Path | None = None
    text: str | None = None
    label: int | None = None
    cluster: str = ""
    attributes: Mapping[str, Json] = field(default_factory=dict)  # what suites may slice by: {"kind": "scene"}


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is kept or lost as a whole; a suite sizes it to take 10 to 300 seconds."""

    id: str  # unique in the suite, readable: "vangogh/0007"
    items: tuple[str, ...]  # manifest ids it covers; one row each
    params: Mapping[str, Json] = field(default_factory=dict)  # what else decides the outcome
    cost: float = 1.0  # relative; for the order and the remaining time
    shared: bool = False  # the model takes no part: what one run measured serves every model


@dataclass(frozen=True)
class Record:
    """What became of a unit: one line of `units.jsonl`."""

    key: str
    unit: str
    status: Literal["ok", "failed"]
    rows: tuple[Mapping[str, Json], ...] = ()  # {"item": id, measured values}; null = not measured
    blobs: Mapping[str, str] = field(default_factory=dict)  # name -> content address
    error: Mapping[str, str] | None = None  # kind, message, trace, and a hint where there is one
    attempt: int = 1
    batch: int = 0
    seconds: float = 0.0
    device: str = ""
    code: str = ""  # digest of the suite's code that measured it
    started: str = ""  # UTC


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. `value` None means that a rule withholds it; `note` says which."""

    value: float | None
    low: float | None = None
    high: float | None = None
    method: str = "none"  # "wilson", "t", "cluster-t", "cluster-bootstrap/2000", ...
    n: int = 0
    note: str = ""


@dataclass(frozen=True)
class Score:
    """One line of `scores.csv`."""

    run: str
    suite: str
    suite_version: int
    model: str
    seed: int
    metric: str
    slice: str  # "all", or "kind=texture"
    value: float | None
    low: float | None
    high: float | None
    method: str
    n: int
    expected: int
    complete: bool
    unit: str
    better: str  # "higher", "lower", "none"
    signature: str
    source: str = "measured"  # or a citation
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot as data: `draw(axes)` paints it with matplotlib, `rows` are what its CSV holds."""

    name: str
    title: str
    rows: Sequence[Mapping[str, Json]]
    draw: Callable[[Any], None]
    note: str = ""  # how to read it


@dataclass(frozen=True)
class Finding:
    """What a law of `bench fit` found: for the terminal, one page, and files."""

    title: str
    about: str  # one sentence: from what, and how
    estimates: Sequence[Mapping[str, Json]]  # rows of quantity, value, low, high
    warnings: Sequence[str] = ()  # stand before every number
    notes: Sequence[str] = ()  # what was read, left out and assumed
    figures: Sequence[Figure] = ()
    table: Sequence[Mapping[str, Json]] = ()  # rows that were asked for besides, such as a grid to train next
    record: Mapping[str, Json] = field(default_factory=dict)  # everything, for --json and fit.json
    files: Mapping[str, bytes] = field(default_factory=dict)  # kept beside the page


class Table:
    """The rows of a run, one per item, with the features that belong to them. Light: no data frame needed.

    `frame()` gives a pandas data frame. Rows of failed units are absent; `expected` counts what should be there.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Json]],
        expected: int | None = None,
        seed: int = 0,
        load_features: Callable[[str], np.ndarray] | None = None,
        index: np.ndarray | None = None,
    ):
        self.rows = list(rows)
        self.expected = len(self.rows) if expected is None else expected
        self.seed = seed  # of every random draw in reduce (bootstrap)
        self._load_features = load_features
        self._index = index  # of these rows among those that the features belong to

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column in row order; None where a row lacks it."""
        return [row.get(name) for row in self.rows]

    def values(self, name: str) -> np.ndarray:
        """A column as float64 [N]; NaN where it is null."""
        import numpy as np

        return np.array([np.nan if row.get(name) is None else float(row[name]) for row in self.rows], dtype=np.float64)

    def clusters(self) -> list[str]:
        """For each row the name of what it shares with dependent rows; the item itself where nothing was said."""
        return [str(row.get("cluster") or row["item"]) for row in self.rows]

    def features(self, name: str) -> np.ndarray:
        """float32 [N, d] in row order; raises KeyError where no unit kept features of that name."""
        if self._load_features is None:
            raise KeyError(name)
        features = self._load_features(name)
        return features if self._index is None else features[self._index]

    def where(self, column: str, value: Any) -> Table:
        """The rows whose column equals value, as a table of its own (complete if this one is)."""
        import numpy as np

        picked = [i for i, row in enumerate(self.rows) if row.get(column) == value]
        base = np.arange(len(self.rows)) if self._index is None else self._index
        missing = self.expected - len(self.rows)
        index = base[np.array(picked, dtype=np.int64)]
        return Table([self.rows[i] for i in picked], len(picked) + missing, self.seed, self._load_features, index)

    def frame(self):
        """The rows as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows)
