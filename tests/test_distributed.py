"""Several processes of ``torch.distributed``: the results of one, and no process that waits for ever."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import influence_framework as inf
from influence_framework.attribution import TorchDistributedExecutor
from tests import distributed_program as program
from tests.torchrun import found_by


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which the processes write to."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    return found_by(2, "tests.distributed_program", folder)


@cache
def alone(name: str) -> dict[str, Any]:
    """What one process finds."""
    return program.SOLVERS[name]("sequential")


SCORES = ("influences", "matrix", "compressed", "top_k", "self")


@pytest.mark.parametrize("name", program.SOLVERS)
class TestScores:
    def test_all_processes_have_the_same_bits(self, name: str, found: list[dict[str, Any]]) -> None:
        first, second = (results[name] for results in found)
        for what in (*SCORES, "which"):
            np.testing.assert_array_equal(first[what], second[what])

    def test_the_data_and_the_blocks_are_divided(self, name: str, found: list[dict[str, Any]]) -> None:
        assert [results[name]["read"] for results in found] == [31, 30]
        shares = [results[name]["scored"] for results in found]
        whole = alone(name)["scored"]
        assert shares == [32, 29]
        assert whole == 61


@pytest.mark.parametrize("name", program.SOLVERS)
def test_the_results_are_those_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    here, there = alone(name), found[0][name]
    for what in SCORES:
        # Sums in another order, through matrices whose condition number is below 1e4.
        np.testing.assert_allclose(
            there[what], here[what], rtol=0, atol=1e-10 * np.abs(here[what]).max(), err_msg=what
        )
    np.testing.assert_array_equal(there["which"], here["which"])


def test_random_mini_batches_lead_to_the_same_solution(found: list[dict[str, Any]]) -> None:
    here, (there, other) = program.RANDOM["lissa"]("sequential"), (results["lissa"] for results in found)
    np.testing.assert_array_equal(there, other)
    # Each is within its residual of the exact one.
    np.testing.assert_allclose(there, here, rtol=0, atol=3e-2 * np.abs(here).max())


def test_memory_that_runs_out_in_one_process_is_met_in_all(found: list[dict[str, Any]]) -> None:
    """They solve for as many samples at a time as the one has room for."""
    here = program.scarce("sequential")
    for results in found:
        np.testing.assert_allclose(results["scarce"], here, rtol=0, atol=1e-10 * np.abs(here).max())


def test_draws_are_others_of_the_same_distribution(found: list[dict[str, Any]]) -> None:
    name = "ekfac of drawn labels"
    here, (there, other) = program.RANDOM[name]("sequential"), (results[name] for results in found)
    np.testing.assert_array_equal(there, other)
    assert np.corrcoef(there.ravel(), here.ravel())[0, 1] > 0.9
    assert not np.allclose(there, here)


def test_without_the_sum_over_processes_results_are_wrong(found: list[dict[str, Any]]) -> None:
    here = alone("direct")["influences"]
    for results in found:
        there = results["no all-reduce"]
        assert np.abs(there - here).max() > 0.1 * np.abs(here).max()


FAILURES = {
    "NaN in one share": (
        "DistributedError: Stopped because another process failed: process 1: NonFiniteError: ",
        "NonFiniteError: ",
    ),
    "an error in the first pass": (
        "DistributedError: Stopped because another process failed: process 1: OSError: the disk is gone",
        "OSError: the disk is gone",
    ),
    "an error in a later pass": (
        "DistributedError: Stopped because another process failed: process 1: OSError: the disk is gone",
        "OSError: the disk is gone",
    ),
    "an error in one job": (
        "DistributedError: Stopped because another process failed: process 1: OSError: the disk is gone",
        "OSError: the disk is gone",
    ),
    "another order": ("InvalidInputError: The processes read different training data",) * 2,
    "another number": ("InvalidInputError: The processes read different training data",) * 2,
    "another model": ("DistributedError: The processes hold different numbers at the model with 43 parameters",)
    * 2,
    "other points": ("DistributedError: The processes hold different numbers at a curvature product",) * 2,
    "more points": (
        "DistributedError: The processes are not doing the same: process 0 is at a curvature product",
    )
    * 2,
    "other points to score": ("InvalidInputError: The training points of process",) * 2,
    "another call": ("DistributedError: The processes are not doing the same: process 0 is at the model",) * 2,
    "fewer samples than processes": (
        "InvalidInputError: 1 samples are too few for 2 processes: their shares are [1, 0].",
    )
    * 2,
    "a store that is refused": (
        "InvalidInputError: ",
        "DistributedError: Stopped because another process failed: process 0: InvalidInputError: ",
    ),
    "a folder that is refused": (
        "InvalidInputError: ",
        "DistributedError: Stopped because another process failed: process 0: InvalidInputError: ",
    ),
    "samples repeated by the sampler": ("InvalidInputError: The DistributedSampler repeats",) * 2,
}


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_process_fails_none_waits(name: str, found: list[dict[str, Any]]) -> None:
    # That the cases after it went well shows that all left this one at the same point.
    for results, said in zip(found, FAILURES[name], strict=True):
        assert str(results[name]).startswith(said)


def test_a_process_that_ended_is_told(found: list[dict[str, Any]]) -> None:
    assert found[0]["lost"].startswith(
        "DistributedError: Another process was lost, or did not come to the same"
    )
    assert "lost" not in found[1]


def test_data_that_is_divided_already(found: list[dict[str, Any]]) -> None:
    data = [(program.TRAIN[0][:60], program.TRAIN[1][:60])]
    expected = program.composed().fit(data).influences(*program.TEST).numpy()
    for results in found:
        np.testing.assert_allclose(results["a share each"], expected, rtol=1e-9)


def test_one_process_writes_the_store_and_all_read_it(found: list[dict[str, Any]]) -> None:
    for results in found:
        for what in ("first", "again"):
            np.testing.assert_array_equal(results["a store"][what], found[0]["a store"]["plain"])
        np.testing.assert_array_equal(results["a store"]["resumed"], found[0]["a store"]["table"])
        for what in ("lost", "lost again"):
            assert (results["a store"][what] > 0).all()
            np.testing.assert_array_equal(results["a store"][what], found[0]["a store"]["lost"])


def test_the_executor_passes_every_check_in_all_of_several_processes(found: list[dict[str, Any]]) -> None:
    for results in found:
        assert "12 of 12 checks passed" in results["the kit"], results["the kit"]


@pytest.mark.parametrize("solver", program.SAVED)
def test_what_several_processes_save_one_process_loads(
    solver: str, found: list[dict[str, Any]], folder: Path
) -> None:
    for results in found:
        assert not isinstance(results["saved"], str), results["saved"]
    path = folder / "saved" / solver
    assert len(list(path.iterdir())) == 3, "the manifest, the model's tensors and those of the inverse"
    data = program.batches(program.TRAIN, 9) if solver == "cg" else None
    again = inf.load(path, program.net(), nn.CrossEntropyLoss(), data)
    assert again.fitted.problem.processes is None
    expected = found[0]["saved"][solver]
    scores = again.influences(*program.TEST, *program.TRAIN).numpy()
    # Products with the curvature are summed in another order.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_the_command_speaks_once(found: list[dict[str, Any]]) -> None:
    first, second = (results["the command"] for results in found)
    assert first["status"] == second["status"] == 0, first["err"] + second["err"]
    assert "Scores (matrix) of 61 training points with 7 test points." in first["out"]
    assert second["out"] == second["err"] == ""


def test_without_a_group_the_remedy_is_named() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"torchrun --nproc-per-node=N .*init_process_group"):
        program.composed().fit(program.batches(program.TRAIN, 17), executor="torch_distributed")


def test_an_executor_that_cannot_fit_is_refused() -> None:
    class Scoring:
        def run(self, job: Any, units: Any) -> Any:
            return iter(())

    with pytest.raises(inf.MissingCapabilityError, match="Scoring computes scores and cannot fit"):
        program.composed().fit(program.batches(program.TRAIN, 17), executor=Scoring())


def test_its_options_are_listed() -> None:
    assert inf.executors["torch_distributed"].cls is TorchDistributedExecutor
    assert list(inf.executors["torch_distributed"].options) == ["group", "divided"]
