"""Sandwiches ``1/N Σ_n J_nᵀ H_n J_n``: diagonal, trace and matrix from per-sample Jacobians."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.costs import Work
from influence_framework.data import Batch
from influence_framework.gradients import sample_chunks
from influence_framework.layers import Layer, LayerBatch, Samples
from influence_framework.operators import estimated_trace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.streaming import StreamingOperator

TRACE_OUTPUTS = 64
"""Outputs of a sample up to which the trace is exact."""

TRACE_DRAWS = 512
"""Random targets that the trace is taken from where it is not exact, if not one for every sample."""

STRIP = 256
"""Rows of the matrix that are added to together, from the diagonal on: the rest is mirrored."""

PASSES = 4
"""Forward passes that one column of a product takes."""

SLOWER = 4
"""What a flop of autograd takes in units of one of a large matrix product: this and more on small nets."""


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
    """``1/N Σ_n J_nᵀ H_n J_n`` with ``J_n`` of a few rows. Offers ``Diagonal`` and ``Trace``."""

    @property
    @abstractmethod
    def sample_rows(self) -> int:
        """Rows of ``J_n``."""

    @abstractmethod
    def sample_factors(
        self, problem: Problem, batch: Batch
    ) -> tuple[Float[Tensor, "n c P"], Float[Tensor, "n c c"] | None]:
        """``J_n`` and ``H_n`` of every sample; ``None`` for identities."""

    def _factors(self, problem: Problem) -> Iterator[tuple[Float[Tensor, "m P"], Float[Tensor, "m P"]]]:
        """The rows of all ``J_n`` and those of all ``H_n J_n``, as many at a time as fit the budget."""
        for batch, size in problem.batches():
            for chunk in sample_chunks(problem, self.parameters, batch, size, copies=2 * self.sample_rows):
                jacobian, middle = self.sample_factors(problem, chunk)
                weighted = jacobian if middle is None else middle @ jacobian
                yield jacobian.flatten(0, 1), weighted.flatten(0, 1)

    def diagonal(self) -> Float[Tensor, " P"]:
        """``1/N Σ_n Σ_cd H_n[c, d] J_n[c]∘J_n[d]``, exact, from per-sample Jacobians within the budget."""
        (total,) = self.problem.total(self._diagonal, "the diagonal")
        return total / self.problem.size

    def _diagonal(self, problem: Problem) -> list[Float[Tensor, " P"]]:
        total = torch.zeros(self.parameters.numel, dtype=self.dtype, device=self.device)
        for rows, weighted in self._factors(problem):
            total += torch.linalg.vecdot(rows, weighted, dim=0)
        return [total]

    def _assembled(self) -> Float[Tensor, "P P"] | None:
        """The matrix at layer outputs, or from per-sample Jacobians where those take less than products."""
        dense = super()._assembled()
        if dense is None and self._few_rows():
            (dense,) = self.problem.total(self._gram, "the matrix")
            dense.div_(self.problem.size)
        return dense

    def _assembling(self) -> Work | None:
        """Jacobians of all samples, as the diagonal takes them, and half of the products of their rows."""
        work = super()._assembling()
        if work is not None or not self._few_rows():
            return work
        size, element = self.shape[0], torch.empty(0, dtype=self.dtype).element_size()
        flops = float(self.problem.size) * self.sample_rows * size**2
        return Work(products=((1, 1),), diagonals=1, flops=flops, traffic=6.0 * element * size**2)

    def _few_rows(self) -> bool:
        """Whether ``c (P² + 2cP)`` flops and ``c`` gradients a sample take less time than ``P`` columns."""
        size, rows, forward = self.parameters.numel, self.sample_rows, self.problem.sample_flops
        # A model without matrix products still reads its parameters.
        forward = max(forward, 2 * size)
        return rows * (size * (size + 2 * rows) + SLOWER * PASSES * forward) < SLOWER * PASSES * forward * size

    def _gram(self, problem: Problem) -> list[Float[Tensor, "P P"]]:
        size = self.parameters.numel
        total = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        for rows, weighted in self._factors(problem):
            for start in range(0, size, STRIP):
                strip = slice(start, start + STRIP)
                total[strip, start:].addmm_(rows[:, strip].T, weighted[:, start:])
        for start in range(0, size, STRIP):
            stop = min(start + STRIP, size)
            corner = total[start:stop, start:stop]
            corner.copy_((corner + corner.T) / 2)
            total[stop:, start:stop] = total[start:stop, stop:].T
        return [total]

    def trace(self) -> float:
        """As of :meth:`traces`."""
        return self.traces({"alone": self})["alone"]

    def traces(self, operators: Mapping[str, LinearOperator]) -> dict[str, float]:
        """From inputs and output gradients of layers, in one pass for all operators that layers have whole.

        Exact for up to 64 outputs and for true labels, else from random targets. For other operators from the
        exact diagonal, or from random vectors where ``J_n`` has too many rows for it.
        """
        mine = cast("Mapping[str, OuterProductOperator]", operators)
        covers = {name: operator.cover() for name, operator in mine.items()}
        few = self.sample_rows <= TRACE_OUTPUTS
        found = {
            name: float(mine[name].diagonal().sum(dtype=torch.float64)) if few else estimated_trace(mine[name])
            for name, cover in covers.items()
            if cover.uncovered
        }
        layers = {name: cover.layers for name, cover in covers.items() if not cover.uncovered}
        every = [layer for part in layers.values() for layer in part]
        if every:
            enumerable = self.problem.outputs_of_a_sample() <= TRACE_OUTPUTS
            samples: Samples = (
                "exact" if enumerable else min(TRACE_OUTPUTS, -(-TRACE_DRAWS // self.problem.size))
            )
            generator = torch.Generator("cpu").manual_seed(0)
            (totals,) = self.layer_sums(every, samples, generator, Squares(every))
            squares = iter(totals.tolist())
            found |= {
                name: sum(islice(squares, len(part))) / self.problem.size for name, part in layers.items()
            }
        return found
