"""Dense curvature of networks of linear layers, assembled from second derivatives at layer outputs.

A weight enters the loss only through its layer's output. With ``s_k`` a change of the output of layer
``k``, ``ā_k`` its input with a one appended for the bias, ``Q_kl = ∂²ℓ/∂s_k∂s_l`` and
``A_kl = ∂a_l/∂s_k``, all per sample,

    C[(k,o,i), (l,p,j)] = 1/N Σ_n ā_k[i] (Q_kl[o,p] ā_l[j] + g_l[p] A_kl[o,j])        k before l

(the second term for the Hessian only, and only for ``k ≠ l``). ``Q`` and ``A`` take one backward pass
for each layer output, of which there are far fewer than parameters; the rest is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.data import Batch, split
from influence_framework.layers import LayerCurvature, LinearLayer, Tape, linear_layers, record
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem

Curvature = Callable[[Problem, Tape, Batch], LayerCurvature]
"""Second derivatives at the layer outputs of a recorded batch, for one kind of curvature."""


def layered_dense(
    problem: Problem, parameters: ParameterSpace, curvature: Curvature
) -> Float[Tensor, "P P"] | None:
    """The full matrix, or ``None`` where the parameters are not all of linear layers used once on vectors."""
    layers = linear_layers(problem.model, parameters)
    covered = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    if covered != set(parameters.names):
        return None
    sums: dict[tuple[str, str], Tensor] = {}
    for whole, size in problem.batches():
        for batch in split(whole, size, _samples_at_once(problem, layers)):
            tape = record(problem, layers, batch)
            if not _used_once_on_vectors(tape, layers, problem.objective.size(batch)):
                return None
            _add(sums, curvature(problem, tape, batch))
    places = {layer.name: _places(layer, parameters) for layer in layers}
    return _scatter(sums, places, parameters).div_(problem.size)


def _samples_at_once(problem: Problem, layers: list[LinearLayer]) -> int:
    """How many samples' second derivatives fit the budget."""
    inputs = sum(layer.inputs for layer in layers)
    outputs = sum(layer.outputs for layer in layers)
    widest = max((layer.inputs + 1) * layer.outputs for layer in layers)
    element = torch.empty(0, dtype=problem.parameters.dtype).element_size()
    # Q and A of the sample, a Khatri-Rao row, and the graph of the backward pass of every output.
    per_sample = element * (outputs * (outputs + inputs) + 2 * widest) + 3 * outputs * problem.sample_bytes
    return max(1, problem.memory_budget // per_sample)


def _places(layer: LinearLayer, parameters: ParameterSpace) -> Int[Tensor, "o e"]:
    """Positions in the flat vector of ``[weight, bias]`` of a layer, as far as they take part."""
    spans = dict(zip(parameters.names, parameters.spans, strict=True))
    shapes = dict(zip(parameters.names, parameters.shapes, strict=True))
    columns = []
    if layer.weight:
        columns.append(torch.arange(*spans[layer.weight]).view(shapes[layer.weight]))
    if layer.bias:
        columns.append(torch.arange(*spans[layer.bias])[:, None])
    return torch.cat(columns, dim=1).to(parameters.device)


def _used_once_on_vectors(tape: Tape, layers: list[LinearLayer], size: int) -> bool:
    names = [use.layer.name for use in tape.uses]
    on_vectors = all(use.inputs.ndim == 2 and use.inputs.shape[0] == size for use in tape.uses)
    return on_vectors and sorted(names) == sorted(layer.name for layer in layers) and tape.outputs.ndim == 2


def _extended(inputs: Tensor, layer: LinearLayer, last: float) -> Tensor:
    """The columns of ``[inputs, last]`` that belong to parameters."""
    parts = [inputs] if layer.weight else []
    if layer.bias:
        parts.append(inputs.new_full((*inputs.shape[:-1], 1), last))
    return torch.cat(parts, dim=-1)


def _add(sums: dict[tuple[str, str], Tensor], curvature: LayerCurvature) -> None:
    """Add the batch's sum over samples to ``(o_k, e_k, o_l, e_l)`` for every pair of layers."""
    layers = [use.layer for use in curvature.uses]
    extended = [_extended(a, layer, 1.0) for a, layer in zip(curvature.inputs, layers, strict=True)]
    for (k, other), block in curvature.blocks.items():
        flow = curvature.flow.get((k, other))
        flow = None if flow is None else _extended(flow, layers[other], 0.0)
        left, right = extended[k].T, extended[other]
        shape = (block.shape[1], left.shape[0], block.shape[2], right.shape[1])
        key = (layers[k].name, layers[other].name)
        total = sums.setdefault(key, block.new_zeros(shape))
        for output in range(block.shape[1]):
            # A layer's own block is symmetric in its two outputs: the other half is mirrored at the end.
            first = output if k == other else 0
            # Khatri-Rao product of a row of the curvature with the second layer's input, (n, p, j).
            factor = block[:, output, first:, None] * right[:, None, :]
            if flow is not None:
                factor.addcmul_(curvature.gradients[other][:, :, None], flow[:, output, None, :])
            total[output, :, first:] += (left @ factor.flatten(1)).view(total[output, :, first:].shape)


def _scatter(
    sums: dict[tuple[str, str], Tensor], places: dict[str, Tensor], parameters: ParameterSpace
) -> Float[Tensor, "P P"]:
    size = parameters.numel
    dense = torch.zeros(size, size, dtype=parameters.dtype, device=parameters.device)
    for (first, second), total in sums.items():
        rows, columns = places[first].reshape(-1), places[second].reshape(-1)
        if first == second:
            upper = torch.ones(total.shape[0], total.shape[0], dtype=torch.bool, device=total.device).triu()
            mirrored = total.permute(2, 3, 0, 1)
            total = torch.where(upper[:, None, :, None], total, mirrored)
        block = total.flatten(2).flatten(0, 1)
        dense[rows[:, None], columns[None, :]] = block
        dense[columns[:, None], rows[None, :]] = block.T
    return dense
