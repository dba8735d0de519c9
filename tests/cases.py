"""The case table: model, loss and data, each made by lambdas that run under a fixed seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from influence_framework import LinearOperator, Problem, hessian_sources
from influence_framework.data import map_leaves
from tests import nets, reference
from tests.reference import Loss, Sample

Make = Callable[[int], Any]


def normal(*shape: int) -> Make:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def labels(classes: int, *shape: int) -> Make:
    return lambda n: torch.randint(classes, (n, *shape))


def quartic(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(4).mean()


def branching(output: Tensor, target: Tensor) -> Tensor:
    """Control flow on values, which ``torch.func.vmap`` refuses."""
    errors = []
    for o, t in zip(output, target, strict=True):
        errors.append((o - t).square().sum() if t.sum() > 0 else (o - t).cosh().sum())
    return torch.stack(errors).mean()


@dataclass(frozen=True)
class Case:
    """A problem by recipe.

    Attributes:
        model: Makes the model.
        loss: The loss.
        x: Makes ``n`` inputs.
        y: Makes ``n`` targets.
        sizes: Samples of each batch.
        seed: Of everything random.
    """

    model: Callable[[], nn.Module]
    loss: Loss = field(default_factory=nn.CrossEntropyLoss)
    x: Make = field(default_factory=lambda: normal(3))
    y: Make = field(default_factory=lambda: labels(3))
    sizes: Sequence[int] = (4, 4, 3)
    seed: int = 0


@dataclass(frozen=True)
class Instance:
    """What a recipe makes."""

    model: nn.Module
    loss: Loss
    data: list[Sample]

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Instance:
        """A copy of another floating dtype on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        model, loss = copy.deepcopy((self.model, self.loss))
        if isinstance(loss, nn.Module):
            loss.to(device, dtype)
        return Instance(model.to(device, dtype), loss, [map_leaves(moved, batch) for batch in self.data])


CASES: dict[str, Case] = {
    "ragged_last_batch": Case(lambda: nets.mlp(3, 4, 3)),
    "batch_size_one": Case(lambda: nets.mlp(3, 4, 3), sizes=[1] * 7),
    "one_batch": Case(lambda: nets.mlp(3, 4, 3), sizes=[11]),
    "one_sample": Case(lambda: nets.mlp(3, 2, 3), sizes=[1]),
    "wildly_different_batches": Case(lambda: nets.mlp(3, 4, 3), sizes=[9, 1, 2]),
    "relu": Case(lambda: nets.mlp(3, 5, 3, activation=nn.ReLU)),
    "frozen_first_layer": Case(lambda: nets.frozen(nets.mlp(3, 4, 3), "0.")),
    "frozen_bias": Case(lambda: nets.frozen(nets.mlp(3, 4, 3), "0.bias", "2.bias")),
    "tied_weights": Case(nets.Tied),
    "module_used_twice": Case(nets.Reused, y=labels(2)),
    "root_and_scalar_parameters": Case(nets.Root),
    "no_bias": Case(lambda: nets.mlp(3, 4, 3, bias=False)),
    "unused_parameter": Case(nets.Unused),
    "tuple_inputs": Case(nets.Positional, nn.MSELoss(), x=lambda n: (normal(3)(n), normal(2)(n)), y=normal(2)),
    "mapping_inputs": Case(
        nets.Keyword, nn.MSELoss(), x=lambda n: {"wide": normal(3)(n), "narrow": normal(2)(n)}, y=normal(2)
    ),
    "conv": Case(nets.conv_net, x=normal(1, 4, 4)),
    "embedding": Case(nets.TokenMean, x=labels(5, 4), y=labels(2)),
    "recurrent": Case(nets.Recurrent, x=normal(3, 2), y=labels(2)),
    "transformer": Case(nets.Transformer, x=normal(2, 3), y=labels(2), sizes=[3, 2]),
    "batch_norm": Case(nets.batch_norm_net, y=labels(2)),
    "one_loss_term_per_token": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh(), nn.Conv1d(3, 2, 1)), x=normal(2, 4), y=labels(2, 4)
    ),
    "mse": Case(lambda: nets.mlp(3, 4, 2), nn.MSELoss(), y=normal(2)),
    "bce_with_logits": Case(
        lambda: nets.mlp(3, 4, 1), nn.BCEWithLogitsLoss(), y=lambda n: labels(2, 1)(n).double()
    ),
    "one_number_a_sample": Case(
        lambda: nn.Sequential(nets.mlp(3, 4, 1), nn.Flatten(0)), nn.MSELoss(), y=normal()
    ),
    "sum": Case(lambda: nets.mlp(3, 4, 3), nn.CrossEntropyLoss(reduction="sum")),
    "weighted_sum": Case(
        lambda: nets.mlp(3, 4, 3),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), reduction="sum"),
    ),
    "label_smoothing": Case(lambda: nets.mlp(3, 4, 3), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "soft_labels": Case(lambda: nets.mlp(3, 4, 3), y=lambda n: normal(3)(n).softmax(1)),
    "quartic_loss": Case(lambda: nets.mlp(3, 4, 2), quartic, y=normal(2)),
    "branching_loss": Case(lambda: nets.mlp(3, 4, 2), branching, y=normal(2)),
    # The loss is linear in the output almost everywhere: no curvature in the middle of Gauss-Newton.
    "absolute_error": Case(lambda: nets.mlp(3, 4, 2), nn.L1Loss(), y=normal(2)),
    # The gradient of a linear model's squared error is linear: parts of its graph are constants.
    "linear_model": Case(lambda: nets.mlp(3, 2), nn.MSELoss(), y=normal(2)),
    "linear_model_linear_loss": Case(lambda: nets.mlp(3, 2), lambda o, t: (o * t).mean(), y=normal(2)),
    "linear_classifier": Case(lambda: nets.mlp(3, 3)),
}


def make(name: str, sizes: Sequence[int] | None = None) -> Instance:
    """A fresh instance in float64, its data cut into batches of ``sizes``."""
    case = CASES[name]
    sizes = list(case.sizes if sizes is None else sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = case.model().double().eval()
        x, y = case.x(sum(sizes)), case.y(sum(sizes))
    stops = torch.tensor(sizes).cumsum(0).tolist()
    spans = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    return Instance(model, case.loss, [(reference.part(x, span), y[span]) for span in spans])


def points(name: str, n: int, seed: int) -> Sample:
    """``n`` further points of a case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CASES[name].x(n), CASES[name].y(n)


def problem(instance: Instance, **options: Any) -> Problem:
    return Problem.build(instance.model, instance.loss, instance.data, **options)


def operator(curvature: str, of: Problem, **options: Any) -> LinearOperator:
    """The named curvature of all parameters of a problem."""
    made: LinearOperator = hessian_sources[curvature].create(**options).operator(of, of.parameters)
    return made


def columns(of: LinearOperator, *shape: int, seed: int = 1) -> Tensor:
    """Normal right-hand sides ``(P, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(of.shape[0], *shape, generator=generator, dtype=torch.float64)
    return values.to(of.device, of.dtype)


def by_columns(of: LinearOperator) -> Tensor:
    """The matrix from one product with the identity, whatever else the operator offers."""
    return of @ torch.eye(of.shape[0], dtype=of.dtype, device=of.device)


@cache
def dense(name: str, curvature: str) -> Tensor:
    """The reference matrix of a case."""
    instance = make(name)
    return reference.CURVATURES[curvature](instance.model, instance.loss, instance.data)
