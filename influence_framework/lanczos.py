"""The method of Lanczos from several vectors at once: what it tells of a spectrum without keeping any basis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import NonFiniteError
from influence_framework.protocols import LinearOperator

NOISE = 64
"""Roundings of the largest eigenvalue below which a value means nothing."""


def tridiagonals(operator: LinearOperator, start: Float[Tensor, "P *k"]) -> Iterator[Float[Tensor, "*k m m"]]:
    """The tridiagonal matrix of each vector by itself after every Lanczos step, float64 on the CPU.

    Of the operator it uses ``@`` with vectors of the shape of ``start``, ``shape``, ``dtype`` and ``device``.
    Nothing is reorthogonalised: what that costs is copies of eigenvalues that were found, which moves no
    extreme. A vector that leads no further is followed by zero rows and columns, and the end is where all are.
    Lanczos (1950), "An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential
    and Integral Operators".

    Raises:
        NonFiniteError: A product with NaN or infinity.
    """
    vector = _over(start, torch.linalg.vector_norm(start, dim=0))
    previous = torch.zeros_like(vector)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    largest = vector.new_zeros(vector.shape[1:])
    precision = torch.finfo(operator.dtype).eps
    for step in range(len(vector)):
        product = operator @ vector
        diagonal.append((vector * product).sum(0))
        product = product - diagonal[-1] * vector
        if step:
            product = product - beside[-1] * previous
        found = torch.diag_embed(_entries(diagonal))
        if step:
            off = _entries(beside)
            found = found + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        if not torch.isfinite(found).all():
            raise NonFiniteError(
                "A curvature product contains NaN or infinity: check the scale of the data and of the "
                "parameters, or use float64."
            )
        yield found
        largest = torch.maximum(largest, diagonal[-1].abs())
        norm = torch.linalg.vector_norm(product, dim=0)
        # Not above it are zero, for vectors so far span all that the start vector leads to.
        beside.append(torch.where(norm <= NOISE * precision * largest, 0.0, norm))
        if not beside[-1].any():
            return
        largest = torch.maximum(largest, beside[-1])
        previous, vector = vector, _over(product, beside[-1])


def _entries(parts: Sequence[Tensor]) -> Float[Tensor, "*k m"]:
    return torch.stack(list(parts), dim=-1).cpu().double()


def _over(columns: Float[Tensor, "P *k"], norms: Float[Tensor, " *k"]) -> Float[Tensor, "P *k"]:
    """The columns over their norms; zero where that is zero."""
    return torch.where(norms == 0, 0.0, columns / norms)
