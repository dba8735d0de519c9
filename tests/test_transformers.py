"""Models of ``transformers`` as they are: every source, solver and block structure against dense references."""

from __future__ import annotations

from typing import Any

import pytest

import influence_framework as inf
from tests import language
from tests.language import ARCHITECTURES
from tests.reference import assert_close

STRUCTURES = ("full", "per_layer", "per_parameter")
WHOLE = 10_000
EXACT: dict[str, dict[str, Any]] = {
    "cg": {"name": "cg", "rtol": 1e-10, "atol": 0.0},
    "arnoldi": {"name": "arnoldi", "rank": WHOLE},
    "nystroem": {"name": "nystroem", "rank": WHOLE},
    "jacobi": {"name": "jacobi"},
    "lissa": {"name": "lissa", "scale": "auto", "rtol": 1e-3, "maxiter": 40},
}
LOOSE = {"lissa": 0.02}


def composed(name: str, data: Any = None, **options: Any) -> inf.TorchInfluenceFunctionModel:
    model = inf.compose(
        language.model(name),
        ARCHITECTURES[name].objective,
        **({"solver": "direct", "preflight": False} | options),
    )
    return model.fit(data or language.training(name))


@pytest.mark.parametrize("source", language.SOURCES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_source_and_block_structure(name: str, source: str) -> None:
    damping = language.strength(name, source)
    structure = STRUCTURES[list(language.SOURCES).index(source)]
    model = composed(name, source=source, blocks=structure, hessian_regularization=damping)
    found = model.influences(language.points(name, "test"), x=language.points(name, "train"))
    whole = language.inverse(name, language.dense(name, source), structure, damping)
    assert_close(found, language.scores(name, whole), ARCHITECTURES[name].tolerance)


# Eigenvalues of zero are noise where a model computes in single precision inside.
@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_solver(name: str, solver: str) -> None:
    damping = (100 if solver == "lissa" else 10) * language.strength(name, "gauss_newton")
    structure = "full" if solver in ("lissa", "jacobi") else "per_layer"
    model = composed(
        name,
        # LiSSA takes fewer steps where every batch is all data.
        [language.joined(language.training(name))] if solver == "lissa" else None,
        solver=EXACT[solver],
        source="gauss_newton",
        blocks=structure,
        hessian_regularization=damping,
        on_failure="ignore",
    )
    found = model.influences(language.points(name, "test"), x=language.points(name, "train"))
    curvature = language.dense(name, "gauss_newton")
    if solver == "jacobi":
        curvature = curvature.diag().diag()
    whole = language.inverse(name, curvature, structure, damping)
    assert_close(found, language.scores(name, whole), LOOSE.get(solver, ARCHITECTURES[name].tolerance))
