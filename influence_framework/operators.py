"""Concrete linear operators: the base class that checks once, and the operators built from others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import InvalidInputError, MissingCapabilityError, NonFiniteError
from influence_framework.protocols import Dense, Diagonal, LinearOperator

PROBES = 64
"""Random vectors of the estimate of a trace."""


class Operator(ABC):
    """Base of the operators in core: checks the argument, then calls one product on columns.

    A subclass writes ``shape``, ``dtype``, ``device`` and ``_matmat``, which always gets ``(P, k)``
    with ``k ≥ 1``, of the right dtype and device. It gains ``@``, ``+``, scaling by a number and
    :meth:`shift`.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the columns taken and returned."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the columns taken and returned."""

    @abstractmethod
    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """The product with ``(P, k)`` columns."""

    def __matmul__(self, columns: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        check_columns(self, columns)
        if columns.numel() == 0:
            return columns.clone()
        if columns.ndim == 1:
            return self._matmat(columns[:, None])[:, 0]
        return self._matmat(columns)

    def __add__(self, other: LinearOperator) -> SumOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return SumOperator((self, other))

    def __sub__(self, other: LinearOperator) -> SumOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return SumOperator((self, ScaledOperator(other, -1.0)))

    def __mul__(self, factor: float) -> ScaledOperator:
        if not isinstance(factor, int | float):
            return NotImplemented
        return ScaledOperator(self, float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> ScaledOperator:
        return ScaledOperator(self, -1.0)

    def shift(self, amount: float) -> ShiftedOperator:
        """``A + amount·I``."""
        return ShiftedOperator(self, float(amount))


def check_columns(operator: LinearOperator, columns: Tensor) -> None:
    """Raise :class:`InvalidInputError` unless ``operator @ columns`` makes sense."""
    size = operator.shape[1]
    if not isinstance(columns, Tensor):
        raise InvalidInputError(
            f"An operator multiplies torch tensors, not {type(columns).__name__}; "
            "for NumPy arrays use influence_framework.to_scipy(operator)."
        )
    if columns.ndim not in (1, 2) or columns.shape[0] != size:
        raise InvalidInputError(
            f"Expected a vector ({size},) or columns ({size}, k), got shape {tuple(columns.shape)}."
            + (
                " Right-hand sides are columns here: pass the transpose."
                if columns.ndim == 2 and columns.shape[1] == size
                else ""
            )
        )
    if columns.dtype != operator.dtype or columns.device != operator.device:
        raise InvalidInputError(
            f"The operator works in {operator.dtype} on {operator.device}, the columns are "
            f"{columns.dtype} on {columns.device}: convert them with .to(...)."
        )


def _check_alike(operators: Sequence[LinearOperator], *, same_shape: bool) -> None:
    if not operators:
        raise InvalidInputError("Expected at least one operator, got none.")
    first = operators[0]
    for other in operators[1:]:
        if (
            other.dtype != first.dtype
            or other.device != first.device
            or (same_shape and other.shape != first.shape)
        ):
            raise InvalidInputError(
                "Operators that are combined must agree: got "
                f"{first.shape} {first.dtype} on {first.device} and "
                f"{other.shape} {other.dtype} on {other.device}."
            )


@dataclass(frozen=True, eq=False)
class DenseOperator(Operator):
    """A symmetric matrix held in memory. Offers ``Diagonal`` and ``Dense``."""

    matrix: Float[Tensor, "P P"]

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInputError(f"Expected a square matrix, got shape {tuple(matrix.shape)}.")
        if not matrix.dtype.is_floating_point:
            raise InvalidInputError(f"Expected a floating-point matrix, got {matrix.dtype}.")
        if not torch.isfinite(matrix).all():
            raise NonFiniteError("The matrix contains NaN or infinity.")
        asymmetry = torch.linalg.matrix_norm(matrix - matrix.mT)
        # A product of a few hundred rounded terms stays well below this; a wrong matrix does not.
        tolerance = matrix.shape[0] ** 0.5 * 100 * torch.finfo(matrix.dtype).eps
        if asymmetry > tolerance * torch.linalg.matrix_norm(matrix):
            raise InvalidInputError(
                f"Curvature matrices are symmetric, but ‖A − Aᵀ‖ = {asymmetry:.3g}. "
                "Symmetrise it: (A + A.mT) / 2."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.matrix @ columns

    def diagonal(self) -> Float[Tensor, " P"]:
        return self.matrix.diagonal().clone()

    def to_dense(self) -> Float[Tensor, "P P"]:
        return self.matrix.clone()


class DerivedOperator(Operator):
    """Base of operators on the space of another one, their ``base``."""

    base: LinearOperator

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device


@dataclass(frozen=True, eq=False)
class ScaledOperator(DerivedOperator):
    """``factor · A``."""

    base: LinearOperator
    factor: float

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return (self.base @ columns) * self.factor


@dataclass(frozen=True, eq=False)
class ShiftedOperator(DerivedOperator):
    """``A + amount·I``."""

    base: LinearOperator
    amount: float

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return torch.add(self.base @ columns, columns, alpha=self.amount)


@dataclass(frozen=True, eq=False)
class SumOperator(Operator):
    """``A₁ + A₂ + …``."""

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        _check_alike(self.terms, same_shape=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0].dtype

    @property
    def device(self) -> torch.device:
        return self.terms[0].device

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        total = self.terms[0] @ columns
        for term in self.terms[1:]:
            total = total + term @ columns
        return total


@dataclass(frozen=True, eq=False)
class BlockDiagonalOperator(Operator):
    """``diag(A₁, A₂, …)``: named operators side by side, in the mapping's order."""

    blocks: Mapping[str, LinearOperator]

    def __post_init__(self) -> None:
        _check_alike(list(self.blocks.values()), same_shape=False)

    @property
    def shape(self) -> tuple[int, int]:
        size = sum(block.shape[0] for block in self.blocks.values())
        return (size, size)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.blocks.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.blocks.values())).device

    def split(self, columns: Float[Tensor, "P *k"]) -> Iterator[tuple[str, Tensor]]:
        """Each block's name and its own rows of ``columns``."""
        sizes = [block.shape[0] for block in self.blocks.values()]
        return zip(self.blocks, columns.split(sizes), strict=True)

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return torch.cat([self.blocks[name] @ rows for name, rows in self.split(columns)])


def to_dense(operator: LinearOperator, *, block_size: int = 256) -> Float[Tensor, "P P"]:
    """The full matrix: the operator's own where it offers one, else ``block_size`` columns a product.

    Args:
        operator: Any symmetric operator.
        block_size: Columns of the identity multiplied at a time; bounds the memory beside the result.

    Returns:
        A new ``(P, P)`` tensor that the caller may overwrite.
    """
    if isinstance(operator, Dense):
        return operator.to_dense()
    return dense_by_columns(operator, block_size=block_size)


def dense_by_columns(operator: LinearOperator, *, block_size: int = 256) -> Float[Tensor, "P P"]:
    """The full matrix from products with ``block_size`` columns of the identity at a time."""
    size = operator.shape[0]
    matrix = torch.empty((size, size), dtype=operator.dtype, device=operator.device)
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        identity = torch.zeros((size, stop - start), dtype=operator.dtype, device=operator.device)
        identity[range(start, stop), range(stop - start)] = 1.0
        matrix[:, start:stop] = operator @ identity
    return matrix


def estimated_trace(operator: LinearOperator) -> float:
    """Hutchinson's estimate from 64 random vectors of signs, the same at every call.

    Its standard error is at most ``√2·‖C‖_F/8``. Hutchinson (1990), "A Stochastic Estimator of the Trace of the
    Influence Matrix for Laplacian Smoothing Splines".
    """
    generator = torch.Generator("cpu").manual_seed(0)
    shape = operator.shape[0], PROBES
    signs = torch.randint(2, shape, generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
    probes = signs.to(operator.device, operator.dtype)
    return float((probes * (operator @ probes)).sum(dtype=torch.float64)) / PROBES


def require_capabilities(consumer: str, operator: LinearOperator, requires: Sequence[type]) -> None:
    """Raise :class:`MissingCapabilityError`, naming what is missing, unless all are offered."""
    missing = [capability.__name__ for capability in requires if not isinstance(operator, capability)]
    if missing:
        raise MissingCapabilityError(
            f"{consumer} needs an operator that offers {', '.join(missing)}; "
            f"{type(operator).__name__} does not. Choose another curvature source or another solver."
        )


__all__ = [
    "BlockDiagonalOperator",
    "DenseOperator",
    "Diagonal",
    "Operator",
    "ScaledOperator",
    "ShiftedOperator",
    "SumOperator",
    "check_columns",
    "dense_by_columns",
    "require_capabilities",
    "to_dense",
]
