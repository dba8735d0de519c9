"""The conformance kit on solvers and preconditioners: each fault fails its own check, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from influence_framework.testing import (
    ConformanceError,
    ConformanceReport,
    check_preconditioner,
    check_solver,
    preconditioner_report,
    solver_report,
)
from tests import faulty_solvers as faulty
from tests.faulty_solvers import Approximate, Exact, Kept

FAULTS = {
    "symmetric": [Approximate(faulty.SkewInverse)],
    "positive_definite": [Approximate(faulty.NegativeInverse)],
    "agrees_with_dense_inverse": [Exact(faulty.RegularizationAloneInverse)],
    "products_are_columnwise": [Exact(faulty.SurplusAsZerosInverse), Exact(faulty.WrongAxisInverse)],
    "vectors_stay_vectors": [Exact(faulty.VectorsAsColumnsInverse)],
    "no_columns_give_none": [Exact(faulty.AtLeastOneColumnInverse)],
    "solve_equals_product": [Exact(faulty.SolvesOtherwiseInverse)],
    "each_column_by_its_own_norm": [Exact(faulty.ToleranceOnTheWholeInverse)],
    "deterministic": [Exact(faulty.UnseededInverse)],
    "global_random_state_untouched": [
        Exact(faulty.TorchDrawingInverse),
        Exact(faulty.NumpyDrawingInverse),
        Exact(faulty.PythonDrawingInverse),
    ],
    "another_regularization": [Exact(faulty.KeepsItsLambdaInverse), Exact(faulty.MovesItselfInverse)],
    "sweep": [Exact(faulty.SortingSweepInverse)],
    "restored_equals_saved": [
        Kept(faulty.RoundsWhatItSavesInverse),
        faulty.RestoresAtOneLambda(),
        Exact(faulty.KeptInverse),
    ],
    "dtype_and_device_kept": [Exact(faulty.LosesDtypeInverse)],
    "products_asked_in_own_dtype": [faulty.AsksInDouble()],
    "inputs_not_written_to": [Exact(faulty.WritesToItsInputInverse)],
    "results_are_the_callers": [Exact(faulty.HandsOutItsMemoryInverse)],
    "solution_is_complete": [
        Exact(faulty.NegativeIterationsInverse),
        Exact(faulty.SinglePrecisionResidualInverse),
    ],
    "claimed_residual_is_the_true_one": [Exact(faulty.MadeUpResidualInverse)],
    "converged_means_solved": [Exact(faulty.NeverConvergedInverse), Exact(faulty.FlagAgainstReasonInverse)],
    "indefinite_is_reported": [Exact(faulty.ClampingInverse), Approximate(faulty.UnmeasuredInverse)],
    "indefinite_is_solved_where_taken": [faulty.Taking(faulty.GivesUpInverse)],
    "singular_is_reported": [
        Exact(faulty.PseudoInverse),
        faulty.ApproximateTaking(faulty.UnmeasuredAtZeroInverse),
    ],
    "zero_gives_zero": [Exact(faulty.DropsZerosInverse), Exact(faulty.ZeroNeverConvergesInverse)],
    "nan_is_reported": [Exact(faulty.SpreadsNanInverse), Exact(faulty.CallsNanSolvedInverse)],
    "every_block_structure": [faulty.MixesBlocks()],
    "options_make_an_equal_instance": [faulty.WithoutEquality(), faulty.WithoutRepr()],
    "its_cost_makes_sense": [faulty.NegativeCost()],
}
PRECONDITIONER_FAULTS = {
    "called_fixed": [faulty.NotFixed()],
    "symmetric": [Approximate(faulty.SkewInverse)],
    "positive_definite": [Approximate(faulty.NegativeButForThatFormInverse)],
    "linear": [Approximate(faulty.NonlinearInverse)],
    "preconditioned_spectrum_is_positive": [Approximate(faulty.LosesDefinitenessInverse)],
    "preconditioner_form_is_positive_definite": [Approximate(faulty.VanishesWithLambdaInverse)],
}


def cases(faults: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(solver, name, id=getattr(solver, "inverse", type(solver)).__name__ + type(solver).__name__)
        for name, solvers in faults.items()
        for solver in solvers
    ]


def failed(report: ConformanceReport) -> set[str]:
    return {result.name for result in report.failures}


CORRECT = {
    "exact": Exact(),
    "approximate": Approximate(),
    "kept": Kept(faulty.KeptInverse),
    "takes indefinite systems": faulty.Taking(),
    "stands for them": faulty.ApproximateTaking(faulty.UnmeasuredInverse),
    "gives them up": Exact(faulty.GivesUpInverse),
}


@pytest.mark.parametrize("solver", CORRECT.values(), ids=CORRECT)
def test_a_correct_solver_passes_every_check(solver: Any) -> None:
    check_solver(solver)


def test_a_correct_preconditioner_passes_every_check() -> None:
    check_preconditioner(Approximate())


@pytest.mark.parametrize(("solver", "name"), cases(FAULTS))
def test_a_fault_fails_its_own_check_alone(solver: Any, name: str) -> None:
    report = solver_report(solver)
    assert failed(report) == {name}, str(report)


@pytest.mark.parametrize(("solver", "name"), cases(PRECONDITIONER_FAULTS))
def test_a_fault_of_a_preconditioner_fails_its_own_check_alone(solver: Any, name: str) -> None:
    report = preconditioner_report(solver)
    assert failed(report) == {name}, str(report)


def test_every_check_of_a_solver_has_a_fault() -> None:
    assert {result.name for result in solver_report(Exact()).results} == set(FAULTS)


def test_every_check_of_a_preconditioner_has_a_fault() -> None:
    names = {result.name for result in preconditioner_report(Approximate()).results}
    assert names == set(PRECONDITIONER_FAULTS) | (names & set(FAULTS))


def test_the_error_is_an_assertion_with_the_table_and_the_numbers() -> None:
    with pytest.raises(AssertionError, match="27 of 28 checks passed") as caught:
        check_solver(Exact(faulty.SurplusAsZerosInverse))
    assert isinstance(caught.value, ConformanceError)
    (failure,) = caught.value.report.failures
    assert failure.name == "products_are_columnwise"
    assert failure.requirement.startswith("A product with k columns is that with each of them")
    assert "k = 15, column 10: apart by" in failure.numbers
    assert failure.numbers.splitlines()[0] in str(caught.value)


def test_an_exception_fails_the_check_it_is_raised_in_and_no_other() -> None:
    report = solver_report(Exact(faulty.AtLeastOneColumnInverse))
    assert [result.numbers for result in report.failures] == ["AssertionError: "]


def test_an_accuracy_can_be_asked_of_an_approximation() -> None:
    assert failed(solver_report(Approximate(), accuracy=1e-6)) >= {"agrees_with_dense_inverse"}
    assert failed(solver_report(Exact(faulty.MadeUpResidualInverse), accuracy=1e-9)) >= {
        "agrees_with_dense_inverse"
    }
