"""The generalised Gauss-Newton matrix, and what other sandwiches ``Jᵀ H J`` share with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of, pull_back
from influence_framework.errors import InvalidInputError
from influence_framework.gradients import sample_jacobians
from influence_framework.layers import Tape, fisher_rows
from influence_framework.output_curvature import OutputCurvature
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.layered import LayerCurvature, jacobians
from influence_framework.sources.linearization import Product, sandwich
from influence_framework.sources.outer_products import OuterProductOperator


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

    @cached_property
    def sample_rows(self) -> int:
        """One for each number that the model returns."""
        return self.problem.outputs_of_a_sample()

    def sample_factors(
        self, problem: Problem, batch: Batch
    ) -> tuple[Float[Tensor, "n c P"], Float[Tensor, "n c c"]]:
        """The Jacobian of every sample's outputs, and the Hessian of its loss with respect to them."""
        return sample_jacobians(problem, self.parameters, batch)


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
