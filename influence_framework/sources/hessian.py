"""The exact Hessian of the mean training loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of, pull_back
from influence_framework.layers import Tape, fisher_rows
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.layered import LayerCurvature, jacobians
from influence_framework.sources.linearization import Product
from influence_framework.sources.streaming import StreamingOperator


def second_derivatives(problem: Problem, outputs: Tensor, leaves: Sequence[Tensor], batch: Batch) -> Product:
    """One more backward pass through the graph of the gradient.

    Reverse-over-reverse, after Pearlmutter (1994), "Fast Exact Multiplication by the Hessian", §4.
    """
    gradients = gradients_of(problem.objective.mean_loss(outputs, batch), leaves)
    return lambda rows: pull_back(gradients, leaves, rows)


def hessian_at_layers(problem: Problem, tape: Tape, batch: Batch) -> LayerCurvature:
    """Second derivatives of the samples' losses with respect to the outputs of the layers."""
    shifts, inputs = tape.shifts, [use.inputs for use in tape.uses]
    total = problem.objective.sample_losses(tape.outputs, batch).sum()
    gradients = gradients_of(total, shifts)
    blocks, flow = {}, {}
    for k, gradient in enumerate(gradients):
        # By symmetry the derivatives of g_k alone give all pairs (k, l) with l from k on.
        for step, block in enumerate(jacobians(gradient, shifts[k:])):
            if block is not None:
                blocks[k, k + step] = block
        for j, jacobian in enumerate(jacobians(inputs[k], shifts[:k])):
            if jacobian is not None:
                flow[j, k] = jacobian.mT
    for pair in flow.keys() - blocks.keys():
        k, other = pair
        blocks[pair] = gradients[k].new_zeros(*gradients[k].shape, gradients[other].shape[1])
    detached = [gradient.detach() for gradient in gradients]
    return LayerCurvature(tape.uses, [a.detach() for a in inputs], blocks, flow, detached)


@dataclass(frozen=True)
class Hessian:
    """Exact Hessian ``1/N Σ_i ∇²ℓ_i`` of the mean loss over all training data.

    Symmetric, but for a trained net usually not positive semidefinite: choose a λ above the magnitude
    of its most negative eigenvalue, or the source ``gauss_newton``.

    Attributes:
        precompute_grad: Keep each batch's graphs for the next product even where those of all data exceed the
            memory budget's share for them. That saves the forward and the first backward pass of every
            further product, and takes memory in proportion to the data set's activations.
    """

    precompute_grad: bool = False

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The Hessian with respect to ``parameters``."""
        return StreamingOperator(
            problem,
            parameters,
            second_derivatives,
            hessian_at_layers,
            fisher_rows,
            gradient_terms=True,
            keep_graphs=self.precompute_grad,
        )
