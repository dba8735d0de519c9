"""Inverses of low-rank approximations against dense float64 algebra."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from influence_framework import (
    ConvergenceWarning,
    DenseOperator,
    InvalidInputError,
    LowRankInverse,
    NonFiniteError,
    SingularOperatorError,
    StopReason,
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


def test_single_precision_scores_do_not_cancel() -> None:
    """Gradients in the span of ``U``: ``1/λ`` times the rounding of one projection would be 30 % of a score."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(2000, 20, generator=generator, dtype=torch.float64).float())
    theta = torch.logspace(1, -1, 20, dtype=torch.float64)
    base = DenseOperator(torch.eye(2000, dtype=torch.float32))
    weights = torch.randn(20, 5, generator=generator, dtype=torch.float64) * theta[:, None]
    gradients = vectors @ weights.float()
    # With the rounding of U and of the gradients themselves taken into account.
    basis, triangle = torch.linalg.qr(vectors.double())
    whole = triangle @ theta.diag() @ triangle.T
    along = basis.T @ gradients.double()
    rest = gradients.double() - basis @ along
    for strength in (1e-2, 1e-4, 1e-6):
        inverse = LowRankInverse(base, strength, theta, vectors)
        scores = gradients.double().T @ (inverse @ gradients).double()
        expected = along.T @ torch.linalg.solve(whole + strength * torch.eye(20).double(), along)
        assert_close(scores, expected + rest.T @ rest / strength, 1e-5, f"λ = {strength}")


@pytest.mark.parametrize("null", [0.0, 1e-17, -1e-17])
@pytest.mark.parametrize("strength", [1e-1, 1e-12, 1e-17])
def test_a_null_direction_of_the_span_is_one_like_those_outside(strength: float, null: float) -> None:
    """Inverted by λ, however far that is below the rounding of the largest eigenvalue."""
    theta, vectors, matrix = pairs([1e3, 2.0, null])
    inverse = LowRankInverse(DenseOperator(matrix), strength, theta, vectors)
    assert_close(inverse @ vectors[:, 2], vectors[:, 2] / strength, 1e-12)
    outside = normal(8) - vectors @ (vectors.T @ normal(8))
    assert_close(inverse @ outside, outside / strength, 1e-10)


def test_twice_the_error_of_an_eigenvalue_is_too_near() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0, -0.2])
    base = DenseOperator(matrix)
    for error, refused in ((0.004, False), (0.006, True)):
        errors = torch.full((3,), error, dtype=torch.float64)
        with pytest.raises(SingularOperatorError) if refused else nullcontext():
            LowRankInverse(base, 0.21, theta, vectors, errors=errors)


def test_a_right_hand_side_with_nan_is_not_called_converged() -> None:
    theta, vectors, matrix = pairs([3.0, 1.0])
    rhs = normal(8, 3)
    rhs[2, 1] = float("nan")
    with pytest.warns(ConvergenceWarning, match=r"1 of 3 .*columns 1;.* NaN or infinity"):
        solution = LowRankInverse(DenseOperator(matrix), 0.5, theta, vectors).solve(rhs)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.reason[1] is StopReason.NOT_FINITE
    assert solution.reason[0] is StopReason.APPROXIMATION
