"""Dense direct solves."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.costs import Cost, Fidelity, Work, Workload, in_bytes
from influence_framework.errors import (
    IndefiniteOperatorWarning,
    InvalidInputError,
    NonFiniteError,
    SingularOperatorError,
)
from influence_framework.inverses import Inverse, make_solution, relative_residuals
from influence_framework.operators import DenseOperator, to_dense
from influence_framework.protocols import LinearOperator, SavedState, Solution, StopReason
from influence_framework_direct.factorization import Factorization, condition_estimate, factorize

ACCURACY = 1e-6
"""Relative residual of what is called solved, or the square root of the dtype's precision if that is more."""


@dataclass(frozen=True)
class DirectSolver:
    """Exact inverse by one dense factorisation, for models of up to some ten thousand parameters.

    The matrix is taken from the operator where it offers one and formed by blocks of columns otherwise,
    then factored once: by Cholesky, or, where ``C + λI`` is not positive definite, by a symmetric
    indefinite factorisation (Bunch and Kaufman 1977) with a warning. Forming costs up to ``P`` products,
    factoring ``P³/3`` flops, each right-hand side ``2P²``;
    memory is two ``P × P`` matrices, and about four while they are made.

    Attributes:
        block_size: Columns of the matrix formed at a time.
    """

    block_size: int = 256

    accuracy: ClassVar[float] = ACCURACY
    takes_indefinite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InvalidInputError(f"block_size counts columns and must be positive, got {self.block_size}.")

    def fit(self, operator: LinearOperator, regularization: float) -> DirectInverse:
        """Form and factor ``C + λI``.

        Raises:
            SingularOperatorError: Singular or too badly conditioned for the dtype.
            InvalidInputError: The matrices would not fit this machine's memory.
            NonFiniteError: The matrix contains NaN or infinity.

        Warns:
            IndefiniteOperatorWarning: ``C + λI`` is not positive definite.
        """
        if operator.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(
                f"'direct' factors float32 and float64 matrices, not {operator.dtype}: convert model and data, "
                "or use 'cg'."
            )
        _check_memory(operator)
        matrix = to_dense(operator, block_size=self.block_size)
        if not torch.isfinite(matrix).all():
            raise NonFiniteError(
                "The curvature matrix contains NaN or infinity: check the scale of data and parameters."
            )
        # Rounding leaves the products of columns unsymmetric in the last digits.
        matrix = matrix.add_(matrix.mT.clone()).mul_(0.5)
        return _invert(DenseOperator(matrix), regularization)

    def cost(self, workload: Workload) -> Cost:
        """Forming, ``P³/3`` flops to factor, and ``4P²`` for each right-hand side with its residual."""
        size = workload.parameters
        if workload.element < 4:
            raise InvalidInputError("it factors float32 and float64 matrices only")
        matrix = workload.vectors(size)
        # Made symmetric, shifted, its norm taken and a handful of solves for its condition.
        factoring = Work(flops=size**3 / 3, traffic=20 * matrix)
        return Cost(
            Fidelity.EXACT,
            fit=workload.forming + factoring,
            solve=Work(flops=4.0 * size**2 * workload.columns, traffic=3 * matrix),
            fit_bytes=4 * matrix,
            held_bytes=2 * matrix,
            solve_bytes=workload.vectors(4 * workload.columns),
            reasons=(
                f"the matrix of {size} x {size} takes {in_bytes(matrix)}, four times while it is factored",
                f"{size**3 / 3:.1e} flops to factor it",
            ),
        )

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> DirectInverse:
        """The matrix and its factors as they were."""
        tensors = state.tensors
        factorization = Factorization(tensors["factors"], tensors.get("pivots"))
        return DirectInverse(
            DenseOperator(tensors["matrix"]), regularization, factorization, state.values["condition"]
        )


@dataclass(frozen=True, eq=False)
class DirectInverse(Inverse):
    """``(C + λI)⁻¹`` through a factorisation.

    Attributes:
        base: ``C``, formed.
        regularization: λ.
        factorization: Of ``C + λI``.
        condition: Estimate of the 1-norm condition number of ``C + λI``.
    """

    base: DenseOperator
    regularization: float
    factorization: Factorization
    condition: float

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.factorization.solve(columns)

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        value = self.factorization.solve(columns)
        residual = relative_residuals(self.base, self.regularization, value, columns)
        # Backward stable as it is, the solution of a badly conditioned system may leave much of b unsolved.
        limit = max(ACCURACY, torch.finfo(self.dtype).eps ** 0.5)
        reasons = [StopReason.STAGNATED if rest > limit else StopReason.CONVERGED for rest in residual.tolist()]
        return make_solution(value, residual, reasons)

    def with_regularization(self, regularization: float) -> DirectInverse:
        """Another λ from the formed matrix: one factorisation, no product with the curvature."""
        return _invert(self.base, regularization)

    def state(self) -> SavedState:
        """The matrix and its factors."""
        tensors = {"matrix": self.base.matrix, "factors": self.factorization.factors}
        if self.factorization.pivots is not None:
            tensors["pivots"] = self.factorization.pivots
        return SavedState(tensors, {"condition": self.condition})


def _invert(base: DenseOperator, regularization: float) -> DirectInverse:
    shifted = base.to_dense()
    shifted.diagonal().add_(regularization)
    norm = torch.linalg.matrix_norm(shifted, ord=1).item()
    factorization = factorize(shifted)
    condition = condition_estimate(factorization, norm)
    # Beyond this not one digit of the solution is certain.
    if not condition < 0.1 / torch.finfo(base.dtype).eps:
        raise _singular(base, regularization, condition)
    if not factorization.positive_definite:
        lowest = torch.linalg.eigvalsh(shifted.double())[0].item()
        warnings.warn(
            f"C + λI is not positive definite at λ = {regularization:g}: its most negative eigenvalue is "
            f"{lowest:.4g}. The inverse is exact, but scores along such directions have the opposite sign "
            f"of a minimum's. For a positive definite system use λ > {regularization - lowest:.4g}, or the "
            "source 'gauss_newton'.",
            IndefiniteOperatorWarning,
            stacklevel=4,
        )
    return DirectInverse(base, regularization, factorization, condition)


def _singular(base: DenseOperator, regularization: float, condition: float) -> SingularOperatorError:
    spectrum = torch.linalg.eigvalsh(base.matrix.double())
    lowest, largest = spectrum[0].item(), spectrum.abs().max().item()
    # Half the digits of the dtype are left for the solution.
    suggested = max(-lowest, 0.0) + max(largest, 1e-30) * torch.finfo(base.dtype).eps ** 0.5
    return SingularOperatorError(
        f"C + λI is singular to working precision at λ = {regularization:g}: its condition number is about "
        f"{condition:.1e}, {base.dtype} can work with less than {0.1 / torch.finfo(base.dtype).eps:.0e}. "
        f"The eigenvalues of C lie in [{lowest:.3g}, {spectrum[-1].item():.3g}]: use "
        f"hessian_regularization ≥ {suggested:.2g}.",
        condition,
        suggested,
    )


def _check_memory(operator: LinearOperator) -> None:
    size = operator.shape[0]
    needed = 4 * size**2 * torch.empty(0, dtype=operator.dtype).element_size()
    if operator.device.type == "cpu":
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elif operator.device.type != "cuda":
        return
    else:
        present = torch.cuda.get_device_properties(operator.device).total_memory
    if needed > present:
        raise InvalidInputError(
            f"'direct' works on four {size} × {size} matrices ({needed / 2**30:.1f} GiB) and this machine "
            f"has {present / 2**30:.1f} GiB: use blocks='per_layer', or an iterative solver such as 'cg'."
        )
