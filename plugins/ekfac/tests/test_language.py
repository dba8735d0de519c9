"""Kronecker factors of models of ``transformers`` as they are, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import influence_framework as inf
from plugins.ekfac.tests import language_factors
from tests import language
from tests.language import ARCHITECTURES
from tests.reference import assert_close

STRENGTH = 0.05


def fitted(
    name: str, solver: str = "ekfac", data: Any = None, **options: Any
) -> inf.TorchInfluenceFunctionModel:
    model = inf.compose(
        language.model(name),
        ARCHITECTURES[name].objective,
        solver={"name": solver, "samples": "exact", "uncovered": "diagonal", "score_rtol": 0.0},
        hessian_regularization=STRENGTH,
        preflight=False,
        **({"source": "gauss_newton", "blocks": "per_layer"} | options),
    )
    return model.fit(data or language.training(name))


@pytest.mark.parametrize(
    ("solver", "source"), [("ekfac", "gauss_newton"), ("ekfac", "empirical_fisher"), ("kfac", "gauss_newton")]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_the_definition(name: str, solver: str, source: str) -> None:
    curvature = language_factors.curvature(name, source, refit=solver == "ekfac")
    damped = curvature + STRENGTH * torch.eye(len(curvature), dtype=curvature.dtype)
    expected = language.scores(name, torch.linalg.inv(damped))
    model = fitted(name, solver, source=source)
    found = model.influences(language.points(name, "test"), x=language.points(name, "train"))
    assert torch.linalg.eigvalsh(curvature)[-1] > 2 * STRENGTH
    assert_close(found, expected, ARCHITECTURES[name].tolerance)


def test_every_parameter_has_a_layer_but_those_that_no_module_is_applied_with() -> None:
    outside = {}
    for name in ARCHITECTURES:
        problem = inf.Problem.build(
            language.model(name),
            inf.objectives[ARCHITECTURES[name].objective].create(),
            language.training(name),
        )
        source = inf.hessian_sources["gauss_newton"].create()
        outside[name] = list(source.operator(problem, problem.parameters).cover().uncovered)
    vit = [f"vit.embeddings.{name}" for name in ("cls_token", "position_embeddings")]
    assert outside == {key: [] for key in ARCHITECTURES} | {"vit": vit}
