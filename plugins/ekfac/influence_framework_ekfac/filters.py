"""The filter ``D = 1/(Λ + λ)`` as a constant and a staircase of small dense blocks.

Most directions of a layer carry eigenvalues far below λ, where ``D`` is the constant ``1/λ`` to any accuracy
worth having. The others lie under a hyperbola, because ``Λ`` is near a product of two decaying sequences:
few output directions reach far along the inputs, and many only a little. Groups of output directions that
double in size, each with the input directions that it or a later group reaches, cover it with little waste.
The constant costs ``o + e`` products a pair, the blocks the area of the steps, in place of ``o·e``.

The constant stands outside the steps only. Were it everywhere, and subtracted again in the steps, scores of
points whose gradients lie along large eigenvalues would lose a factor ``Λ/λ`` of their precision.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FIRST_STEP = 8
"""Output directions in the first step; each further step has twice as many."""


@dataclass(frozen=True, eq=False)
class Step:
    """``D`` itself on some output directions and the input directions that they reach.

    Attributes:
        rows: Which output directions, in the order of the staircase.
        values: ``D``, ``(p, q)``, for those and the first ``q`` input directions in that order.
    """

    rows: slice
    values: Float[Tensor, "p q"]


@dataclass(frozen=True, eq=False)
class Staircase:
    """Where one group's ``D`` is not the constant: in steps whose reach falls.

    Attributes:
        rows: The order of the output directions: those that reach furthest first.
        columns: The order of the input directions: those that are reached by most steps first.
        steps: One below the other.
    """

    rows: Int[Tensor, " o"]
    columns: Int[Tensor, " e"]
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Filter:
    """``D`` of one layer, and its staircase where an error is allowed.

    Every entry of constant and steps together is within ``rtol`` of ``D``, relative to that entry. The error
    of a pair's score is then at most ``rtol`` times the geometric mean of the two self-influences: by the
    Cauchy-Schwarz inequality in the inner product that ``D`` gives.

    Attributes:
        dense: ``D``, ``(g, o, e)``.
        constant: What ``D`` is outside the steps.
        stairs: Of each group; ``None`` where only ``D`` itself will do.
    """

    dense: Float[Tensor, "g o e"]
    constant: float
    stairs: tuple[Staircase, ...] | None

    @property
    def key(self) -> Hashable:
        """What tells it from another filter of its layer, while it is held."""
        return id(self)

    def made(self) -> Filter:
        """Itself, as a filter that is not kept becomes by its own ``made``."""
        return self

    @property
    def area(self) -> int:
        """Entries in all steps."""
        return sum(step.values.numel() for stair in self.stairs or () for step in stair.steps)


@dataclass(frozen=True, eq=False)
class UnkeptFilter:
    """A filter that is worked out wherever it is used, and never held.

    Attributes:
        make: Works it out.
        key: What tells it from another filter of its layer.
    """

    make: Callable[[], Filter]
    key: Hashable

    def made(self) -> Filter:
        """The filter."""
        return self.make()


def make_filter(dense: Float[Tensor, "g o e"], rtol: float, dtype: torch.dtype) -> Filter:
    """The filter ``dense`` in ``dtype``, with a staircase to within ``rtol``."""
    largest = dense.max().item()
    exact = dense.to(dtype)
    if rtol == 0 or (dense == 0).any():
        # Nothing may be wrong, or the pseudo-inverse of λ = 0 leaves directions out.
        return Filter(exact, 0.0, None)
    # As low as the largest entry, 1/λ, allows: then the constant does for the most of the smaller ones.
    constant = (1 - rtol) * largest
    apart = dense * (1 + rtol) < constant
    return Filter(exact, constant, tuple(_staircase(*group) for group in zip(exact, apart, strict=True)))


def _staircase(dense: Float[Tensor, "o e"], apart: Bool[Tensor, "o e"]) -> Staircase:
    counts = apart.sum(1)
    rows = torch.argsort(counts, descending=True, stable=True)
    count, size = int((counts > 0).sum()), FIRST_STEP
    spans = [slice(0, min(size, count))]
    while spans[-1].stop < count:
        start, size = spans[-1].stop, 2 * size
        spans.append(slice(start, min(start + size, count)))
    reached = torch.stack([apart[rows[span]].any(0) for span in spans])
    # The number of steps down to the last one that reaches a direction.
    depth = (reached * torch.arange(1, len(spans) + 1, device=apart.device)[:, None]).amax(0)
    columns = torch.argsort(depth, descending=True, stable=True)
    steps = [
        Step(span, dense[rows[span]][:, columns[: int((depth > at).sum())]]) for at, span in enumerate(spans)
    ]
    return Staircase(rows, columns, tuple(steps))
