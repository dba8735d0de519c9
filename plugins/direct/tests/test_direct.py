"""``direct``: exact solutions, honest about definiteness and condition."""

from __future__ import annotations

import warnings

import pytest
import torch
from influence_framework_direct import DirectSolver
from influence_framework_direct.factorization import condition_estimate, factorize

from influence_framework import (
    ConvergenceWarning,
    DenseOperator,
    IndefiniteOperatorWarning,
    InvalidInputError,
    SingularOperatorError,
    StopReason,
)
from influence_framework.testing import ProductsOnly, symmetric


@pytest.mark.parametrize("count", [1, 3, 20], ids=["one", "few", "more than P"])
@pytest.mark.parametrize("formed", [True, False])
def test_equals_the_dense_inverse_far_below_the_largest_eigenvalue(count: int, formed: bool) -> None:
    matrix = symmetric([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0])
    operator = DenseOperator(matrix) if formed else ProductsOnly(matrix)
    inverse = DirectSolver(block_size=3).fit(operator, 1e-4)
    columns = torch.randn(7, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = inverse.solve(columns)
    expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(7, dtype=torch.float64), columns)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(inverse @ columns, expected, rtol=1e-8, atol=0.0)
    assert solution.converged.all()
    assert (solution.residual < 1e-9).all()


def test_what_the_dtype_cannot_solve_is_not_called_solved() -> None:
    """Within the condition that float32 can work with, a residual of a few per mille is left."""
    matrix = symmetric([-5.0, *torch.logspace(-4, 1, 39).tolist()], dtype=torch.float32)
    columns = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    with pytest.warns(IndefiniteOperatorWarning):
        inverse = DirectSolver().fit(DenseOperator(matrix), 0.0)
    with pytest.warns(ConvergenceWarning, match="reached the accuracy this dtype can give"):
        solution = inverse.solve(columns)
    exact = columns.double() - matrix.double() @ solution.value.double()
    wrong = torch.linalg.norm(exact, dim=0) / torch.linalg.norm(columns, dim=0) > 4e-4
    assert wrong.any()
    assert not solution.converged[wrong].any()
    easy = DirectSolver().fit(DenseOperator(matrix), 6.0).solve(columns)
    assert easy.converged.all()


def test_a_vector_comes_back_as_a_vector() -> None:
    inverse = DirectSolver().fit(DenseOperator(symmetric([1.0, 2.0, 3.0])), 0.0)
    vector = torch.ones(3, dtype=torch.float64)
    assert inverse.solve(vector).value.shape == (3,)
    torch.testing.assert_close(inverse @ vector, inverse.solve(vector).value)


def test_no_columns_give_no_columns() -> None:
    inverse = DirectSolver().fit(DenseOperator(symmetric([1.0, 2.0, 3.0])), 0.0)
    solution = inverse.solve(torch.empty(3, 0, dtype=torch.float64))
    assert solution.value.shape == (3, 0)
    assert solution.reason == ()


def test_with_regularization_reuses_the_formed_matrix() -> None:
    operator = ProductsOnly(symmetric([0.5, 1.0, 2.0, 4.0]))
    inverse = DirectSolver().fit(operator, 0.1)
    assert operator.products == 4
    other = inverse.with_regularization(1.0)
    assert operator.products == 4
    vector = torch.arange(4.0, dtype=torch.float64)
    torch.testing.assert_close(other @ vector, DirectSolver().fit(operator, 1.0) @ vector)
    torch.testing.assert_close(
        inverse @ vector, torch.linalg.solve(operator.matrix + 0.1 * torch.eye(4).double(), vector)
    )


def test_an_indefinite_system_is_solved_and_said_to_be_indefinite() -> None:
    matrix = symmetric([-0.5, -0.1, 1.0, 3.0, 9.0])
    with pytest.warns(IndefiniteOperatorWarning, match=r"most negative eigenvalue is -0\.4"):
        inverse = DirectSolver().fit(DenseOperator(matrix), 0.1 - 1e-3)
    columns = torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.inv(matrix + (0.1 - 1e-3) * columns)
    torch.testing.assert_close(inverse @ columns, expected, rtol=1e-9, atol=1e-9)
    assert (inverse.solve(columns).residual < 1e-10).all()


def test_the_regularisation_named_in_the_warning_makes_it_definite() -> None:
    matrix = symmetric([-0.5, 1.0, 3.0])
    with pytest.warns(IndefiniteOperatorWarning, match=r"use λ > 0\.5"):
        DirectSolver().fit(DenseOperator(matrix), 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DirectSolver().fit(DenseOperator(matrix), 0.501)


@pytest.mark.parametrize("eigenvalues", [[0.0, 1.0, 2.0], [-1e-17, 1.0, 2.0], [-1.0, 0.0, 1.0]])
def test_a_singular_system_raises_with_a_regularisation_that_works(eigenvalues: list[float]) -> None:
    operator = DenseOperator(symmetric(eigenvalues))
    with pytest.raises(SingularOperatorError, match="condition number") as caught:
        DirectSolver().fit(operator, 0.0)
    assert caught.value.condition > 1e14
    inverse = DirectSolver().fit(operator, caught.value.suggested_regularization)
    vector = torch.ones(3, dtype=torch.float64)
    assert inverse.solve(vector).residual.item() < 1e-6


def test_bad_conditioning_is_judged_by_the_dtype() -> None:
    matrix = symmetric([1e-7, 1.0, 2.0])
    DirectSolver().fit(DenseOperator(matrix), 0.0)
    with pytest.raises(SingularOperatorError, match="float32"):
        DirectSolver().fit(DenseOperator(matrix.float()), 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("smallest", [1e-8, 1e-2, -1e-3])
def test_condition_estimate_is_within_a_factor_of_three(seed: int, smallest: float) -> None:
    matrix = symmetric([smallest, *torch.linspace(0.5, 4.0, 30).tolist()], seed)
    norm = torch.linalg.matrix_norm(matrix, ord=1).item()
    exact = norm * torch.linalg.matrix_norm(torch.linalg.inv(matrix), ord=1).item()
    estimate = condition_estimate(factorize(matrix), norm)
    assert exact / 3 <= estimate <= exact * (1 + 1e-6)


def test_a_right_hand_side_that_is_not_finite_is_reported_alone() -> None:
    inverse = DirectSolver().fit(DenseOperator(symmetric([1.0, 2.0, 3.0])), 0.0)
    columns = torch.ones(3, 2, dtype=torch.float64)
    columns[0, 1] = float("nan")
    with pytest.warns(UserWarning, match="1 of 2 right-hand sides"):
        solution = inverse.solve(columns)
    assert solution.reason == (StopReason.CONVERGED, StopReason.NOT_FINITE)
    assert torch.isfinite(solution.value[:, 0]).all()


def test_matrices_that_cannot_fit_are_refused_before_any_work() -> None:
    class Huge(ProductsOnly):
        @property
        def shape(self) -> tuple[int, int]:
            return (10**7, 10**7)

    operator = Huge(torch.eye(2))
    with pytest.raises(InvalidInputError, match="use blocks='per_layer'"):
        DirectSolver().fit(operator, 0.0)
    assert operator.products == 0


def test_block_size_must_be_positive() -> None:
    with pytest.raises(InvalidInputError, match="block_size"):
        DirectSolver(block_size=0)
