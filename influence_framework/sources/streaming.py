"""The operator behind every source: a sum over batches, each linearised once and applied to all columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.costs import Work, by_columns, layers_forming
from influence_framework.data import Batch, split
from influence_framework.errors import NonFiniteError
from influence_framework.finite import all_finite
from influence_framework.layers import Cover, Layer, LayerBatch, Rows, Samples, cover, layer_batches
from influence_framework.memory import GRAPH
from influence_framework.operators import Operator, dense_by_columns
from influence_framework.parameters import ParameterSpace
from influence_framework.problem import Problem
from influence_framework.protocols import LinearOperator
from influence_framework.rows import RootRows
from influence_framework.sources.chain import ChainLinearization, plain_layers
from influence_framework.sources.layered import Curvature, layered_dense, once_on_vectors
from influence_framework.sources.leading import leading_rows
from influence_framework.sources.linearization import Curve, GraphLinearization, Linearization

Draws = Callable[[Problem, Samples | Literal["leading"], torch.Generator], Rows]
"""From the number of samples and a generator to what draws cotangents of outputs."""


@dataclass(eq=False)
class _Cache:
    """Linearisations kept between products, and the layers; moving to another device drops them."""

    kept: list[tuple[Linearization, int]] | None = None
    versions: list[int] = field(default_factory=list)
    cover: Cover | None = None
    chained: bool = True
    held: list[int] | None = None
    semidefinite: bool | None = None

    def to(self, device: Any) -> _Cache:
        return _Cache()

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        # Graphs cannot be sent to another process, and layers are found again there.
        return _Cache, ()


@dataclass(frozen=True, eq=False)
class StreamingOperator(Operator):
    """``C = Σ_b (n_b / N) C_b`` over the batches of a problem, at the model's current parameters.

    One product costs one pass over the data whatever the number of columns: each batch is linearised
    once, and all columns go through its graphs. Offers ``Minibatches``, ``Dense``, ``LayerStatistics`` and
    ``LeadingRows``.

    Attributes:
        problem: Model, objective and data.
        parameters: What is differentiated with respect to; a subset of ``problem.parameters``.
        curve: The curvature of one batch with respect to leaves of a graph.
        at_layers: The same curvature with respect to the outputs of linear layers.
        rows: Cotangents of the outputs whose second moment is the curvature in the outputs.
        gradient_terms: Whether the curvature has terms with first derivatives of the loss, as the Hessian has.
        keep_graphs: Keep every batch's graphs for the next product, faster, at their price in memory. Where
            they fit the budget, they are kept in any case.
    """

    problem: Problem
    parameters: ParameterSpace
    curve: Curve
    at_layers: Curvature
    rows: Draws
    gradient_terms: bool = False
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
        needed = GRAPH * problem.sample_bytes * problem.share_size
        return problem.cached and needed <= share * problem.memory_budget / 2

    @property
    def keeps_graphs(self) -> bool:
        """Whether graphs are built once for all products."""
        return self.keep_graphs or self._graphs_fit

    def linearize(self, batch: Batch, *, held: bool = False) -> Linearization:
        """The curvature of a batch: by matrix products where the model is a chain of linear layers.

        ``held`` says that gradients of the same samples were held against autograd before.
        """
        problem = self.problem
        if self._cache.chained and problem.twice_differentiable and (layers := plain_layers(self.cover())):
            found = ChainLinearization.of(
                problem,
                self.parameters,
                self.curve,
                batch,
                layers,
                gradient_terms=self.gradient_terms,
                held=held,
            )
            if found is not None:
                return found
        # What one batch is not, the next will not be either.
        self._cache.chained = False
        return GraphLinearization(problem, self.parameters, self.curve, batch)

    def _linearizations(self) -> Iterator[tuple[Linearization, int]]:
        model, room = self.problem.model, self.problem.room
        versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
        if not self.keeps_graphs:
            held = self._cache.held == versions
            for batch, size in self.problem.batches():
                yield self.linearize(batch, held=held), size
            self._cache.held = versions  # a whole pass, to its end
            return
        kept = self._cache.kept
        if kept is None or self._cache.versions != versions or any(room.at_most(n) < n for _, n in kept):
            # A graph through tensors that were written to since, be it with the same values, is lost; and
            # where memory ran out with a batch, so is its graph, before those of smaller ones are made.
            kept = self._cache.kept = None
            kept = [(self.linearize(batch), size) for batch, size in self.problem.batches()]
            self._cache.kept, self._cache.versions = kept, versions
        for linearization, size in kept:
            room.last = size
            yield linearization, size

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        # Rows are contiguous vectors: each parameter's part of them is a view, with nothing to copy.
        rows = columns.T.contiguous()
        (product,) = self.problem.total(partial(self._product, rows), "a curvature product", rows)
        if not all_finite(product) and all_finite(columns):
            raise NonFiniteError(
                "A curvature product contains NaN or infinity: a gradient of the model overflows. "
                "Check the scale of the data and of the parameters, or use float64."
            )
        return product.T

    def _product(self, rows: Float[Tensor, "k P"], problem: Problem) -> list[Float[Tensor, "k P"]]:
        """The part of the product that the batches of ``problem`` make up."""
        product = torch.zeros_like(rows)
        for linearization, size in self._linearizations():
            linearization.add(product, rows, size / problem.size, problem.memory_budget)
        return [product]

    def to_dense(self) -> Float[Tensor, "P P"]:
        """The full matrix: assembled where the model and the curvature allow, else by columns.

        What was assembled is checked against a product with a random vector, and given up for the second
        way where they differ: a model may use a layer's weight behind the layer's back.
        """
        dense = self._assembled()
        if dense is None or not self._confirmed(dense):
            return dense_by_columns(self)
        return dense

    def _assembled(self) -> Float[Tensor, "P P"] | None:
        """The matrix from second derivatives at layer outputs; ``None`` where the model has no such form."""
        return layered_dense(self.problem, self.parameters, self.at_layers)

    def forming(self) -> Work:
        """What :meth:`to_dense` takes."""
        return self._assembling() or by_columns(self.shape[0])

    def _assembling(self) -> Work | None:
        """What :meth:`_assembled` takes; ``None`` where it gives nothing."""
        layers = plain_layers(self.cover())
        if layers is None or not once_on_vectors(self.problem, layers):
            return None
        shapes = [layer.form.places.shape for layer in layers.values()]
        element = torch.empty(0, dtype=self.dtype).element_size()
        return layers_forming(
            [(o, e) for _, o, e in shapes], self.problem.size, self.problem.outputs_of_a_sample(), element
        )

    def _confirmed(self, dense: Float[Tensor, "P P"]) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(self.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        probe = probe.to(self.device, self.dtype)
        expected = self @ probe
        error = torch.linalg.vector_norm(dense @ probe - expected)
        # Above the rounding of sums over many samples, below a use of a weight that is merely faint.
        return bool(error <= 256 * self.problem.precision * torch.linalg.vector_norm(expected))

    def cover(self) -> Cover:
        """The layers whose gradients have a matrix form, and the parameters outside them."""
        if self._cache.cover is None:
            self._cache.cover = cover(self.problem, self.parameters)
        return self._cache.cover

    def layer_sums(
        self,
        layers: Sequence[Layer],
        samples: Samples,
        generator: torch.Generator,
        collect: Callable[[Iterator[tuple[Mapping[Layer, LayerBatch], int]]], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """Sums over inputs and output gradients of ``layers``; see :class:`LayerStatistics`."""
        if self.problem.processes is not None:
            generator = self.problem.processes.generator(generator)

        state = generator.get_state()

        def work(problem: Problem) -> Sequence[Tensor]:
            generator.set_state(state)  # it may begin again
            rows = self.rows(problem, samples, generator)
            return collect(layer_batches(problem, layers, rows, samples, generator))

        return self.problem.total(work, "statistics of layers")

    def leading_rows(self, count: int) -> RootRows:
        """Of the Gauss-Newton part of the Hessian; see :class:`LeadingRows`."""
        rows = self.rows(self.problem, "leading", torch.Generator("cpu").manual_seed(0))
        return leading_rows(self.problem, self.parameters, rows, count)

    def minibatches(self, generator: torch.Generator) -> Iterator[LinearOperator]:
        """Operators of random mini-batches, without end."""
        for batch, size in self.problem.random_batches(generator):
            yield MinibatchOperator(self, batch, self.problem.count(size))


@dataclass(frozen=True, eq=False)
class MinibatchOperator(Operator):
    """The curvature ``C_b`` of one mini-batch's mean loss.

    Attributes:
        whole: The operator over all data that this batch is a sample of.
        batch: Its samples; of data that is divided, those of this process.
        size: Number of samples of the whole mini-batch.
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
        problem = self.whole.problem
        (product,) = problem.total(partial(self._product, rows), "a product with a mini-batch", rows)
        return product.T

    def _product(self, rows: Float[Tensor, "k P"], problem: Problem) -> list[Float[Tensor, "k P"]]:
        product = torch.zeros_like(rows)
        own, room = problem.objective.size(self.batch), problem.room
        for piece in split(self.batch, own, room.at_most(own)):
            room.last = size = problem.objective.size(piece)
            self.whole.linearize(piece).add(product, rows, size / self.size, problem.memory_budget)
        return [product]
