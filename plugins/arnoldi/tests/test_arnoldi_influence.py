"""Scores through ``arnoldi``, and the documented class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import influence_framework_arnoldi
import pytest
import torch
from influence_framework_arnoldi import ArnoldiInfluence, ArnoldiSolver
from torch import nn

import influence_framework as inf
from tests import cases, fits, reference, small


def compose(name: str, **options: Any) -> tuple[cases.Instance, inf.TorchInfluenceFunctionModel]:
    instance = cases.make(name)
    settings = {"solver": ArnoldiSolver(rank=100), "hessian_regularization": fits.strength(name)} | options
    return instance, inf.compose(instance.model, instance.loss, **settings).fit(instance.data)


@pytest.mark.parametrize("structure", ["full", "per_layer", "per_parameter"])
@pytest.mark.parametrize("name", ["ragged_last_batch", "conv", "mse"])
def test_all_eigenpairs_give_the_exact_scores(name: str, structure: str) -> None:
    instance = cases.make(name)
    names = list(reference.trainable(instance.model))
    instance, influence = compose(name, blocks=fits.STRUCTURES[structure][0](names))
    x_test, y_test = cases.points(name, 4, seed=1)
    blocks = fits.STRUCTURES[structure][1](names)
    strengths = dict.fromkeys(blocks, fits.strength(name))
    inverses = reference.block_inverse(
        instance.model, cases.dense(name, "gauss_newton"), blocks, strengths
    ).values()
    test = reference.gradients(instance.model, instance.loss, [(x_test, y_test)])
    train = reference.gradients(instance.model, instance.loss, instance.data[:1])
    expected = reference.up_scores(sum(inverses, torch.zeros(())), test, train)
    reference.assert_close(influence.influences(x_test, y_test, *instance.data[0]), expected, 1e-8)


def test_a_few_eigenpairs_of_a_net_by_products() -> None:
    """The rank below half of the parameters, so that no matrix is formed."""
    name = "ragged_last_batch"
    instance, influence = compose(
        name, solver=ArnoldiSolver(rank=4, krylov_dimension=12, tol=1e-10), hessian_regularization=0.05
    )
    curvature = cases.dense(name, "gauss_newton")
    values, vectors = torch.linalg.eigh(curvature)
    values[:-4] = 0.0
    inverse = vectors @ torch.diag(1 / (values + 0.05)) @ vectors.T
    test = reference.gradients(instance.model, instance.loss, instance.data[:1])
    reference.assert_close(
        influence.influences(*instance.data[0]), reference.up_scores(inverse, test, test), 1e-8
    )


def test_it_registers_under_its_name() -> None:
    registered: dict[str, type[Any]] = {}
    influence_framework_arnoldi.register_solvers(registered.__setitem__)
    assert registered == {"arnoldi": ArnoldiSolver}


def test_gauss_newton_is_the_source_where_none_is_named() -> None:
    assert type(small.model(solver=ArnoldiSolver()).source).__name__ == "GaussNewton"


def test_pitfall_a_net_with_an_indefinite_hessian_is_reported() -> None:
    strength = {"hessian_regularization": 1e-4, "preflight": False}
    model = small.model(solver=ArnoldiSolver(rank=100), source="hessian", **strength)
    with pytest.warns(inf.IndefiniteOperatorWarning, match=r"lie below −λ.*gauss_newton"):
        model.fit(small.batches())
    # Warnings are errors here.
    small.fitted(solver=ArnoldiSolver(rank=100), source="hessian", hessian_regularization=1.0)


def documented(**options: Any) -> ArnoldiInfluence:
    return ArnoldiInfluence(small.net(), nn.CrossEntropyLoss(), **({"hessian_regularization": 1.0} | options))


def test_constructor_is_the_documented_one() -> None:
    parameters = inspect.signature(ArnoldiInfluence.__init__).parameters
    positional = {
        name: p.default for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    empty = inspect.Parameter.empty
    assert list(positional.items()) == [
        ("self", empty),
        ("model", empty),
        ("loss", empty),
        ("hessian_regularization", 0.0),
        ("rank_estimate", 10),
        ("krylov_dimension", None),
        ("tol", 1e-6),
        ("max_iter", None),
        ("eigen_computation_on_gpu", False),
        ("precompute_grad", False),
    ]


def test_documented_class_is_the_composition() -> None:
    options = {"krylov_dimension": 9, "tol": 1e-4, "max_iter": 7, "seed": 3}
    model = documented(
        rank_estimate=4, precompute_grad=True, blocks="per_layer", memory_budget=2**20, **options
    )
    assert model.solver == ArnoldiSolver(rank=4, **options)
    assert model.source == inf.hessian_sources["hessian"].create(precompute_grad=True)
    assert (model.blocks, model.memory_budget) == ("per_layer", 2**20)
    assert documented().solver == ArnoldiSolver()
    assert documented().source == inf.hessian_sources["hessian"].create()
    x, y = small.points()
    composed = small.fitted(
        solver=model.solver, source="hessian", blocks="per_layer", hessian_regularization=1.0
    )
    torch.testing.assert_close(model.fit(small.batches()).influences(x, y), composed.influences(x, y))


def test_documented_class_on_the_gpu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(inf.InvalidInputError, match="needs a CUDA device"):
        documented(eigen_computation_on_gpu=True).fit(small.batches())


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: documented(rank_estimate=0), "rank must be an integer of at least 1"),
        (
            lambda: documented(source=inf.hessian_sources["hessian"].create(), precompute_grad=True),
            r"set it on the instance: Hessian\(precompute_grad=True\)",
        ),
    ],
)
def test_documented_class_refuses_what_cannot_be(action: Callable[[], object], message: str) -> None:
    with pytest.raises(inf.InvalidInputError, match=message):
        action()
