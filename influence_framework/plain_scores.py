"""Products of factors with gradients of samples, of models whose parameters are all those of linear layers.

The gradient of a sample is ``δ_l āᵀ_l`` at every layer that is applied to one vector a sample, so that a
factor's product with it is ``Σ_l δ_lᵀ F_l ā_l``. Neither a gradient of a sample nor a graph of it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import CACHE_BYTES, gradients_of
from influence_framework.layers import Layer, LayerBatch, cover, layer_batch, true_gradients
from influence_framework.problem import Problem

ROUNDINGS = 16.0
"""Rounding of a sum of products, in units of the precision and of the norms of what is multiplied."""


def plain_layers_of(problem: Problem) -> tuple[Layer, ...] | None:
    """The layers, where they are linear, share nothing and have all parameters; else ``None``."""
    names = problem.parameters.names
    if names not in problem.plain:
        covered = cover(problem, problem.parameters)
        problem.plain[names] = covered.layers if covered.plain else None
    found: tuple[Layer, ...] | None = problem.plain[names]
    return found


def scores_by_layers(
    factors: Sequence[Float[Tensor, "_m P"]], problem: Problem, batch: Batch
) -> list[Float[Tensor, "_m n"]] | None:
    """``f_k · ∇ℓ_j`` of every factor and sample; ``None`` where the model is not of that kind.

    Their sum over the samples, with random signs, is held against the gradient of the same sum of losses, by
    autograd: what a model does with a weight beside its layer shows there. (Without signs, what is
    proportional to the gradient in the outputs would not where that vanishes, as it does at an optimum.) Where
    it shows, other batches are not tried.
    """
    layers = plain_layers_of(problem)
    if layers is None:
        return None
    found = layer_batch(problem, layers, batch, true_gradients(problem))
    if len(found) == len(layers) and all(part.positions == 1 for part in found.values()):
        size = problem.objective.size(batch)
        scores = [_contracted(rows, found, size) for rows in factors]
        if _add_up(scores, factors, problem, batch, found):
            return [part.T for part in scores]
    problem.plain[problem.parameters.names] = None
    return None


def _contracted(
    rows: Float[Tensor, "m P"], found: Mapping[Layer, LayerBatch], size: int
) -> Float[Tensor, "n m"]:
    scores = rows.new_zeros(size, len(rows))
    for layer, part in found.items():
        inputs, deltas = part.inputs[0, :, 0], part.output_gradients[0, 0, :, 0]
        places = layer.form.places[0].to(rows.device)
        at_once = max(1, CACHE_BYTES // (places.numel() * rows.element_size()))
        for begun in range(0, len(rows), at_once):
            some = slice(begun, begun + at_once)
            matrices = rows[some, places]
            step = max(32, CACHE_BYTES // (matrices[:, :, 0].numel() * rows.element_size()))
            for start in range(0, size, step):
                chunk = slice(start, start + step)
                along = (inputs[chunk] @ matrices.flatten(0, 1).T).unflatten(1, matrices.shape[:2])
                scores[chunk, some] += (along @ deltas[chunk, :, None])[..., 0]
    return scores


def _add_up(
    scores: Sequence[Float[Tensor, "n _m"]],
    factors: Sequence[Float[Tensor, "_m P"]],
    problem: Problem,
    batch: Batch,
    found: Mapping[Layer, LayerBatch],
) -> bool:
    leaves = problem.parameters.leaves(problem.model)
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(2, (len(scores[0]),), generator=generator, device="cpu")
    signs = (2 * drawn - 1).to(scores[0])
    with torch.enable_grad():
        total = (signs * problem.sample_losses(leaves, batch)).sum()
    gradients = gradients_of(total, list(leaves.values()), keep_graph=False)
    gradient = problem.parameters.flatten(dict(zip(leaves, gradients, strict=True)))
    squares = [
        part.inputs[0, :, 0].square().sum(1) * part.output_gradients[0, 0, :, 0].square().sum(1)
        for part in found.values()
    ]
    norms = torch.stack(squares).sum(0).sqrt().sum()
    for part, rows in zip(scores, factors, strict=True):
        allowed = ROUNDINGS * problem.precision * torch.linalg.vector_norm(rows, dim=1) * norms
        # A gradient that is not finite is told of by whoever checks the scores.
        if ((signs @ part - rows @ gradient).abs() > allowed).any():
            return False
    return True
