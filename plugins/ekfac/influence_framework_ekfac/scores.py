"""Scores of pairs in the eigenbasis of a layer, in whichever order takes the fewest flops.

With ``δ`` and ``ā`` rotated into the eigenbasis and ``D = 1/(Λ + λ)``, a pair's score in one layer is
``⟨G_m, D ∘ G_n⟩`` with ``G = Σ_t δ_t ⊗ ā_t``, ``(o, e)``. It can be had

- from gradients in the layer's own coordinates, where a sample has too many positions for the staircase below:
  the test side alone is rotated, weighted and rotated back;
- from gradients: ``G_n`` formed for every sample, then ``o·e`` products a pair;
- from positions: ``Σ_t δ_tᵀ (D ∘ G_m) ā_t``, which forms nothing of sample ``n``;
- by a staircase: ``D`` is a constant but for a few directions, and the constant's part is
  ``Σ_tt' (δ_t·δ_t')(ā_t·ā_t')`` over the others, which needs no gradient at all;
- for unit vectors ``ā``, from the pairs of positions that hold the same index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.layers import LayerBatch, contract_positions
from influence_framework_ekfac.filters import Filter, Staircase, Step, UnkeptFilter
from influence_framework_ekfac.statistics import Eigenbasis, in_dtype
from influence_framework_ekfac.storage import Stored

FORMED, TURNED = 24, 64
"""What it costs, in multiplications, to write an entry of a gradient; of a pair and to read it again."""


JOINED_BYTES = 2**26
"""Factors of test points that are copied together, in order that products have more rows."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Samples of one side, rotated.

    Attributes:
        deltas: ``(g, n, t, o)``.
        inputs: ``(g, n, t, e)``; or indices ``(n, t)``.
        columns: ``e``.
    """

    deltas: Float[Tensor, "g n t o"]
    inputs: Float[Tensor, "g n t e"] | Int[Tensor, "n t"]
    columns: int

    @property
    def size(self) -> int:
        """``n``."""
        return self.deltas.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.deltas.nbytes + self.inputs.nbytes

    def loaded(self) -> Positions:
        """Itself: it needs no basis any more."""
        return self

    @property
    def count(self) -> int:
        """Positions of a sample."""
        return self.deltas.shape[2]

    @property
    def one_hot(self) -> bool:
        """Whether ``inputs`` are indices."""
        return not self.inputs.is_floating_point()

    def part(self, part: slice) -> Positions:
        """Some of the samples."""
        inputs = self.inputs[part] if self.one_hot else self.inputs[:, part]
        return Positions(self.deltas[:, part], inputs, self.columns)

    def gradients(self) -> Float[Tensor, "n g o e"]:
        """``G`` of every sample."""
        return contract_positions(self.deltas[None], self.inputs, self.columns)[0]

    def sort(self, stairs: Sequence[Staircase]) -> list[Sorted]:
        """Each group in the order of its staircase."""
        parts = zip(self.deltas, self.inputs, stairs, strict=True)
        return [Sorted(deltas[..., x.rows], inputs[..., x.columns]) for deltas, inputs, x in parts]


@dataclass(frozen=True, eq=False)
class Sorted:
    """One group's output gradients and inputs in the order of a staircase."""

    deltas: Float[Tensor, "n t o"]
    inputs: Float[Tensor, "n t e"]

    def corner(self, step: Step) -> Float[Tensor, "n _entries"]:
        """``G`` on the directions of a step, flattened."""
        inputs = self.inputs[..., : step.values.shape[1]]
        return torch.einsum("ntp,ntq->npq", self.deltas[..., step.rows], inputs).flatten(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class InOwnCoordinates(ABC):
    """Samples of one side in the layer's own coordinates.

    There a pair is ``⟨Q_G (D ∘ Q_Gᵀ G_m Q_A) Q_Aᵀ, G_n⟩``, so that one side alone is rotated, there and back.

    Attributes:
        basis: That of the layer, wherever it is kept.
    """

    basis: Eigenbasis | Stored
    _weighted: dict[Hashable, tuple[Filter | UnkeptFilter, Tensor]] = field(default_factory=dict, repr=False)

    @property
    @abstractmethod
    def size(self) -> int:
        """``n``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held, with what :meth:`weighted` will keep."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of gradients in the layer's own coordinates."""

    @abstractmethod
    def formed(self) -> Float[Tensor, "n g o e"]:
        """``G`` of every sample, in the layer's own coordinates."""

    @abstractmethod
    def gradients(self) -> Float[Tensor, "n g o e"]:
        """``G`` of every sample, rotated."""

    def loaded(self) -> Self:
        """The same with the basis at hand, for work that uses it several times."""
        return replace(self, basis=self.basis.load())

    def weighted(self, spectral: Filter | UnkeptFilter) -> Float[Tensor, "n goe"]:
        """``Q_G (D ∘ Q_Gᵀ G Q_A) Q_Aᵀ`` of every sample, flattened; that of the last filter is kept."""
        held = self._weighted.get(spectral.key)
        if held is None:
            here = self.loaded()
            basis = here.basis.load()
            turned = basis.rotate_back(here.gradients() * spectral.made().dense).flatten(1).to(self.dtype)
            self._weighted.clear()
            held = self._weighted[spectral.key] = (spectral, turned)
        return held[1]


@dataclass(frozen=True, eq=False)
class Unrotated(InOwnCoordinates):
    """Samples whose gradients are smaller than their positions.

    Attributes:
        matrices: ``(n, g, o, e)``.
    """

    matrices: Float[Tensor, "n g o e"]

    @property
    def size(self) -> int:
        return self.matrices.shape[0]

    @property
    def nbytes(self) -> int:
        return 2 * self.matrices.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.matrices.dtype

    def part(self, part: slice) -> Unrotated:
        """Some of the samples."""
        return Unrotated(self.matrices[part], basis=self.basis)

    def formed(self) -> Float[Tensor, "n g o e"]:
        return self.matrices

    def gradients(self) -> Float[Tensor, "n g o e"]:
        basis = self.basis.load()
        return basis.rotate(self.matrices.to(basis.dtype))


@dataclass(frozen=True, eq=False)
class Unformed(InOwnCoordinates):
    """Samples whose positions are smaller than their gradients.

    Attributes:
        positions: As the layer has them.
    """

    positions: Positions

    @property
    def size(self) -> int:
        return self.positions.size

    @property
    def nbytes(self) -> int:
        entries = self.size * prod(self.basis.shape)
        return self.positions.nbytes + entries * self.positions.deltas.element_size()

    @property
    def dtype(self) -> torch.dtype:
        return self.positions.deltas.dtype

    def part(self, part: slice) -> Unformed:
        """Some of the samples."""
        return Unformed(self.positions.part(part), basis=self.basis)

    def formed(self) -> Float[Tensor, "n g o e"]:
        return self.positions.gradients()

    def gradients(self) -> Float[Tensor, "n g o e"]:
        held = self.positions
        return self.basis.load().gradients(LayerBatch(held.inputs, held.deltas[None], held.columns))[0]


@dataclass(frozen=True, eq=False)
class Weighted:
    """Samples of the test side in the layer's own coordinates, with one filter applied and nothing else kept.

    Attributes:
        factors: ``Q_G (D ∘ Q_Gᵀ G Q_A) Q_Aᵀ``, flattened, ``(n, g·o·e)``, in parts that are never held twice.
        key: Of the filter.
    """

    factors: tuple[Float[Tensor, "_n goe"], ...]
    key: Hashable

    @property
    def size(self) -> int:
        """``n``."""
        return sum(map(len, self.factors))

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(part.nbytes for part in self.factors)


def join_weighted(sides: Sequence[Weighted]) -> Weighted:
    """Several batches as one: parts that are small as one part, for products of more rows."""
    waiting: list[Tensor] = []
    parts: list[Tensor] = []
    for part in (part for side in sides for part in side.factors):
        if waiting and sum(x.nbytes for x in waiting) + part.nbytes > JOINED_BYTES:
            parts.append(torch.cat(waiting) if len(waiting) > 1 else waiting[0])
            waiting = []
        waiting.append(part)
    parts.append(torch.cat(waiting) if len(waiting) > 1 else waiting[0])
    return Weighted(tuple(parts), sides[0].key)


Side = Positions | Unrotated | Unformed
AnySide = TypeVar("AnySide", Positions, Unrotated, Unformed, Unrotated | Unformed, Side)


@dataclass(frozen=True, eq=False)
class Sides:
    """One side of the pairs.

    Attributes:
        layers: Its samples at each layer, by name.
        size: Number of samples.
    """

    layers: Mapping[str, Side | Weighted]
    size: int

    def give_up(self) -> dict[str, Side | Weighted]:
        """The layers, which are not here any more: whatever looks for them raises an exception."""
        layers = dict(self.layers)
        object.__setattr__(self, "layers", None)
        return layers

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(side.nbytes for side in self.layers.values())


def side_of(basis: Eigenbasis | Stored, batch: LayerBatch, dtype: torch.dtype | None = None) -> Side:
    """One draw's samples: as rotated positions if a pair of them may take less than a product of gradients.

    Else in the layer's own coordinates, which saves rotating the training side; there in ``dtype``, if given.
    """
    positions, outputs = batch.output_gradients.shape[3:]
    entries = outputs * batch.columns
    if positions**2 * (outputs + (0 if batch.one_hot else batch.columns)) <= entries:
        turned = basis.load().rotated(batch)
        return Positions(turned.output_gradients[0], turned.inputs, batch.columns)
    wide = in_dtype(batch, dtype or basis.dtype)
    if positions * (outputs + (1 if batch.one_hot else batch.columns)) > entries:
        return Unrotated(wide.gradients()[0], basis=basis)
    return Unformed(Positions(wide.output_gradients[0], wide.inputs, batch.columns), basis=basis)


def join_sides(sides: Sequence[Side], basis: Eigenbasis | Stored) -> Side:
    """Several batches as one: as positions where all have the same number of them, else as gradients."""
    rotated = [side for side in sides if isinstance(side, Positions)]
    unformed = [side.positions for side in sides if isinstance(side, Unformed)]
    for positions in (rotated, unformed):
        if len(positions) == len(sides) and len({side.count for side in positions}) == 1:
            inputs = torch.cat([side.inputs for side in positions], dim=0 if positions[0].one_hot else 1)
            deltas = torch.cat([side.deltas for side in positions], dim=1)
            joined = Positions(deltas, inputs, positions[0].columns)
            return joined if positions is rotated else Unformed(joined, basis=basis)
    matrices = [
        basis.load().rotate_back(side.gradients()) if isinstance(side, Positions) else side.formed()
        for side in sides
    ]
    return Unrotated(torch.cat(matrices), basis=basis)


def own_scores(side: Side, dense: Float[Tensor, "g o e"], budget: int) -> Float[Tensor, " n"]:
    """``⟨G_n, D ∘ G_n⟩`` of every sample."""
    side, dense = side.loaded(), dense.to(_dtype(side))
    if isinstance(side, Positions) and side.count == 1 and not side.one_hot:
        weighted = side.deltas[:, :, 0].square() @ dense
        return (weighted * side.inputs[:, :, 0].square()).sum((0, 2))
    step = _samples(budget, 2 * dense.numel() * dense.element_size())
    return torch.cat([(part.gradients().square() * dense).sum((1, 2, 3)) for part in _parts(side, step)])


def pair_scores(test: Side, train: Side, given: Filter | UnkeptFilter, budget: int) -> Float[Tensor, "m n"]:
    """``⟨G_m, D ∘ G_n⟩`` of every pair, by the order of contraction that takes the fewest flops."""
    if not isinstance(test, Positions) and not isinstance(train, Positions):
        return _by_own_coordinates(test, train, given, budget)
    spectral = given.made()
    test, train = test.loaded(), train.loaded()
    outputs, columns = spectral.dense.shape[1:]
    pairs, size = test.size * train.size, spectral.dense.numel()
    formed = pairs * size + _forming(test, size) + _forming(train, size)
    orders: list[tuple[int, Callable[[], Tensor]]] = [
        (formed, partial(_by_gradients, test, train, spectral, budget))
    ]
    if isinstance(test, Positions) and isinstance(train, Positions):
        together = test.count * train.count
        if test.one_hot:
            orders.append((pairs * together * outputs, partial(_by_indices, test, train, spectral, budget)))
        else:
            # As many flops as gradients for one position; what is written and read differs.
            turned = len(spectral.dense) * columns * TURNED
            streamed = pairs * train.count * (size + turned) + _forming(test, size)
            orders.append((streamed, partial(_by_positions, test, train, spectral, budget)))
            if spectral.stairs is not None:
                constant = together * len(spectral.dense) * (outputs + columns)
                corners = pairs * spectral.area + _forming(test, spectral.area) + _forming(train, spectral.area)
                staircase = pairs * constant + corners
                orders.append(
                    (staircase, partial(_by_staircase, test, train, spectral, spectral.stairs, budget))
                )
    _, fewest = min(orders, key=lambda order: order[0])
    return fewest()


def weighted_scores(
    test: Weighted, train: Side, basis: Eigenbasis | Stored, budget: int
) -> Float[Tensor, "m n"]:
    """:func:`pair_scores` of samples with their filter applied: one product with each training gradient."""
    like = test.factors[0]
    found = []
    for part in _parts(train, _samples(budget, 2 * like.shape[1] * like.element_size())):
        own = basis.load().rotate_back(part.gradients()) if isinstance(part, Positions) else part.formed()
        columns = own.flatten(1).T.to(like.dtype)
        found.append(torch.cat([factors @ columns for factors in test.factors]))
    return torch.cat(found, dim=1)


def _forming(side: Side, size: int) -> int:
    return side.size * (side.count + FORMED) * size if isinstance(side, Positions) else 0


def _dtype(side: Side) -> torch.dtype:
    return side.basis.dtype if not isinstance(side, Positions) else side.deltas.dtype


def _samples(budget: int, each: int) -> int:
    # A filter that is constant to its tolerance has no stairs, and takes no memory.
    return max(1, budget // max(1, each))


def _parts(side: AnySide, step: int) -> Iterator[AnySide]:
    for start in range(0, side.size, step):
        yield side.part(slice(start, start + step))


def _by_own_coordinates(
    test: Unrotated | Unformed, train: Unrotated | Unformed, given: Filter | UnkeptFilter, budget: int
) -> Float[Tensor, "m n"]:
    weighted = test.weighted(given)
    step = _samples(budget, 2 * weighted.shape[1] * weighted.element_size())
    # Of rotated positions that were joined, one side is not rounded as the other is.
    found = [weighted @ part.formed().flatten(1).T.to(weighted.dtype) for part in _parts(train, step)]
    return torch.cat(found, dim=1)


def _by_gradients(test: Side, train: Side, spectral: Filter, budget: int) -> Float[Tensor, "m n"]:
    step = _samples(budget, 4 * spectral.dense.numel() * spectral.dense.element_size())
    scores = spectral.dense.new_empty(test.size, train.size)
    for start, left in zip(range(0, test.size, step), _parts(test, step), strict=True):
        weighted = (left.gradients() * spectral.dense).flatten(1)
        for at, right in zip(range(0, train.size, step), _parts(train, step), strict=True):
            scores[start : start + step, at : at + step] = weighted @ right.gradients().flatten(1).T
    return scores


def _by_positions(test: Positions, train: Positions, spectral: Filter, budget: int) -> Float[Tensor, "m n"]:
    groups, outputs, columns = spectral.dense.shape
    each = groups * columns * (outputs + train.size * train.count) * spectral.dense.element_size()
    scores = []
    for left in _parts(test, _samples(budget, 2 * each)):
        # δ_tᵀ (D ∘ G_m) of all positions and test samples as one product: (g, n·t, m·e).
        weighted = (left.gradients() * spectral.dense).permute(1, 2, 0, 3).flatten(2)
        turned = (train.deltas.flatten(1, 2) @ weighted).unflatten(2, (left.size, columns))
        scores.append(torch.einsum("gkme,gke->mk", turned, train.inputs.flatten(1, 2)))
    by_position: Tensor = torch.cat(scores).unflatten(1, (train.size, train.count))
    return by_position.sum(2)


def _by_staircase(
    test: Positions, train: Positions, spectral: Filter, stairs: Sequence[Staircase], budget: int
) -> Float[Tensor, "m n"]:
    element = spectral.dense.element_size()
    widest = max(step.values.numel() for stair in stairs for step in stair.steps)
    scores = spectral.dense.new_zeros(test.size, train.size)
    step = _samples(budget, 4 * element * widest)
    for start, left in zip(range(0, test.size, step), _parts(test, step), strict=True):
        each = 2 * element * (widest + 3 * left.size * test.count * train.count)
        columns = _samples(budget, each)
        for at, right in zip(range(0, train.size, columns), _parts(train, columns), strict=True):
            total = scores[start : start + step, at : at + columns]
            for one, other, stair in zip(left.sort(stairs), right.sort(stairs), stairs, strict=True):
                _add_stair(total, one, other, stair, spectral.constant)
    return scores


def _add_stair(
    total: Float[Tensor, "m n"], left: Sorted, right: Sorted, stair: Staircase, constant: float
) -> None:
    """Add one group's scores: ``D`` on the steps, and the constant beyond the reach of each and below them."""
    outside = total.new_zeros(*left.deltas.shape[:2], *right.deltas.shape[:2])
    products = torch.zeros_like(outside)
    reach = left.inputs.shape[2]
    below = Step(slice(stair.steps[-1].rows.stop, None), total.new_zeros(0, 0))
    for step in (*stair.steps, below):
        beyond = slice(step.values.shape[1], reach)
        outside += _dots(left.inputs[..., beyond], right.inputs[..., beyond])
        products.addcmul_(outside, _dots(left.deltas[..., step.rows], right.deltas[..., step.rows]))
        reach = step.values.shape[1]
        if step.values.numel():
            total.addmm_(left.corner(step) * step.values.flatten(), right.corner(step).T)
    total.add_(products.sum((1, 3)), alpha=constant)


def _dots(left: Float[Tensor, "m t i"], right: Float[Tensor, "n u i"]) -> Float[Tensor, "m t n u"]:
    """Every vector of one side times every vector of the other."""
    products = left.flatten(0, 1) @ right.flatten(0, 1).T
    apart: Tensor = products.view(*left.shape[:2], *right.shape[:2])
    return apart


def _by_indices(test: Positions, train: Positions, spectral: Filter, budget: int) -> Float[Tensor, "m n"]:
    weights = spectral.dense[0].T[test.inputs.flatten()].unflatten(0, test.inputs.shape)
    weighted = test.deltas[0] * weights
    each = 3 * test.deltas[0, ..., 0].numel() * train.count * spectral.dense.element_size()
    scores = []
    for right in _parts(train, _samples(budget, each)):
        products = _dots(weighted, right.deltas[0])
        same = test.inputs[:, :, None, None] == right.inputs
        scores.append((products * same).sum((1, 3)))
    return torch.cat(scores, dim=1)
