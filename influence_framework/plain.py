"""Gradients of samples of models whose parameters are all those of linear layers, without autograd for each.

The gradient of a sample is ``δ_l āᵀ_l`` at every layer that is applied to one vector a sample. A factor's
product with it is ``Σ_l δ_lᵀ F_l ā_l``, and that of two samples' ``Σ_l (δ_lᵀ δ'_l)(ā_lᵀ ā'_l)``: neither needs
a gradient, nor a graph of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import CACHE_BYTES, gradients_of
from influence_framework.layers import Layer, Rows, cover, layer_batch, true_gradients
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem

ROUNDINGS = 64.0
"""Rounding of a layer's sum with random weights, in units of the precision and of the root of its squares."""

FAINTEST = 1e-10
"""Part of the largest gradient below which a smaller one is not made up for."""

Total: TypeAlias = Callable[[dict[str, Tensor], Float[Tensor, " n"]], Tensor]
"""What samples' gradients are of, summed with a weight for each, as a function of the parameters."""


def weighted_sum(
    outputs: Float[Tensor, "n ..."], cotangents: Float[Tensor, "n ..."], weights: Float[Tensor, " n"]
) -> Tensor:
    """``Σ_n w_n (cotangents · outputs)_n``."""
    return (weights * (outputs * cotangents).reshape(len(weights), -1).sum(1)).sum()


def plain_layers_of(problem: Problem, parameters: ParameterSpace) -> tuple[Layer, ...] | None:
    """The layers, where they are linear, share nothing and have all ``parameters``; else ``None``."""
    names = parameters.names
    if names not in problem.plain:
        covered = cover(problem, parameters)
        problem.plain[names] = covered.layers if covered.plain else None
    found: tuple[Layer, ...] | None = problem.plain[names]
    return found


@dataclass(frozen=True, eq=False)
class PlainGradients:
    """Gradients of ``n`` samples, as outer products.

    Attributes:
        parameters: What they are with respect to.
        parts: Of every layer ``δ``, ``(n, o)``, and ``ā``, ``(n, e)``: the input, and a one where the bias
            takes part.
    """

    parameters: ParameterSpace
    parts: Mapping[Layer, tuple[Float[Tensor, "n o"], Float[Tensor, "n e"]]]

    @classmethod
    def of(
        cls,
        problem: Problem,
        parameters: ParameterSpace,
        batch: Batch,
        cotangents: Rows,
        total: Total,
    ) -> PlainGradients | None:
        """Of every sample's ``cotangents · outputs``; ``None`` where the model is not of that kind.

        Where they do not add up to the gradient of ``total``, other batches are not tried.
        """
        layers = plain_layers_of(problem, parameters)
        if layers is None:
            return None
        found = layer_batch(problem, layers, batch, cotangents)
        dtypes = {t.dtype for part in found.values() for t in (part.inputs, part.output_gradients)}
        once = len(found) == len(layers) and all(part.positions == 1 for part in found.values())
        if once and dtypes == {parameters.dtype}:
            parts = {
                layer: (part.output_gradients[0, 0, :, 0], part.inputs[0, :, 0])
                for layer, part in found.items()
            }
            result = cls(parameters, parts)
            if result.adds_up(problem, total, parameters.leaves(problem.model)):
                return result
        problem.plain[parameters.names] = None
        return None

    @classmethod
    def joined(cls, several: Sequence[PlainGradients], order: Int[Tensor, " n"]) -> PlainGradients:
        """Those of several batches in one, in this ``order``."""
        parts = {}
        for layer in several[0].parts:
            deltas, inputs = zip(*(some.parts[layer] for some in several), strict=True)
            parts[layer] = torch.cat(deltas)[order], torch.cat(inputs)[order]
        return cls(several[0].parameters, parts)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values()))[0])

    def rows(self) -> Float[Tensor, "n P"]:
        """The gradients themselves."""
        spans = dict(zip(self.parameters.names, self.parameters.spans, strict=True))
        shapes = dict(zip(self.parameters.names, self.parameters.shapes, strict=True))
        result = torch.empty(
            len(self), self.parameters.numel, dtype=self.parameters.dtype, device=self.parameters.device
        )
        for layer, (deltas, inputs) in self.parts.items():
            for name in layer.parts.values():
                target = result[:, slice(*spans[name])].unflatten(1, shapes[name])
                if target.ndim == 2:
                    target.copy_(deltas)
                else:
                    torch.mul(deltas[:, :, None], inputs[:, None, : target.shape[2]], out=target)
        return result

    def inner(self) -> Float[Tensor, "n n"]:
        """``∇_iᵀ ∇_j`` of all pairs, in float64."""
        size = len(self)
        result = torch.zeros(size, size, dtype=torch.float64, device=self.parameters.device)
        for deltas, inputs in self.parts.values():
            delta, given = deltas.double(), inputs.double()
            result.addcmul_(delta @ delta.T, given @ given.T)
        return result

    def products(self, rows: Float[Tensor, "m P"]) -> Float[Tensor, "m n"]:
        """``f_k · ∇_j`` of every row and sample."""
        scores = rows.new_zeros(len(self), len(rows))
        for layer, (deltas, inputs) in self.parts.items():
            places = layer.form.places[0].to(rows.device)
            at_once = max(1, CACHE_BYTES // (places.numel() * rows.element_size()))
            for begun in range(0, len(rows), at_once):
                some = slice(begun, begun + at_once)
                matrices = rows[some, places]
                step = max(32, CACHE_BYTES // (matrices[:, :, 0].numel() * rows.element_size()))
                for start in range(0, len(self), step):
                    chunk = slice(start, start + step)
                    along = (inputs[chunk] @ matrices.flatten(0, 1).T).unflatten(1, matrices.shape[:2])
                    scores[chunk, some] += (along @ deltas[chunk, :, None])[..., 0]
        return scores.T

    def adds_up(
        self, problem: Problem, total: Total, leaves: dict[str, Tensor], *, keep_graph: bool = False
    ) -> bool:
        """Whether autograd finds their sum with random weights, as the gradient of ``total``, at every layer.

        What a model does with a weight beside its layer shows there. Each sample weighs about as much as any
        other, so that a few large ones hide nothing, and no two alike, with a sign of its own: without that,
        what is proportional to the gradient in the outputs would not show where that vanishes, as it does at
        an optimum. Gradients that are not finite themselves are told of by whoever checks what is made of them.
        With ``keep_graph`` that of ``total`` is there for more.
        """
        norms = {
            layer: torch.linalg.vector_norm(deltas, dim=1, dtype=torch.float64)
            * torch.linalg.vector_norm(inputs, dim=1, dtype=torch.float64)
            for layer, (deltas, inputs) in self.parts.items()
        }
        sizes = torch.stack(list(norms.values())).square().sum(0).sqrt()
        if not sizes.isfinite().all():
            return True
        weights = self._weights(sizes)
        with torch.enable_grad():
            value = total(leaves, weights)
        found = gradients_of(value, list(leaves.values()), keep_graph=keep_graph)
        gradient = self.parameters.flatten(dict(zip(leaves, found, strict=True)))
        for layer, (deltas, inputs) in self.parts.items():
            places = layer.form.places[0].to(gradient.device)
            error = (gradient[places] - (weights[:, None] * deltas).T @ inputs).double()
            allowed = ROUNDINGS * problem.precision * torch.linalg.vector_norm(weights.double() * norms[layer])
            if not torch.linalg.vector_norm(error) <= allowed:
                return False
        return True

    def _weights(self, sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Of random signs, between one and two over the samples' sizes; not over those next to nothing."""
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = 2 * torch.rand(len(sizes), generator=generator, dtype=torch.float64, device="cpu") - 1
        drawn = (drawn + drawn.sign()).to(sizes.device)
        largest = sizes.max().clamp_min(torch.finfo(torch.float64).tiny)
        return (drawn * (largest / sizes.clamp_min(FAINTEST * largest))).to(self.parameters.dtype)


def scores_by_layers(
    factors: Sequence[Float[Tensor, "_m P"]], problem: Problem, batch: Batch
) -> list[Float[Tensor, "_m n"]] | None:
    """``f_k · ∇ℓ_j`` of every factor and sample; ``None`` where the model is not of that kind."""

    def total(leaves: dict[str, Tensor], weights: Float[Tensor, " n"]) -> Tensor:
        return (weights * problem.sample_losses(leaves, batch)).sum()

    found = PlainGradients.of(problem, problem.parameters, batch, true_gradients(problem), total)
    return None if found is None else [found.products(rows) for rows in factors]
