"""Dense curvature of networks of linear layers, assembled from second derivatives at layer outputs.

A weight enters the loss only through its layer's output. With ``s_k`` a change of the output of layer
``k``, ``ā_k`` its input with a one appended for the bias, ``Q_kl = ∂²ℓ/∂s_k∂s_l`` and
``A_kl = ∂a_l/∂s_k``, all per sample,

    C[(k,o,i), (l,p,j)] = 1/N Σ_n ā_k[i] (Q_kl[o,p] ā_l[j] + g_l[p] A_kl[o,j])        k before l

(the second term for the Hessian only, and only for ``k ≠ l``). ``Q`` and ``A`` take one backward pass
for each layer output, of which there are far fewer than parameters; the rest is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch, split
from influence_framework.derivatives import pull_back
from influence_framework.layers import Layer, Tape, Use, cover, record
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.sources.chain import plain_layers, used_once_on_vectors


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


Curvature = Callable[[Problem, Tape, Batch], LayerCurvature]
"""Second derivatives at the layer outputs of a recorded batch, for one kind of curvature."""


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


def layered_dense(
    problem: Problem, parameters: ParameterSpace, curvature: Curvature
) -> Float[Tensor, "P P"] | None:
    """The full matrix, or ``None`` where the parameters are not all of linear layers used once on vectors."""
    layers = plain_layers(cover(problem, parameters))
    if layers is None:
        return None
    covered = list(layers.values())
    refused, dense = problem.total(partial(_summed, parameters, curvature, covered), "the matrix")
    return None if refused else dense.div_(problem.size)


def once_on_vectors(problem: Problem, layers: Mapping[str, Layer]) -> bool:
    """Whether the model takes these layers so, as the first samples tell."""
    tape = record(problem, layers, problem.example)
    size = problem.objective.size(problem.example)
    return tape.outputs.ndim == 2 and used_once_on_vectors(tape, layers, size)


def _summed(
    parameters: ParameterSpace, curvature: Curvature, covered: Sequence[Layer], problem: Problem
) -> list[Tensor]:
    """Whether any batch was refused, and the sum over samples."""
    layers = {name: layer for layer in covered for name in layer.modules}
    sums: dict[tuple[str, str], Tensor] = {}
    for whole, size in problem.batches():
        for batch in split(whole, size, _samples_at_once(problem, covered)):
            tape = record(problem, layers, batch)
            vectors = used_once_on_vectors(tape, layers, problem.objective.size(batch))
            if not vectors or tape.outputs.ndim != 2:
                # Zeros, since others may be on their way to the sum with what they have.
                return [torch.ones((), dtype=torch.float64, device="cpu"), _scatter({}, {}, parameters)]
            _add(sums, curvature(problem, tape, batch), layers)
    places = {name: layer.form.places[0] for name, layer in layers.items()}
    return [torch.zeros((), dtype=torch.float64, device="cpu"), _scatter(sums, places, parameters)]


def _samples_at_once(problem: Problem, layers: Sequence[Layer]) -> int:
    """How many samples' second derivatives fit the budget."""
    shapes = [layer.form.places.shape for layer in layers]
    inputs = sum(shape[2] for shape in shapes)
    outputs = sum(shape[1] for shape in shapes)
    widest = max(shape[1] * shape[2] for shape in shapes)
    element = torch.empty(0, dtype=problem.parameters.dtype).element_size()
    # Q and A of the sample, a Khatri-Rao row, and the graph of the backward pass of every output.
    per_sample = element * (outputs * (outputs + inputs) + 2 * widest) + 3 * outputs * problem.sample_bytes
    return max(1, problem.memory_budget // per_sample)


def _extended(inputs: Tensor, layer: Layer, last: float) -> Tensor:
    """The columns of ``[inputs, last]`` that belong to parameters."""
    parts = [inputs] if "weight" in layer.parts else []
    if "bias" in layer.parts:
        parts.append(inputs.new_full((*inputs.shape[:-1], 1), last))
    return torch.cat(parts, dim=-1)


def _add(
    sums: dict[tuple[str, str], Tensor], curvature: LayerCurvature, by_module: Mapping[str, Layer]
) -> None:
    """Add the batch's sum over samples to ``(o_k, e_k, o_l, e_l)`` for every pair of modules."""
    names = [use.module for use in curvature.uses]
    layers = [by_module[name] for name in names]
    extended = [_extended(a, layer, 1.0) for a, layer in zip(curvature.inputs, layers, strict=True)]
    for (k, other), block in curvature.blocks.items():
        flow = curvature.flow.get((k, other))
        flow = None if flow is None else _extended(flow, layers[other], 0.0)
        left, right = extended[k].T, extended[other]
        shape = (block.shape[1], left.shape[0], block.shape[2], right.shape[1])
        key = (names[k], names[other])
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
