"""Do pictures show what their prompts say? Shares with intervals, per attribute and per group of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """`successes` of `n` pictures; low and high are the 95 % interval of Wilson (1927)."""

    what: str
    group: str
    n: int
    successes: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.successes / self.n


def agreement(
    seen: Mapping[str, Sequence[str]], asked: Sequence[Mapping[str, str]], by: str, whats: Sequence[Sequence[str]]
) -> list[Share]:
    """For each of `whats`, the share of pictures in which all its attributes are what was asked for: of all pictures,
    and of each value of the attribute `by`.

    `seen[attribute][i]` is what a judge read from picture i, `asked[i]` what its prompt said. Raises ValueError without
    pictures, or where the two differ in length.
    """
    if not asked or any(len(values) != len(asked) for values in seen.values()):
        raise ValueError("agreement needs one reading per prompt, and at least one prompt")
    shares = []
    for names in whats:
        right = [all(seen[name][i] == wanted[name] for name in names) for i, wanted in enumerate(asked)]
        shares.append(share(" and ".join(names), "all", right))
        for value in dict.fromkeys(wanted[by] for wanted in asked):
            own = [r for r, wanted in zip(right, asked, strict=True) if wanted[by] == value]
            shares.append(share(" and ".join(names), value, own))
    return shares


def share(what: str, group: str, right: Sequence[bool]) -> Share:
    """One share with its interval; raises ValueError without pictures."""
    from scipy.stats import binomtest

    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return Share(what, group, len(right), sum(right), float(interval.low), float(interval.high))
