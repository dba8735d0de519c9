"""Inverses of low-rank approximations: a few eigenpairs, and one value for all the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from influence_framework.errors import InvalidInputError, NonFiniteError, SingularOperatorError
from influence_framework.inverses import Inverse, approximation
from influence_framework.protocols import LinearOperator, SavedState, Solution

NEAR = 1e-3
"""A λ this near, relative to a negative eigenvalue, cancels it: 1/(θ + λ) is then mostly error."""


@dataclass(frozen=True, eq=False)
class LowRankInverse(Inverse):
    """``U (Θ + λI)⁻¹ Uᵀ + (τ + λ)⁻¹ (I − U Uᵀ)`` from eigenpairs ``(Θ, U)`` of ``C`` or near it.

    ``τ`` stands for the eigenvalues outside the span of ``U``. With ``τ = 0`` this is ``(U Θ Uᵀ + λI)⁻¹``
    by the Woodbury identity. One application costs ``8·P·r`` flops a column, half of that where nothing
    outside the span comes through or where it is rough; another λ costs nothing.

    Attributes:
        base: ``C``.
        regularization: λ.
        values: Eigenvalues ``θ``, ``(r,)``, float64.
        vectors: Orthonormal eigenvectors ``U``, ``(P, r)``.
        tail: ``τ``; ``None`` leaves the complement of the span out. With ``τ + λ = 0`` it is left out too,
            and so is, with λ = 0, what rounding does not tell from zero within the span: what remains is
            the pseudo-inverse.
        errors: Bounds on the errors of the eigenvalues, ``(r,)`` float64, where they are known.
        rough: Whether rounding may show, as in a preconditioner. A column is then projected off the span once,
            where λ is not far below the eigenvalues, and not once more: half of the flops.

    Raises:
        SingularOperatorError: λ is so near to the magnitude of a negative eigenvalue, relative to it or to
            its error, that the inverse would consist of that error.
    """

    base: LinearOperator
    regularization: float
    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "P r"]
    tail: float | None = 0.0
    errors: Float[Tensor, " r"] | None = None
    rough: bool = False

    def __post_init__(self) -> None:
        if not torch.isfinite(self.values).all() or not torch.isfinite(self.vectors).all():
            raise NonFiniteError("The eigenpairs of the low-rank approximation contain NaN or infinity.")
        if self.tail is not None and self.tail + self.regularization < 0:
            raise InvalidInputError(
                f"The eigenvalue {self.tail:.4g} that stands for the complement, plus the regularisation "
                f"{self.regularization:.4g}, must not be negative."
            )
        shifted = (self.values + self.regularization).abs()
        margin = NEAR * self.values.abs()
        if self.errors is not None:
            margin = torch.maximum(margin, 2 * self.errors)
        near = (self.values < 0) & ~self._null() & (shifted <= margin)
        if near.any():
            raise self._cancelled(near, shifted)

    def _cancelled(self, near: Bool[Tensor, " r"], shifted: Float[Tensor, " r"]) -> SingularOperatorError:
        suggested = -2 * self.values.min().item()
        distance = shifted[near].min().item()
        condition = float("inf") if distance == 0 else shifted.max().item() / distance
        return SingularOperatorError(
            f"hessian_regularization={self.regularization:.4g} cancels the eigenvalue "
            f"{self.values[near][0].item():.4g} of the curvature to within {distance:.1e}: scores would "
            f"consist of that eigenvalue's error. Use {suggested:.3g}, twice the magnitude of the most "
            "negative eigenvalue found, or the source 'gauss_newton'.",
            condition,
            suggested,
        )

    def _null(self) -> Bool[Tensor, " r"]:
        """Eigenvalues that rounding does not tell from zero."""
        largest = self.values.abs().max() if len(self.values) else 0.0
        return self.values.abs() <= torch.finfo(self.dtype).eps * largest

    @property
    def spectrum(self) -> tuple[float, float] | None:
        return (self.values.min().item(), self.values.max().item()) if len(self.values) else None

    @property
    def singular(self) -> bool:
        left_out = not self.tail and len(self.values) < len(self.vectors)
        return self.regularization == 0 and (left_out or bool(self._null().any()))

    def _near_enough(self) -> bool:
        """Whether rounding of the large eigenvalues is well below what λ needs."""
        largest = self.values.abs().max().item() if len(self.values) else 0.0
        precision: float = torch.finfo(self.dtype).eps
        return bool(precision**0.5 * (largest + self.regularization) <= self.regularization)

    def _filters(self) -> tuple[Float[Tensor, " r"], float]:
        """What is applied on the span, and what outside of it."""
        shifted = torch.where(self._null(), 0.0, self.values) + self.regularization
        inside = torch.where(shifted == 0, 0.0, 1.0 / shifted)
        rest = 0.0 if self.tail is None else self.tail + self.regularization
        return inside.to(self.vectors), 1.0 / rest if rest > 0 else 0.0

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        inside, outside = self._filters()
        along = self.vectors.T @ columns
        if outside == 0:
            return self.vectors @ (inside[:, None] * along)
        if self.rough and self._near_enough():
            # As rows, which is how right-hand sides come, and how what is done with them next is quick.
            scaled = (inside - outside)[:, None] * along
            return torch.addmm(columns.T, scaled.T, self.vectors.T, beta=outside).T
        # One projection leaves the rounding of what it takes out, which 1/(τ + λ) would make the larger part.
        rest = columns - self.vectors @ along
        again = self.vectors.T @ rest
        rest -= self.vectors @ again
        return torch.addmm(rest, self.vectors, inside[:, None] * (along + again), beta=outside)

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        return approximation(self._matmat(columns), self.spectrum, singular=self.singular)

    def with_regularization(self, regularization: float) -> Self:
        """Another λ over the same eigenpairs."""
        return replace(self, regularization=regularization)

    def state(self) -> SavedState:
        """The eigenpairs, and what stands for the rest."""
        errors = {} if self.errors is None else {"errors": self.errors}
        kept = {"tail": self.tail, "rough": self.rough}
        return SavedState({"values": self.values, "vectors": self.vectors, **errors}, kept)

    @classmethod
    def restored(cls, operator: LinearOperator, regularization: float, state: SavedState, **more: Any) -> Self:
        """The inverse that ``state`` was taken of; ``more`` are the fields that a subclass adds."""
        tail, rough = state.values["tail"], state.values["rough"]
        return cls(operator, regularization, tail=tail, rough=rough, **state.tensors, **more)
