"""The part of a curvature that its most curved samples make up, as the rows of a square root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.data import Batch, take
from influence_framework.errors import InvalidInputError
from influence_framework.gradients import check_sample_gradients, chunk_size, sample_pullbacks
from influence_framework.layers import Rows
from influence_framework.memory import in_pieces
from influence_framework.parameters import ParameterSpace
from influence_framework.plain import PlainGradients, plain_layers_of, weighted_sum
from influence_framework.problem import Problem
from influence_framework.rows import RootRows


@dataclass(frozen=True)
class _Candidates:
    """Rows of samples of one batch: each row's sample, its cotangent of the outputs, and the norm of that."""

    samples: Batch
    cotangents: Float[Tensor, "n ..."]
    norms: Float[Tensor, " n"]

    @classmethod
    def of(cls, problem: Problem, rows: Rows, batch: Batch, count: int) -> _Candidates:
        """The ``count`` largest of a batch, without those of no length."""
        with torch.no_grad():
            outputs = problem.outputs({}, batch)
        cotangents = rows(outputs, batch)
        size = cotangents.shape[1]
        cotangents = cotangents.flatten(0, 1)
        norms = torch.linalg.vector_norm(cotangents.reshape(len(cotangents), -1), dim=1)
        norms, index = norms.topk(min(count, int((norms > 0).sum())))
        return cls(take(batch, index % size), cotangents[index], norms)

    def __len__(self) -> int:
        return len(self.norms)

    def at(self, index: Int[Tensor, " m"]) -> _Candidates:
        return _Candidates(take(self.samples, index), self.cotangents[index], self.norms[index])


def leading_rows(problem: Problem, parameters: ParameterSpace, rows: Rows, count: int) -> RootRows:
    """``J_nᵀ r / √N`` of the ``m ≤ count`` cotangents ``r`` of samples that are the largest, largest first.

    Takes a forward pass over the data, and ``m`` samples' worth of a backward pass.

    Args:
        problem: Model, objective and data.
        parameters: What is differentiated with respect to.
        rows: From outputs to cotangents of each sample.
        count: How many rows.

    Raises:
        InvalidInputError: ``count`` is not positive, or the data is divided between processes.
    """
    if count < 1:
        raise InvalidInputError(f"The number of leading rows must be positive, got {count}.")
    if problem.processes is not None:
        raise InvalidInputError(
            "Leading rows are chosen among all samples, and these are divided between processes: fit in one "
            "process, or leave the option leading_rows out."
        )
    chosen: list[_Candidates] = problem.room.retried(partial(_chosen, problem, rows, count))
    order = torch.cat([part.norms for part in chosen]).argsort(descending=True)
    pieces = [(part.samples, part.cotangents / sqrt(problem.size)) for part in chosen if len(part)]
    if pieces:
        plain = _by_layers(problem, parameters, pieces)
        if plain is not None:
            return PlainRows.of(PlainGradients.joined(plain, order))
    places = order.argsort()
    result = torch.empty(len(order), parameters.numel, dtype=parameters.dtype, device=parameters.device)
    pull, begun = partial(_pulled, problem, parameters), 0
    for piece in pieces:
        at_most = chunk_size(problem, parameters, _size(piece))
        for _, found in in_pieces(problem.room, piece, _size, at_most, pull):
            result[places[begun : begun + len(found)]] = found
            begun += len(found)
    return RootRows(result)


@dataclass(frozen=True, eq=False)
class PlainRows(RootRows):
    """Rows that are outer products of layers, whose inner products take no products of rows."""

    gradients: PlainGradients

    @classmethod
    def of(cls, gradients: PlainGradients) -> PlainRows:
        rows = gradients.rows()
        check_sample_gradients(rows)
        return cls(rows, gradients)

    def inner(self) -> Float[Tensor, "m m"]:
        return self.gradients.inner()


Piece: TypeAlias = tuple[Batch, Tensor]
"""Samples, and the cotangent of the outputs of each."""


def _by_layers(
    problem: Problem, parameters: ParameterSpace, pieces: Sequence[Piece]
) -> list[PlainGradients] | None:
    """From inputs and output gradients of layers; ``None`` where the model does not allow it."""
    if plain_layers_of(problem, parameters) is None:
        return None
    work = partial(_outer_products, problem, parameters)
    result = []
    for piece in pieces:
        for _, found in in_pieces(problem.room, piece, _size, problem.max_batch, work):
            if found is None:
                return None
            result.append(found)
    return result


def _outer_products(problem: Problem, parameters: ParameterSpace, piece: Piece) -> PlainGradients | None:
    samples, cotangents = piece

    def total(leaves: dict[str, Tensor], weights: Float[Tensor, " m"]) -> Tensor:
        return weighted_sum(problem.outputs(leaves, samples), cotangents, weights)

    return PlainGradients.of(problem, parameters, samples, lambda *_: cotangents[None], total)


def _pulled(problem: Problem, parameters: ParameterSpace, piece: Piece) -> Tensor:
    return sample_pullbacks(problem, parameters, *piece)


def _size(piece: Piece) -> int:
    return len(piece[1])


def _chosen(problem: Problem, rows: Rows, count: int) -> list[_Candidates]:
    """The candidates with the largest norms: batch by batch, so that few are held that are not chosen."""
    kept: list[_Candidates] = []
    for batch, _ in problem.batches():
        kept = _largest([*kept, _Candidates.of(problem, rows, batch, count)], count)
    return kept


def _largest(candidates: list[_Candidates], count: int) -> list[_Candidates]:
    norms = torch.cat([part.norms for part in candidates])
    if len(norms) <= count:
        return candidates
    chosen = torch.zeros_like(norms, dtype=torch.bool)
    chosen[norms.topk(count).indices] = True
    parts = chosen.split([len(part) for part in candidates])
    return [
        part if keep.all() else part.at(keep.nonzero().flatten())
        for part, keep in zip(candidates, parts, strict=True)
        if keep.any()
    ]
