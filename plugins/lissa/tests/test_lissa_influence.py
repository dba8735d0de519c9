"""``lissa`` on models: real mini-batches, scores against dense references, and the documented class."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from influence_framework_lissa import LissaInfluence, LissaSolver
from torch import nn

import influence_framework as inf
from influence_framework import ConvergenceWarning, IndefiniteOperatorWarning, InvalidInputError, StopReason
from tests import cases, reference
from tests.cases import Instance

FLOAT = torch.float64


def regression(samples: int = 400, batch_size: int = 25, spread: float = -0.7) -> Instance:
    """Least squares on five features whose standard deviations fall from 1 to ``10^spread``; six parameters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, generator=generator, dtype=FLOAT) * torch.logspace(0, spread, 5, dtype=FLOAT)
    y = x.sum(1, keepdim=True) + torch.randn(samples, 1, generator=generator, dtype=FLOAT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(5, 1).double()
    return Instance(model, nn.MSELoss(), list(zip(x.split(batch_size), y.split(batch_size), strict=True)))


def points(instance: Instance) -> Any:
    """The first seven training points."""
    x, y = zip(*instance.data, strict=True)
    return torch.cat(x)[:7], torch.cat(y)[:7]


def dense_scores(instance: Instance, curvature: torch.Tensor, regularization: float) -> torch.Tensor:
    """Scores of those points on each other."""
    damped = curvature + regularization * torch.eye(len(curvature), dtype=FLOAT)
    rows = reference.gradients(instance.model, instance.loss, [points(instance)])
    return reference.up_scores(torch.linalg.inv(damped), rows, rows)


def solve(
    instance: Instance, regularization: float, source: str = "gauss_newton", **options: Any
) -> inf.Solution:
    """The solution for the gradients of those points."""
    operator = cases.operator(source, cases.problem(instance))
    b = reference.gradients(instance.model, instance.loss, [points(instance)]).T
    return LissaSolver(**options).fit(operator, regularization).solve(b)


def test_pitfall_six_parameters_at_a_fixed_scale() -> None:
    """At the scale 10 the plain recursion leaves a large error after 500 iterations, and must say so."""
    instance = regression(spread=-1.0)
    expected = dense_scores(instance, reference.hessian(instance.model, instance.loss, instance.data), 1e-3)

    def error(**options: Any) -> float:
        solver = LissaSolver(**options)
        model = inf.compose(
            instance.model, instance.loss, solver=solver, source="hessian", hessian_regularization=1e-3
        ).fit(instance.data)
        return reference.relative_error(model.influences(*points(instance)), expected)

    with pytest.warns(ConvergenceWarning, match="reached the iteration limit"):
        assert error(scale=10.0, averaging=None, maxiter=500) > 0.05
    assert error(maxiter=500) < 1e-3


def test_noise_of_real_mini_batches_falls_with_more_iterations() -> None:
    instance = regression()
    options = {"rtol": 0.0, "warn_on_max_iteration": False}

    def residual(maxiter: int, averaging: int | None) -> float:
        return solve(instance, 1e-3, maxiter=maxiter, averaging=averaging, **options).residual.max().item()

    falling = [residual(maxiter, 32) for maxiter in (20, 60, 180)]
    assert all(later < 0.5 * earlier for earlier, later in pairwise(falling))
    assert falling[-1] < 1e-2
    assert min(residual(maxiter, None) for maxiter in (20, 180)) > 0.1


@pytest.mark.parametrize("batch_size", [1, 7, 100, 400], ids=["single", "ragged", "four", "whole"])
def test_linear_models_converge_without_tuning(batch_size: int) -> None:
    instance = regression(batch_size=batch_size, spread=-0.2)
    solution = solve(instance, 1e-2, maxiter=20_000, rtol=1e-3)
    assert solution.converged.all()
    assert (solution.residual <= 1e-3).all()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ragged_last_batch", "gauss_newton"),
        ("wildly_different_batches", "empirical_fisher"),
        ("conv", "gauss_newton"),
    ],
)
def test_nets_converge_without_tuning_to_the_dense_scores(name: str, source: str) -> None:
    instance = cases.make(name)
    curvature = cases.dense(name, source)
    strength = 0.03 * torch.linalg.eigvalsh(curvature)[-1].item()
    model = inf.compose(
        instance.model,
        instance.loss,
        solver=LissaSolver(maxiter=20_000),
        source=source,
        hessian_regularization=strength,
    ).fit(instance.data)
    expected = dense_scores(instance, curvature, strength)
    # Condition number 30 times the tolerance.
    reference.assert_close(model.influences(*points(instance)), expected, 3e-3, f"scores of {name}")


@pytest.mark.parametrize("scale", ["auto", 50.0])
def test_indefinite_hessian_of_a_net_is_said_to_be_indefinite(scale: float | str) -> None:
    curvature = cases.dense("ragged_last_batch", "hessian")
    lowest = torch.linalg.eigvalsh(curvature)[0].item()
    assert lowest < 0
    with pytest.warns(IndefiniteOperatorWarning, match="every scale"), pytest.warns(ConvergenceWarning):
        solution = solve(cases.make("ragged_last_batch"), -0.2 * lowest, "hessian", scale=scale, maxiter=20_000)
    assert StopReason.NEGATIVE_CURVATURE in solution.reason
    assert torch.isfinite(solution.value).all()
    definite = solve(cases.make("ragged_last_batch"), -2.0 * lowest, "hessian", maxiter=20_000)
    assert definite.converged.all()


def test_float32_models() -> None:
    instance = cases.make("ragged_last_batch")
    curvature = cases.dense("ragged_last_batch", "gauss_newton")
    strength = 0.1 * torch.linalg.eigvalsh(curvature)[-1].item()
    single = instance.to(torch.float32)
    model = inf.compose(
        single.model, single.loss, solver=LissaSolver(maxiter=20_000), hessian_regularization=strength
    ).fit(single.data)
    scores = model.influences(*points(single))
    assert scores.dtype == torch.float32
    reference.assert_close(scores, dense_scores(instance, curvature, strength), 1e-2)


def test_documented_class_has_the_documented_parameters() -> None:
    parameters = inspect.signature(LissaInfluence).parameters
    positional = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == {
        "model": inspect.Parameter.empty,
        "loss": inspect.Parameter.empty,
        "hessian_regularization": 0.0,
        "maxiter": 1000,
        "dampen": 0.0,
        "scale": 10.0,
        "h0": None,
        "rtol": 1e-4,
        "progress": False,
        "warn_on_max_iteration": True,
    }
    keyword = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword == ["source", "blocks", "memory_budget", "seed"]


def test_documented_class_scores_by_the_hessian() -> None:
    instance = regression(spread=-0.4)
    model = LissaInfluence(instance.model, instance.loss, 1e-2, scale=3.0).fit(instance.data)
    expected = dense_scores(instance, reference.hessian(instance.model, instance.loss, instance.data), 1e-2)
    reference.assert_close(model.influences(*points(instance)), expected, 1e-3)
    assert isinstance(model, inf.TorchInfluenceFunctionModel)


def test_documented_class_passes_everything_on() -> None:
    instance, guess = regression(), torch.ones(6, dtype=FLOAT)
    model = LissaInfluence(
        instance.model, instance.loss, 0.5, 7, 0.1, 3.0, guess, 1e-3, True, False,
        source={"name": "gauss_newton", "precompute_grad": True}, blocks="per_layer", memory_budget=2**20,
        seed=4,
    )  # fmt: skip
    assert model.solver == LissaSolver(
        maxiter=7, dampen=0.1, scale=3.0, rtol=1e-3, progress=True, warn_on_max_iteration=False, seed=4
    )
    assert model.solver.h0 is guess
    assert model.source == inf.hessian_sources["gauss_newton"].create(precompute_grad=True)
    assert (model.hessian_regularization, model.blocks, model.memory_budget) == (0.5, "per_layer", 2**20)
    with pytest.raises(InvalidInputError, match="scale"):
        LissaInfluence(instance.model, instance.loss, scale=-1.0)
