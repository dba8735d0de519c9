"""The sketch ``Y = C Ω``, and the Nyström approximation that it holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.protocols import LinearOperator
from influence_framework.rows import RootRows
from influence_framework_nystroem.spectrum import Apply, inner, normal_columns

ROUNDING = 10.0
"""What may be zero but for rounding, in units of the dtype's precision times the norm."""


TEST_VECTORS = 10
"""Of subspace iteration, beyond the rank."""

PASSES = 4
"""Of subspace iteration."""


@dataclass(frozen=True, eq=False)
class Approximation:
    """``C ≈ U diag(θ) Uᵀ``.

    Attributes:
        values: ``θ``, ``(r,)`` float64, descending, each positive beyond rounding.
        vectors: ``U``, ``(P, r)`` with orthonormal columns.
        rounding: The magnitude up to which an eigenvalue cannot be told from zero.
    """

    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "P r"]
    rounding: float


@dataclass(frozen=True, eq=False)
class Sketch:
    """A test matrix and its product with ``C``.

    Attributes:
        test: ``Ω``, ``(P, s)`` with orthonormal columns.
        product: ``Y = C Ω``.
    """

    test: Float[Tensor, "P s"]
    product: Float[Tensor, "P s"]

    @classmethod
    def empty(cls, operator: LinearOperator) -> Self:
        """Of no columns."""
        nothing = torch.empty((operator.shape[0], 0), dtype=operator.dtype, device=operator.device)
        return cls(nothing, nothing)

    @cached_property
    def core(self) -> Float[Tensor, "s s"]:
        """``Ωᵀ C Ω``, float64."""
        core = inner(self.test, self.product)
        return (core + core.T) / 2

    def widened(self, apply: Apply, width: int, passes: int, generator: torch.Generator) -> Sketch:
        """With ``width`` columns, or ``P``; the new ones alone are multiplied, ``passes + 1`` times."""
        size, present = self.test.shape
        added = min(width, size) - present
        if not added:
            return self
        fresh = self._orthonormal(normal_columns(self.test, added, generator))
        product = apply(fresh)
        for _ in range(passes):
            fresh = self._orthonormal(product)
            product = apply(fresh)
        return Sketch(torch.cat([self.test, fresh], dim=1), torch.cat([self.product, product], dim=1))

    def _orthonormal(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """An orthonormal basis of what the columns add to the span of ``Ω``."""
        basis: Tensor = torch.linalg.qr(self._outside(columns)).Q
        # What cancellation leaves of columns nearly in the span is not orthogonal to it: once more.
        return torch.linalg.qr(self._outside(basis)).Q if self.test.shape[1] else basis

    def _outside(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return columns - self.test @ (self.test.T @ columns)

    def approximation(self, rank: int) -> Approximation:
        """``⟦Y (Ωᵀ Y)⁺ Yᵀ⟧`` of at most this rank, for ``C`` positive semidefinite up to rounding.

        Tropp, Yurtsever, Udell and Cevher (2017), "Fixed-Rank Approximation of a Positive-Semidefinite
        Matrix from Streaming Data", algorithm 3: the matrix approximated is ``C + νI`` with a small ``ν``, for
        which ``Ωᵀ (C + νI) Ω`` has a Cholesky factor, and ``ν`` is subtracted from the eigenvalues. Here ``ν``
        is at least twice the magnitude of a negative eigenvalue of ``Ωᵀ C Ω``, so that the factor always
        exists. ``Y + νΩ`` is factored in the dtype of ``C``, to whose rounding ``Y`` is known, and the small
        matrices in float64.
        """
        precision = torch.finfo(self.product.dtype).eps
        norm = torch.linalg.vector_norm(self.product, dtype=torch.float64).item()
        if norm == 0:
            return Approximation(self.test.new_empty(0).double(), self.test[:, :0], 0.0)
        shift = max(precision * norm, -2.0 * torch.linalg.eigvalsh(self.core)[0].item())
        shifted = self.core.clone()
        shifted.diagonal().add_(shift)
        factor = torch.linalg.cholesky(shifted, upper=True)
        basis, triangle = torch.linalg.qr(torch.add(self.product, self.test, alpha=shift))
        root = torch.linalg.solve_triangular(factor, triangle.double(), upper=True, left=False)
        left, singular, _ = torch.linalg.svd(root)
        values = singular[:rank].square() - shift
        rounding = ROUNDING * precision * max(norm, values[0].item())
        values = values[values > rounding]
        return Approximation(values, basis @ left[:, : len(values)].to(basis.dtype), rounding)


def leading_approximation(root: RootRows, rank: int) -> Approximation:
    """``⟦AᵀA⟧`` of at most this rank for ``A`` with few rows, from the eigenvectors of ``AAᵀ``.

    Exact but for rounding where the rows are not many more than the rank: the Nyström approximation with test
    vectors that span the rows. Else the eigenvectors are from :data:`PASSES` passes of subspace iteration,
    which leaves the last of them mixed with those beyond the rank, and their values up to some ten per cent
    too small: Halko, Martinsson and Tropp (2011), "Finding Structure with Randomness", algorithm 4.4. ``AAᵀ``
    and its Rayleigh-Ritz values are in float64, so that what is found is never above ``AᵀA``, and orthonormal
    to ``√(θ₁/θ_r)`` times the precision of the rows. Of more rows than parameters it is ``AᵀA`` itself.
    """
    rows = root.rows
    if not len(rows):
        return Approximation(rows.new_empty(0).double(), rows.T, 0.0)
    precision = torch.finfo(rows.dtype).eps
    if rows.shape[0] > rows.shape[1]:
        values, vectors = torch.linalg.eigh(RootRows(rows.T).inner())
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        rounding = ROUNDING * precision * max(values[0].item(), 0.0)
        return Approximation(values[values > rounding], vectors[:, values > rounding].to(rows.dtype), rounding)
    inner = root.inner()
    width = rank + TEST_VECTORS
    basis = None
    if len(rows) > 2 * width:
        working = torch.promote_types(rows.dtype, torch.float32)
        basis = _leading_subspace(inner.to(working), width).double()
    values, coefficients = torch.linalg.eigh(inner if basis is None else basis.T @ inner @ basis)
    values, coefficients = values.flip(0)[:rank], coefficients.flip(1)[:, :rank]
    rounding = ROUNDING * precision * max(values[0].item(), 0.0)
    values = values[values > rounding]
    coefficients = coefficients[:, : len(values)] / values.sqrt()
    if basis is not None:
        coefficients = basis @ coefficients
    return Approximation(values, rows.T @ coefficients.to(rows.dtype), rounding)


def _leading_subspace(matrix: Float[Tensor, "m m"], width: int) -> Float[Tensor, "m w"]:
    """About that of the ``width`` largest eigenvalues, with an orthonormal basis to rounding."""
    generator = torch.Generator("cpu").manual_seed(0)
    basis = normal_columns(matrix, width, generator)
    for _ in range(PASSES):
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis
