"""The problems that are timed: digits as vectors, images or sequences, and small nets trained on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import influence_framework as inf

LOSS = nn.CrossEntropyLoss()
Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Digits:
    """Training and test images with features in [0, 1], float32."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def loader(self, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=batch_size)


def digits() -> Digits:
    """1,500 training and 50 test images of 64 features."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.as_tensor(data.data, dtype=torch.float32) / 16.0)[order]
    y = torch.as_tensor(data.target)[order]
    return Digits(x[:1500], y[:1500], x[1500:1550], y[1500:1550])


def images(data: Digits, train: int, test: int) -> Digits:
    """The first digits, enlarged to 32 × 32 pixels in three channels."""

    def enlarged(x: Tensor) -> Tensor:
        gray: Tensor = x.unflatten(1, (1, 8, 8))
        return nn.functional.interpolate(gray, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)

    return Digits(enlarged(data.x[:train]), data.y[:train], enlarged(data.x_test[:test]), data.y_test[:test])


def sequences(data: Digits, train: int, test: int) -> Digits:
    """The first digits, each as 64 tokens of one pixel."""
    return Digits(data.x[:train, :, None], data.y[:train], data.x_test[:test, :, None], data.y_test[:test])


class Encoder(nn.Module):
    """One block of a transformer: attention and a net of two layers, each behind a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixed, self.merged = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.mixed(self.norms[0](x)).unflatten(2, (3, self.heads, -1))
        attended = nn.functional.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4))
        x = x + self.merged(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return result


class Transformer(nn.Module):
    """Four encoders on tokens with learned places; classes from the mean token."""

    def __init__(self, tokens: int = 64, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, width)
        self.places = nn.Parameter(torch.randn(tokens, width))
        self.encoders = nn.Sequential(*(Encoder(width, heads=4) for _ in range(4)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoders(self.embedding(x) + self.places).mean(1))
        return logits


def dense(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def train(net: Net, data: Digits, *, steps: int, lr: float) -> Net:
    """Train with Adam and weight decay on the full batch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(net(data.x), data.y).backward()
        optimizer.step()
    net.zero_grad()
    return net.eval()


def seeded(make: Callable[[], Net], seed: int = 0) -> Net:
    """What ``make`` returns, its random weights from a seed of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def trained(data: Digits, widths: list[int], *, steps: int = 200, seed: int = 0) -> nn.Sequential:
    """A tanh net trained with Adam and weight decay on the full batch."""
    return train(seeded(lambda: dense(widths), seed), data, steps=steps, lr=1e-2)


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
