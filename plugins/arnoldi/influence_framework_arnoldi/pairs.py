"""What a backend is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.protocols import LinearOperator

ATTAINABLE = 20.0
"""Residual, in units of the dtype's precision times ``|θ₁|``, below which nothing can be told from rounding."""

CAUTION = 0.5
"""Part of the tolerance that a recurrence stops at, since what it leaves out may add to the residual."""


@dataclass(frozen=True)
class Wanted:
    """The eigenpairs that are wanted of one operator, and what they may cost.

    Attributes:
        rank: How many of largest magnitude, ``r < P``.
        krylov_dimension: Basis vectors kept at a time, ``r < m < P``.
        tol: Residual of a pair relative to its own eigenvalue.
        max_iter: How often the basis may be filled.
        block_size: Columns multiplied at a time.
        seed: Of the start vectors.
    """

    rank: int
    krylov_dimension: int
    tol: float
    max_iter: int
    block_size: int
    seed: int

    def limits(self, values: Float[Tensor, " r"], dtype: torch.dtype) -> Float[Tensor, " r"]:
        """Residuals up to which pairs with these eigenvalues, largest magnitude first, have converged."""
        magnitudes = values.abs()
        return torch.maximum(self.tol * magnitudes, ATTAINABLE * torch.finfo(dtype).eps * magnitudes[:1])

    def start(self, operator: LinearOperator) -> Float[Tensor, " P"]:
        """A normal start vector, for backends that begin with one."""
        return random_vector(operator, torch.Generator("cpu").manual_seed(self.seed))


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Approximate eigenpairs, largest magnitude first.

    Attributes:
        values: ``(r,)`` float64, on the operator's device.
        vectors: Orthonormal ``(P, r)``, of the operator's dtype, on its device.
        residuals: ``‖C u − θ u‖``, ``(r,)`` float64, where the backend's own products tell them.
        lowest: The least Ritz value seen, an upper bound of the least eigenvalue of ``C``, where the backend
            tells it.
    """

    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "P r"]
    residuals: Float[Tensor, " r"] | None = None
    lowest: float | None = None

    @classmethod
    def largest(cls, rank: int, values: Float[Tensor, " n"], vectors: Float[Tensor, "P n"]) -> Eigenpairs:
        """The ``rank`` pairs of largest magnitude, or all that there are."""
        order = values.abs().argsort(descending=True)[:rank]
        return cls(values[order].double(), vectors[:, order])


Backend = Callable[[LinearOperator, Wanted], Eigenpairs]
"""Finds the wanted pairs, or whatever it could find of them within its limits."""


def random_vector(operator: LinearOperator, generator: torch.Generator) -> Float[Tensor, " P"]:
    """A standard normal vector for ``operator``, the same on every device."""
    draw = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    return draw.to(operator.device, operator.dtype)
