"""The table of solvers, sources, block structures, nets and dtypes, and its dense references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests import nets, reference
from tests.cases import Instance, Make, labels, normal

STRENGTH = 0.03
"""λ; the nets have largest eigenvalues far above it and no eigenvalue below its negative."""


def scaled(*shape: int) -> Make:
    """Normal inputs three times as large, for curvature well above λ."""
    return lambda n: 3.0 * normal(*shape)(n)


@dataclass(frozen=True)
class Net:
    """A small classifier of three classes and its inputs."""

    make: Callable[[], nn.Module]
    x: Make


NETS: dict[str, Net] = {
    "linear": Net(lambda: nets.mlp(3, 4, 3), scaled(3)),
    "linear without bias, first layer frozen": Net(
        lambda: nets.frozen(nets.mlp(3, 4, 4, 3, bias=False), "0."), scaled(3)
    ),
    "conv1d": Net(
        lambda: nn.Sequential(
            nn.Conv1d(2, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, bias=False)
        ),
        scaled(2, 3),
    ),
    "conv2d, bias frozen": Net(
        lambda: nets.frozen(
            nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), "0.bias"
        ),
        scaled(1, 4, 4),
    ),
    "conv3d without bias": Net(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
        scaled(1, 2, 3, 2),
    ),
    "embedding": Net(lambda: nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 3)), labels(4, 3)),
}

Adapt = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A solver, what it inverts exactly, and how nearly.

    Attributes:
        options: With its name.
        sources: Those it can take.
        tolerance: By dtype: of the scores, relative to the largest.
        single: Other options in single precision.
        inverts: What of a block's curvature it is the inverse of, plus λ.
        strength: λ.
        devices: Where it runs.
    """

    options: dict[str, Any]
    sources: tuple[str, ...] = ("hessian", "gauss_newton", "empirical_fisher")
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float64: 1e-8, torch.float32: 2e-3}
    )
    single: Mapping[str, Any] = field(default_factory=dict)
    inverts: Adapt = lambda curvature: curvature
    strength: float = STRENGTH
    devices: tuple[str, ...] = ("cpu", "cuda")

    def solver(self, dtype: torch.dtype) -> dict[str, Any]:
        return self.options | (dict(self.single) if dtype is torch.float32 else {})


SEMIDEFINITE = ("gauss_newton", "empirical_fisher")
WHOLE = 10_000
"""A rank beyond every number of parameters."""
TIGHT = {"rtol": 1e-11, "atol": 0.0}
LOOSE = {"rtol": 1e-5}

METHODS: dict[str, Method] = {
    "direct": Method({"name": "direct"}),
    "cg": Method({"name": "cg", **TIGHT}, single=LOOSE),
    "block cg": Method({"name": "cg", "block": True, **TIGHT}, single=LOOSE),
    "cg with jacobi": Method({"name": "cg", "preconditioner": "jacobi", **TIGHT}, single=LOOSE),
    "cg with nystroem": Method(
        {"name": "cg", "preconditioner": {"name": "nystroem", "rank": 5}, **TIGHT}, SEMIDEFINITE, single=LOOSE
    ),
    "arnoldi": Method({"name": "arnoldi", "rank": WHOLE}),
    "arnoldi by cupy": Method({"name": "arnoldi", "rank": WHOLE, "backend": "cupy"}, devices=("cuda",)),
    "nystroem": Method({"name": "nystroem", "rank": WHOLE}, SEMIDEFINITE),
    "lissa": Method(
        {"name": "lissa", "scale": "auto", "rtol": 3e-3, "maxiter": 20_000},
        tolerance={torch.float64: 5e-2, torch.float32: 5e-2},
        # Iterations are in proportion to the condition number.
        strength=0.1,
    ),
    "jacobi": Method({"name": "jacobi"}, SEMIDEFINITE, inverts=lambda curvature: curvature.diag().diag()),
}


def _trained(module: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Near a minimum, where the Hessian's negative eigenvalues are small."""
    parameters = list(reference.trainable(module).values())
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum((p.square().sum() for p in parameters), torch.zeros(()))
        loss: Tensor = nn.functional.cross_entropy(module(x), y) + 0.01 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    module.zero_grad()
    return module


@cache
def instance(name: str) -> Instance:
    """A trained net of the table with its data in ragged batches, float64."""
    recipe = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = recipe.make().double().eval()
        x, y = recipe.x(26), labels(3)(26)
        _trained(model, x, y)
    return Instance(model, nn.CrossEntropyLoss(), [(x[:20], y[:20]), (x[20:], y[20:])])


@cache
def points(name: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name].x(n), labels(3)(n)


@cache
def dense(name: str, source: str) -> Tensor:
    made = instance(name)
    return reference.CURVATURES[source](made.model, made.loss, made.data)


@cache
def gradients(name: str, n: int, seed: int) -> Tensor:
    made = instance(name)
    return reference.gradients(made.model, made.loss, [points(name, n, seed)])


@cache
def mixed(name: str, n: int, seed: int) -> Tensor:
    made = instance(name)
    return reference.mixed_derivatives(made.model, made.loss, *points(name, n, seed))


def inverse(name: str, source: str, blocks: Mapping[str, list[str]], method: Method) -> Tensor:
    """The dense inverse, blocks side by side."""
    model, curvature = instance(name).model, dense(name, source)
    total = torch.zeros_like(curvature)
    for names in blocks.values():
        own = reference.positions(model, names)
        block = method.inverts(curvature[own][:, own])
        damped = block + method.strength * torch.eye(len(own), dtype=torch.float64)
        total[own[:, None], own] = torch.linalg.inv(damped)
    return total
