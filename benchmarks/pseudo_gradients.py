"""The Fisher information as pydvl has it, as a source: with it both sides compute the same scores.

pydvl draws no label and takes the gradient of ``Σ_c √p_c log p_c`` with ``√p`` held constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import influence_framework as inf
from influence_framework.layers.statistics import Rows
from influence_framework.sources.empirical_fisher import (
    EmpiricalFisher,
    EmpiricalFisherOperator,
    fisher_at_layers,
    fisher_product,
)


def pydvl_rows(_problem: inf.Problem, _samples: Any, _generator: torch.Generator) -> Rows:
    """Of ``Σ_c √p_c log p_c``, in the outputs."""

    def rows(outputs: Tensor, _batch: Any) -> Tensor:
        p = outputs.softmax(1)
        return (p.sqrt() - p * p.sqrt().sum(1, keepdim=True))[None]

    return rows


class PydvlFisher(EmpiricalFisher):
    """The curvature that pydvl approximates."""

    def operator(self, problem: inf.Problem, parameters: inf.ParameterSpace) -> inf.LinearOperator:
        return EmpiricalFisherOperator(
            problem,
            parameters,
            fisher_product,
            fisher_at_layers,
            pydvl_rows,
            keep_graphs=self.precompute_grad,
        )
