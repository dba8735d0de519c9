"""dattri 0.3.0. Its influence scores are products with the inverse of the curvature of the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from adapter import Method, Task
from dattri.algorithm.influence_function import (
    IFAttributorArnoldi,
    IFAttributorCG,
    IFAttributorDataInf,
    IFAttributorEKFAC,
    IFAttributorExplicit,
)
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader


def described(task: Task, batched: bool) -> tuple[AttributionTask, Any]:
    net, loss = task.model(), task.loss()

    def value(params: Any, data: Any) -> Any:
        x, y = data
        if not batched:
            x, y = x[None], y[None]
        return loss(torch.func.functional_call(net, params, x), y)

    def probability(params: Any, data: Any) -> Any:
        x, y = data
        return torch.exp(-loss(torch.func.functional_call(net, params, x[None]), y[None]))

    return AttributionTask(loss_func=value, model=net, checkpoints=task.checkpoints[0]), probability


def influence(make: Callable[[AttributionTask, float], Any]) -> Method:
    def method(task: Task, strength: float) -> Iterator[Any]:
        attributor = make(described(task, batched=True)[0], strength)
        attributor.cache(task.loader())
        yield
        # The products with the inverse are its first use of the curvature, whatever was cached.
        test = DataLoader(task.test, batch_size=len(task.test))
        yield task.pairs(attributor.attribute(task.loader(), test).T)

    return method


def trak(task: Task, strength: float) -> Iterator[Any]:
    described_task, probability = described(task, batched=False)
    size = sum(p.numel() for p in task.model().parameters())
    attributor = TRAKAttributor(
        described_task,
        probability,
        projector_kwargs={"proj_dim": 512, "device": "cpu", "proj_seed": 0, "proj_max_batch_size": 32},
        # Its matrix is a sum over samples of gradients divided by √P: the same λ in its units.
        regularization=strength * len(task.x) / size,
    )
    attributor.cache(task.loader())
    yield
    yield task.pairs(attributor.attribute(DataLoader(task.test, batch_size=len(task.test))).T)


METHODS = {
    "explicit": influence(lambda t, s: IFAttributorExplicit(t, regularization=s)),
    "cg": influence(lambda t, s: IFAttributorCG(t, regularization=s, max_iter=200, tol=1e-5)),
    "arnoldi": influence(lambda t, s: IFAttributorArnoldi(t, regularization=s, proj_dim=50, max_iter=100)),
    "datainf": influence(lambda t, s: IFAttributorDataInf(t, regularization=s)),
    "ekfac": influence(lambda t, s: IFAttributorEKFAC(t, damping=s)),
    "trak": trak,
}
