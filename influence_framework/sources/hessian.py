"""The exact Hessian of the mean training loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.gradients import pull_back
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.streaming import Linearization, StreamingOperator


class HessianLinearization(Linearization):
    """The graph of one batch's gradient; a product is one more backward pass through it.

    Reverse-over-reverse, after Pearlmutter (1994), "Fast Exact Multiplication by the Hessian", §4.
    """

    gradients: list[Tensor]

    def _build(self, problem: Problem, leaves: dict[str, Tensor], batch: Batch) -> None:
        loss = problem.mean_loss(leaves, batch)
        gradients = torch.autograd.grad(loss, self.leaves, create_graph=True, materialize_grads=True)
        self.gradients = list(gradients)

    def apply(self, rows: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        products = pull_back(self.gradients, self.leaves, self.parameters.unflatten_rows(rows))
        return self.parameters.gather_rows(products, rows)


@dataclass(frozen=True)
class Hessian:
    """Exact Hessian ``1/N Σ_i ∇²ℓ_i`` of the mean loss over all training data.

    Symmetric, but for a trained net usually not positive semidefinite: choose a λ above the magnitude
    of its most negative eigenvalue, or the source ``gauss_newton``.

    Attributes:
        precompute_grad: Keep each batch's gradient graph for the next product. Saves the forward and
            the first backward pass of every further product, and takes memory in proportion to the
            data set's activations.
    """

    precompute_grad: bool = False

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The Hessian with respect to ``parameters``."""
        return StreamingOperator(problem, parameters, HessianLinearization, self.precompute_grad)
