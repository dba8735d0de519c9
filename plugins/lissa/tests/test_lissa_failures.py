"""``lissa`` where it fails: noticed within a few iterations, told apart, and reported per right-hand side."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from influence_framework_lissa import LissaSolver
from influence_framework_lissa.spectrum import ritz_values, typical_largest

from influence_framework import (
    ConvergenceWarning,
    DenseOperator,
    IndefiniteOperatorWarning,
    InvalidInputError,
    MissingCapabilityError,
    NonFiniteError,
    StopReason,
)
from influence_framework.testing import normal, symmetric
from plugins.lissa.tests.test_lissa import FLOAT, Sampled, noisy, shifted, true_residuals

AVERAGING = pytest.mark.parametrize("averaging", [32, None], ids=["averaged", "plain"])


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=FLOAT))


@AVERAGING
@pytest.mark.parametrize("excess", [1.2, 3.0, 1e6])
def test_pitfall_divergence_is_noticed_within_a_few_iterations(averaging: int | None, excess: float) -> None:
    """A scale of ``Λ / (2·excess)``: the iterates grow by ``2·excess − 1`` an iteration, to NaN if let."""
    operator, b = Sampled(symmetric(torch.logspace(-2, 1, 30))), normal(30, 3)
    solver = LissaSolver(scale=5.0 / excess, averaging=averaging)
    with pytest.warns(ConvergenceWarning) as caught:
        solution = solver.fit(operator, 0.01).solve(b)
    assert set(solution.reason) == {StopReason.DIVERGED}
    assert not solution.converged.any()
    assert solution.iterations.max() <= (32 if excess < 3 else 16)
    # The best that was seen, which is the initial guess, with its true residual.
    assert torch.isfinite(solution.value).all()
    torch.testing.assert_close(solution.residual, true_residuals(operator, 0.01, solution, b))
    assert (solution.residual <= 1).all()
    messages = [str(warning.message) for warning in caught if "largest eigenvalue" in str(warning.message)]
    assert len(messages) == 1
    found = re.search(r"is about ([\d.]+)\. Use scale=([\d.]+),", messages[0])
    assert found
    assert float(found[1]) == pytest.approx(10.0, rel=0.05)
    named = LissaSolver(scale=float(found[2]), maxiter=20_000).fit(operator, 0.01).solve(b)
    assert named.converged.all()


def test_columns_diverge_one_by_one() -> None:
    operator = Sampled(diagonal(0.5, 1.0, 30.0))
    with (
        pytest.warns(ConvergenceWarning, match="largest eigenvalue of mini-batches is about 30"),
        pytest.warns(ConvergenceWarning, match=r"1 of 3 .*columns 2;.*1 diverged"),
    ):
        solution = LissaSolver(scale=10.0).fit(operator, 0.0).solve(torch.eye(3, dtype=FLOAT))
    assert solution.reason[:2] == (StopReason.CONVERGED,) * 2
    assert solution.reason[2] is StopReason.DIVERGED
    assert solution.iterations[2] < solution.iterations[0]
    torch.testing.assert_close(
        solution.value[:, :2], torch.linalg.inv(operator.matrix)[:, :2], rtol=1e-4, atol=0.0
    )


@AVERAGING
@pytest.mark.parametrize("seed", range(4))
def test_transients_of_noise_are_no_divergence(averaging: int | None, seed: int) -> None:
    """One mini-batch in sixty multiplies a direction by -49; the others damp it by 0.9 each."""
    operator = Sampled(*[diagonal(0.2, 0.1, 0.02)] * 59, diagonal(100.0, 0.1, 0.02))
    solver = LissaSolver(scale=2.0, averaging=averaging, maxiter=3000, seed=seed, warn_on_max_iteration=False)
    solution = solver.fit(operator, 0.0).solve(torch.eye(3, dtype=FLOAT))
    assert StopReason.DIVERGED not in solution.reason
    assert solution.converged[1:].all()


@AVERAGING
@pytest.mark.parametrize("scale", ["auto", 2.0, 10.0, 100.0])
def test_negative_curvature_is_told_apart_from_a_small_scale(scale: float | str, averaging: int | None) -> None:
    operator, b = Sampled(symmetric([-0.5, *torch.logspace(-2, 0, 20).tolist()])), normal(21, 3)
    with (
        pytest.warns(IndefiniteOperatorWarning, match=r"eigenvalue of at most -0\.(5|499)\S*, .*Use λ > 0\.5"),
        pytest.warns(ConvergenceWarning, match="3 of 3 .*non-positive curvature"),
    ):
        solution = LissaSolver(scale=scale, averaging=averaging, maxiter=4000).fit(operator, 0.1).solve(b)
    assert set(solution.reason) == {StopReason.NEGATIVE_CURVATURE}
    assert torch.isfinite(solution.value).all()
    torch.testing.assert_close(solution.residual, true_residuals(operator, 0.1, solution, b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LissaSolver(maxiter=4000).fit(operator, 0.6).solve(b).converged.all()


@AVERAGING
@pytest.mark.parametrize("seed", range(4))
def test_a_singular_matrix_is_not_called_indefinite(seed: int, averaging: int | None) -> None:
    """Along its null vectors the curvature is rounding, of either sign."""
    operator = Sampled(symmetric([3.0, 2.0, 1.0, *[0.0] * 7], seed))
    solver = LissaSolver(averaging=averaging, seed=seed)
    with pytest.warns(ConvergenceWarning, match="2 of 2 .*iteration limit") as caught:
        solution = solver.fit(operator, 0.0).solve(normal(10, 2, seed=seed))
    assert len(caught) == 1
    assert set(solution.reason) == {StopReason.ITERATION_LIMIT}
    # What lies in the range is solved.
    image = operator.matrix @ (operator.matrix @ solution.value - normal(10, 2, seed=seed))
    assert image.norm() <= 1e-3 * normal(10, 2, seed=seed).norm()


def test_the_cause_is_looked_for_along_all_that_grow() -> None:
    """The first of them alone has grown at a scale that is too small, and knows nothing of the second."""
    operator = Sampled(diagonal(30.0, -5.0))
    with pytest.warns(IndefiniteOperatorWarning, match="at most -5,"), pytest.warns(ConvergenceWarning):
        solution = LissaSolver(scale=10.0, averaging=None).fit(operator, 0.1).solve(torch.eye(2, dtype=FLOAT))
    assert StopReason.NEGATIVE_CURVATURE in solution.reason


def test_each_cause_is_said_with_its_own_eigenvalue() -> None:
    operator = Sampled(diagonal(30.0, -1.0, 0.5))
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=FLOAT)
    with (
        pytest.warns(IndefiniteOperatorWarning, match="at most -1,"),
        pytest.warns(ConvergenceWarning, match="mini-batches is about 30"),
        pytest.warns(ConvergenceWarning, match="2 of 2"),
    ):
        solution = LissaSolver(scale=10.0).fit(operator, 0.1).solve(b)
    assert solution.reason == (StopReason.DIVERGED, StopReason.NEGATIVE_CURVATURE)


def test_pitfall_indefinite_system_is_never_called_solved_without_its_residual() -> None:
    operator, b = Sampled(symmetric([-0.02, -0.01, *torch.logspace(-3, 1, 40).tolist()])), normal(42, 10)
    with pytest.warns(IndefiniteOperatorWarning), pytest.warns(ConvergenceWarning):
        solution = LissaSolver().fit(operator, 1e-2).solve(b)
    true = true_residuals(operator, 1e-2, solution, b)
    torch.testing.assert_close(solution.residual, true)
    assert (true[solution.converged] <= 1e-4).all()
    assert not solution.converged.all()


@AVERAGING
def test_a_scale_at_which_iterates_grow_is_raised(averaging: int | None) -> None:
    """One mini-batch in a hundred, which the estimate misses here, holds nearly all curvature."""
    operator, b = Sampled(*[diagonal(0.3, 0.2, 0.1)] * 99, diagonal(0.3, 0.2, 300.0)), normal(3, 4)
    solver = LissaSolver(averaging=averaging, maxiter=8_000, warn_on_max_iteration=False)
    inverse = solver.fit(operator, 0.0)
    assert inverse.scale < 100
    solution = inverse.solve(b)
    assert solution.converged.all() or averaging is None
    assert StopReason.DIVERGED not in solution.reason
    assert (solution.residual < 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_scale_at_which_noise_drowns_the_runs_is_raised(seed: int) -> None:
    """Mini-batches of one sample: else up to 0.7 of the residual is left after 3,000 iterations."""
    operator = noisy(count=100, rows=1)
    assert (
        LissaSolver(seed=seed, rtol=1e-3, maxiter=1500).fit(operator, 0.01).solve(normal(12, 4)).converged.all()
    )


@AVERAGING
def test_noise_never_returns_something_worse_than_the_guess(averaging: int | None) -> None:
    operator, b = noisy(rows=1), normal(12, 4)
    guess = torch.linalg.solve(shifted(operator.matrix, 0.01), b) * 1.01
    solver = LissaSolver(h0=guess, averaging=averaging, scale=2.5, maxiter=100, warn_on_max_iteration=False)
    assert (solver.fit(operator, 0.01).solve(b).residual < 0.01001).all()


def test_automatic_scale_is_about_the_least_that_is_stable() -> None:
    for operator in (noisy(rows=2), noisy(rows=100), Sampled(symmetric(torch.logspace(-3, 2, 50)))):
        squares = torch.stack([matrix @ matrix for matrix in operator.matrices]).mean(0)
        # Stable in mean square where 2s > vᵀ E[C_b²] v / vᵀ C v for every v.
        least = torch.linalg.eigvals(torch.linalg.solve(operator.matrix, squares)).real.max().item() / 2
        # The estimate is of the largest eigenvalues alone; what it misses is made up for while solving.
        assert 0.9 * least < LissaSolver().fit(operator, 0.0).scale < 2 * least


def test_largest_eigenvalue_follows_the_mini_batches_not_only_the_whole() -> None:
    few, many = noisy(rows=2), noisy(rows=200)
    assert typical_largest(few, few, 0) > 2 * typical_largest(many, many, 0)
    assert LissaSolver().fit(few, 3.0).scale == pytest.approx(0.6 * (typical_largest(few, few, 0) + 3.0))
    with pytest.warns(ConvergenceWarning, match="dampen=0.5 adds"):
        dampened = LissaSolver(dampen=0.5).fit(few, 0.0)
    assert dampened.scale == pytest.approx(0.8 * typical_largest(few, few, 0))


def test_negative_curvature_of_mini_batches_counts_by_its_magnitude() -> None:
    operator = Sampled(diagonal(-9.0, 1.0), diagonal(-9.0, 1.0), diagonal(19.0, 1.0))
    expected = (9.0**2 + 9.0**2 + 19.0**2) / (9.0 + 9.0 + 19.0)
    assert typical_largest(operator, operator, 0) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ritz_values_lie_within_the_spectrum_and_reach_its_ends(dtype: torch.dtype) -> None:
    matrix = symmetric([-3.0, *torch.linspace(-0.5, 1.0, 40).tolist(), 5.0])
    operator = Sampled(matrix.to(dtype))
    values = ritz_values(operator, normal(42, 2).to(dtype), 6)
    assert values[0].item() == pytest.approx(-3.0, rel=1e-2)
    assert values[-1].item() == pytest.approx(5.0, rel=1e-2)
    assert values[0] >= -3.0 - 1e-5
    assert values[-1] <= 5.0 + 1e-5
    # An invariant space ends it early, without directions made of rounding.
    assert len(ritz_values(operator, torch.linalg.eigh(matrix).eigenvectors[:, :2].to(dtype), 6)) <= 4


def test_iteration_limit_is_said_with_the_true_residual_and_can_be_quiet() -> None:
    operator, b = noisy(), normal(12, 3)
    with pytest.warns(ConvergenceWarning, match="3 of 3 .*reached the iteration limit"):
        solution = LissaSolver(maxiter=20).fit(operator, 1e-3).solve(b)
    assert set(solution.reason) == {StopReason.ITERATION_LIMIT}
    assert solution.iterations.tolist() == [20] * 3
    torch.testing.assert_close(solution.residual, true_residuals(operator, 1e-3, solution, b))
    quiet = LissaSolver(maxiter=20, warn_on_max_iteration=False).fit(operator, 1e-3).solve(b)
    assert quiet.reason == solution.reason


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_tolerance_is_on_each_true_residual_alone(rtol: float) -> None:
    operator = noisy()
    b = normal(12, 4) * torch.tensor([1e-8, 1.0, 10.0, 1e8], dtype=FLOAT)
    solution = LissaSolver(rtol=rtol, averaging=8).fit(operator, 1e-2).solve(b)
    true = true_residuals(operator, 1e-2, solution, b)
    assert solution.converged.all()
    assert (true <= rtol).all()
    # Not solved much beyond what was asked: a tolerance on another norm would be off by orders.
    assert (true >= 1e-3 * rtol).all()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-21, 1e25])
def test_magnitudes_whose_squares_single_precision_cannot_hold(magnitude: float) -> None:
    operator, b = Sampled(symmetric([3.0, 2.0, 1.0, 0.5]).float()), (magnitude * normal(4, 2)).float()
    solution = LissaSolver().fit(operator, 0.1).solve(b)
    assert solution.converged.all()
    assert (solution.iterations > 0).all()
    remainder = b.double() - shifted(operator.matrix.double(), 0.1) @ solution.value.double()
    assert (remainder.norm(dim=0) <= 1.01e-4 * b.double().norm(dim=0)).all()
    # A guess is in the units of the right-hand sides.
    assert not LissaSolver(h0=solution.value, rtol=1e-3).fit(operator, 0.1).solve(b).iterations.any()


def test_float32_stops_at_the_accuracy_it_can_give() -> None:
    matrix = symmetric(torch.logspace(-3, 1, 40)).float()
    operator, b = Sampled(matrix), normal(40, 3).float()
    with pytest.warns(ConvergenceWarning, match="accuracy this dtype can give"):
        solution = LissaSolver(rtol=0.0, maxiter=200_000).fit(operator, 0.01).solve(b)
    assert StopReason.STAGNATED in solution.reason
    exact = shifted(matrix.double(), 0.01) @ solution.value.double()
    true = (b.double() - exact).norm(dim=0) / b.double().norm(dim=0)
    assert (true <= 1e-4).all()
    # Computed from the value that is returned, in the operator's own precision.
    torch.testing.assert_close(solution.residual, true, rtol=0.5, atol=1e-6)
    assert solution.iterations.max() < 100_000


@AVERAGING
def test_a_not_finite_right_hand_side_spoils_no_other(averaging: int | None) -> None:
    operator, b = Sampled(symmetric(torch.logspace(-1, 0, 10))), normal(10, 3)
    b[2, 1] = float("inf")
    with pytest.warns(ConvergenceWarning, match="1 of 3 .*NaN or infinity"):
        solution = LissaSolver(averaging=averaging).fit(operator, 0.1).solve(b)
    assert solution.reason[1] is StopReason.NOT_FINITE
    assert solution.converged.tolist() == [True, False, True]
    assert torch.isfinite(solution.value[:, [0, 2]]).all()


def test_products_that_are_not_finite_are_refused_at_fit() -> None:
    with pytest.raises(NonFiniteError, match="scale of data and parameters"):
        LissaSolver().fit(Sampled(torch.full((3, 3), float("nan"), dtype=FLOAT)), 0.1)


def test_nothing_to_invert_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="hessian_regularization > 0"):
        LissaSolver().fit(Sampled(torch.zeros(3, 3, dtype=FLOAT)), 0.0)


@pytest.mark.parametrize(
    ("guess", "message"),
    [
        (torch.ones(3, dtype=FLOAT), r"h0 must be \(12,\) or \(12, 2\)"),
        (torch.ones(12), "float32"),
        (torch.full((12,), float("nan"), dtype=FLOAT), "NaN"),
    ],
)
def test_a_guess_that_does_not_fit_is_refused(guess: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LissaSolver(h0=guess).fit(noisy(), 0.1).solve(normal(12, 2))


def test_an_operator_without_mini_batches_is_refused() -> None:
    with pytest.raises(MissingCapabilityError, match="DenseOperator has none"):
        LissaSolver().fit(DenseOperator(torch.eye(3)), 0.1)
