"""Fitted influence models of the case table, at a λ well below the largest eigenvalue."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import influence_framework as inf
from tests import cases, reference
from tests.cases import Instance

DAMPING = 1e-3
"""λ as a fraction of the largest eigenvalue: ``g·gᵀ/λ`` alone would be off by orders of magnitude."""

Names = dict[str, list[str]]


def per_layer(names: list[str]) -> Names:
    layers: Names = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or "(root)", []).append(name)
    return layers


STRUCTURES: dict[str, tuple[Callable[[list[str]], Any], Callable[[list[str]], Names]]] = {
    "full": (lambda names: "full", lambda names: {"full": names}),
    "per_layer": (lambda names: "per_layer", per_layer),
    "per_parameter": (lambda names: "per_parameter", lambda names: {name: [name] for name in names}),
    "interleaved": (
        lambda names: {"odd": names[::-1][::2], "even": names[::-1][1::2]},
        lambda names: {"odd": names[::-1][::2], "even": names[::-1][1::2]},
    ),
    "one in reverse": (lambda names: {"all": names[::-1]}, lambda names: {"all": names[::-1]}),
}


@cache
def strength(name: str) -> float:
    return DAMPING * torch.linalg.eigvalsh(cases.dense(name, "gauss_newton"))[-1].item()


def compose(instance: Instance, **options: Any) -> inf.TorchInfluenceFunctionModel:
    return inf.compose(
        instance.model, instance.loss, **({"solver": "direct", "source": "gauss_newton"} | options)
    )


def fitted(
    name: str, structure: str = "full", **options: Any
) -> tuple[Instance, inf.TorchInfluenceFunctionModel]:
    instance = cases.make(name)
    blocks = STRUCTURES[structure][0](list(reference.trainable(instance.model)))
    influence = compose(instance, blocks=blocks, **({"hessian_regularization": strength(name)} | options))
    return instance, influence.fit(instance.data)
