"""Paired timings: both sides in turn, in one process, with the ratio pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of some runs."""

    values: tuple[float, ...]

    def __format__(self, spec: str) -> str:
        low, middle, high = min(self.values), statistics.median(self.values), max(self.values)
        return f"{middle:{spec}} ({low:{spec}}–{high:{spec}})"

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Pairing:
    """Seconds of each side and ``peer / ours``, run by run."""

    ours: Spread
    peer: Spread
    ratio: Spread


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(ours: Callable[[], object], peer: Callable[[], object], runs: int) -> Pairing:
    """One warm-up of each side, then ``runs`` pairs, the order within a pair alternating."""
    ours()
    peer()
    mine, theirs = [], []
    for run in range(runs):
        if run % 2:
            theirs.append(seconds(peer))
            mine.append(seconds(ours))
        else:
            mine.append(seconds(ours))
            theirs.append(seconds(peer))
    ratios = tuple(b / a for a, b in zip(mine, theirs, strict=True))
    return Pairing(Spread(tuple(mine)), Spread(tuple(theirs)), Spread(ratios))
