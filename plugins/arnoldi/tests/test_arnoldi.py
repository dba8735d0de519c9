"""``arnoldi``: the inverse that the eigenpairs give, and what is said where they do not suffice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from influence_framework_arnoldi import ArnoldiInverse, ArnoldiSolver
from torch import Tensor

from influence_framework import (
    ConvergenceWarning,
    DenseOperator,
    IndefiniteOperatorWarning,
    InvalidInputError,
    NonFiniteError,
    SingularOperatorError,
    StopReason,
)
from influence_framework.testing import ProductsOnly, normal, symmetric

BACKENDS = pytest.mark.parametrize("backend", ["torch", "arpack"])


def spectrum(*leading: float, size: int = 80, below: float = 0.1) -> Tensor:
    """Some eigenvalues, and the rest evenly between 0 and ``below``."""
    return torch.cat([torch.tensor(leading), torch.linspace(0, below, size - len(leading))]).double()


def low_rank_inverse(matrix: Tensor, rank: int, regularization: float) -> Tensor:
    """The definition: ``1/(θ + λ)`` on the pairs of largest magnitude, ``1/λ`` on all others."""
    values, vectors = torch.linalg.eigh(matrix)
    values[values.abs().argsort(descending=True)[rank:]] = 0.0
    return vectors @ torch.diag(1 / (values + regularization)) @ vectors.T


@BACKENDS
@pytest.mark.parametrize("count", [1, 4, 120], ids=["one", "few", "more than P"])
def test_equals_its_definition(backend: str, count: int) -> None:
    matrix = symmetric(spectrum(9.0, 7.0, 4.0, 2.0, 1.0))
    columns = normal(80, count)
    solution = ArnoldiSolver(rank=5, tol=1e-10, backend=backend).fit(DenseOperator(matrix), 1e-2).solve(columns)
    expected = low_rank_inverse(matrix, 5, 1e-2) @ columns
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)
    assert solution.converged.all()
    assert set(solution.reason) == {StopReason.APPROXIMATION}


@BACKENDS
@pytest.mark.parametrize("rank", [6, 10])
@pytest.mark.parametrize("size", [12, 80], ids=["formed", "by products"])
def test_exact_where_the_rest_of_the_spectrum_is_zero(backend: str, rank: int, size: int) -> None:
    matrix = symmetric(spectrum(9.0, 5.0, 2.0, 1.0, 0.5, 0.2, size=size, below=0.0))
    columns = normal(size, 3)
    inverse = ArnoldiSolver(rank=rank, tol=1e-10, backend=backend).fit(DenseOperator(matrix), 1e-3)
    expected = torch.linalg.solve(matrix + 1e-3 * torch.eye(size, dtype=torch.float64), columns)
    torch.testing.assert_close(inverse @ columns, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [30, 1000])
@pytest.mark.parametrize("regularization", [0.0, 1e-12])
def test_all_eigenpairs_give_the_exact_inverse(rank: int, regularization: float) -> None:
    matrix = symmetric(torch.logspace(-3, 1, 30))
    inverse = ArnoldiSolver(rank=rank).fit(DenseOperator(matrix), regularization)
    assert inverse.values.shape == (30,)
    torch.testing.assert_close(inverse @ normal(30, 4), torch.linalg.solve(matrix, normal(30, 4)))


def test_pitfall_the_complement_of_the_eigenvectors_is_not_dropped() -> None:
    matrix = symmetric(spectrum(9.0, 7.0))
    inverse = ArnoldiSolver(rank=2).fit(DenseOperator(matrix), 0.1)
    outside = normal(80)
    outside -= inverse.vectors @ (inverse.vectors.T @ outside)
    torch.testing.assert_close(inverse @ outside, outside / 0.1)


def test_without_complement_only_the_span_comes_through() -> None:
    matrix = symmetric(spectrum(9.0, 7.0))
    inverse = ArnoldiSolver(rank=2, complement=False).fit(DenseOperator(matrix), 0.1)
    vectors, columns = inverse.vectors, normal(80, 3)
    expected = vectors @ ((vectors.T @ columns) / (inverse.values + 0.1)[:, None])
    torch.testing.assert_close(inverse @ columns, expected)


def test_without_regularisation_it_is_the_pseudo_inverse() -> None:
    # Some eigenvalues found are zero up to rounding, of either sign.
    matrix = symmetric(spectrum(9.0, 5.0, 2.0, below=0.0))
    inverse = ArnoldiSolver(rank=8).fit(DenseOperator(matrix), 0.0)
    columns = normal(80, 3)
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ columns
    torch.testing.assert_close(inverse @ columns, expected)
    with pytest.warns(ConvergenceWarning, match="left out directions of no curvature"):
        torch.testing.assert_close(inverse.solve(columns).value, expected)
    assert inverse.with_regularization(0.1).solve(columns).converged.all()


@BACKENDS
def test_zero_columns_no_columns_and_vectors(backend: str) -> None:
    matrix = symmetric(spectrum(9.0, 7.0, 4.0))
    inverse = ArnoldiSolver(rank=3, backend=backend).fit(DenseOperator(matrix), 0.1)
    columns = torch.stack([torch.zeros(80, dtype=torch.float64), normal(80)], dim=1)
    value = inverse.solve(columns).value
    torch.testing.assert_close(value[:, 0], columns[:, 0])
    torch.testing.assert_close(inverse.solve(columns[:, 1]).value, value[:, 1])
    torch.testing.assert_close(inverse @ columns[:, 1], value[:, 1])
    solution = inverse.solve(columns[:, :0])
    assert solution.value.shape == (80, 0)
    assert solution.reason == ()


def test_another_regularisation_needs_no_product() -> None:
    matrix = symmetric(spectrum(9.0, 7.0, 4.0))
    operator = ProductsOnly(matrix)
    inverse = ArnoldiSolver(rank=3, tol=1e-10).fit(operator, 0.1)
    products = operator.products
    other = inverse.with_regularization(0.5)
    assert isinstance(other, ArnoldiInverse)
    torch.testing.assert_close(other @ normal(80), low_rank_inverse(matrix, 3, 0.5) @ normal(80))
    assert operator.products == products


def test_negative_eigenvalues_are_reported_with_what_to_do() -> None:
    matrix = symmetric(spectrum(9.0, 7.0, -5.0, -3.0))
    with pytest.warns(
        IndefiniteOperatorWarning, match=r"4 eigenvalues .* 2 lie below −λ.* at most -5\..*gauss_newton.*≥ 10\."
    ):
        inverse = ArnoldiSolver(rank=4, tol=1e-10).fit(DenseOperator(matrix), 1.0)
    # Kept as they are, neither clamped nor dropped.
    torch.testing.assert_close(inverse @ normal(80), low_rank_inverse(matrix, 4, 1.0) @ normal(80))
    with pytest.warns(IndefiniteOperatorWarning, match=r"1 lie below −λ"):
        inverse.with_regularization(4.0)
    # Warnings are errors here: rounding below zero and a λ above them all are not worth one.
    inverse.with_regularization(6.0)
    ArnoldiSolver(rank=4).fit(DenseOperator(symmetric(spectrum(9.0, 7.0, below=0.0))), 0.0)


@BACKENDS
@pytest.mark.parametrize("distance", [0.0, 1e-5, -2e-3])
def test_pitfall_a_regularisation_near_a_negative_eigenvalue_is_refused(backend: str, distance: float) -> None:
    solver = ArnoldiSolver(rank=3, backend=backend)
    operator = DenseOperator(symmetric(spectrum(9.0, 7.0, -5.0)))
    with pytest.raises(SingularOperatorError, match=r"cancels the eigenvalue -5") as caught:
        solver.fit(operator, 5.0 + distance)
    assert caught.value.suggested_regularization == pytest.approx(10.0)
    solver.fit(operator, caught.value.suggested_regularization)  # warnings are errors here


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pair_residuals_are_those_of_the_pairs_returned(backend: str, dtype: torch.dtype) -> None:
    matrix = symmetric(spectrum(9.0, 7.0, 4.0, 2.0)).to(dtype)
    inverse = ArnoldiSolver(rank=6, tol=1e-3, backend=backend).fit(DenseOperator(matrix), 0.5)
    vectors = inverse.vectors.double()
    true = torch.linalg.norm(matrix.double() @ vectors - vectors * inverse.values, dim=0)
    rounding = 20 * torch.finfo(dtype).eps * 9.0
    torch.testing.assert_close(inverse.pair_residuals, true, rtol=1e-6, atol=rounding)
    assert (inverse.pair_residuals <= (1e-3 * inverse.values.abs()).clamp_min(rounding)).all()
    assert inverse.pair_residuals is inverse.errors


def test_residuals_that_a_product_contradicts_are_measured_anew() -> None:
    class Changing(ProductsOnly):
        """Another matrix after so many products."""

        left: int

        def _matmat(self, columns: Tensor) -> Tensor:
            product = super()._matmat(columns)
            return product if self.products <= self.left else other @ columns

    matrix, other = (symmetric(spectrum(9.0, 7.0, 4.0), seed) for seed in (0, 1))
    steady, changing = ProductsOnly(matrix), Changing(matrix)
    ArnoldiSolver(rank=3).fit(steady, 1.0)
    changing.left = steady.products - 1
    with pytest.warns(ConvergenceWarning, match="0 of 3 eigenpairs"):
        inverse = ArnoldiSolver(rank=3).fit(changing, 1.0)
    vectors = inverse.vectors
    true = torch.linalg.norm(other @ vectors - vectors * inverse.values, dim=0)
    torch.testing.assert_close(inverse.pair_residuals, true)


@BACKENDS
def test_at_the_iteration_limit_the_pairs_are_kept_and_counted(backend: str) -> None:
    matrix = symmetric(torch.cat([torch.tensor([9.0, 8.0]), torch.linspace(0.9, 1.0, 78)]))
    solver = ArnoldiSolver(rank=6, tol=1e-10, max_iter=1, krylov_dimension=12, backend=backend)
    with pytest.warns(
        ConvergenceWarning, match=r"2 of 6 eigenpairs converged to tol = 1e-10.*max_iter"
    ) as caught:
        inverse = solver.fit(DenseOperator(matrix), 1.0)
    assert len(caught) == 1
    torch.testing.assert_close(inverse.values[:2], torch.tensor([9.0, 8.0]).double())
    assert len(inverse.values) == (6 if backend == "torch" else 2)
    assert torch.isfinite(inverse @ normal(80, 2)).all()


def test_not_one_pair_converged_leaves_the_complement() -> None:
    operator = DenseOperator(symmetric(torch.linspace(0.9, 1.0, 80)))
    solver = ArnoldiSolver(rank=2, tol=1e-12, max_iter=1, krylov_dimension=3, backend="arpack")
    with pytest.warns(ConvergenceWarning, match=r"0 of 2 eigenpairs"):
        inverse = solver.fit(operator, 0.5)
    torch.testing.assert_close(inverse @ normal(80, 2), normal(80, 2) / 0.5)


def test_float32_stops_at_the_accuracy_it_can_give() -> None:
    matrix = symmetric(spectrum(9.0, 7.0, 4.0, 2.0, 1.0)).float()
    operator = ProductsOnly(matrix)
    inverse = ArnoldiSolver(rank=5, tol=0.0).fit(operator, 0.1)
    assert operator.products < 60
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:5]
    torch.testing.assert_close(inverse.values, exact, rtol=0.0, atol=9.0 * 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [10, 80], ids=["formed", "by products"])
def test_products_that_are_not_finite_are_refused(value: float, size: int) -> None:
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[0, 0] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        ArnoldiSolver(rank=2).fit(ProductsOnly(matrix), 1.0)


def test_half_precision_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"float32 and float64, not torch\.bfloat16"):
        ArnoldiSolver().fit(DenseOperator(torch.eye(4, dtype=torch.bfloat16)), 1.0)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": None}, "rank must be an integer"),
        ({"rank": True}, "rank must be an integer"),
        ({"rank": 2.0}, "rank must be an integer"),
        (
            {"krylov_dimension": 10},
            "krylov_dimension=10 leaves no room for rank=10 eigenpairs: use at least 21",
        ),
        ({"tol": -1e-3}, r"tol is relative and must lie in \[0, 1\), got -0.001"),
        ({"tol": 1.0}, "tol is relative"),
        ({"tol": float("nan")}, "tol is relative"),
        ({"tol": "small"}, "tol is relative"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1"),
        ({"block_size": 0}, "block_size must be an integer of at least 1"),
        ({"seed": "zero"}, "seed must be an integer"),
        ({"complement": "no"}, "complement must be True or False, got 'no'"),
        ({"progress": None}, "progress must be True or False"),
        ({"backend": "arpak"}, r"Unknown backend 'arpak'; expected one of .* Did you mean 'arpack'\?"),
    ],
)
def test_bad_options_are_refused_when_the_solver_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ArnoldiSolver(**options)
