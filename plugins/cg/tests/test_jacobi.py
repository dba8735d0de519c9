"""``jacobi``: exact where the diagonal is offered, a positive estimate elsewhere."""

from __future__ import annotations

import pytest
import torch
from influence_framework_cg import CgSolver, JacobiSolver

from influence_framework import DenseOperator, InvalidInputError
from influence_framework.testing import ProductsOnly


def badly_scaled(size: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64) / (2 * size) ** 0.5
    scale = torch.logspace(-1, 1, size, dtype=torch.float64)
    return scale[:, None] * (factor @ factor.T) * scale


def test_exact_where_the_operator_offers_its_diagonal() -> None:
    matrix = badly_scaled()
    inverse = JacobiSolver().fit(DenseOperator(matrix), 0.5)
    columns = torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(inverse @ columns, torch.diag(1 / (matrix.diagonal() + 0.5)))


def test_estimate_converges_at_the_monte_carlo_rate() -> None:
    """The standard error of entry i is sqrt(Σ_{j≠i} C_ij² / probes)."""
    matrix = badly_scaled()
    off_diagonal = (matrix.square().sum(1) - matrix.diagonal().square()).sqrt()
    for probes in (64, 4096):
        estimate = JacobiSolver(probes=probes, seed=3).fit(ProductsOnly(matrix), 0.0).magnitude
        deviations = (estimate - matrix.diagonal()) / (off_diagonal / probes**0.5)
        # Root mean square of 60 nearly standard normal deviations.
        assert 0.5 < deviations.square().mean().sqrt() < 1.6


def test_pitfall_one_probe_leaves_a_third_of_the_diagonal_negative() -> None:
    """Off-diagonal mass that drowns the diagonal: every entry must still be positive and not tiny."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    matrix = vectors @ vectors.T
    inverse = JacobiSolver(probes=8).fit(ProductsOnly(matrix), 1e-6)
    assert (inverse.magnitude > 0).all()
    applied = inverse @ torch.ones(200, dtype=torch.float64)
    assert (applied > 0).all()
    # Clamping noise to zero would leave entries of 1/λ = 1e6.
    assert applied.max() < 1e3


def test_positive_definite_on_an_indefinite_operator() -> None:
    matrix = torch.diag(torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64))
    inverse = JacobiSolver().fit(DenseOperator(matrix), 0.0)
    torch.testing.assert_close(inverse @ torch.ones(3).double(), torch.tensor([0.5, 1.0, 1 / 3]).double())


def test_seed_decides_and_global_state_is_left_alone() -> None:
    operator = ProductsOnly(badly_scaled())
    state = torch.get_rng_state()
    first, again = (JacobiSolver(seed=5).fit(operator, 0.0).magnitude for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, JacobiSolver(seed=6).fit(operator, 0.0).magnitude)


@pytest.mark.parametrize("block", [False, True])
def test_pitfall_the_preconditioner_is_really_used(block: bool) -> None:
    matrix = badly_scaled()
    rhs = torch.ones(60, dtype=torch.float64)
    plain = CgSolver(rtol=1e-6, atol=0.0, block=block).fit(DenseOperator(matrix), 0.0).solve(rhs)
    with_jacobi = CgSolver(rtol=1e-6, atol=0.0, block=block, preconditioner=JacobiSolver())
    helped = with_jacobi.fit(DenseOperator(matrix), 0.0).solve(rhs)
    assert helped.converged.all()
    assert helped.iterations.item() < plain.iterations.item() / 2


def test_zero_diagonal_without_regularisation_is_refused() -> None:
    operator = DenseOperator(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="hessian_regularization > 0"):
        JacobiSolver().fit(operator, 0.0)


def test_with_regularization_equals_a_refit() -> None:
    operator = ProductsOnly(badly_scaled())
    vector = torch.ones(60, dtype=torch.float64)
    moved = JacobiSolver().fit(operator, 1.0).with_regularization(0.1)
    torch.testing.assert_close(moved @ vector, JacobiSolver().fit(operator, 0.1) @ vector)


def test_one_probe_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="At least 2 probes"):
        JacobiSolver(probes=1)
