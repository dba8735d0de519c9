"""What is said of every right-hand side, and what is done where one failed."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import influence_framework as inf
from influence_framework.inverses import Inverse, make_solution
from tests import cases, fits, reference, small


def solved(**options: Any) -> tuple[cases.Instance, inf.TorchInfluenceFunctionModel]:
    instance, model = fits.fitted("ragged_last_batch", **options)
    x, y = instance.data[0]
    model.influence_factors(x, y)
    return instance, model


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_report_tells_the_truth_of_every_right_hand_side() -> None:
    instance, model = fits.fitted(
        "ragged_last_batch", "per_layer", solver={"name": "cg", "rtol": 1e-8, "atol": 0.0}
    )
    batch = instance.data[0]
    factors = model.influence_factors_by_block(*batch)
    gradients = reference.gradients(instance.model, instance.loss, [batch])
    assert [block.block for block in model.report.blocks] == list(factors)
    strength = fits.strength("ragged_last_batch")
    for block in model.report.blocks:
        index = reference.positions(
            instance.model,
            fits.STRUCTURES["per_layer"][1](list(reference.trainable(instance.model)))[block.block],
        )
        matrix = cases.dense("ragged_last_batch", "gauss_newton")[index][:, index]
        g, x = gradients[:, index].T, factors[block.block].T
        true = (g - matrix @ x - strength * x).norm(dim=0) / g.norm(dim=0)
        torch.testing.assert_close(block.residual, true, rtol=1e-3, atol=1e-13)
        spectrum = torch.linalg.eigvalsh(matrix)
        assert (block.curvature[:, 0] >= spectrum[0] - 1e-12).all()
        assert (block.curvature[:, 1] <= spectrum[-1] + 1e-12).all()
        assert (block.curvature[:, 0] < block.curvature[:, 1]).all()
        assert block.converged.all()
        assert (block.iterations >= 1).all()
        assert (block.seconds > 0).all()
        assert block.regularization == strength
        assert block.solver == "CgSolver"
        assert set(block.reason) == {inf.StopReason.CONVERGED}


@pytest.mark.parametrize("block", [True, False])
def test_cg_sees_the_extreme_curvatures(block: bool) -> None:
    """Along the search directions of a block that fills the space, they are the extreme eigenvalues."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    operator = inf.DenseOperator(matrix)
    solver = inf.solvers["cg"].create(block=block)
    solution = solver.fit(operator, 0.5).solve(torch.eye(3, dtype=torch.float64))
    assert solution.curvature is not None
    expected = [[1.0, 5.0]] * 3 if block else [[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]
    torch.testing.assert_close(solution.curvature, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("call", ["influences", "self_influences", "residuals", "explore"])
def test_every_call_is_reported(call: str) -> None:
    instance, model = fits.fitted("ragged_last_batch", solver="cg")
    test, train = instance.data[0], instance.data[1]
    assert str(model.report) == "Nothing has been solved yet."
    if call == "explore":
        model.explore_hessian_regularization(*test, [0.1, 1.0], *train)
        assert [block.regularization for block in model.report.blocks] == [0.1, 1.0]
        assert [len(block) for block in model.report.blocks] == [4, 4]
        return
    arguments = (*test, *train) if call == "influences" else test
    getattr(model, call)(*arguments)
    assert len(model.report) == 4
    assert model.report.converged


def test_scores_from_layers_are_reported_as_what_they_are() -> None:
    instance, model = fits.fitted("ragged_last_batch", solver="ekfac")
    model.influences(*instance.data[0], *instance.data[1])
    (block,) = model.report.blocks
    assert set(block.reason) == {inf.StopReason.APPROXIMATION}
    assert block.residual.isnan().all()
    assert (block.curvature[:, 1] > 0).all()
    assert len(block) == 4
    assert "not measured" in str(model.report)


def test_residuals_of_an_approximation_are_those_against_the_curvature() -> None:
    instance, model = fits.fitted("ragged_last_batch", solver="ekfac")
    batch = instance.data[0]
    strength = fits.strength("ragged_last_batch")
    g = reference.gradients(instance.model, instance.loss, [batch]).T
    x = model.influence_factors(*batch).T
    true = (g - cases.dense("ragged_last_batch", "gauss_newton") @ x - strength * x).norm(dim=0) / g.norm(dim=0)
    torch.testing.assert_close(model.residuals(*batch), true, rtol=1e-8, atol=1e-12)
    assert (true > 1e-3).all()


def test_a_sampled_right_hand_side_appears_in_the_data_frame() -> None:
    _, model = solved(solver="cg")
    frame = model.report.to_pandas()
    assert list(frame["position"]) == [0, 1, 2, 3]
    assert list(frame["converged"]) == [True] * 4
    torch.testing.assert_close(torch.tensor(frame["residual"].to_numpy()), model.report.blocks[0].residual)


def test_without_pandas_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = solved(solver="cg")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        model.report.to_pandas()


LIMITED = {"name": "cg", "maxiter": 1, "rtol": 1e-10}


def test_many_failures_are_one_line_at_the_callers() -> None:
    instance, model = fits.fitted("ragged_last_batch", "per_layer", solver=LIMITED)
    with pytest.warns(inf.ConvergenceWarning) as caught:
        model.influences(*instance.data[0], *instance.data[1])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert "4 of 4 right-hand sides were not solved" in text
    assert "1 more block" in text
    assert "\n" not in text
    assert "reached the iteration limit" in str(model.report)
    assert not model.report.converged


def test_failures_raise_where_asked_to_and_the_report_tells_of_them() -> None:
    instance, model = fits.fitted("ragged_last_batch", solver=LIMITED, on_failure="raise")
    with pytest.raises(inf.ConvergenceError, match="4 of 4 right-hand sides") as error:
        model.influences(*instance.data[0], *instance.data[1])
    assert error.value.report is model.report
    assert not model.report.converged


def test_failures_are_ignored_where_asked_to() -> None:
    instance, model = fits.fitted("ragged_last_batch", solver=LIMITED, on_failure="ignore")
    with silence():
        model.influences(*instance.data[0], *instance.data[1])
    assert not model.report.converged


def test_what_a_solver_was_told_not_to_warn_of_is_still_a_failure() -> None:
    quiet = LIMITED | {"warn_on_max_iteration": False}
    instance, model = fits.fitted("ragged_last_batch", solver=quiet)
    with silence():
        model.influences(*instance.data[0])
    assert not model.report.converged
    instance, model = fits.fitted("ragged_last_batch", solver=quiet, on_failure="raise")
    with pytest.raises(inf.ConvergenceError):
        model.influences(*instance.data[0])


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"'raise', 'warn', 'ignore', got 'warning'.*'warn'"):
        small.model(on_failure="warning")


@dataclass(frozen=True)
class Loud:
    """A solver that warns of each right-hand side, and of something else."""

    fails: bool

    def fit(self, operator: inf.LinearOperator, regularization: float) -> LoudInverse:
        return LoudInverse(operator, regularization, self.fails)


@dataclass(frozen=True, eq=False)
class LoudInverse(Inverse):
    base: inf.LinearOperator
    regularization: float
    fails: bool

    def _solve(self, columns: torch.Tensor) -> inf.Solution:
        for index in range(columns.shape[1]):
            warnings.warn(f"number {index} did not converge", inf.ConvergenceWarning, stacklevel=2)
        warnings.warn("the operator is odd", UserWarning, stacklevel=2)
        count = columns.shape[1]
        reason = [inf.StopReason.ITERATION_LIMIT if self.fails else inf.StopReason.CONVERGED] * count
        return make_solution(columns.clone(), torch.full((count,), math.nan), reason)


def test_what_solvers_warn_of_by_themselves_is_gathered_and_nothing_is_lost() -> None:
    model = small.model(solver=Loud(fails=True)).fit(small.batches())
    with pytest.warns() as caught:
        model.influences(*small.points())
    texts = [str(warning.message) for warning in caught]
    assert "the operator is odd" in texts
    assert [w.category for w in caught].count(inf.ConvergenceWarning) == 1
    (line,) = [text for text in texts if "were not solved" in text]
    assert "number 0 did not converge" in line
    assert model.report.hints == tuple(f"number {index} did not converge" for index in range(4))
    model = small.model(solver=Loud(fails=False)).fit(small.batches())
    with pytest.warns() as caught:
        model.influences(*small.points())
    assert "number 3 did not converge" in [str(warning.message) for warning in caught]


def test_a_call_that_raises_leaves_its_report() -> None:
    @dataclass(frozen=True)
    class Broken:
        def fit(self, operator: inf.LinearOperator, regularization: float) -> Inverse:
            return BrokenInverse(operator, regularization)

    @dataclass(frozen=True, eq=False)
    class BrokenInverse(Inverse):
        base: inf.LinearOperator
        regularization: float

        def _solve(self, columns: torch.Tensor) -> inf.Solution:
            count = columns.shape[1]
            nothing = torch.full((count,), math.nan)
            return make_solution(columns * math.nan, nothing, [inf.StopReason.NOT_FINITE] * count)

    model = small.model(solver=Broken(), on_failure="ignore").fit(small.batches())
    with pytest.raises(inf.NonFiniteError):
        model.influences(*small.points())
    assert [reason.name for reason in model.report.blocks[0].reason] == ["NOT_FINITE"] * 4


def test_the_report_of_a_model_is_not_that_of_one_made_from_it() -> None:
    _, model = solved(solver="cg")
    other = model.with_regularization(1.0)
    assert len(other.report) == 0
    assert len(model.report) == 4


def test_a_report_is_a_table() -> None:
    _, model = solved(solver=LIMITED | {"maxiter": 2}, on_failure="ignore")
    header, line, _, *rest = str(model.report).splitlines()
    assert header.split()[:3] == ["block", "λ", "solver"]
    assert line.split()[0] == "full"
    assert len(rest) == 4
    worst = [float(text.split("residual ")[1].split(",")[0]) for text in rest]
    assert worst == sorted(worst, reverse=True)


def test_classification_with_a_hessian_reports_negative_curvature() -> None:
    torch.manual_seed(0)
    instance = cases.make("mse")
    model = inf.compose(
        instance.model, nn.MSELoss(), solver="cg", source="hessian", on_failure="ignore", preflight=False
    ).fit(instance.data)
    model.influence_factors(*instance.data[0])
    (block,) = model.report.blocks
    failed = [i for i, reason in enumerate(block.reason) if reason is inf.StopReason.NEGATIVE_CURVATURE]
    assert failed
    assert (block.curvature[failed, 0] <= 0).all()
