"""pydvl 0.10.0. Its scores have the signs and units of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from adapter import Method, Task
from pydvl.influence.torch import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    NystroemSketchInfluence,
    SecondOrderMode,
)


def influence(make: Callable[[Task, float], Any]) -> Method:
    def method(task: Task, strength: float) -> Iterator[Any]:
        model = make(task, strength).fit(task.loader())
        yield
        x, y = task.test.tensors
        if task.measure == "self":
            yield task.pairs(model.influences(x, y, task.x, task.y))
        # Training points in parts: all at once it takes many times as long.
        factors = model.influence_factors(x, y)
        parts = zip(task.x.split(100), task.y.split(100), strict=True)
        yield torch.cat([model.influences_from_factors(factors, *part) for part in parts], dim=1)

    return method


METHODS = {
    "direct, hessian": influence(lambda t, s: DirectInfluence(t.model(), t.loss(), regularization=s)),
    "direct, gauss_newton": influence(
        lambda t, s: DirectInfluence(
            t.model(), t.loss(), regularization=s, second_order_mode=SecondOrderMode.GAUSS_NEWTON
        )
    ),
    "cg, gauss_newton": influence(
        lambda t, s: CgInfluence(
            t.model(),
            t.loss(),
            regularization=s,
            rtol=1e-3,
            maxiter=200,
            solve_simultaneously=True,
            second_order_mode=SecondOrderMode.GAUSS_NEWTON,
        )
    ),
    "arnoldi": influence(lambda t, s: ArnoldiInfluence(t.model(), t.loss(), regularization=s, rank=50)),
    "nystroem": influence(
        lambda t, s: NystroemSketchInfluence(t.model(), t.loss(), regularization=s, rank=100)
    ),
    "harmonic mean": influence(
        lambda t, s: InverseHarmonicMeanInfluence(t.model(), t.loss(), regularization=s)
    ),
    "ekfac": influence(lambda t, s: EkfacInfluence(t.model(), update_diagonal=True, hessian_regularization=s)),
}
