"""Every composition of this framework that is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapter import Method, Task
from torch import Tensor

import influence_framework as inf

ENSEMBLE = 5


def fitted(task: Task, checkpoint: int, options: dict[str, Any], strength: float) -> Any:
    # LiSSA takes mini-batches as they come; all others see one.
    size = 100 if "lissa" in str(options) else len(task.x)
    batches = list(zip(task.x.split(size), task.y.split(size), strict=True))
    model = inf.compose(
        task.model(checkpoint),
        task.loss(),
        **options,
        hessian_regularization=strength,
        on_failure="ignore",
        preflight=False,
    )
    return model.fit(batches)


def scored(task: Task, model: Any) -> Tensor:
    scores: Tensor = (
        model.self_influences(task.x, task.y)
        if task.measure == "self"
        else model.influences(task.x_test, task.y_test, task.x, task.y)
    )
    return scores


def composition(**options: Any) -> Method:
    def method(task: Task, strength: float) -> Iterator[Any]:
        model = fitted(task, 0, options, strength)
        yield
        yield scored(task, model)

    return method


def ensemble(**options: Any) -> Method:
    def method(task: Task, strength: float) -> Iterator[Any]:
        if len(task.checkpoints) < ENSEMBLE:
            raise ValueError("a single optimum: all seeds end at the same parameters")
        model = inf.ensemble([fitted(task, i, options, strength) for i in range(ENSEMBLE)])
        yield
        yield scored(task, model)

    return method


def advised(task: Task, strength: float) -> Iterator[Any]:
    """What ``inf.advise`` recommends, the time it takes to say so included."""
    batches = [(task.x, task.y)]
    model, own = task.model(0), task.measure == "self"
    advice = inf.advise(
        model, task.loss(), batches, n_test=len(task.x if own else task.x_test), hessian_regularization=strength
    )
    composed = advice.compose(on_failure="ignore", preflight=False).fit(batches)
    yield
    yield scored(task, composed)


CG = {"name": "cg", "rtol": 1e-3, "maxiter": 200, "block": True}
METHODS = {
    "direct, gauss_newton": composition(solver="direct", source="gauss_newton"),
    "direct, hessian": composition(solver="direct", source="hessian"),
    "direct, empirical_fisher": composition(solver="direct", source="empirical_fisher"),
    "direct per layer, gauss_newton": composition(solver="direct", source="gauss_newton", blocks="per_layer"),
    "cg, gauss_newton": composition(solver=CG, source="gauss_newton"),
    "nystroem, gauss_newton": composition(solver={"name": "nystroem", "rank": 100}, source="gauss_newton"),
    "arnoldi, gauss_newton": composition(solver={"name": "arnoldi", "rank": 50}, source="gauss_newton"),
    "lissa, gauss_newton": composition(solver={"name": "lissa", "scale": "auto"}, source="gauss_newton"),
    "ekfac": composition(solver="ekfac"),
    "ekfac, exact expectations": composition(solver={"name": "ekfac", "samples": "exact"}),
    "kfac": composition(solver="kfac"),
    "as advised": advised,
    "direct, gauss_newton, 5 nets": ensemble(solver="direct", source="gauss_newton"),
    "ekfac, 5 nets": ensemble(solver="ekfac"),
}
