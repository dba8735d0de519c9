"""A correct solver and a correct approximation, and the same with one fault each."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from influence_framework.costs import Cost, Fidelity, Work, Workload
from influence_framework.inverses import Inverse, approximation, make_solution, relative_residuals
from influence_framework.operators import dense_by_columns
from influence_framework.protocols import LinearOperator, SavedState, Solution, StopReason


@dataclass(frozen=True, eq=False)
class ExactInverse(Inverse):
    """By a dense factorisation of ``C``, honest about what it achieved."""

    base: LinearOperator
    regularization: float
    matrix: Tensor

    accuracy: ClassVar[float] = 1e-6

    def __post_init__(self) -> None:
        """For faults that lie in the fit."""

    def shifted(self) -> Tensor:
        return self.matrix + self.regularization * torch.eye(len(self.matrix), dtype=self.matrix.dtype)

    def _matmat(self, columns: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.shifted(), columns)
        return solved

    def residuals(self, value: Tensor, columns: Tensor) -> Tensor:
        return relative_residuals(self.base, self.regularization, value.to(columns.dtype), columns)

    def _solve(self, columns: Tensor) -> Solution:
        value = self._matmat(columns)
        residual = self.residuals(value, columns)
        limit = max(self.accuracy, torch.finfo(columns.dtype).eps ** 0.5)
        reached = (residual <= limit).tolist()
        return make_solution(
            value, residual, [StopReason.CONVERGED if good else StopReason.STAGNATED for good in reached]
        )

    def with_regularization(self, regularization: float) -> Self:
        return replace(self, regularization=regularization)

    def solve_sweep(self, columns: Tensor, regularizations: Sequence[float]) -> list[Solution]:
        return [self.with_regularization(value).solve(columns) for value in regularizations]


@dataclass(frozen=True)
class Exact:
    """A correct solver; a faulty one makes another kind of inverse."""

    inverse: type[ExactInverse] = ExactInverse

    @property
    def accuracy(self) -> float | None:
        return self.inverse.accuracy

    def fit(self, operator: LinearOperator, regularization: float) -> ExactInverse:
        return self.inverse(operator, regularization, dense_by_columns(operator))


@dataclass(frozen=True)
class Kept(Exact):
    """A correct solver whose inverse can be saved; a faulty one makes another kind of inverse."""

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> ExactInverse:
        return self.inverse(operator, regularization, state.tensors["matrix"])


@dataclass(frozen=True, eq=False)
class DiagonalInverse(ExactInverse):
    """The diagonal in place of ``C``, and how far off that is."""

    def weights(self) -> Tensor:
        return 1 / (self.matrix.diagonal().abs() + self.regularization)

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.weights()[:, None] * columns

    def _solve(self, columns: Tensor) -> Solution:
        value = self._matmat(columns)
        residual = self.residuals(value, columns)
        return make_solution(value, residual, [StopReason.APPROXIMATION] * columns.shape[1])


class UnmeasuredInverse(DiagonalInverse):
    """Says nothing of how far off it is; λ = 0 it refuses."""

    def __post_init__(self) -> None:
        if self.regularization == 0:
            raise ArithmeticError("λ = 0")

    def _solve(self, columns: Tensor) -> Solution:
        return approximation(self._matmat(columns))


class UnmeasuredAtZeroInverse(UnmeasuredInverse):
    def __post_init__(self) -> None:
        """Nothing is refused."""


@dataclass(frozen=True)
class Approximate(Exact):
    """A correct approximation, and preconditioner."""

    inverse: type[ExactInverse] = DiagonalInverse
    accuracy: ClassVar[float | None] = None  # type: ignore[misc]
    fixed: ClassVar[bool] = True


@dataclass(frozen=True)
class Taking(Exact):
    """A solver that takes indefinite systems."""

    takes_indefinite: ClassVar[bool] = True


@dataclass(frozen=True)
class ApproximateTaking(Approximate):
    """An approximation that takes indefinite systems."""

    takes_indefinite: ClassVar[bool] = True


# Faults of the inverse as a matrix.


class SkewInverse(DiagonalInverse):
    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns) + 1e-6 * (columns.roll(1, 0) - columns.roll(-1, 0))


class NegativeInverse(DiagonalInverse):
    def weights(self) -> Tensor:
        return -super().weights()


class RegularizationAloneInverse(ExactInverse):
    def _matmat(self, columns: Tensor) -> Tensor:
        return columns / self.regularization


class SurplusAsZerosInverse(ExactInverse):
    """Right-hand sides beyond the number of parameters."""

    def _matmat(self, columns: Tensor) -> Tensor:
        value = super()._matmat(columns)
        value[:, len(columns) :] = 0.0
        return value


class WrongAxisInverse(ExactInverse):
    """Takes the right-hand sides for rows wherever the shape allows it."""

    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns.T if columns.shape[0] == columns.shape[1] else columns)


class VectorsAsColumnsInverse(ExactInverse):
    def __matmul__(self, columns: Tensor) -> Tensor:
        return super().__matmul__(columns[:, None] if columns.ndim == 1 else columns)


class AtLeastOneColumnInverse(ExactInverse):
    def __matmul__(self, columns: Tensor) -> Tensor:
        assert columns.shape[1:] != (0,)
        return super().__matmul__(columns)


class SolvesOtherwiseInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(1.001 * columns)
        residual = self.residuals(solution.value, columns)
        return make_solution(
            solution.value, residual, [StopReason.STAGNATED if r else StopReason.CONVERGED for r in residual]
        )


class ToleranceOnTheWholeInverse(ExactInverse):
    """Off by what a tolerance on the norm of all right-hand sides together lets pass."""

    def _matmat(self, columns: Tensor) -> Tensor:
        error = 1e-4 * self.accuracy * torch.linalg.norm(columns.nan_to_num())
        return super()._matmat(columns) + error * torch.ones_like(columns) * (columns != 0).any(0)


class UnseededInverse(ExactInverse):
    """Off by next to nothing, and by something else after every fit."""

    def __post_init__(self) -> None:
        generator = torch.Generator()
        generator.seed()
        object.__setattr__(self, "noise", torch.rand((), generator=generator, dtype=torch.float64).item())

    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns) * (1 + 1e-9 * getattr(self, "noise"))  # noqa: B009


class TorchDrawingInverse(ExactInverse):
    def __post_init__(self) -> None:
        torch.rand(1)


class NumpyDrawingInverse(ExactInverse):
    def __post_init__(self) -> None:
        np.random.rand()


class PythonDrawingInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        random.random()
        return super()._solve(columns)


class KeepsItsLambdaInverse(ExactInverse):
    def with_regularization(self, regularization: float) -> Self:
        return self

    def solve_sweep(self, columns: Tensor, regularizations: Sequence[float]) -> list[Solution]:
        return [ExactInverse(self.base, value, self.matrix).solve(columns) for value in regularizations]


class MovesItselfInverse(KeepsItsLambdaInverse):
    def with_regularization(self, regularization: float) -> Self:
        object.__setattr__(self, "regularization", regularization)
        return self


class SortingSweepInverse(ExactInverse):
    def solve_sweep(self, columns: Tensor, regularizations: Sequence[float]) -> list[Solution]:
        return super().solve_sweep(columns, sorted(regularizations))


class LosesDtypeInverse(ExactInverse):
    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns).double()


@dataclass(frozen=True)
class AsksInDouble(Exact):
    def fit(self, operator: LinearOperator, regularization: float) -> ExactInverse:
        matrix = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
        return ExactInverse(operator, regularization, matrix.to(operator.dtype))


class WritesToItsInputInverse(ExactInverse):
    """Scales in place and back, which costs the last bits."""

    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns.div_(3.0).mul_(3.0))


@dataclass(frozen=True, eq=False)
class HandsOutItsMemoryInverse(ExactInverse):
    kept: dict[tuple[float, bytes], Tensor] = field(default_factory=dict)

    def _matmat(self, columns: Tensor) -> Tensor:
        question = (self.regularization, columns.numpy().tobytes())
        return self.kept.setdefault(question, super()._matmat(columns))


# Faults of what is said of a solution.


class NegativeIterationsInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(columns)
        return replace(solution, iterations=solution.iterations - 1)


class SinglePrecisionResidualInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(columns)
        return replace(solution, residual=solution.residual.float())


class MadeUpResidualInverse(ExactInverse):
    """Solves in single precision, and claims to have no residual at all."""

    accuracy: ClassVar[float] = 1e-3

    def _matmat(self, columns: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.shifted().float(), columns.float())
        return solved.to(columns.dtype)

    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(columns)
        return replace(solution, residual=torch.zeros_like(solution.residual))


class NeverConvergedInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(columns)
        reasons = [StopReason.ITERATION_LIMIT if b.any() else StopReason.CONVERGED for b in columns.T]
        return make_solution(solution.value, solution.residual, reasons)


class FlagAgainstReasonInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(columns)
        return replace(solution, reason=(StopReason.ITERATION_LIMIT,) * len(solution.reason))


class CredulousInverse(ExactInverse):
    """Calls everything solved, and measures nothing."""

    def _solve(self, columns: Tensor) -> Solution:
        count = columns.shape[1]
        unmeasured = torch.full((count,), float("nan"), dtype=torch.float64)
        return make_solution(self._matmat(columns), unmeasured, [StopReason.CONVERGED] * count)


class ClampingInverse(CredulousInverse):
    """Negative eigenvalues are taken for zero without a word."""

    def __post_init__(self) -> None:
        if self.regularization == 0:
            raise ArithmeticError("λ = 0")

    def shifted(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self.matrix)
        return (vectors * (values.clamp_min(0.0) + self.regularization)) @ vectors.T


class GivesUpInverse(ExactInverse):
    """Solves nothing where there is a negative eigenvalue, and says so."""

    def _solve(self, columns: Tensor) -> Solution:
        if torch.linalg.eigvalsh(self.shifted())[0] >= 0:
            return super()._solve(columns)
        residual = self.residuals(value := torch.zeros_like(columns), columns)
        return make_solution(value, residual, [StopReason.NEGATIVE_CURVATURE] * columns.shape[1])


class PseudoInverse(CredulousInverse):
    def _matmat(self, columns: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.pinv(self.shifted(), rcond=1e-10)
        return inverse @ columns


class DropsZerosInverse(ExactInverse):
    """Leaves columns of zeros out, and fills up with zeros at the end."""

    def _matmat(self, columns: Tensor) -> Tensor:
        value = torch.zeros_like(columns)
        kept = columns[:, columns.any(0)]
        value[:, : kept.shape[1]] = super()._matmat(kept)
        return value


class ZeroNeverConvergesInverse(ExactInverse):
    def residuals(self, value: Tensor, columns: Tensor) -> Tensor:
        return torch.where(columns.any(0), super().residuals(value, columns), torch.nan)


class SpreadsNanInverse(ExactInverse):
    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns) + 0.0 * columns.sum()


class CallsNanSolvedInverse(ExactInverse):
    def _solve(self, columns: Tensor) -> Solution:
        solution = super()._solve(columns)
        wrong = columns.isnan().any(0)
        reason = [StopReason.CONVERGED if bad else why for bad, why in zip(wrong, solution.reason, strict=True)]
        return replace(solution, converged=solution.converged | wrong, reason=tuple(reason))


# Faults of what is written to disk.


class KeptInverse(ExactInverse):
    def state(self) -> SavedState:
        return SavedState({"matrix": self.matrix})


class RoundsWhatItSavesInverse(KeptInverse):
    def state(self) -> SavedState:
        return SavedState({"matrix": self.matrix.float().double()})


class FrozenInverse(KeptInverse):
    """Keeps its λ when it is asked for another one."""

    def with_regularization(self, regularization: float) -> Self:
        return self


@dataclass(frozen=True)
class RestoresAtOneLambda(Kept):
    inverse: type[ExactInverse] = KeptInverse

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> ExactInverse:
        return FrozenInverse(operator, regularization, state.tensors["matrix"])


# Faults in how a solver is used.


@dataclass(frozen=True)
class MixesBlocks(Exact):
    """Fits blocks together, each at the λ of the first and with the curvature of the last of its size."""

    def fit_jointly(
        self, operators: Mapping[str, LinearOperator], regularizations: Mapping[str, float]
    ) -> dict[str, ExactInverse]:
        fitted = {name: self.fit(operator, regularizations[name]) for name, operator in operators.items()}
        return {
            name: inverse.with_regularization(len(fitted) * inverse.regularization)
            for name, inverse in fitted.items()
        }


class WithoutEquality:
    def __init__(self, tolerance: float = 1e-6) -> None:
        self.tolerance = tolerance

    def __repr__(self) -> str:
        return f"WithoutEquality(tolerance={self.tolerance})"

    def fit(self, operator: LinearOperator, regularization: float) -> ExactInverse:
        return Exact().fit(operator, regularization)


class WithoutRepr(WithoutEquality):
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = None  # type: ignore[assignment]
    __repr__ = object.__repr__


@dataclass(frozen=True)
class NegativeCost(Exact):
    """More than nothing is saved by it."""

    def cost(self, workload: Workload) -> Cost:
        return Cost(Fidelity.EXACT, fit=Work(flops=-1.0))


# Faults of a preconditioner.


@dataclass(frozen=True)
class NotFixed(Approximate):
    fixed: ClassVar[bool] = False


class NegativeButForThatFormInverse(NegativeInverse):
    def preconditioner(self) -> DiagonalInverse:
        return DiagonalInverse(self.base, self.regularization, self.matrix)


class NonlinearInverse(DiagonalInverse):
    def _matmat(self, columns: Tensor) -> Tensor:
        return super()._matmat(columns) * (1 + 1e-3 * torch.tanh(torch.linalg.norm(columns, dim=0)))


class LosesDefinitenessInverse(DiagonalInverse):
    """Off by a constant that is negligible until the curvature is large."""

    def weights(self) -> Tensor:
        return super().weights() - 1e-4


class VanishesWithLambdaInverse(DiagonalInverse):
    def preconditioner(self) -> Any:
        return DiagonalForm(self.base, self.regularization, self.matrix)


class DiagonalForm(DiagonalInverse):
    def weights(self) -> Tensor:
        return self.regularization * super().weights()
