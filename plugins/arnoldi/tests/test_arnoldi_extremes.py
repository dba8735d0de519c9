"""``arnoldi`` on negative eigenvalues beside the pairs, and on zero, singular and tiny curvature."""

from __future__ import annotations

import pytest
import torch
from influence_framework_arnoldi import ArnoldiSolver

from influence_framework import DenseOperator, IndefiniteOperatorWarning
from influence_framework.testing import ProductsOnly, symmetric
from plugins.arnoldi.tests.test_arnoldi import BACKENDS, spectrum

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@BACKENDS
def test_a_negative_eigenvalue_beside_the_pairs_is_reported(backend: str) -> None:
    matrix = symmetric(torch.cat([10 / torch.arange(1, 400), torch.tensor([-0.5])]), seed=7)
    with pytest.warns(
        IndefiniteOperatorWarning, match=r"10 eigenvalues .*, 0 lie below −λ.* at most -0\.(5|4[5-9])"
    ) as caught:
        inverse = ArnoldiSolver(rank=10, backend=backend).fit(DenseOperator(matrix), 0.01)
    assert len(caught) == 1
    assert -0.5 - 1e-9 <= inverse.lowest <= -0.45
    with pytest.warns(IndefiniteOperatorWarning):
        inverse.with_regularization(0.4)
    inverse.with_regularization(0.6)  # warnings are errors here


def test_what_restarts_have_dropped_is_remembered() -> None:
    matrix = symmetric(torch.cat([torch.linspace(10, 9, 60), torch.linspace(0, 1, 339), torch.tensor([-3.0])]))
    with pytest.warns(IndefiniteOperatorWarning, match=r"at most -3\."):
        ArnoldiSolver(rank=10, krylov_dimension=30).fit(DenseOperator(matrix), 0.01)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("size", [12, 80], ids=["formed", "by products"])
def test_a_singular_matrix_is_not_called_indefinite(size: int, dtype: torch.dtype, backend: str) -> None:
    matrix = symmetric(spectrum(9.0, 5.0, 2.0, size=size, below=0.0)).to(dtype)
    assert ArnoldiSolver(rank=5, backend=backend).fit(DenseOperator(matrix), 0.0).lowest == 0.0


def test_a_promise_of_no_negative_eigenvalue_saves_the_search_for_one() -> None:
    class Semidefinite(ProductsOnly):
        positive_semidefinite = True

    matrix = symmetric(spectrum(9.0, 7.0, 4.0))
    promising, silent = Semidefinite(matrix), ProductsOnly(matrix)
    for operator in (promising, silent):
        ArnoldiSolver(rank=3, backend="arpack").fit(operator, 0.1)
    assert 5 <= silent.products - promising.products <= 12


@BACKENDS
def test_a_zero_matrix_is_inverted_by_the_regularisation(backend: str) -> None:
    inverse = ArnoldiSolver(rank=2, backend=backend).fit(DenseOperator(torch.zeros(60, 60)), 0.5)
    assert torch.equal(inverse.values, torch.zeros(2).double())
    torch.testing.assert_close(inverse.vectors.T @ inverse.vectors, torch.eye(2))
    torch.testing.assert_close(inverse @ torch.ones(60), torch.full((60,), 2.0))


@BACKENDS
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
def test_units_of_the_curvature_do_not_matter(dtype: torch.dtype, unit: float, backend: str) -> None:
    values = torch.cat([torch.linspace(2, 1, 12), torch.linspace(0.9, 0, 188)]).double()
    operator = DenseOperator((unit * symmetric(values)).to(dtype))
    inverse = ArnoldiSolver(rank=10, tol=1e-4, backend=backend).fit(operator, unit)
    torch.testing.assert_close(inverse.values, unit * values[:10], rtol=1e-5, atol=0.0)


def test_what_the_search_for_copies_comes_upon_counts() -> None:
    """Two eigenvalues that stand out have converged before the rest of the spectrum shows."""
    matrix = symmetric([1e4, 1e3, -5.0, *torch.linspace(0, 1, 397).tolist()])
    with pytest.warns(IndefiniteOperatorWarning, match=r"at most -(5|4\.9)"):
        ArnoldiSolver(rank=2, tol=1e-2).fit(DenseOperator(matrix), 0.01)
