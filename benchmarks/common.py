"""What the comparisons share: choosing each side's best setting, and one row of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from timing import Pairing, seconds
from torch import Tensor

BATCH_SIZES = (100, 500, 1500)
HEADER = "| | ours, s | {peer}, s | {peer} / ours | ours | {peer} |\n|---|---|---|---|---|---|"


def quickest(make: Callable[[int], Callable[[], object]], sizes: Iterable[int] = BATCH_SIZES) -> int:
    """The loader batch size at which ``make(batch_size)()`` is quickest."""
    sizes = tuple(sizes)
    for size in sizes:
        make(size)()
    return min(sizes, key=lambda size: min(seconds(make(size)) for _ in range(2)))


def relative_error(scores: Tensor, reference: Tensor) -> float:
    return float((scores.double() - reference.double()).norm() / reference.double().norm())


def row(what: str, pairing: Pairing, ours: str, peer: str) -> str:
    return f"| {what} | {pairing.ours:.3f} | {pairing.peer:.3f} | **{pairing.ratio:.1f}** | {ours} | {peer} |"


def loosest(
    settings: Iterable[float],
    factors: Callable[[float], Tensor],
    residual: Callable[[Tensor], float],
    limit: float,
    patience: float = float("inf"),
) -> tuple[float, float] | None:
    """The first of ``settings``, loosest first, whose factors reach the residual ``limit``, and their residual.

    ``None`` where none does, or once a run has taken longer than ``patience`` seconds.
    """
    for setting in settings:
        start = time.perf_counter()
        reached = residual(factors(setting))
        if time.perf_counter() - start > patience:
            return None
        if reached <= limit:
            return setting, reached
    return None
