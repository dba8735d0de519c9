"""``nystroem`` in single precision: what rounding may cost, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from influence_framework_nystroem import NystroemSolver
from influence_framework_nystroem.spectrum import SLAB, inner

from influence_framework import ConvergenceWarning, DenseOperator
from influence_framework.testing import ProductsOnly, normal, symmetric


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_that_is_that_of_the_curvature_keeps_its_digits(seed: int) -> None:
    """Without oversampling the smallest singular value of a square random matrix would cost them."""
    factor = normal(500, 20, seed=seed) * torch.logspace(0.5, -0.5, 20, dtype=torch.float64) / 500**0.5
    matrix = factor @ factor.T
    inverse = NystroemSolver(rank=20, seed=seed).fit(DenseOperator(matrix.float()), 1e-2)
    gradients = factor @ normal(20, 5)
    scores = gradients.T @ (inverse @ gradients.float()).double()
    expected = gradients.T @ torch.linalg.solve(matrix + 1e-2 * torch.eye(500, dtype=torch.float64), gradients)
    assert torch.linalg.norm(scores - expected) <= 1e-3 * torch.linalg.norm(expected)


def test_auto_ends_where_rounding_does_and_says_so() -> None:
    operator = ProductsOnly(symmetric(torch.cat([torch.logspace(3, 0, 20), torch.zeros(380)])).float())
    with pytest.warns(ConvergenceWarning, match="the rounding of this dtype.*use float64 or raise the regul"):
        inverse = NystroemSolver(rank="auto").fit(operator, 1e-5)
    assert len(inverse.values) == 20
    assert sum(operator.widths) < 200
    NystroemSolver(rank="auto").fit(DenseOperator(operator.matrix.double()), 1e-2)  # warnings are errors here


def test_inner_products_of_single_precision_are_summed_in_double() -> None:
    size = SLAB + 1000
    left, right = normal(size, 2).float(), normal(size, 3, seed=2).float()
    torch.testing.assert_close(inner(left, right), left.double().T @ right.double(), rtol=1e-12, atol=1e-9)
