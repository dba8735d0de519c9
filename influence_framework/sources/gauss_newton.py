"""Sandwiches ``Jᵀ H J``: the generalised Gauss-Newton matrix and the empirical Fisher."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of, pull_back
from influence_framework.errors import InvalidInputError
from influence_framework.gradients import sample_chunks, sample_jacobians
from influence_framework.layers import Layer, LayerBatch, Samples, Tape, fisher_rows
from influence_framework.operators import estimated_trace
from influence_framework.output_curvature import OutputCurvature
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.layered import LayerCurvature, jacobians
from influence_framework.sources.linearization import Product, sandwich
from influence_framework.sources.streaming import StreamingOperator


def gauss_newton_product(problem: Problem, outputs: Tensor, leaves: Sequence[Tensor], batch: Batch) -> Product:
    """``Jᵀ H J`` with ``J`` of the model's outputs, ``H`` the Hessian of the mean loss with respect to them."""
    leaf = outputs.detach().requires_grad_()
    (gradient,) = gradients_of(problem.objective.mean_loss(leaf, batch), [leaf])
    return sandwich(outputs, leaves, lambda tangents: pull_back([gradient], [leaf], [tangents])[0])


def gauss_newton_at_layers(problem: Problem, tape: Tape, batch: Batch) -> LayerCurvature:
    """``J_kᵀ H J_l`` of every sample, with ``J_k`` the Jacobian of its output at layer ``k``'s output."""
    leaf = tape.outputs.detach().requires_grad_()
    total = problem.objective.sample_losses(leaf, batch).sum()
    (gradient,) = gradients_of(total, [leaf])
    (curvature,) = jacobians(gradient, [leaf])
    if curvature is None:
        curvature = leaf.new_zeros(*leaf.shape, leaf.shape[1])
    return sandwich_at_layers(tape, jacobians(tape.outputs, tape.shifts), curvature)


def sandwich_at_layers(
    tape: Tape, factors: Sequence[Float[Tensor, "n c _o"] | None], middle: Float[Tensor, "n c d"]
) -> LayerCurvature:
    """``J_kᵀ H J_l`` from per-sample ``J_k``, ``(n, c, o_k)``; ``None`` where zero."""
    blocks = {}
    for k, left in enumerate(factors):
        for other in range(k, len(factors)):
            right = factors[other]
            if left is not None and right is not None:
                blocks[k, other] = left.mT @ (middle @ right)
    return LayerCurvature(tape.uses, [use.inputs.detach() for use in tape.uses], blocks, {}, [])


TRACE_OUTPUTS = 64
"""Outputs of a sample up to which the trace is exact."""

TRACE_DRAWS = 512
"""Random targets that the trace is taken from where it is not exact, if not one for every sample."""


@dataclass(frozen=True)
class Squares:
    """``Σ_n ‖G_n‖²`` of each layer; no closure, so that it can be sent to another process."""

    layers: Sequence[Layer]

    def __call__(self, passed: Iterator[tuple[Mapping[Layer, LayerBatch], int]]) -> list[Tensor]:
        totals = dict.fromkeys(self.layers, 0.0)
        for batches, _ in passed:
            for layer, batch in batches.items():
                totals[layer] += batch.square()
        return [torch.tensor(list(totals.values()), dtype=torch.float64, device="cpu")]


class OuterProductOperator(StreamingOperator):
    """``1/N Σ_n Σ_s g[s,n] g[s,n]ᵀ``: the trace is the sum of squares of the gradients."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " P"]:
        """The exact diagonal."""

    def trace(self) -> float:
        """As of :meth:`traces`."""
        return self.traces({"alone": self})["alone"]

    def traces(self, operators: Mapping[str, LinearOperator]) -> dict[str, float]:
        """From inputs and output gradients of layers, in one pass for all operators that layers have whole.

        Exact for up to 64 outputs, else from random targets. For other operators from the exact diagonal, or
        from random vectors where the outputs are too many for it.
        """
        mine = cast("Mapping[str, OuterProductOperator]", operators)
        few = self.problem.outputs_of_a_sample() <= TRACE_OUTPUTS
        covers = {name: operator.cover() for name, operator in mine.items()}
        found = {
            name: float(mine[name].diagonal().sum(dtype=torch.float64)) if few else estimated_trace(mine[name])
            for name, cover in covers.items()
            if cover.uncovered
        }
        layers = {name: cover.layers for name, cover in covers.items() if not cover.uncovered}
        every = [layer for part in layers.values() for layer in part]
        if every:
            samples: Samples = "exact" if few else min(TRACE_OUTPUTS, -(-TRACE_DRAWS // self.problem.size))
            generator = torch.Generator("cpu").manual_seed(0)
            (totals,) = self.layer_sums(every, samples, generator, Squares(every))
            squares = iter(totals.tolist())
            found |= {
                name: sum(islice(squares, len(part))) / self.problem.size for name, part in layers.items()
            }
        return found


class GaussNewtonOperator(OuterProductOperator):
    """Offers ``Diagonal`` and ``Trace`` beside what every streaming operator offers."""

    @property
    def positive_semidefinite(self) -> bool:
        """Whether the loss is known to be convex in the outputs, or is recognised and so at every sample.

        The latter takes a forward pass over the data, once: a loss that weighs its samples, say, may be of one
        sign on the first of them only.
        """
        if getattr(self.problem.objective, "convex", False):
            return True
        if self._cache.semidefinite is None:
            (doubtful,) = self.problem.total(self._doubtful, "whether the loss is convex")
            self._cache.semidefinite = not doubtful.item()
        return self._cache.semidefinite

    def _doubtful(self, problem: Problem) -> list[Float[Tensor, ""]]:
        """Positive unless the loss is recognised as convex at every sample."""
        try:
            convex = self._in_outputs(problem.example).convex and all(
                self._in_outputs(batch) is not None for batch, _ in problem.batches()
            )
        except InvalidInputError:
            convex = False
        return [torch.tensor(float(not convex), dtype=torch.float64, device="cpu")]

    def _in_outputs(self, batch: Batch) -> OutputCurvature:
        with torch.no_grad():
            outputs = self.problem.outputs({}, batch)
        return OutputCurvature.of(self.problem.objective, outputs, batch)

    def diagonal(self) -> Float[Tensor, " P"]:
        """``1/N Σ_i Σ_cd H_i[c, d] J_i[c]∘J_i[d]``, from per-sample Jacobians within the budget."""
        (total,) = self.problem.total(self._diagonal, "the diagonal")
        return total / self.problem.size

    def _diagonal(self, problem: Problem) -> list[Float[Tensor, " P"]]:
        parameters = self.parameters
        total = torch.zeros(parameters.numel, dtype=self.dtype, device=self.device)
        for batch, size in problem.batches():
            with torch.no_grad():
                width = problem.outputs({}, batch)[0].numel()
            for chunk in sample_chunks(problem, parameters, batch, size, copies=2 * width):
                jacobian, curvature = sample_jacobians(problem, parameters, chunk)
                total += torch.einsum("ncp,ncd,ndp->p", jacobian, curvature, jacobian)
        return [total]


@dataclass(frozen=True)
class GaussNewton:
    """Generalised Gauss-Newton matrix ``1/N Σ_i J_iᵀ H_i J_i``, positive semidefinite.

    ``J_i`` is the Jacobian of the model's output for sample ``i`` and ``H_i = ∇²_out ℓ_i`` the Hessian
    of its loss with respect to that output. It equals the Fisher information where the loss is the
    negative log-likelihood of an exponential family in its natural parameters (cross-entropy, squared
    error, BCE with logits), and is positive semidefinite for any loss convex in the output.
    Schraudolph (2002), "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", §3;
    Martens (2020), "New Insights and Perspectives on the Natural Gradient Method", §8.

    Attributes:
        precompute_grad: Keep each batch's graphs for the next product even where those of all data exceed the
            memory budget's share for them. That saves the forward and the first backward pass of every
            further product, and takes memory in proportion to the data set's activations.
    """

    precompute_grad: bool = False

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The Gauss-Newton matrix with respect to ``parameters``."""
        return GaussNewtonOperator(
            problem,
            parameters,
            gauss_newton_product,
            gauss_newton_at_layers,
            fisher_rows,
            keep_graphs=self.precompute_grad,
        )
