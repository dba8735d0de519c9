"""captum 0.9.0: curvatures of the summed loss, hence λ times the number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from adapter import Method, Task
from captum.influence import TracInCP

# Documented, but not exported.
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from captum.influence._core.influence_function import NaiveInfluenceFunction


def load(model: Any, state: str) -> float:
    model.load_state_dict(torch.load(state))
    return 1.0


def checkpoint(task: Task) -> str:
    path = f"/dev/shm/captum-{id(task)}.pt"
    torch.save(task.checkpoints[0], path)
    return path


def common(task: Task) -> dict[str, Any]:
    return {
        "checkpoints_load_func": load,
        "loss_fn": task.loss("sum"),
        "batch_size": len(task.x),
        "sample_wise_grads_per_batch": True,
    }


def influence(kind: Any, **options: Any) -> Method:
    def method(task: Task, strength: float) -> Iterator[Any]:
        model = kind(
            task.model(),
            task.train,
            checkpoint(task),
            hessian_reg=strength * len(task.x),
            **common(task),
            **options,
        )
        yield
        if task.measure == "self":
            yield model.self_influence()
        yield model.influence((task.x_test, task.y_test))

    return method


def tracin(task: Task, strength: float) -> Iterator[Any]:
    """Knows no λ: the same for all."""
    model = TracInCP(task.model(), task.train, [checkpoint(task)], **common(task))
    yield
    if task.measure == "self":
        yield model.self_influence()
    yield model.influence((task.x_test, task.y_test))


METHODS = {
    "naive": influence(NaiveInfluenceFunction, projection_dim=10_000),
    "arnoldi": influence(ArnoldiInfluenceFunction, projection_dim=50, arnoldi_dim=100),
    "tracin": tracin,
}
