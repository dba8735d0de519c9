"""The solver ``cg``: options, and what surrounds the recurrences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from influence_framework.costs import Cost, Workload
from influence_framework.errors import InvalidInputError
from influence_framework.inverses import Inverse, make_solution, row_norms, scaled_rows
from influence_framework.operators import check_columns, require_capabilities
from influence_framework.persistence.states import restored, state_of
from influence_framework.protocols import (
    InverseOperator,
    LinearOperator,
    Preconditioning,
    Reregularizable,
    SavedState,
    Solution,
    Solver,
    StopReason,
)
from influence_framework_cg.block import block_conjugate_gradients
from influence_framework_cg.cost import cost_of_cg
from influence_framework_cg.recurrence import Rows, Systems, conjugate_gradients
from influence_framework_cg.shifted import shifted_conjugate_gradients

ATTAINABLE = 10.0
"""Relative residual, in units of the dtype's precision, below which nothing can be told from rounding."""


@dataclass(frozen=True)
class CgSolver:
    """Preconditioned conjugate gradients for all right-hand sides together.

    Solves ``(C + λI) x = b`` to ``‖b − (C + λI)x‖ ≤ max(rtol·‖b‖, atol)``, as SciPy defines it, for
    positive definite ``C + λI``. The residual that decides is the true one: the recursive one is
    replaced by it every 50 iterations, and a system that the recursion calls solved is checked, and
    worked on further where the recursion was wrong. Systems that meet non-positive curvature, the
    iteration limit or the limit of the dtype's accuracy are reported one by one.

    Attributes:
        rtol: Relative tolerance; never taken below ten times the dtype's precision (1e-6 in float32).
        atol: Absolute tolerance. A right-hand side within it is left at the initial guess, and called solved:
            with gradients of well-fitted samples as small as that, their scores would be zero.
        maxiter: Iteration limit; ``10·P`` where left out.
        preconditioner: A solver whose inverse is one fixed positive definite matrix, such as ``jacobi``.
        x0: Initial guess, ``(P,)`` for every right-hand side or ``(P, k)``; zero where left out.
        block: Share one Krylov space between all right-hand sides (block CG): fewer iterations for many
            right-hand sides, at ``O(P k²)`` extra work for each.
        progress: Show a bar that counts the systems solved.
        warn_on_max_iteration: Warn of systems that reached the iteration limit.
    """

    refines: ClassVar[bool] = True

    rtol: float = 1e-7
    atol: float = 0.0
    maxiter: int | None = None
    preconditioner: Solver | None = None
    x0: Float[Tensor, "P *k"] | None = field(default=None, compare=False)
    block: bool = False
    progress: bool = False
    warn_on_max_iteration: bool = True

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise InvalidInputError(f"{name} must be finite and not negative, got {value!r}.")
        if self.maxiter is not None and (not isinstance(self.maxiter, int) or self.maxiter < 1):
            raise InvalidInputError(f"maxiter must be a positive integer or None, got {self.maxiter!r}.")
        if self.x0 is not None and not isinstance(self.x0, Tensor):
            raise InvalidInputError(f"x0 must be a tensor or None, got {type(self.x0).__name__}.")
        if self.preconditioner is None:
            return
        if isinstance(self.preconditioner, type) or not isinstance(self.preconditioner, Solver):
            raise InvalidInputError(
                "The preconditioner must be a solver instance (compose() also takes its name), got "
                f"{self.preconditioner!r}."
            )
        if not getattr(self.preconditioner, "fixed", False):
            raise InvalidInputError(
                f"{type(self.preconditioner).__name__} cannot precondition 'cg': a preconditioner is a "
                "solver whose inverse is one fixed symmetric positive definite matrix (fixed = True), such "
                "as 'jacobi'."
            )

    @property
    def accuracy(self) -> float:
        """The largest relative residual of a right-hand side of norm 1 or more that is called solved."""
        return max(self.rtol, self.atol)

    def cost(self, workload: Workload) -> Cost:
        """A product for every step, of which the spectrum tells how many."""
        rtol = max(self.rtol, ATTAINABLE * workload.precision)
        return cost_of_cg(workload, rtol, self.maxiter, self.preconditioner, block=self.block)

    @staticmethod
    def advised(workload: Workload) -> list[dict[str, Any]]:
        """With a tolerance that is below what scores are good for otherwise."""
        return [{"rtol": 1e-4}]

    def fit(self, operator: LinearOperator, regularization: float) -> CgInverse:
        """Fit the preconditioner; the systems themselves are solved on demand."""
        fitted = None
        if self.preconditioner is not None:
            fitted = self._fit_preconditioner(self.preconditioner, operator, regularization)
        return CgInverse(operator, regularization, self, fitted)

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> CgInverse:
        """The preconditioner as it was."""
        fitted = None
        if self.preconditioner is not None:
            fitted = restored(self.preconditioner, operator, regularization, state.part("preconditioner"))
        return CgInverse(operator, regularization, self, fitted)

    @staticmethod
    def _fit_preconditioner(solver: Solver, operator: LinearOperator, regularization: float) -> InverseOperator:
        name = type(solver).__name__
        require_capabilities(f"The preconditioner {name}", operator, getattr(solver, "requires", ()))
        fitted = solver.fit(operator, regularization)
        if not isinstance(fitted, LinearOperator) or fitted.shape != operator.shape:
            raise InvalidInputError(
                f"{name}.fit returned {type(fitted).__name__} where an inverse operator of shape "
                f"{operator.shape} was expected: the preconditioner is faulty."
            )
        return fitted.preconditioner() if isinstance(fitted, Preconditioning) else fitted


@dataclass(frozen=True, eq=False)
class CgInverse(Inverse):
    """``(C + λI)⁻¹`` by conjugate gradients, solved anew for every right-hand side.

    Attributes:
        base: ``C``.
        regularization: λ.
        solver: The options.
        preconditioner: Fitted; ``None`` for none.
    """

    multiplies: ClassVar[bool] = True

    base: LinearOperator
    regularization: float
    solver: CgSolver
    preconditioner: InverseOperator | None

    @property
    def quiet(self) -> frozenset[StopReason]:
        silent = () if self.solver.warn_on_max_iteration else (StopReason.ITERATION_LIMIT,)
        return frozenset(silent)

    def with_regularization(self, regularization: float) -> CgInverse:
        """Another λ; the preconditioner follows, refitted only if it must be."""
        fitted = self.preconditioner
        if fitted is None:
            return replace(self, regularization=regularization)
        if isinstance(fitted, Reregularizable):
            return replace(
                self,
                regularization=regularization,
                preconditioner=fitted.with_regularization(regularization),
            )
        return self.solver.fit(self.base, regularization)

    def state(self) -> SavedState:
        """That of the preconditioner."""
        if self.solver.preconditioner is None or self.preconditioner is None:
            return SavedState()
        return state_of(self.solver.preconditioner, self.preconditioner).under("preconditioner")

    def _apply(self, rows: Rows) -> Rows:
        return torch.add((self.base @ rows.T).T, rows, alpha=self.regularization)

    def _precondition(self, rows: Rows) -> Rows:
        return rows if self.preconditioner is None else (self.preconditioner @ rows.T).T

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        rhs, unit = scaled_rows(columns)
        guess = self._guess(columns)
        return self._solve_from(rhs, unit, None if guess is None else guess / unit)

    def solve_sweep(self, columns: Float[Tensor, "P k"], regularizations: Sequence[float]) -> list[Solution]:
        """Solve for several λ: from one Krylov space where there is no preconditioner and ``block=False``.

        Each solution is checked against its own system, and worked on where it is not there yet. With a
        preconditioner, or ``block=True``, every λ is a solve of its own.

        Raises:
            InvalidInputError: Wrong shape, dtype or device.
        """
        check_columns(self, columns)
        systems = [self.with_regularization(value) for value in regularizations]
        if self.preconditioner is not None or self.solver.block or not columns.numel():
            return [system.solve(columns) for system in systems]
        rhs, unit = scaled_rows(columns)
        seed = self.with_regularization(min(regularizations))
        shifts = torch.tensor(regularizations, dtype=torch.float64, device="cpu") - seed.regularization
        with self._bar(len(rhs)) as progress:
            guesses, spent = shifted_conjugate_gradients(
                seed._apply,
                rhs,
                shifts.to(rhs),
                0.5 * self._tolerance(row_norms(rhs), unit),
                self._limit(rhs),
                _notifier(progress),
            )
        solutions = [
            system._solve_from(rhs, unit, guess, spent) for system, guess in zip(systems, guesses, strict=True)
        ]
        for solution in solutions:
            self.report(solution)
        return solutions

    def _bar(self, count: int) -> tqdm[Any]:
        return tqdm(total=count, desc="Conjugate gradients", unit="system", disable=not self.solver.progress)

    def _solve_from(
        self, rhs: Rows, unit: Float[Tensor, "k 1"], guess: Rows | None, spent: Int[Tensor, " k"] | None = None
    ) -> Solution:
        """Solve for ``unit`` times the rows of ``rhs``; ``guess`` is a solution for ``rhs`` itself."""
        norms = row_norms(rhs)
        with self._bar(len(rhs)) as progress:
            systems = self._systems(rhs, self._tolerance(norms, unit), guess, spent, _notifier(progress))
            remaining = self._run(systems, norms)
        relative = torch.where(norms == 0, 0.0, remaining.double() / norms.double())
        reasons = [reason or StopReason.CONVERGED for reason in systems.reason]
        curvature = systems.extremes - self.regularization
        return make_solution(
            (systems.value * unit).T, relative, reasons, systems.iterations.tolist(), curvature
        )

    def solve_from(self, columns: Float[Tensor, "P k"], start: Float[Tensor, "P k"]) -> Solution:
        """Solve from a guess for each column, or from zero where the guess has the larger residual.

        Raises:
            InvalidInputError: Wrong shape, dtype or device.
        """
        check_columns(self, columns)
        check_columns(self, start)
        if columns.ndim != 2 or start.shape != columns.shape:
            raise InvalidInputError(
                f"solve_from takes columns and a start of one shape (P, k), got {tuple(columns.shape)} and "
                f"{tuple(start.shape)}."
            )
        if not columns.numel():
            return self.solve(columns)
        rhs, unit = scaled_rows(columns)
        solution = self._solve_from(rhs, unit, start.T / unit, torch.zeros(len(rhs), dtype=torch.int64))
        self.report(solution)
        return solution

    def _tolerance(self, norms: Float[Tensor, " k"], unit: Float[Tensor, "k 1"]) -> Float[Tensor, " k"]:
        floor = ATTAINABLE * torch.finfo(norms.dtype).eps
        return torch.maximum(max(self.solver.rtol, floor) * norms, self.solver.atol / unit[:, 0])

    def _limit(self, rhs: Rows) -> int:
        return 10 * rhs.shape[1] if self.solver.maxiter is None else self.solver.maxiter

    def _systems(
        self,
        rhs: Rows,
        tolerance: Float[Tensor, " k"],
        guess: Rows | None,
        spent: Int[Tensor, " k"] | None,
        notify: Callable[[int, int], None],
    ) -> Systems:
        norms = row_norms(rhs)
        value = torch.zeros_like(rhs) if guess is None else guess.clone()
        value[norms == 0] = 0.0
        residual = rhs.clone() if guess is None else rhs - self._apply(value)
        if spent is not None:
            # Where the recurrence for several λ broke down, what it left may be far worse than zero.
            useless = ~(row_norms(residual) < norms)
            value[useless], residual[useless] = 0.0, rhs[useless]
        return Systems(
            apply=self._apply,
            precondition=self._precondition,
            rhs=rhs,
            value=value,
            residual=residual,
            tolerance=tolerance,
            reason=[None] * len(rhs),
            iterations=torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
            if spent is None
            else spent.clone(),
            limit=self._limit(rhs),
            notify=notify,
        )

    def _run(self, systems: Systems, norms: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Run the recurrence until every claim it makes is true; the norms of the true residuals."""
        method = block_conjugate_gradients if self.solver.block else conjugate_gradients
        active = torch.nonzero(norms).flatten()
        previous = row_norms(systems.residual)
        while len(active):
            passes = systems.passes
            method(systems, active)
            if systems.passes == passes:  # the guess was good, and its residual is a true one
                break
            unknown = active[~systems.verified[active]]
            if len(unknown):
                systems.residual[unknown] = systems.rhs[unknown] - self._apply(systems.value[unknown])
            latest = row_norms(systems.residual)
            systems.keep_best(active, latest[active])
            again = self._claimed_in_error(systems, active, latest)
            stuck = latest[again] > 0.5 * previous[again]
            systems.end(again[stuck], StopReason.STAGNATED)
            previous = latest
            active = again[~stuck]
            for system in active.tolist():
                systems.reason[system] = None
        # A system that failed gets the best that was seen, never something worse than the guess.
        systems.value.copy_(systems.best)
        return systems.least

    @staticmethod
    def _claimed_in_error(
        systems: Systems, active: Int[Tensor, " m"], norms: Float[Tensor, " k"]
    ) -> Int[Tensor, " l"]:
        claimed = torch.tensor(
            [systems.reason[system] is StopReason.CONVERGED for system in active.tolist()],
            dtype=torch.bool,
            device=active.device,
        )
        return active[claimed & (norms[active] > systems.tolerance[active])]

    def _guess(self, columns: Float[Tensor, "P k"]) -> Rows | None:
        guess = self.solver.x0
        if guess is None:
            return None
        if guess.shape not in (columns.shape[:1], columns.shape):
            raise InvalidInputError(
                f"x0 must be ({columns.shape[0]},) or {tuple(columns.shape)} for these right-hand sides, got "
                f"{tuple(guess.shape)}."
            )
        if guess.dtype != columns.dtype or guess.device != columns.device:
            raise InvalidInputError(
                f"x0 is {guess.dtype} on {guess.device}, the right-hand sides {columns.dtype} on "
                f"{columns.device}: convert it with .to(...)."
            )
        return (guess if guess.ndim == 1 else guess.T).expand(columns.T.shape)


def _notifier(progress: tqdm[Any]) -> Callable[[int, int], None]:
    total = int(progress.total or 0)

    def notify(iteration: int, left: int) -> None:
        progress.set_postfix(iteration=iteration, refresh=False)
        progress.update(max(0, total - left - progress.n))

    return notify
