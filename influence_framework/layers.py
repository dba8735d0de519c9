"""Inputs and output gradients of linear layers: the only place where hooks are put on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of, pull_back
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LayerBatch


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer whose weight or bias takes part.

    Attributes:
        name: Of the module.
        weight: Name of the weight where it is a parameter, else ``None``.
        bias: Name of the bias where it is a parameter, else ``None``.
        inputs: Features in.
        outputs: Features out.
    """

    name: str
    weight: str | None
    bias: str | None
    inputs: int
    outputs: int


def linear_layers(model: nn.Module, parameters: ParameterSpace) -> list[LinearLayer]:
    """The ``nn.Linear`` modules that own some of ``parameters``, and share them with no other module."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or any(owners[id(p)] > 1 for p in module.parameters()):
            continue
        prefix = f"{name}." if name else ""
        weight, bias = (
            f"{prefix}{part}" if f"{prefix}{part}" in parameters.names else None for part in ("weight", "bias")
        )
        if weight or bias:
            layers.append(LinearLayer(name, weight, bias, module.in_features, module.out_features))
    return layers


@dataclass
class Use:
    """One use of a layer in a forward pass.

    Attributes:
        layer: The layer.
        inputs: What it was applied to, part of the graph.
        shift: Zeros added to its output; gradients with respect to them are output gradients.
    """

    layer: LinearLayer
    inputs: Tensor
    shift: Tensor


@dataclass
class Tape:
    """A forward pass in which every use of the given layers was noted.

    Attributes:
        outputs: The model's outputs, as a function of the shifts.
        uses: In the order in which the layers were applied.
    """

    outputs: Tensor
    uses: list[Use]

    @property
    def shifts(self) -> list[Tensor]:
        """The shift of every use."""
        return [use.shift for use in self.uses]


def record(problem: Problem, layers: list[LinearLayer], batch: Batch) -> Tape:
    """Run the model on ``batch`` with its parameters held constant and every use of ``layers`` noted."""
    uses: list[Use] = []
    with torch.enable_grad(), _noting(problem.model, layers, uses):
        outputs = problem.outputs({}, batch)
    return Tape(outputs, uses)


@contextmanager
def _noting(model: nn.Module, layers: list[LinearLayer], uses: list[Use]) -> Iterator[None]:
    modules = dict(model.named_modules())

    def hook_for(layer: LinearLayer) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            shift = torch.zeros_like(output, requires_grad=True)
            uses.append(Use(layer, args[0], shift))
            return output + shift

        return hook

    handles = [modules[layer.name].register_forward_hook(hook_for(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_batch(problem: Problem, layers: list[LinearLayer], batch: Batch) -> dict[str, list[LayerBatch]]:
    """Inputs and output gradients of every use of ``layers``, by layer name."""
    tape = record(problem, layers, batch)
    total = problem.objective.sample_losses(tape.outputs, batch).sum()
    gradients = gradients_of(total, tape.shifts, keep_graph=False)
    found: dict[str, list[LayerBatch]] = {layer.name: [] for layer in layers}
    for use, gradient in zip(tape.uses, gradients, strict=True):
        layer = use.layer
        found[layer.name].append(LayerBatch(use.inputs.detach(), gradient, layer.weight, layer.bias))
    return found


@dataclass(frozen=True)
class LayerCurvature:
    """Per-sample second derivatives with respect to the outputs of layers that are used once each.

    Attributes:
        uses: The uses, in order of application.
        inputs: ``(n, i_k)`` of each.
        blocks: ``(k, l)`` with ``k ≤ l`` to ``Q_kl``, ``(n, o_k, o_l)``: the curvature between the
            outputs of uses ``k`` and ``l``.
        flow: ``(k, l)`` with ``k < l`` to ``(n, o_k, i_l)``, the Jacobian of ``l``'s input with respect to
            ``k``'s output, and ``gradients[l]``, ``(n, o_l)``; both empty for curvatures of the form
            ``Jᵀ H J``, which have no such term.
    """

    uses: list[Use]
    inputs: list[Float[Tensor, "n _i"]]
    blocks: Mapping[tuple[int, int], Float[Tensor, "n _o _p"]]
    flow: Mapping[tuple[int, int], Float[Tensor, "n _o _j"]]
    gradients: list[Float[Tensor, "n _p"]]


def one_hot(like: Tensor) -> Tensor:
    """For ``like`` of shape ``(n, c)``: ``(c, n, c)``, row ``r`` one in channel ``r`` of every sample."""
    channels = like.shape[1]
    eye = torch.eye(channels, dtype=like.dtype, device=like.device)
    return eye[:, None, :].expand(channels, like.shape[0], channels)


def jacobians(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    """``∂outputs[n, c] / ∂inputs_k[n, o]`` per sample, ``(n, c, o_k)`` each; ``None`` where zero.

    Right where a sample's outputs depend on its own inputs only.
    """
    rows = pull_back([outputs], inputs, [one_hot(outputs)])
    # Autograd may hand out zeros that take no memory and cannot be written to; a clone is an ordinary tensor.
    return [None if row is None else row.transpose(0, 1).clone() for row in rows]
