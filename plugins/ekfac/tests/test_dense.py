"""Products, factors and scores against the definition, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from plugins.ekfac.tests import dense
from tests import nets, reference
from tests.cases import Case, Instance, branching, labels, normal, quartic
from tests.reference import assert_close

STRENGTH = 1e-3


class Pooled(nn.Module):
    """The mean over positions, the dimension after the samples, of layers applied to each."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.body(x).mean(1)
        return pooled


class TwoLengths(nn.Module):
    """A layer applied to sequences of two lengths, and to vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.shared(x)).sum(1) + torch.tanh(self.shared(x[:, :2])).mean(1)
        result: Tensor = self.head(torch.tanh(self.shared(hidden)))
        return result


class TiedSequences(nn.Module):
    """One weight in two layers, on sequences; the bias is each layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.second(torch.tanh(self.first(x))).mean(1)
        return pooled


def convolution(kind: Callable[..., nn.Module], *sizes: int, **options: Any) -> Case:
    """A convolution, a non-linearity and a head, on images of ``sizes``, channels first."""

    def model() -> nn.Module:
        layer = kind(sizes[0], 4, **options)
        width = layer(torch.zeros(1, *sizes)).numel()
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3, bias=False))

    return Case(model, x=normal(*sizes), sizes=(6, 5))


def normed(norm: Callable[[], nn.Module], *shape: int) -> Case:
    return Case(
        lambda: nn.Sequential(norm(), nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3)), x=normal(*shape)
    )


BOTH = {"padding": 1, "dilation": 2, "groups": 2}
LAYERS: dict[str, Case] = {
    "linear": Case(lambda: nets.mlp(3, 4, 3)),
    "no bias": Case(lambda: nets.mlp(3, 4, 3, bias=False)),
    "bias frozen": Case(lambda: nets.frozen(nets.mlp(3, 4, 3), "0.bias")),
    "weight frozen": Case(lambda: nets.frozen(nets.mlp(3, 4, 3), "0.weight", "2.bias")),
    "squared error": Case(lambda: nets.mlp(3, 4, 2), nn.MSELoss(), y=normal(2)),
    "bernoulli": Case(lambda: nets.mlp(3, 4, 2), nn.BCEWithLogitsLoss(), y=lambda n: labels(2, 2)(n).double()),
    "quartic": Case(lambda: nets.mlp(3, 4, 2), quartic, y=normal(2)),
    "branching": Case(lambda: nets.mlp(3, 4, 2), branching, y=normal(2)),
    "sum": Case(lambda: nets.mlp(3, 4, 3), nn.CrossEntropyLoss(reduction="sum")),
    "sequences": Case(lambda: Pooled(nets.mlp(3, 4, 3)), x=normal(5, 3)),
    "images of vectors": Case(lambda: Pooled(nets.mlp(3, 4, 3), nn.Flatten(1, 2)), x=normal(2, 3, 3)),
    "one loss term a token": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh(), nn.Conv1d(3, 2, 1)), x=normal(2, 4), y=labels(2, 4)
    ),
    "used twice": Case(nets.Reused, y=labels(2)),
    "used on two lengths": Case(TwoLengths, x=normal(4, 3)),
    "tied": Case(nets.Tied),
    "tied, on sequences": Case(TiedSequences, x=normal(4, 3)),
    "unused": Case(lambda: nets.frozen(nets.Unused(), "spare")),
    "two inputs": Case(nets.Positional, nn.MSELoss(), x=lambda n: (normal(3)(n), normal(2)(n)), y=normal(2)),
    "hugging face": Case(lambda: Pooled(dense.Conv1D(4, 3), nn.Tanh(), dense.Conv1D(3, 4)), x=normal(3, 3)),
    "embedding": Case(nets.TokenMean, x=labels(5, 4), y=labels(2)),
    "embedding with padding": Case(
        lambda: nn.Sequential(nn.Embedding(4, 2, padding_idx=1), nn.Flatten(), nn.Linear(6, 3)), x=labels(4, 3)
    ),
    "conv1d": convolution(nn.Conv1d, 2, 7, kernel_size=3, stride=2, padding=2),
    "conv2d": convolution(nn.Conv2d, 2, 5, 4, kernel_size=(3, 2), stride=(1, 2), bias=False),
    "conv2d, depthwise": convolution(nn.Conv2d, 4, 4, 4, kernel_size=3, groups=4),
    "conv3d": convolution(nn.Conv3d, 2, 3, 4, 3, kernel_size=2, groups=2, stride=(1, 2, 1)),
    "conv1d circular": convolution(nn.Conv1d, 2, 6, kernel_size=3, padding_mode="circular", **BOTH),
    **{
        f"conv2d {mode}": convolution(nn.Conv2d, 2, 4, 3, kernel_size=2, padding_mode=mode, **BOTH)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "layer norm": normed(lambda: nn.LayerNorm(4), 3, 4),
    "rms norm": normed(lambda: nn.RMSNorm(4, eps=0.1), 3, 4),
    "group norm": normed(lambda: nn.GroupNorm(2, 4), 4, 3),
    "batch norm": Case(nets.batch_norm_net, y=labels(2)),
}


SOLVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ekfac": ({"name": "ekfac"}, {}),
    "ekfac, reduce": ({"name": "ekfac", "weight_sharing": "reduce"}, {"sharing": "reduce"}),
    "kfac": ({"name": "kfac"}, {"refit": False}),
    "kfac, reduce": ({"name": "kfac", "weight_sharing": "reduce"}, {"refit": False, "sharing": "reduce"}),
}


@cache
def recorded(name: str, true_labels: bool = False) -> tuple[Instance, reference.Sample, dense.Recorded]:
    """A case with its further points and its layers' parts in every sample."""
    instance, test = dense.made(LAYERS[name])
    rows = (dense.true_rows if true_labels else dense.exact_rows)(instance.loss)
    return instance, test, dense.recorded(instance.model, instance.data, rows)


def check(name: str, solver: str, source: str = "gauss_newton", blocks: str = "full") -> None:
    (instance, test, samples), (chosen, options) = recorded(name, source == "empirical_fisher"), SOLVERS[solver]
    model, loss, data = instance.model, instance.loss, instance.data
    inverse = dense.inverse(model, samples, STRENGTH, **options)
    influence = inf.compose(
        model,
        loss,
        solver={"samples": "exact", "score_rtol": 0.0, **chosen},
        source=source,
        blocks=blocks,
        hessian_regularization=STRENGTH,
    ).fit(data)
    train = data[0]
    left, right = reference.gradients(model, loss, [test]), reference.gradients(model, loss, [train])
    assert_close(influence.influence_factors(*test), left @ inverse, 1e-10, "factors")
    assert_close(influence.influences(*test, *train), left @ inverse @ right.T, 1e-10, "scores")
    assert_close(influence.influences(*train, *test), right @ inverse @ left.T, 1e-10, "scores, sides swapped")
    own = torch.einsum("np,pq,nq->n", right, inverse, right)
    assert_close(influence.self_influences(*train), own, 1e-10, "self-influences")
    if blocks == "full":
        whole = influence.inverses["full"]
        assert_close(whole @ left.T, inverse @ left.T, 1e-10, "product")
        assert_close(whole @ left[0], inverse @ left[0], 1e-10, "product with a vector")


SHARED = [
    name for name in LAYERS if any(word in name for word in ("sequences", "token", "used", "conv", "emb"))
]
# Padding modes differ in the inputs alone, which one solver shows.
PAIRS = [
    (n, s)
    for n, s in product(LAYERS, SOLVERS)
    if s == "ekfac" or ((n in SHARED or "reduce" not in s) and not n.startswith("conv2d "))
]


@pytest.mark.parametrize(("name", "solver"), PAIRS)
def test_every_layer(name: str, solver: str) -> None:
    check(name, solver)


SOME = ["linear", "sequences", "used twice", "tied", "embedding", "conv2d circular", "layer norm", "bernoulli"]


@pytest.mark.parametrize("source", ["hessian", "empirical_fisher"])
@pytest.mark.parametrize("name", SOME)
def test_every_source(name: str, source: str) -> None:
    check(name, "ekfac", source)


@pytest.mark.parametrize("name", SOME)
def test_one_block_a_layer_is_the_same(name: str) -> None:
    check(name, "ekfac", blocks="per_layer")
