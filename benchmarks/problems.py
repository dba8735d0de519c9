"""The problems that are timed: digits, and small nets trained on them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf

LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Digits:
    """1,500 training and 50 test images of 64 features in [0, 1], float32."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def loader(self, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=batch_size)


def digits() -> Digits:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.as_tensor(data.data, dtype=torch.float32) / 16.0)[order]
    y = torch.as_tensor(data.target)[order]
    return Digits(x[:1500], y[:1500], x[1500:1550], y[1500:1550])


def trained(data: Digits, widths: list[int], *, steps: int = 200, seed: int = 0) -> nn.Sequential:
    """A tanh net trained with Adam and weight decay on the full batch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths[:-1]):
            layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(net(data.x), data.y).backward()
        optimizer.step()
    net.zero_grad()
    return net.eval()


class Judge:
    """The Hessian of a float64 copy of the net: what residuals and scores are checked with."""

    def __init__(self, net: nn.Sequential, data: Digits) -> None:
        self.net = copy.deepcopy(net).double()
        self.data = data
        self.rhs = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(LOSS(net(x), y), [*net.parameters()])])
                for x, y in zip(data.x_test.split(1), data.y_test.split(1), strict=True)
            ],
            dim=1,
        ).double()
        batches = [(data.x.double(), data.y)]
        self.problem = inf.Problem.build(self.net, LOSS, batches)
        source = inf.hessian_sources["hessian"].create(precompute_grad=True)
        self.operator = source.operator(self.problem, self.problem.parameters)

    def most_negative_eigenvalue(self) -> float:
        lowest = eigsh(inf.to_scipy(self.operator), k=1, which="SA", tol=1e-3, return_eigenvectors=False)
        return float(lowest[0])

    def residual(self, factors: Tensor, regularization: float) -> float:
        """Largest true relative residual of the factors ``(m, P)`` of the test points.

        The right-hand sides are the float32 gradients that both sides solve for, by plain autograd: of
        an image that is classified with confidence, float32 has only three digits of the gradient.
        """
        columns = factors.double().T
        remainder = self.rhs - self.operator @ columns - regularization * columns
        return float((remainder.norm(dim=0) / self.rhs.norm(dim=0)).max())

    def scores(self, regularization: float) -> Tensor:
        """Scores of all pairs by the direct solver in float64."""
        model = inf.compose(
            self.net, LOSS, solver="direct", source="hessian", hessian_regularization=regularization
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.fit([(self.data.x.double(), self.data.y)])
        return model.influences(self.data.x_test.double(), self.data.y_test, self.data.x.double(), self.data.y)
