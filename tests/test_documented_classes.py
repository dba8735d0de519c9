"""The documented influence classes: their constructors, and that each is the composition it says it is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from influence_framework_arnoldi import ArnoldiInfluence
from influence_framework_cg import CgInfluence, CgSolver, JacobiSolver
from influence_framework_direct import DirectInfluence
from influence_framework_lissa import LissaInfluence
from influence_framework_nystroem import NystroemSketchInfluence

import influence_framework as inf
from influence_framework.sources import GaussNewton, Hessian
from tests import table
from tests.reference import assert_close

REQUIRED = inspect.Parameter.empty
START = {"model": REQUIRED, "loss": REQUIRED, "hessian_regularization": 0.0}
LAST = {"progress": False, "warn_on_max_iteration": True}
DOCUMENTED: dict[type[inf.TorchInfluenceFunctionModel], dict[str, Any]] = {
    DirectInfluence: START,
    CgInfluence: START
    | {"x0": None, "rtol": 1e-7, "atol": 1e-7, "maxiter": None, "progress": False, "precompute_grad": False}
    | {"pre_conditioner": None, "use_block_cg": False, "warn_on_max_iteration": True},
    LissaInfluence: START | {"maxiter": 1000, "dampen": 0.0, "scale": 10.0, "h0": None, "rtol": 1e-4} | LAST,
    ArnoldiInfluence: START
    | {"rank_estimate": 10, "krylov_dimension": None, "tol": 1e-6, "max_iter": None}
    | {"eigen_computation_on_gpu": False, "precompute_grad": False},
    NystroemSketchInfluence: START | {"hessian_regularization": REQUIRED, "rank": REQUIRED},
}


@pytest.mark.parametrize("cls", DOCUMENTED, ids=lambda cls: cls.__name__)
def test_the_constructor_is_the_documented_one(cls: type[inf.TorchInfluenceFunctionModel]) -> None:
    parameters = list(inspect.signature(cls).parameters.values())
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    extras = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert list(positional.items()) == list(DOCUMENTED[cls].items())
    assert extras["source"] == "hessian"
    assert extras["blocks"] == "full"


@pytest.mark.parametrize("blocks", ["full", "per_layer"])
@pytest.mark.parametrize("source", ["hessian", "gauss_newton"])
def test_direct_and_cg_equal_what_they_compose(source: str, blocks: str) -> None:
    instance = table.instance("linear")
    test, train = table.points("linear", 3, 1), table.points("linear", 6, 2)
    options: dict[str, Any] = {"source": source, "blocks": blocks}
    expected = inf.compose(
        instance.model, instance.loss, solver="direct", hessian_regularization=table.STRENGTH, **options
    ).fit(instance.data)
    start = (instance.model, instance.loss, table.STRENGTH)
    for made in (
        DirectInfluence(*start, **options),
        CgInfluence(*start, None, 1e-11, 0.0, **options),
        CgInfluence(*start, None, 1e-11, 0.0, None, False, True, "jacobi", True, **options),
    ):
        scores = made.fit(instance.data).influences(*test, *train)
        assert_close(scores, expected.influences(*test, *train), 1e-8)


def test_the_options_of_cg_reach_the_solver_and_the_source() -> None:
    instance, guess = table.instance("linear"), torch.zeros(31, dtype=torch.float64)
    made = CgInfluence(
        instance.model,
        instance.loss,
        x0=guess,
        rtol=1e-3,
        atol=1e-4,
        maxiter=7,
        progress=True,
        precompute_grad=True,
        pre_conditioner={"name": "jacobi", "probes": 9},
        use_block_cg=True,
        warn_on_max_iteration=False,
    )
    assert made.solver == CgSolver(1e-3, 1e-4, 7, JacobiSolver(9), guess, True, True, False)
    assert made.solver.x0 is guess  # type: ignore[attr-defined]
    assert made.source == Hessian(precompute_grad=True)


def test_precompute_grad_goes_with_a_name_and_not_with_an_instance() -> None:
    instance = table.instance("linear")
    made = CgInfluence(instance.model, instance.loss, precompute_grad=True, source={"name": "gauss_newton"})
    assert made.source == GaussNewton(precompute_grad=True)
    with pytest.raises(inf.InvalidInputError, match=r"GaussNewton\(precompute_grad=True\)"):
        CgInfluence(instance.model, instance.loss, precompute_grad=True, source=GaussNewton())
