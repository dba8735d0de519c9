"""``cg``: tolerances, dropping columns, honesty about residuals, indefiniteness and dtype limits."""

from __future__ import annotations

import math

import pytest
import torch
from influence_framework_cg import CgSolver, JacobiSolver

from influence_framework import (
    ConvergenceWarning,
    DenseOperator,
    InvalidInputError,
    StopReason,
)
from influence_framework.testing import ProductsOnly, normal, symmetric

BLOCK = pytest.mark.parametrize("block", [False, True], ids=["columns", "block"])


@BLOCK
@pytest.mark.parametrize("preconditioner", [None, JacobiSolver()], ids=["plain", "jacobi"])
@pytest.mark.parametrize("count", [1, 4, 45], ids=["one", "few", "more than P"])
def test_equals_the_dense_inverse(block: bool, preconditioner: JacobiSolver | None, count: int) -> None:
    matrix = symmetric(torch.logspace(-4, 1, 30))
    columns = normal(30, count)
    solver = CgSolver(rtol=1e-10, atol=0.0, block=block, preconditioner=preconditioner)
    solution = solver.fit(DenseOperator(matrix), 1e-3).solve(columns)
    expected = torch.linalg.solve(matrix + 1e-3 * torch.eye(30, dtype=torch.float64), columns)
    # Condition number 1e4 times the tolerance.
    assert torch.linalg.norm(solution.value - expected) <= 1e-6 * torch.linalg.norm(expected)
    assert solution.converged.all()
    assert (solution.residual <= 1e-10).all()


@BLOCK
def test_the_claimed_residual_is_the_true_one(block: bool) -> None:
    matrix = symmetric(torch.logspace(-6, 0, 40))
    columns = normal(40, 3)
    with pytest.warns(ConvergenceWarning, match="reached the iteration limit"):
        solution = CgSolver(maxiter=5, block=block).fit(DenseOperator(matrix), 1e-6).solve(columns)
    shifted = matrix + 1e-6 * torch.eye(40, dtype=torch.float64)
    true = torch.linalg.norm(columns - shifted @ solution.value, dim=0) / torch.linalg.norm(columns, dim=0)
    torch.testing.assert_close(solution.residual, true, rtol=1e-6, atol=0.0)
    assert set(solution.reason) == {StopReason.ITERATION_LIMIT}
    assert not solution.converged.any()
    assert (solution.iterations == 5).all()


@BLOCK
@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 0.0), (0.0, 1e-2), (1e-9, 5.0)])
def test_tolerance_is_scipys_on_each_column_alone(block: bool, rtol: float, atol: float) -> None:
    matrix = symmetric(torch.logspace(-2, 2, 30))
    columns = normal(30, 4) * torch.tensor([1e-4, 1.0, 10.0, 1e4])
    solution = CgSolver(rtol=rtol, atol=atol, block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    residuals = torch.linalg.norm(columns - matrix @ solution.value, dim=0)
    limits = torch.maximum(rtol * torch.linalg.norm(columns, dim=0), torch.tensor(atol))
    assert (residuals <= limits * (1 + 1e-6)).all()
    # Not solved much beyond what was asked: a tolerance on the wrong norm would be off by orders.
    untouched = torch.linalg.norm(columns, dim=0) <= limits
    assert (residuals[~untouched] >= 1e-5 * limits[~untouched]).all()
    torch.testing.assert_close(solution.value[:, untouched], torch.zeros_like(columns[:, untouched]))


def test_iterations_are_those_of_scipy() -> None:
    from scipy.sparse.linalg import cg

    matrix = symmetric(torch.logspace(-1, 1, 50))
    columns = normal(50, 3)
    solution = CgSolver(rtol=1e-5, atol=0.0).fit(DenseOperator(matrix), 0.0).solve(columns)
    for index in range(3):
        counted: list[int] = []
        cg(
            matrix.numpy(),
            columns[:, index].numpy(),
            rtol=1e-5,
            atol=0.0,
            callback=lambda _, c=counted: c.append(1),
        )
        # The replacement of the residual every 50 iterations may shift the end by a little.
        assert abs(len(counted) - solution.iterations[index].item()) <= 3


@BLOCK
def test_more_columns_need_no_more_passes(block: bool) -> None:
    matrix = symmetric(torch.logspace(-2, 1, 60))
    columns = normal(60, 20)
    one, many = ProductsOnly(matrix), ProductsOnly(matrix)
    CgSolver(rtol=1e-8, atol=0.0, block=block).fit(one, 0.1).solve(columns[:, :1])
    CgSolver(rtol=1e-8, atol=0.0, block=block).fit(many, 0.1).solve(columns)
    assert len(many.widths) <= len(one.widths) + 10
    if block:
        assert len(many.widths) < len(one.widths) / 2


@BLOCK
def test_finished_columns_leave_the_product(block: bool) -> None:
    matrix = symmetric(torch.logspace(-4, 1, 60))
    _, vectors = torch.linalg.eigh(matrix)
    slow = normal(60, 1)
    columns = torch.cat([vectors[:, :5], slow], dim=1)  # an eigenvector takes one iteration
    operator = ProductsOnly(matrix)
    solution = CgSolver(rtol=1e-6, atol=0.0, block=block).fit(operator, 0.0).solve(columns)
    assert solution.converged.all()
    assert operator.widths[0] == 6
    # Afterwards only the slow one, but for the final check of all residuals.
    assert operator.widths[2:-1] == [1] * (len(operator.widths) - 3)
    assert solution.iterations[:5].max() <= 2 < solution.iterations[5]


@BLOCK
def test_zero_right_hand_sides_end_at_once(block: bool) -> None:
    matrix = symmetric([1.0, 2.0, 3.0, 4.0])
    columns = torch.stack([torch.zeros(4, dtype=torch.float64), normal(4)], dim=1)
    solver = CgSolver(rtol=1e-10, atol=0.0, block=block, x0=torch.ones(4, dtype=torch.float64))
    solution = solver.fit(DenseOperator(matrix), 0.0).solve(columns)
    assert solution.iterations[0] == 0
    assert solution.converged.all()
    assert solution.residual[0] == 0
    torch.testing.assert_close(solution.value[:, 0], torch.zeros(4, dtype=torch.float64))


def test_negative_curvature_is_reported_for_its_column_alone() -> None:
    matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    columns = torch.eye(4, dtype=torch.float64)[:, :3]
    columns[3, 1] = 1.0
    with pytest.warns(ConvergenceWarning, match=r"1 of 3 .*columns 0;.*non-positive curvature"):
        solution = CgSolver().fit(DenseOperator(matrix), 0.5).solve(columns)
    assert solution.reason[0] is StopReason.NEGATIVE_CURVATURE
    assert solution.converged.tolist() == [False, True, True]
    expected = torch.linalg.solve(matrix + 0.5 * torch.eye(4, dtype=torch.float64), columns)
    torch.testing.assert_close(solution.value[:, 1:], expected[:, 1:])


def test_block_reports_negative_curvature_in_the_shared_space() -> None:
    matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="non-positive curvature"):
        solution = CgSolver(block=True).fit(DenseOperator(matrix), 0.5).solve(normal(4, 2))
    assert set(solution.reason) == {StopReason.NEGATIVE_CURVATURE}


def test_pitfall_indefinite_hessian_is_never_called_solved() -> None:
    """On an indefinite matrix, whatever is called converged has the residual that was asked for."""
    matrix = symmetric([-0.02, -0.01, *torch.logspace(-3, 1, 40).tolist()])
    columns = normal(42, 10)
    with pytest.warns(ConvergenceWarning):
        solution = CgSolver(rtol=1e-5, atol=0.0).fit(DenseOperator(matrix), 1e-2).solve(columns)
    shifted = matrix + 1e-2 * torch.eye(42, dtype=torch.float64)
    true = torch.linalg.norm(columns - shifted @ solution.value, dim=0) / torch.linalg.norm(columns, dim=0)
    assert (true[solution.converged] <= 1.01e-5).all()
    assert StopReason.NEGATIVE_CURVATURE in solution.reason


@BLOCK
def test_float32_stops_at_the_accuracy_it_can_give(block: bool) -> None:
    matrix = symmetric(torch.logspace(-3, 1, 80)).float()
    columns = normal(80, 3).float()
    operator = ProductsOnly(matrix)
    with pytest.warns(ConvergenceWarning, match="accuracy this dtype can give"):
        solution = CgSolver(rtol=1e-7, atol=0.0, block=block).fit(operator, 0.0).solve(columns)
    assert StopReason.STAGNATED in solution.reason
    assert (solution.residual < 1e-2).all()
    # 10·P iterations would be the limit; stagnation must end it long before.
    assert len(operator.widths) < 700


@BLOCK
def test_recursive_residuals_are_replaced_by_true_ones(block: bool) -> None:
    """In float32 the recursion goes on to zero while the truth stalls: the final check must see that."""
    matrix = symmetric(torch.logspace(-2, 1, 60)).float()
    columns = normal(60, 2).float()
    solution = CgSolver(rtol=3e-5, atol=0.0, block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    true = torch.linalg.norm(columns.double() - matrix.double() @ solution.value.double(), dim=0)
    assert solution.converged.all()
    assert (true / torch.linalg.norm(columns.double(), dim=0) <= 4e-5).all()


def test_a_fast_solve_takes_hardly_a_product_to_be_checked() -> None:
    operator = ProductsOnly(symmetric(torch.linspace(1, 1.2, 40)))
    solution = CgSolver(rtol=1e-8).fit(operator, 0.0).solve(normal(40, 20))
    assert solution.converged.all()
    # Without last steps that are checked by their own products it would be all twenty.
    assert sum(operator.widths) - solution.iterations.sum() <= 8


@pytest.mark.parametrize("spread", [1.05, 1.5, 2.5, 4.0])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-8, 1e-11])
def test_a_last_step_that_falls_short_is_followed_by_others(spread: float, rtol: float) -> None:
    """The length of a step foretells the next one's only roughly, and residuals are promised in any case."""
    operator = ProductsOnly(symmetric(torch.logspace(0, math.log10(spread), 40)))
    columns = normal(40, 20)
    solution = CgSolver(rtol=rtol).fit(operator, 0.0).solve(columns)
    true = torch.linalg.norm(columns - operator.matrix @ solution.value, dim=0) / torch.linalg.norm(
        columns, dim=0
    )
    assert (true <= rtol).all()
    assert solution.converged.all()
    torch.testing.assert_close(solution.residual, true, rtol=1e-2, atol=0.0)


@BLOCK
def test_a_wrong_recursion_is_found_out_and_worked_on(block: bool) -> None:
    """An operator that is off in its first products leaves a recursive residual that is a lie."""

    class Unsteady(ProductsOnly):
        def _matmat(self, columns: torch.Tensor) -> torch.Tensor:
            product = super()._matmat(columns)
            return product * (1.3 if len(self.widths) <= 2 else 1.0)

    matrix = symmetric(torch.logspace(-1, 1, 20))
    columns = normal(20, 2)
    solution = CgSolver(rtol=1e-8, atol=0.0, block=block).fit(Unsteady(matrix), 0.0).solve(columns)
    assert solution.converged.all()
    assert (torch.linalg.norm(columns - matrix @ solution.value, dim=0) <= 1e-7).all()


@BLOCK
def test_tiny_right_hand_sides_are_solved_like_any_unless_asked_otherwise(block: bool) -> None:
    """The gradients of samples that a model fits well."""
    matrix = symmetric(torch.logspace(-2, 1, 25))
    columns = normal(25, 2)
    columns[:, 1] *= 1e-12
    solution = CgSolver(block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    assert (solution.residual <= 1e-7).all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, columns), rtol=1e-4, atol=1e-18)
    asked = CgSolver(atol=1e-7, block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    assert asked.value[:, 1].count_nonzero() == 0


@BLOCK
def test_dependent_right_hand_sides(block: bool) -> None:
    matrix = symmetric(torch.logspace(-2, 1, 25))
    base = normal(25, 2)
    columns = torch.cat([base, base, base.sum(1, keepdim=True), 1e-8 * base], dim=1)
    solution = CgSolver(rtol=1e-9, atol=0.0, block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    assert solution.converged.all()
    expected = torch.linalg.solve(matrix, columns)
    torch.testing.assert_close(solution.value, expected, rtol=1e-5, atol=1e-13)


@BLOCK
def test_start_from_a_guess(block: bool) -> None:
    matrix = symmetric(torch.logspace(-2, 1, 25))
    columns = normal(25, 3)
    exact = torch.linalg.solve(matrix, columns)
    solution = CgSolver(x0=exact, block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    assert (solution.iterations == 0).all()
    shared = CgSolver(rtol=1e-9, atol=0.0, x0=exact[:, 0], block=block)
    solution = shared.fit(DenseOperator(matrix), 0.0).solve(columns)
    assert solution.iterations[0] == 0
    torch.testing.assert_close(solution.value, exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("guess", "message"),
    [(torch.ones(3).double(), r"x0 must be \(5,\)"), (torch.ones(5).float(), "float32")],
)
def test_a_guess_that_does_not_fit_is_refused(guess: torch.Tensor, message: str) -> None:
    inverse = CgSolver(x0=guess).fit(DenseOperator(torch.eye(5).double()), 0.0)
    with pytest.raises(InvalidInputError, match=message):
        inverse.solve(normal(5, 2))


def test_limit_warning_can_be_switched_off_but_the_report_cannot() -> None:
    inverse = CgSolver(maxiter=2, warn_on_max_iteration=False).fit(
        DenseOperator(symmetric(torch.logspace(-6, 0, 40))), 0.0
    )
    assert inverse.solve(normal(40, 2)).reason == (StopReason.ITERATION_LIMIT,) * 2


def test_iteration_limit_comes_from_the_number_of_parameters() -> None:
    """One right-hand side on a spectrum that needs more than 10 iterations, the limit if k counted."""
    matrix = symmetric(torch.logspace(-3, 1, 50))
    assert CgSolver(rtol=1e-9, atol=0.0).fit(DenseOperator(matrix), 0.0).solve(normal(50)).converged.all()


def test_a_not_finite_right_hand_side_spoils_no_other() -> None:
    columns = normal(10, 3)
    columns[2, 1] = float("inf")
    with pytest.warns(ConvergenceWarning, match="NaN or infinity"):
        solution = CgSolver().fit(DenseOperator(symmetric(torch.logspace(-1, 1, 10))), 0.0).solve(columns)
    assert solution.reason[1] is StopReason.NOT_FINITE
    assert solution.converged.tolist() == [True, False, True]


@BLOCK
def test_with_regularization_equals_a_refit(block: bool) -> None:
    operator = DenseOperator(symmetric(torch.logspace(-2, 1, 20)))
    solver = CgSolver(rtol=1e-10, atol=0.0, preconditioner=JacobiSolver(), block=block)
    columns = normal(20, 2)
    moved = solver.fit(operator, 1.0).with_regularization(1e-2)
    torch.testing.assert_close(moved.solve(columns).value, solver.fit(operator, 1e-2).solve(columns).value)


def test_progress_bar_counts_systems(capsys: pytest.CaptureFixture[str]) -> None:
    CgSolver(progress=True).fit(DenseOperator(symmetric([1.0, 2.0, 3.0])), 0.0).solve(normal(3, 4))
    assert "4/4" in capsys.readouterr().err


@BLOCK
@pytest.mark.parametrize("seed", range(3))
def test_float32_near_its_limit_never_returns_something_worse_than_zero(block: bool, seed: int) -> None:
    """The true residual put in the place of the recursive one under an old direction diverges."""
    matrix = symmetric(torch.logspace(-3, 1, 200), seed).float()
    columns = normal(200, 4, seed=seed).float()
    with pytest.warns(ConvergenceWarning):
        solution = CgSolver(rtol=1e-6, atol=0.0, block=block).fit(DenseOperator(matrix), 0.0).solve(columns)
    true = torch.linalg.norm(columns.double() - matrix.double() @ solution.value.double(), dim=0)
    # Textbook CG reaches 2e-4 here.
    assert (true / torch.linalg.norm(columns.double(), dim=0) <= 1e-3).all()


@BLOCK
def test_indefiniteness_along_one_system_leaves_the_others_solved(block: bool) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="1 of 4"):
        solution = CgSolver(block=block).fit(DenseOperator(matrix), 0.0).solve(torch.eye(4).double())
    assert solution.converged.tolist() == [True, True, True, False]
    assert solution.reason[3] is StopReason.NEGATIVE_CURVATURE
