"""A small classifier and its data, for the tests of what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import influence_framework as inf
from tests import nets

Action = Callable[[], object]


def net(width: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    model = nets.mlp(3, 4, width)
    return model.double().eval()


def points(n: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=generator)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [points(4), points(3, 2)]


def model(module: nn.Module | None = None, loss: Any = None, **options: Any) -> inf.TorchInfluenceFunctionModel:
    settings = {"solver": "direct", "hessian_regularization": 0.1} | options
    return inf.compose(module or net(), loss or nn.CrossEntropyLoss(), **settings)


def fitted(**options: Any) -> inf.TorchInfluenceFunctionModel:
    return model(**options).fit(batches())


def fit(data: Any = None, **options: Any) -> Action:
    """An action that fits a fresh model; values are called where they are lambdas without arguments."""
    return lambda: model(**options).fit(batches() if data is None else data())


def regression(targets: Callable[[int], Tensor]) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    return lambda: [(x, targets(len(x)).double()) for x, _ in batches()]
