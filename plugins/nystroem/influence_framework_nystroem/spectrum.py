"""Eigenvalues estimated from a few products with single vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.protocols import LinearOperator

Apply = Callable[[Tensor], Tensor]
"""``(P, k)`` columns to their product, of the same shape."""

SLAB = 2**16
"""Rows that :func:`inner` converts to float64 at a time."""

NORM_STEPS = 10
"""Products that bring an estimate of a norm within some percent."""

KEPT = 4
"""Ritz vectors of the lowest values with which the search for the lowest eigenvalue starts."""

ROOM = 8
"""Columns by which a basis is made longer."""

OVERLOOKED = 0.01
"""Probability with which :func:`lanczos_steps` may be too few."""


def inner(left: Float[Tensor, "P r"], right: Float[Tensor, "P s"]) -> Float[Tensor, "r s"]:
    """``leftᵀ right``, accumulated in float64 without a copy of both in float64."""
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for a, b in zip(left.split(SLAB), right.split(SLAB), strict=True):
        total.addmm_(a.double().T, b.double())
    return total


def normal_columns(like: LinearOperator | Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``(P, count)`` standard normal numbers, the same on every device."""
    columns = torch.randn((like.shape[0], count), generator=generator, dtype=like.dtype, device="cpu")
    return columns.to(like.device)


def ritz_values(
    apply: Apply,
    precondition: Apply,
    basis: Float[Tensor, "P s"],
    products: Float[Tensor, "P s"],
    projected: Float[Tensor, "s s"],
) -> Iterator[Float[Tensor, " _k"]]:
    """Ascending Ritz values of ``C`` in a given space, and again with every product by which it grows.

    Davidson's method for the lowest eigenpair: the space, of which the lowest few pairs are kept at first,
    grows by its preconditioned residual. Morgan and Scott (1986), "Generalizations of Davidson's Method for
    Computing Eigenvalues of Sparse Symmetric Matrices", §2. From one vector and without a preconditioner it
    is the method of Lanczos, whose values come near to both ends of the spectrum. But for rounding, none is
    ever beyond them.

    Args:
        apply: The product with ``C``.
        precondition: That with a positive definite matrix near to the inverse of ``C``.
        basis: Orthonormal columns.
        products: ``C`` times these.
        projected: ``basisᵀ products``, symmetric, float64.
    """
    size, precision = basis.shape[0], torch.finfo(basis.dtype).eps
    rounding = 10 * precision * torch.linalg.vector_norm(products)
    values, vectors = torch.linalg.eigh(projected)
    yield values
    if basis.shape[1] == size:
        return
    # The others would cost more with every step than they bring near to the end of the spectrum.
    kept = vectors[:, :KEPT].to(basis.dtype)
    held, images = _Columns(basis @ kept), _Columns(products @ kept)
    projected = vectors[:, :KEPT].T @ projected @ vectors[:, :KEPT]
    values, vectors = torch.linalg.eigh(projected)
    while True:
        lowest = vectors[:, :1].to(basis.dtype)
        residual = images.all @ lowest - values[0].item() * (held.all @ lowest)
        if torch.linalg.vector_norm(residual) <= rounding or len(projected) == size:
            return
        held.append(_orthonormal(precondition(residual), held.all))
        images.append(apply(held.all[:, -1:]))
        border = (held.all.T @ images.all[:, -1:]).double()
        projected = torch.cat([torch.cat([projected, border[:-1]], dim=1), border.T])
        values, vectors = torch.linalg.eigh(projected)
        yield values


class _Columns:
    """A matrix that grows by columns, with room for a few more."""

    def __init__(self, first: Float[Tensor, "P k"]) -> None:
        self._rows, self._count = first.T.contiguous(), first.shape[1]

    @property
    def all(self) -> Float[Tensor, "P k"]:
        return self._rows[: self._count].T

    def append(self, column: Float[Tensor, "P 1"]) -> None:
        if self._count == len(self._rows):
            longer = self._rows.new_empty(self._count + ROOM, self._rows.shape[1])
            longer[: self._count] = self._rows
            self._rows = longer
        self._rows[self._count] = column[:, 0]
        self._count += 1


def _orthonormal(column: Float[Tensor, "P 1"], basis: Float[Tensor, "P k"]) -> Float[Tensor, "P 1"]:
    """What ``column`` has beyond the span of ``basis``, of norm one."""
    for _ in range(2):
        column = column / torch.linalg.vector_norm(column)
        column = torch.addmm(column, basis, basis.T @ column, alpha=-1)
    unit: Tensor = column / torch.linalg.vector_norm(column)
    return unit


def lanczos_steps(size: int, fraction: float) -> int:
    """Products that show the end of a spectrum to this fraction of its width, but for one case in a hundred.

    ``k`` Lanczos steps from a random vector miss it by more than ε of the width with a probability below
    ``1.648 √P exp(−√ε (2k − 1))``: Kuczyński and Woźniakowski (1992), "Estimating the Largest Eigenvalue by
    the Power and Lanczos Algorithms with a Random Start".
    """
    attempts = math.log(1.648 * math.sqrt(size)) - math.log(OVERLOOKED)
    return math.ceil((1 + attempts / math.sqrt(fraction)) / 2)


def residual_norm(
    apply: Apply, values: Float[Tensor, " r"], vectors: Float[Tensor, "P r"], generator: torch.Generator
) -> float:
    """``‖C − U diag(θ) Uᵀ‖₂``, estimated from below; ``apply`` is the product with ``C``."""

    def negative(columns: Tensor) -> Tensor:
        return vectors @ (values.to(columns)[:, None] * (vectors.T @ columns)) - apply(columns)

    start = normal_columns(vectors, 1, generator)
    start = start / torch.linalg.vector_norm(start)
    product = negative(start)
    seen = ritz_values(negative, lambda columns: columns, start, product, inner(start, product))
    *_, last = islice(seen, NORM_STEPS)
    return last.abs().max().item()
