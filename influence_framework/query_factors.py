"""Factors of queries compressed to low rank, layer by layer, and scores of training points with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.fitted import Fitted
from influence_framework.gradients import Factors, contract_up
from influence_framework.layer_scores import checked_gradients
from influence_framework.layers import Layer, LayerBatch, cover, layer_batch, samples_at_once
from influence_framework.measurement import Measurement, measured
from influence_framework.memory import in_pieces
from influence_framework.solving import SolveLog

POWER_ITERATIONS = 2
"""Of ``torch.svd_lowrank``: its own default, enough for a spectrum that decays at all."""


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Each query's factor in one layer, ``F_m = L_m R_mᵀ``.

    Attributes:
        left: ``L``, ``(m, g, o, r)``.
        right: ``R``, ``(m, g, e, r)``; ``None`` where the layer is so small that ``left`` is ``F`` itself.
    """

    left: Float[Tensor, "m g o r"]
    right: Float[Tensor, "m g e r"] | None

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)

    def scores(self, batch: LayerBatch, budget: int) -> Float[Tensor, "m n"]:
        """``⟨F_m, G_n⟩`` of every pair, in the order that takes the fewest flops.

        With few positions ``Σ_t (L_mᵀ δ_nt)·(R_mᵀ ā_nt)``, which forms no matrix; with many, ``F_m`` and
        ``G_n`` are formed: ``L_m R_mᵀ`` takes as much as the products with as many samples as its rank.

        Args:
            batch: The layer's part in some training points, one draw of each.
            budget: Bytes for what is formed on the way, of one pair at least.
        """
        if self.right is None or self._positions_cost(batch) > self._matrices_cost(batch, budget):
            return self._by_matrices(batch, budget)
        return self._by_positions(batch, budget)

    def _positions_cost(self, batch: LayerBatch) -> int:
        count, groups, outputs, rank = self.left.shape
        reached = 0 if batch.one_hot else batch.columns
        return count * groups * batch.size * batch.positions * rank * (outputs + reached + 1)

    def _matrices_cost(self, batch: LayerBatch, budget: int) -> int:
        count, groups, outputs, rank = self.left.shape
        entries = groups * outputs * batch.columns
        times = ceil(batch.size / self._matrices_at_once(batch, budget))
        return entries * (count * (times * rank + batch.size) + batch.size * batch.positions)

    def _matrices_at_once(self, batch: LayerBatch, budget: int) -> int:
        groups, outputs = self.left.shape[1:3]
        return max(1, budget // (4 * groups * outputs * batch.columns * self.left.element_size()))

    def _by_matrices(self, batch: LayerBatch, budget: int) -> Float[Tensor, "m n"]:
        step, found = self._matrices_at_once(batch, budget), []
        for part in batch.parts(step):
            gradients = part.gradients()[0].flatten(1).T.to(self.left.dtype)
            found.append(torch.cat([some._whole() @ gradients for some in self._parts(step)]))
        return torch.cat(found, dim=1)

    def _by_positions(self, batch: LayerBatch, budget: int) -> Float[Tensor, "m n"]:
        groups, rank = self.left.shape[1], self.left.shape[3]
        # Both sides turned, and their products.
        each = 3 * groups * rank * batch.positions * batch.size * self.left.element_size()
        step = max(1, budget // each)
        return torch.cat([some._dots(batch) for some in self._parts(step)])

    def _dots(self, batch: LayerBatch) -> Float[Tensor, "m n"]:
        """``Σ_t (L_mᵀ δ_nt)·(R_mᵀ ā_nt)``, as two products of matrices in each group."""
        assert self.right is not None
        count, rank = self.left.shape[0], self.left.shape[3]
        turned = _times_all(batch.output_gradients[0], self.left)
        if batch.one_hot:
            reached = self.right[:, 0].transpose(0, 1)[batch.inputs].flatten(2)[None]
        else:
            reached = _times_all(batch.inputs, self.right)
        products: Tensor = (turned * reached).sum((0, 2)).view(-1, count, rank)
        return products.sum(2).T

    def _whole(self) -> Float[Tensor, "m goe"]:
        """``F`` of every query, flattened."""
        whole = self.left if self.right is None else self.left @ self.right.mT
        return whole.flatten(1)

    def _parts(self, step: int) -> Iterator[LayerFactors]:
        rights = [None] * len(self.left) if self.right is None else self.right.split(step)
        for left, right in zip(self.left.split(step), rights, strict=False):
            yield LayerFactors(left, right)


def _times_all(
    vectors: Float[Tensor, "g n t i"], factors: Float[Tensor, "m g i r"]
) -> Float[Tensor, "g n t mr"]:
    """Every vector times every query's factor."""
    together = factors.permute(1, 2, 0, 3).flatten(2).to(vectors.dtype)
    products: Tensor = (vectors.flatten(1, 2) @ together).unflatten(1, vectors.shape[1:3])
    return products


@dataclass(frozen=True, eq=False)
class QueryFactors:
    """``(C + λI)⁻¹ ∇ℓ(z)`` of some queries, each layer's matrix of it compressed to ``rank``.

    Attributes:
        rank: Of every layer's matrix, at most.
        layers: By name.
        rest: What is in no layer, as it is.
        error: ``‖F − F_rank‖ / ‖F‖`` of every query over all layers, ``(m,)`` float64: a score with a training
            gradient ``g`` is off by at most ``error · ‖F‖ · ‖g‖``.
        norm: ``‖F‖`` of every query, ``(m,)`` float64.
    """

    rank: int
    layers: Mapping[str, LayerFactors]
    rest: Factors
    error: Float[Tensor, " m"]
    norm: Float[Tensor, " m"]

    def __len__(self) -> int:
        return len(self.error)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.rest.rows.nbytes + sum(layer.nbytes for layer in self.layers.values())


def query_factors(
    fitted: Fitted, batch: Batch, rank: int, seed: int, log: SolveLog, measurement: Measurement | None
) -> QueryFactors:
    """Solve for the queries, a few at a time within the budget, and keep what ``rank`` holds of each."""
    check_rank(rank, "rank")
    problem = fitted.problem
    found = cover(problem, problem.parameters)
    names = problem.parameters.subset(found.uncovered)
    index = problem.parameters.indices_of(names) if found.uncovered else torch.empty(0, dtype=torch.long)
    parts: list[QueryFactors] = []
    torch.manual_seed(seed)  # svd_lowrank has no generator of its own; the caller's state is kept outside
    for gradients in fitted.gradients(batch, problem=measured(problem, measurement)):
        by_block = {name: block.solve(gradients, log) for name, block in fitted.blocks.items()}
        rows = fitted.assemble(by_block)
        norm = torch.linalg.vector_norm(rows.double(), dim=1)
        lost = torch.zeros_like(norm)
        layers = {}
        for layer in found.layers:
            matrices = rows[:, layer.form.places.to(rows.device)]
            layers[layer.name] = kept = _compressed(matrices, rank)
            if kept.right is not None:
                missing = matrices - kept.left @ kept.right.mT
                lost += missing.double().square().sum((1, 2, 3))
        rest = Factors(rows if index is None else rows[:, index.to(rows.device)], index)
        error = torch.where(norm > 0, lost.sqrt() / norm, 0.0)
        parts.append(QueryFactors(rank, layers, rest, error, norm))
    return join_query_factors(parts)


def check_rank(rank: int, name: str) -> None:
    """Refuse what is no rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidInputError(f"{name} is a whole number, at least 1; got {rank!r}.")


def query_bytes(fitted: Fitted, rank: int) -> int:
    """Memory that the compressed factor of one query takes."""
    problem = fitted.problem
    found = cover(problem, problem.parameters)
    entries = problem.parameters.subset(found.uncovered).numel
    for layer in found.layers:
        groups, outputs, columns = layer.form.places.shape
        entries += groups * min(rank * (outputs + columns), outputs * columns)
    return entries * problem.parameters.dtype.itemsize


def _compressed(matrices: Float[Tensor, "m g o e"], rank: int) -> LayerFactors:
    outputs, columns = matrices.shape[2:]
    if rank * (outputs + columns) >= outputs * columns:
        return LayerFactors(matrices, None)
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    left, values, right = torch.svd_lowrank(wide, q=rank, niter=POWER_ITERATIONS)
    return LayerFactors((left * values[..., None, :]).to(matrices.dtype), right.to(matrices.dtype))


def join_query_factors(parts: Sequence[QueryFactors]) -> QueryFactors:
    """Those of several batches as one."""

    def layer(name: str) -> LayerFactors:
        each = [part.layers[name] for part in parts]
        rights = [one.right for one in each if one.right is not None]
        return LayerFactors(torch.cat([one.left for one in each]), torch.cat(rights) if rights else None)

    first = parts[0]
    return QueryFactors(
        first.rank,
        {name: layer(name) for name in first.layers},
        Factors(torch.cat([part.rest.rows for part in parts]), first.rest.index),
        torch.cat([part.error for part in parts]),
        torch.cat([part.norm for part in parts]),
    )


def scores_of(fitted: Fitted, factors: QueryFactors, train: Batch) -> Float[Tensor, "m n"]:
    """Scores of every training point with every query, from one pass over the training points.

    Outputs of the model are looked at in this pass, if there is any layer.

    Raises:
        InvalidInputError: Factors of another model.
    """
    problem = fitted.problem
    layers = {layer.name: layer for layer in cover(problem, problem.parameters).layers}
    shapes = {name: tuple(one.left.shape[1:3]) for name, one in factors.layers.items()}
    if shapes != {name: tuple(layer.form.places.shape[:2]) for name, layer in layers.items()}:
        raise InvalidInputError("The query factors are of a model with other layers: make them with this one.")
    size = fitted.size(train)
    # Half of single precision would lose the later layers.
    wide = torch.promote_types(problem.parameters.dtype, torch.float32)
    result = torch.zeros(len(factors), size, dtype=wide, device=problem.parameters.device)
    start = 0
    # Half of what the factors leave for the pass, and half for products with them.
    rest = max(problem.memory_budget - factors.nbytes, problem.memory_budget // 4) // 2
    for piece, found in _pieces(fitted, train, list(layers.values()), rest):
        place = slice(start, start := start + fitted.size(piece))
        for layer, batch in found.items():
            result[:, place] += factors.layers[layer.name].scores(batch, rest)
    if factors.rest.rows.shape[1]:
        result += contract_up({"rest": factors.rest}, problem, train)["rest"]
    return result


def _pieces(
    fitted: Fitted, batch: Batch, layers: list[Layer], budget: int
) -> Iterator[tuple[Batch, dict[Layer, LayerBatch]]]:
    problem = fitted.problem
    at_once = samples_at_once(replace(problem, memory_budget=budget), layers=layers)
    yield from in_pieces(
        problem.room,
        batch,
        fitted.size,
        at_once,
        lambda piece: layer_batch(problem, layers, piece, partial(checked_gradients, problem)),
    )
