"""The diagonal as an approximate inverse and as a preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.costs import Cost, Workload
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.inverses import Inverse, make_solution, relative_residuals
from influence_framework.protocols import Diagonal, LinearOperator, SavedState, Solution, StopReason
from influence_framework_cg.cost import cost_of_jacobi

PROBES_A_PRODUCT = 32


@dataclass(frozen=True)
class JacobiSolver:
    """``(|diag C| + λ)⁻¹``, a fixed positive diagonal matrix; made to precondition ``cg``.

    The diagonal is the operator's own where it offers one. Else it is estimated from products with
    random signs, ``d ≈ mean(z ∘ C z)``, whose error in entry ``i`` has the variance
    ``Σ_{j≠i} C_ij² / probes``: Bekas, Kokiopoulou and Saad (2007), "An Estimator for the Diagonal of a
    Matrix", §2. Entries that the estimate does not tell from zero are raised to their own standard
    error, so that noise makes no entry of the preconditioner huge, and their magnitude is taken, so
    that it stays positive definite where the curvature is not.

    Attributes:
        probes: Random vectors for the estimate.
        seed: Of the generator that draws them.
    """

    probes: int = 128
    seed: int = 0

    fixed: ClassVar[bool] = True
    accuracy: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise InvalidInputError(f"At least 2 probes are needed to know their error, got {self.probes}.")

    def fit(self, operator: LinearOperator, regularization: float) -> JacobiInverse:
        """Take or estimate the diagonal.

        Raises:
            InvalidInputError: An entry of the diagonal is zero and λ is zero too.
            NonFiniteError: The diagonal contains NaN or infinity.
        """
        if isinstance(operator, Diagonal):
            magnitude = operator.diagonal().abs()
        else:
            mean, error = self._estimate(operator)
            magnitude = torch.maximum(mean.abs(), error)
        if not torch.isfinite(magnitude).all():
            raise NonFiniteError("The diagonal of the curvature contains NaN or infinity.")
        return _invert(operator, magnitude, regularization)

    def cost(self, workload: Workload) -> Cost:
        """The diagonal once, and a product for the residuals of a solve."""
        return cost_of_jacobi(workload, math.ceil(self.probes / PROBES_A_PRODUCT), self.probes)

    def restore(self, operator: LinearOperator, regularization: float, state: SavedState) -> JacobiInverse:
        """The diagonal as it was."""
        return JacobiInverse(operator, regularization, state.tensors["magnitude"])

    def _estimate(self, operator: LinearOperator) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """Mean of ``z ∘ C z`` over the probes, and its standard error."""
        size = operator.shape[0]
        generator = torch.Generator("cpu").manual_seed(self.seed)
        total = torch.zeros(size, dtype=operator.dtype, device=operator.device)
        squares = torch.zeros_like(total)
        left = self.probes
        while left:
            count = min(left, PROBES_A_PRODUCT)
            signs = torch.randint(0, 2, (size, count), generator=generator, device="cpu").mul_(2).sub_(1)
            probes = signs.to(operator.device, operator.dtype)
            samples = probes * (operator @ probes)
            total += samples.sum(1)
            squares += samples.square().sum(1)
            left -= count
        mean = total / self.probes
        variance = (squares / self.probes - mean.square()).clamp_min(0.0)
        return mean, (variance / (self.probes - 1)).sqrt()


@dataclass(frozen=True, eq=False)
class JacobiInverse(Inverse):
    """A positive diagonal matrix.

    Attributes:
        base: ``C``.
        regularization: λ.
        magnitude: ``|diag C|``, exact or estimated.
    """

    multiplies: ClassVar[bool] = True

    base: LinearOperator
    regularization: float
    magnitude: Float[Tensor, " P"]

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return columns / (self.magnitude + self.regularization)[:, None]

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        value = self._matmat(columns)
        # A diagonal shows no negative eigenvalue: what they make of the solution, only the residual tells.
        residual = relative_residuals(self.base, self.regularization, value, columns)
        return make_solution(value, residual, [StopReason.APPROXIMATION] * columns.shape[1])

    def with_regularization(self, regularization: float) -> JacobiInverse:
        """Another λ over the same diagonal."""
        return _invert(self.base, self.magnitude, regularization)

    def state(self) -> SavedState:
        """The diagonal."""
        return SavedState({"magnitude": self.magnitude})


def _invert(base: LinearOperator, magnitude: Tensor, regularization: float) -> JacobiInverse:
    if (magnitude + regularization == 0).any():
        count = int((magnitude == 0).sum())
        raise InvalidInputError(
            f"{count} entries of the diagonal are zero and so is the regularisation: 'jacobi' needs "
            "hessian_regularization > 0 here."
        )
    return JacobiInverse(base, regularization, magnitude)
