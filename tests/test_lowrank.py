"""Inverses of low-rank approximations against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence_framework import (
    DenseOperator,
    InvalidInputError,
    LowRankInverse,
    NonFiniteError,
    SingularOperatorError,
)
from tests.reference import assert_close


def pairs(values: list[float], size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, orthonormal vectors, and the matrix that they make."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    theta, vectors = torch.tensor(values, dtype=torch.float64), basis[:, : len(values)].contiguous()
    return theta, vectors, vectors @ theta.diag() @ vectors.T


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


EYE = torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("tail", [0.0, 0.05])
def test_is_the_inverse_of_the_approximation(tail: float, count: int) -> None:
    theta, vectors, matrix = pairs([3.0, 1.0, -0.2])
    whole = matrix + tail * (EYE - vectors @ vectors.T)
    inverse = LowRankInverse(DenseOperator(matrix), 0.5, theta, vectors, tail)
    rhs = normal(8, count)
    assert_close(inverse @ rhs, torch.linalg.solve(whole + 0.5 * EYE, rhs), 1e-12)
    solution = inverse.solve(rhs)
    assert torch.equal(solution.value, inverse @ rhs)
    assert solution.converged.all()
    assert solution.residual.isnan().all()


def test_another_regularisation_keeps_pairs_and_tail() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0])
    inverse = LowRankInverse(DenseOperator(matrix), 0.5, theta, vectors, 0.2).with_regularization(0.01)
    whole = matrix + 0.2 * (EYE - vectors @ vectors.T) + 0.01 * EYE
    assert_close(inverse @ EYE, torch.linalg.inv(whole), 1e-12)


def test_without_the_complement_it_acts_on_the_span_alone() -> None:
    theta, vectors, matrix = pairs([3.0, -1.0])
    inverse = LowRankInverse(DenseOperator(matrix), 0.5, theta, vectors, None)
    assert_close(inverse @ EYE, vectors @ (1 / (theta + 0.5)).diag() @ vectors.T, 1e-12)


def test_without_regularisation_it_is_the_pseudo_inverse() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0, 1e-17, -1e-17, 0.0])
    inverse = LowRankInverse(DenseOperator(matrix), 0.0, theta, vectors)
    assert_close(inverse @ EYE, torch.linalg.pinv(matrix, rtol=1e-12), 1e-10)


@pytest.mark.parametrize("regularization", [0.2, 0.2 * (1 + 5e-4), 0.2 * (1 - 5e-4)])
def test_pitfall_a_regularisation_that_cancels_a_negative_eigenvalue_is_an_error(regularization: float) -> None:
    theta, vectors, matrix = pairs([3.0, 1.0, -0.2])
    with pytest.raises(SingularOperatorError, match=r"cancels the eigenvalue -0\.2") as caught:
        LowRankInverse(DenseOperator(matrix), regularization, theta, vectors)
    assert caught.value.suggested_regularization == pytest.approx(0.4)
    assert caught.value.condition > 1e3


def test_an_eigenvalue_that_is_not_known_well_enough_is_an_error_too() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0, -0.2])
    base, errors = DenseOperator(matrix), torch.full((3,), 0.02, dtype=torch.float64)
    LowRankInverse(base, 0.21, theta, vectors)
    with pytest.raises(SingularOperatorError):
        LowRankInverse(base, 0.21, theta, vectors, errors=errors)
    with pytest.raises(SingularOperatorError):
        LowRankInverse(base, 0.5, theta, vectors, errors=errors).with_regularization(0.21)


def test_bad_pairs_are_refused() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0])
    with pytest.raises(NonFiniteError):
        LowRankInverse(DenseOperator(matrix), 0.1, theta * float("nan"), vectors)
    with pytest.raises(InvalidInputError, match="must not be negative"):
        LowRankInverse(DenseOperator(matrix), 0.1, theta, vectors, -0.2)


def test_single_precision_vectors_keep_their_dtype() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0, 0.5])
    inverse = LowRankInverse(DenseOperator(matrix.float()), 0.5, theta, vectors.float())
    result = inverse @ normal(8, 3).float()
    assert result.dtype is torch.float32
    assert_close(result.double(), torch.linalg.solve(matrix + 0.5 * EYE, normal(8, 3)), 1e-5)
