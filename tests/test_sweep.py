"""``explore_hessian_regularization``: scores at several λ equal one model fitted for each."""

from __future__ import annotations

import pytest
import torch

import influence_framework as inf
from influence_framework import fitted as fits
from influence_framework.compose import Spec
from tests import cases, small
from tests.fits import STRUCTURES, compose, fitted, strength
from tests.reference import assert_close

FACTORS = (1.0, 0.03, 30.0)


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("structure", ["full", "per_layer", "interleaved"])
@pytest.mark.parametrize("solver", ["direct", {"name": "cg", "rtol": 1e-12, "atol": 0.0}, "jacobi"])
def test_equals_one_fit_for_each(solver: Spec, structure: str, mode: str) -> None:
    name = "ragged_last_batch"
    values = [factor * strength(name) for factor in FACTORS]
    instance, influence = fitted(name, structure, solver=solver)
    for few, many in ((3, 7), (7, 3)):
        test, train = cases.points(name, few, 1), cases.points(name, many, 2)
        swept = influence.explore_hessian_regularization(*test, values, *train, mode=mode)
        assert list(swept) == values
        for value, scores in swept.items():
            blocks = STRUCTURES[structure][0]([n for n, _ in instance.model.named_parameters()])
            alone = compose(instance, solver=solver, blocks=blocks, hessian_regularization=value)
            expected = alone.fit(instance.data).influences_by_block(*test, *train, mode=mode)
            assert list(scores) == list(expected)
            for block in expected:
                assert_close(scores[block], expected[block], 1e-7, f"λ = {value}, block {block}")


def test_test_points_stand_in_for_training_points() -> None:
    influence = small.fitted()
    test = small.points()
    swept = influence.explore_hessian_regularization(*test, 0.1)
    assert_close(swept[0.1]["full"], influence.influences(*test), 1e-12)


def test_a_small_budget_gives_the_same() -> None:
    name = "ragged_last_batch"
    values = [factor * strength(name) for factor in FACTORS]
    test, train = cases.points(name, 6, 1), cases.points(name, 7, 2)
    whole = fitted(name)[1].explore_hessian_regularization(*test, values, *train)
    pieces = fitted(name, memory_budget=2**14)[1].explore_hessian_regularization(*test, values, *train)
    for value in values:
        assert_close(pieces[value]["full"], whole[value]["full"], 1e-11)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one λ"),
        ([0.1, -1.0], "finite and not negative"),
        ([float("nan")], "finite and not negative"),
    ],
)
def test_what_is_no_list_of_regularisations_is_refused(values: list[float], message: str) -> None:
    with pytest.raises(inf.InvalidInputError, match=message):
        small.fitted().explore_hessian_regularization(*small.points(), values)


def test_an_unfitted_model_is_refused() -> None:
    with pytest.raises(inf.NotFittedError):
        small.model().explore_hessian_regularization(*small.points(), [0.1])


def test_the_gradients_are_computed_once_for_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = fits.sample_gradients

    def counted(problem: inf.Problem, parameters: inf.ParameterSpace, batch: object) -> torch.Tensor:
        calls.append(1)
        return original(problem, parameters, batch)

    influence = small.fitted()
    monkeypatch.setattr(fits, "sample_gradients", counted)
    influence.explore_hessian_regularization(*small.points(), [0.1, 0.2, 0.3, 0.4])
    assert len(calls) == 1
