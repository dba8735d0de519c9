"""The minimal residual method of SciPy as a solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import minres
from torch import Tensor

from influence_framework import InvalidInputError, LinearOperator, Solution, StopReason, to_scipy
from influence_framework.inverses import Inverse, make_solution, relative_residuals

MARGIN = 0.1
"""Of what remains to be done, asked of SciPy at first."""

TIGHTER = 1e-3
"""Factor on that where SciPy stopped and had not halved the residual."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MinresSolver:
    """Minimal residuals: ``C + λI`` may be indefinite, one right-hand side after the other.

    Each is solved to ``‖b − (C + λI)x‖ ≤ rtol · ‖b‖``. A product with ``C`` serves one right-hand side
    here, so where ``C + λI`` is positive definite a solver that works on all columns together needs far
    fewer passes over the data. Arithmetic outside the products is in float64, on the host.

    C. C. Paige and M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM
    Journal on Numerical Analysis 12 (1975), §5. SciPy stops where ``‖r‖ ≤ rtol · ‖C + λI‖ · ‖x‖``, or where
    ``(C + λI) r`` is small likewise, which in an ill-conditioned system says little about ``‖r‖ / ‖b‖``; the
    method is then started again on what remains, with a tighter tolerance.

    Attributes:
        rtol: Relative tolerance on the true residual of each right-hand side.
        maxiter: Limit on the iterations of each right-hand side; ``5·P`` where left out.
    """

    rtol: float = 1e-6
    maxiter: int | None = None

    takes_indefinite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.rtol < 1:
            raise InvalidInputError(f"rtol must lie between 0 and 1, got {self.rtol!r}.")
        if self.maxiter is not None and self.maxiter < 1:
            raise InvalidInputError(f"maxiter must be at least 1, or None for 5·P, got {self.maxiter!r}.")

    @property
    def accuracy(self) -> float:
        """The largest relative residual of a right-hand side that is called solved."""
        return self.rtol

    def fit(self, operator: LinearOperator, regularization: float) -> MinresInverse:
        """Nothing is computed before there is a right-hand side."""
        return MinresInverse(operator, regularization, self)


@dataclass(frozen=True, eq=False)
class MinresInverse(Inverse):
    """``(C + λI)⁻¹`` by minimal residuals.

    Attributes:
        base: ``C``.
        regularization: λ.
        options: Tolerance and limit.
    """

    base: LinearOperator
    regularization: float
    options: MinresSolver

    def with_regularization(self, regularization: float) -> MinresInverse:
        """Another λ, at no cost."""
        return replace(self, regularization=regularization)

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        matrix = to_scipy(self.base)
        # What overflows is found in the result; NumPy's own warnings would say it again.
        with np.errstate(all="ignore"):
            solved = [self._column(matrix, column) for column in columns.T.to("cpu", torch.float64).numpy()]
        values, iterations, reasons = zip(*solved, strict=True)
        value = torch.from_numpy(np.stack(values, axis=1)).to(columns)
        residual = relative_residuals(self.base, self.regularization, value, columns)
        return make_solution(
            value, residual, list(map(self._verdict, residual.tolist(), reasons)), list(iterations)
        )

    def _verdict(self, residual: float, reason: StopReason) -> StopReason:
        """What the residual of the rounded value makes of the reason to stop."""
        if residual <= self.options.rtol:
            return StopReason.CONVERGED
        return StopReason.STAGNATED if reason is StopReason.CONVERGED else reason

    def _column(self, matrix: ScipyOperator, column: Vector) -> tuple[Vector, int, StopReason]:
        """Solution, iterations and reason to stop for one right-hand side."""
        limit = self.options.maxiter or 5 * len(column)
        goal = self.options.rtol * float(np.linalg.norm(column))
        value, rest, used, margin = np.zeros_like(column), column, 0, MARGIN
        if not math.isfinite(goal):
            return np.full_like(column, np.nan), used, StopReason.NOT_FINITE
        while (size := float(np.linalg.norm(rest))) > goal:
            if used >= limit:
                return value, used, StopReason.ITERATION_LIMIT
            rtol = margin * goal / size
            step, count = self._pass(matrix, rest / size, rtol, limit - used)
            used += count
            tried = value + size * step
            remainder = column - matrix.matvec(tried) - self.regularization * tried
            left = float(np.linalg.norm(remainder))
            if not math.isfinite(left):
                return value, used, StopReason.NOT_FINITE
            if left < size:
                value, rest = tried, remainder
            if left > size / 2:
                if rtol <= torch.finfo(self.dtype).eps and used < limit:
                    return value, used, StopReason.STAGNATED
                margin *= TIGHTER
        return value, used, StopReason.CONVERGED

    def _pass(self, matrix: ScipyOperator, rest: Vector, rtol: float, limit: int) -> tuple[Vector, int]:
        """One run of SciPy's method from zero, and its iterations."""
        # Not from the solution so far: with a start value SciPy leaves the shift out of the first residual.
        iterates = 0

        def count(_: Vector) -> None:
            nonlocal iterates
            iterates += 1

        step, _ = minres(matrix, rest, shift=-self.regularization, rtol=rtol, maxiter=limit, callback=count)
        return step, iterates
