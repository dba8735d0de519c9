"""The filter ``D = 1/(Λ + λ)`` as a constant and a staircase of small dense corrections.

Most directions of a layer carry eigenvalues far below λ, where ``D`` is the constant ``1/λ`` to any accuracy
worth having. The others lie under a hyperbola, because ``Λ`` is near a product of two decaying sequences:
few output directions reach far along the inputs, and many only a little. Groups of output directions that
double in size, each with the input directions that any of them reaches, cover it with little waste. The
constant costs ``o + e`` products a pair, the corrections the area of the steps, in place of ``o·e``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_STEP = 8
"""Output directions in the first step; each further step has twice as many."""


@dataclass(frozen=True, eq=False)
class Step:
    """A dense correction on some output and some input directions of one group.

    Attributes:
        group: Of the layer's groups.
        rows: Output directions, ``(p,)``.
        columns: Input directions, ``(q,)``.
        values: ``D`` less the constant, ``(p, q)``.
    """

    group: int
    rows: Int[Tensor, " p"]
    columns: Int[Tensor, " q"]
    values: Float[Tensor, "p q"]


@dataclass(frozen=True, eq=False)
class Filter:
    """``D`` of one layer, and its staircase where an error is allowed.

    Every entry of constant and steps together is within ``rtol`` of ``D``, relative to that entry. The error
    of a pair's score is then at most ``rtol`` times the geometric mean of the two self-influences: by the
    Cauchy-Schwarz inequality in the inner product that ``D`` gives.

    Attributes:
        dense: ``D``, ``(g, o, e)``.
        constant: What ``D`` is outside the steps.
        steps: The corrections; ``None`` where only ``D`` itself will do.
    """

    dense: Float[Tensor, "g o e"]
    constant: float
    steps: tuple[Step, ...] | None

    @property
    def area(self) -> int:
        """Entries in all steps."""
        return sum(step.values.numel() for step in self.steps or ())


def make_filter(dense: Float[Tensor, "g o e"], rtol: float, dtype: torch.dtype) -> Filter:
    """The filter ``dense`` in ``dtype``, with a staircase to within ``rtol``."""
    largest = dense.max().item()
    exact = dense.to(dtype)
    if rtol == 0 or largest == 0 or (dense == 0).any():
        # Nothing may be wrong, or the pseudo-inverse of λ = 0 leaves directions out.
        return Filter(exact, 0.0, None)
    # Entries from (1 - rtol)·constant to (1 + rtol)·constant are within rtol of it, and so is 1/λ at the top.
    constant = largest / (1 + rtol)
    apart = (dense - constant).abs() > rtol * dense * (1 + 4 * torch.finfo(dense.dtype).eps)
    steps = tuple(step for group in range(len(dense)) for step in _steps(dense, apart[group], group, constant))
    return Filter(exact, constant, tuple(_cast(step, dtype) for step in steps))


def _steps(dense: Tensor, apart: Tensor, group: int, constant: float) -> list[Step]:
    order = torch.argsort(apart.sum(1), descending=True, stable=True)
    order = order[apart[order].any(1)]
    steps, start, size = [], 0, FIRST_STEP
    while start < len(order):
        rows = order[start : start + size]
        columns = torch.nonzero(apart[rows].any(0))[:, 0]
        steps.append(Step(group, rows, columns, dense[group][rows][:, columns] - constant))
        start, size = start + size, 2 * size
    return steps


def _cast(step: Step, dtype: torch.dtype) -> Step:
    return Step(step.group, step.rows, step.columns, step.values.to(dtype))
