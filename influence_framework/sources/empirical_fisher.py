"""The second moment of per-sample loss gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import gradients_of
from influence_framework.gradients import sample_gradients
from influence_framework.layers import Rows, Samples, Tape, true_gradients
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.gauss_newton import sandwich_at_layers
from influence_framework.sources.layered import LayerCurvature
from influence_framework.sources.linearization import Product, sandwich
from influence_framework.sources.outer_products import OuterProductOperator


def fisher_product(problem: Problem, outputs: Tensor, leaves: Sequence[Tensor], batch: Batch) -> Product:
    """``Jᵀ J / n`` with ``J`` of the per-sample losses, whose rows are the per-sample gradients."""
    losses = problem.objective.sample_losses(outputs, batch)
    return sandwich(losses, leaves, lambda tangents: tangents / len(losses))


def fisher_at_layers(problem: Problem, tape: Tape, batch: Batch) -> LayerCurvature:
    """``g_k g_lᵀ`` of every sample, with ``g_k`` its loss gradient at layer ``k``'s output."""
    total = problem.objective.sample_losses(tape.outputs, batch).sum()
    gradients = gradients_of(total, tape.shifts, keep_graph=False)
    one = gradients[0].new_ones(gradients[0].shape[0], 1, 1)
    return sandwich_at_layers(tape, [gradient[:, None, :] for gradient in gradients], one)


def _labelled(problem: Problem, samples: Samples | Literal["leading"], generator: torch.Generator) -> Rows:
    """The gradients of the true labels: nothing is drawn."""
    return true_gradients(problem)


class EmpiricalFisherOperator(OuterProductOperator):
    """Offers ``Diagonal`` and ``Trace`` beside what every streaming operator offers."""

    positive_semidefinite: ClassVar[bool] = True

    sample_rows: ClassVar[int] = 1

    def sample_factors(self, problem: Problem, batch: Batch) -> tuple[Float[Tensor, "n 1 P"], None]:
        """The loss gradient of every sample."""
        return sample_gradients(problem, self.parameters, batch)[:, None], None


@dataclass(frozen=True)
class EmpiricalFisher:
    """Empirical Fisher ``1/N Σ_i g_i g_iᵀ`` of per-sample loss gradients, positive semidefinite.

    Its gradients are those of the true labels, so it is not the Fisher information and vanishes where
    the model fits its data; Kunstner, Hennig and Balles (2019), "Limitations of the Empirical Fisher
    Approximation", §3.

    Attributes:
        precompute_grad: Keep each batch's graphs for the next product even where those of all data exceed the
            memory budget's share for them. That saves the forward and the first backward pass of every
            further product, and takes memory in proportion to the data set's activations.
    """

    precompute_grad: bool = False

    def operator(self, problem: Problem, parameters: ParameterSpace) -> LinearOperator:
        """The empirical Fisher with respect to ``parameters``."""
        return EmpiricalFisherOperator(
            problem,
            parameters,
            fisher_product,
            fisher_at_layers,
            _labelled,
            keep_graphs=self.precompute_grad,
        )
