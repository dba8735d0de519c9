"""A cheap inverse as the start of, and the preconditioner for, a few steps of an exact method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import ConvergenceWarning, InvalidInputError
from influence_framework.inverses import Inverse
from influence_framework.persistence.states import multiplies, restored, state_of
from influence_framework.protocols import (
    InverseOperator,
    JointSolver,
    LinearOperator,
    Reregularizable,
    SavedState,
    Solution,
    Solver,
    StopReason,
    WarmStart,
)


@dataclass(frozen=True)
class RefinedSolver:
    """Solve by one method and refine the solution by another.

    Each right-hand side is solved by ``approximation``; ``refiner`` starts from there, preconditioned with the
    same inverse where that is one fixed positive definite matrix (``fixed``), and measures true residuals.

    Attributes:
        approximation: A cheap method, such as ``ekfac`` or ``nystroem``.
        refiner: A method that can start anywhere (``refines``), such as ``cg`` with a small ``maxiter``. A
            preconditioner of its own is kept.
    """

    approximation: Solver
    refiner: Solver

    def __post_init__(self) -> None:
        if not getattr(self.refiner, "refines", False):
            raise InvalidInputError(
                f"{type(self.refiner).__name__} cannot refine: its inverse does not start from a given "
                "solution (no attribute refines = True). Use 'cg'."
            )

    @property
    def requires(self) -> tuple[type, ...]:
        """What both need of the operator."""
        needs = (*getattr(self.approximation, "requires", ()), *getattr(self.refiner, "requires", ()))
        return tuple(dict.fromkeys(needs))

    @property
    def default_source(self) -> str | None:
        """That of the approximation."""
        return getattr(self.approximation, "default_source", None)

    @property
    def takes_indefinite(self) -> bool:
        """Whether the refiner takes negative eigenvalues, whose solutions are the ones returned."""
        return bool(getattr(self.refiner, "takes_indefinite", False))

    def fit(self, operator: LinearOperator, regularization: float) -> RefinedInverse:
        """Fit the approximation, then the refiner with it as its preconditioner."""
        return self._refined(operator, regularization, self.approximation.fit(operator, regularization))

    def fit_jointly(
        self, operators: Mapping[str, LinearOperator], regularizations: Mapping[str, float]
    ) -> dict[str, RefinedInverse]:
        """The blocks of one problem, together where the approximation can."""
        if not isinstance(self.approximation, JointSolver):
            return {name: self.fit(operator, regularizations[name]) for name, operator in operators.items()}
        fitted = self.approximation.fit_jointly(operators, regularizations)
        return {
            name: self._refined(operator, regularizations[name], fitted[name])
            for name, operator in operators.items()
        }

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> RefinedInverse:
        """Both inverses as they were."""
        approximation = restored(self.approximation, operator, regularization, state.part("approximation"))
        refiner = self._preconditioned(regularization, approximation)
        inverse = restored(refiner, operator, regularization, state.part("refiner"))
        return self._joined(operator, regularization, approximation, refiner, inverse)

    def _refined(
        self, operator: LinearOperator, regularization: float, approximation: InverseOperator
    ) -> RefinedInverse:
        refiner = self._preconditioned(regularization, approximation)
        inverse = refiner.fit(operator, regularization)
        return self._joined(operator, regularization, approximation, refiner, inverse)

    def _preconditioned(self, regularization: float, approximation: InverseOperator) -> Solver:
        """The refiner, with the approximation for its preconditioner where the two allow it."""
        refiner = self.refiner
        if getattr(self.approximation, "fixed", False) and _takes_preconditioner(refiner):
            return replace(  # type: ignore[type-var]
                refiner, preconditioner=FittedSolver(self.approximation, approximation, regularization)
            )
        return refiner

    def _joined(
        self,
        operator: LinearOperator,
        regularization: float,
        approximation: InverseOperator,
        refiner: Solver,
        inverse: InverseOperator,
    ) -> RefinedInverse:
        if not isinstance(inverse, WarmStart):
            raise InvalidInputError(
                f"{type(refiner).__name__}.fit returned {type(inverse).__name__}, which has no method "
                "solve_from, though the solver says that it refines: the solver is faulty."
            )
        return RefinedInverse(operator, regularization, self, approximation, inverse)


def _takes_preconditioner(solver: Solver) -> bool:
    return (
        is_dataclass(solver)
        and any(option.name == "preconditioner" for option in fields(solver))
        and getattr(solver, "preconditioner", None) is None
    )


@dataclass(frozen=True, eq=False)
class FittedSolver:
    """A solver that was fitted already: its ``fit`` at that λ is what came of it.

    Attributes:
        solver: The solver.
        inverse: What its ``fit`` returned.
        regularization: λ of that fit.
    """

    solver: Solver
    inverse: InverseOperator
    regularization: float

    @property
    def fixed(self) -> bool:
        """Whether the solver can precondition."""
        return bool(getattr(self.solver, "fixed", False))

    @property
    def requires(self) -> tuple[type, ...]:
        """What the solver needs of the operator."""
        return tuple(getattr(self.solver, "requires", ()))

    def fit(self, operator: LinearOperator, regularization: float) -> InverseOperator:
        """The inverse that exists, or a new one at another λ."""
        if regularization == self.regularization:
            return self.inverse
        return self.solver.fit(operator, regularization)

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> InverseOperator:
        """The inverse of ``state``, by the solver."""
        return restored(self.solver, operator, regularization, state)


@dataclass(frozen=True, eq=False)
class RefinedInverse(Inverse):
    """``(C + λI)⁻¹`` by refining the solutions of an approximate inverse.

    Attributes:
        base: ``C``.
        regularization: λ.
        solver: The options.
        approximation: The cheap inverse.
        refiner: The one that starts from its solutions.
    """

    base: LinearOperator
    regularization: float
    solver: RefinedSolver
    approximation: InverseOperator
    refiner: WarmStart

    @property
    def quiet(self) -> frozenset[StopReason]:
        return frozenset(getattr(self.refiner, "quiet", frozenset()))

    @property
    def multiplies(self) -> bool:
        """Whether one of the two multiplies with the operator in every solve."""
        return multiplies(self.approximation) or multiplies(self.refiner)

    def state(self) -> SavedState:
        """Those of both inverses."""
        approximation = state_of(self.solver.approximation, self.approximation).under("approximation")
        return approximation | state_of(self.solver.refiner, self.refiner).under("refiner")

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        with warnings.catch_warnings():
            # What the approximation could not do is the refiner's to report; such columns start from zero.
            warnings.simplefilter("ignore", ConvergenceWarning)
            start = self.approximation.solve(columns).value
        return self.refiner.solve_from(columns, torch.where(torch.isfinite(start).all(0), start, 0.0))

    def report(self, solution: Solution) -> None:
        """Nothing more: the refiner has warned already."""

    def with_regularization(self, regularization: float) -> RefinedInverse:
        """Another λ; what cannot follow is fitted again."""
        approximation, refiner = self.approximation, self.refiner
        if not isinstance(approximation, Reregularizable):
            return self.solver.fit(self.base, regularization)
        approximation = approximation.with_regularization(regularization)
        if isinstance(refiner, Reregularizable):
            moved = refiner.with_regularization(regularization)
            if isinstance(moved, WarmStart):
                return replace(self, regularization=regularization, approximation=approximation, refiner=moved)
        return self.solver._refined(self.base, regularization, approximation)
