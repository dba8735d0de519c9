"""The operator behind every source: a sum over batches, each linearised once and applied to all columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.derivatives import rows_at_once
from influence_framework.errors import NonFiniteError
from influence_framework.layers import Cover, Layer, LayerBatch, Rows, Samples, cover, layer_batches
from influence_framework.operators import Operator, dense_by_columns
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.sources.layered import Curvature, layered_dense

Draws = Callable[[Problem, Samples, torch.Generator], Rows]
"""From the number of samples and a generator to what draws cotangents of outputs."""


GRAPH = 3
"""What a gradient's graph, or another backward pass through it, takes in units of the forward pass."""


class Linearization(ABC):
    """The curvature of one batch at fixed parameters, with its autograd graphs kept.

    A subclass builds its graphs in ``_build`` and applies them to rows in :meth:`apply`. Every further
    row costs only the backward passes through graphs that exist already.
    """

    def __init__(self, problem: Problem, parameters: ParameterSpace, batch: Batch) -> None:
        problem.require_second_derivatives()
        self.parameters = parameters
        self.leaves = list((leaves := parameters.leaves(problem.model)).values())
        # A second backward pass makes about as many tensors as the first, and that as the forward pass.
        self.row_bytes = GRAPH * problem.sample_bytes * problem.objective.size(batch)
        with torch.enable_grad():
            self._build(problem, leaves, batch)

    @abstractmethod
    def _build(self, problem: Problem, leaves: dict[str, Tensor], batch: Batch) -> None:
        """Build the graphs that :meth:`apply` goes through."""

    @abstractmethod
    def apply(self, rows: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        """The product of this batch's curvature (of its mean loss) with ``k`` rows."""


@dataclass(eq=False)
class _Cache:
    """Linearisations kept between products, and the layers; moving to another device drops them."""

    kept: list[tuple[Linearization, int]] | None = None
    versions: list[int] = field(default_factory=list)
    cover: Cover | None = None
    semidefinite: bool | None = None

    def to(self, device: Any) -> _Cache:
        return _Cache()


@dataclass(frozen=True, eq=False)
class StreamingOperator(Operator):
    """``C = Σ_b (n_b / N) C_b`` over the batches of a problem, at the model's current parameters.

    One product costs one pass over the data whatever the number of columns: each batch is linearised
    once, and all columns go through its graphs. Offers ``Minibatches``, ``Dense`` and
    ``LayerStatistics``.

    Attributes:
        problem: Model, objective and data.
        parameters: What is differentiated with respect to; a subset of ``problem.parameters``.
        linearize: Builds the curvature of one batch.
        at_layers: The same curvature with respect to the outputs of linear layers.
        rows: Cotangents of the outputs whose second moment is the curvature in the outputs.
        keep_graphs: Keep every batch's graphs for the next product, faster, at their price in memory. Where
            they fit the budget, they are kept in any case.
    """

    problem: Problem
    parameters: ParameterSpace
    linearize: Callable[[Problem, ParameterSpace, Batch], Linearization]
    at_layers: Curvature
    rows: Draws
    keep_graphs: bool = False
    _cache: _Cache = field(default_factory=_Cache, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.parameters.numel, self.parameters.numel)

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        return self.parameters.device

    @property
    def _graphs_fit(self) -> bool:
        """Whether the graphs of all data take no more than this block's share of half the budget."""
        problem = self.problem
        share = self.parameters.numel / problem.parameters.numel
        needed = GRAPH * problem.sample_bytes * problem.size
        return problem.cached and needed <= share * problem.memory_budget / 2

    def _linearizations(self) -> Iterator[tuple[Linearization, int]]:
        if not (self.keep_graphs or self._graphs_fit):
            for batch, size in self.problem.batches():
                yield self.linearize(self.problem, self.parameters, batch), size
            return
        model = self.problem.model
        versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
        if self._cache.kept is None or self._cache.versions != versions:
            # A graph through tensors that were written to since, be it with the same values, is lost.
            self._cache.kept = [
                (self.linearize(self.problem, self.parameters, batch), size)
                for batch, size in self.problem.batches()
            ]
            self._cache.versions = versions
        yield from self._cache.kept

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        # Rows are contiguous vectors: each parameter's part of them is a view, with nothing to copy.
        rows = columns.T.contiguous()
        product = torch.zeros_like(rows)
        for linearization, size in self._linearizations():
            add_batch(product, linearization, rows, size / self.problem.size, self.problem.memory_budget)
        if not torch.isfinite(product).all() and torch.isfinite(columns).all():
            raise NonFiniteError(
                "A curvature product contains NaN or infinity: a gradient of the model overflows. "
                "Check the scale of the data and of the parameters, or use float64."
            )
        return product.T

    def to_dense(self) -> Float[Tensor, "P P"]:
        """The full matrix: from second derivatives at layer outputs where the model allows, else by columns.

        The first way is checked against a product with a random vector, and given up for the second
        where they differ: a model may use a layer's weight behind the layer's back.
        """
        dense = layered_dense(self.problem, self.parameters, self.at_layers)
        if dense is None or not self._confirmed(dense):
            return dense_by_columns(self)
        return dense

    def _confirmed(self, dense: Float[Tensor, "P P"]) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(self.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        probe = probe.to(self.device, self.dtype)
        expected = self @ probe
        error = torch.linalg.vector_norm(dense @ probe - expected)
        # The square root of the precision: far above rounding, far below a missing term.
        return bool(error <= torch.finfo(self.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected))

    def cover(self) -> Cover:
        """The layers whose gradients have a matrix form, and the parameters outside them."""
        if self._cache.cover is None:
            self._cache.cover = cover(self.problem, self.parameters)
        return self._cache.cover

    def layer_batches(
        self, layers: Sequence[Layer], samples: Samples, generator: torch.Generator
    ) -> Iterator[tuple[Mapping[Layer, LayerBatch], int]]:
        """Inputs and output gradients of ``layers``, batch by batch; see :class:`LayerStatistics`."""
        rows = self.rows(self.problem, samples, generator)
        return layer_batches(self.problem, layers, rows, samples)

    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]:
        """Operators of random mini-batches, without end."""
        for batch, size in self.problem.random_batches(generator):
            yield MinibatchOperator(self, batch, size)


def add_batch(
    product: Float[Tensor, "k P"],
    linearization: Linearization,
    rows: Float[Tensor, "k P"],
    weight: float,
    budget: int,
) -> None:
    """Add ``weight · C_b · rows`` to ``product``, as many rows at a time as pays."""
    step = rows_at_once(rows.device, linearization.row_bytes, budget)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        product[part].add_(linearization.apply(rows[part]), alpha=weight)


@dataclass(frozen=True, eq=False)
class MinibatchOperator(Operator):
    """The curvature ``C_b`` of one mini-batch's mean loss.

    Attributes:
        whole: The operator over all data that this batch is a sample of.
        batch: Its samples.
        size: Their number.
    """

    whole: StreamingOperator
    batch: Batch
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        rows = columns.T.contiguous()
        product = torch.zeros_like(rows)
        problem = self.whole.problem
        linearization = self.whole.linearize(problem, self.whole.parameters, self.batch)
        add_batch(product, linearization, rows, 1.0, problem.memory_budget)
        return product.T
