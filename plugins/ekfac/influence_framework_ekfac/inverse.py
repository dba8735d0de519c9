"""The inverse in the eigenbases: products, another λ, and scores of pairs without per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.errors import InvalidInputError
from influence_framework.inverses import Inverse, approximation
from influence_framework.layers import LayerBatch
from influence_framework.protocols import LayerStatistics, LinearOperator, SavedState, Solution
from influence_framework_ekfac.filters import Filter, UnkeptFilter, make_filter
from influence_framework_ekfac.scores import (
    Positions,
    Side,
    Sides,
    Unrotated,
    Weighted,
    join_sides,
    join_weighted,
    own_scores,
    pair_scores,
    side_of,
    weighted_scores,
)
from influence_framework_ekfac.statistics import Eigenbasis, compute_dtype
from influence_framework_ekfac.storage import Stored


@dataclass(frozen=True, eq=False)
class EkfacLayer:
    """One layer's place in the flat vector and its curvature.

    Attributes:
        places: Positions of its entries, ``(g, o, e)``.
        basis: Eigenbases and eigenvalues, wherever they are kept.
    """

    places: Int[Tensor, "g o e"]
    basis: Eigenbasis | Stored


def reciprocal(
    values: Float[Tensor, "*shape"], regularization: float, dtype: torch.dtype, *, definite: bool
) -> Float[Tensor, "*shape"]:
    """``1/(Λ + λ)``. With λ = 0, what is null to the rounding of ``dtype`` gives zero: the pseudo-inverse.

    Where it has to be ``definite``, the largest of ``Λ`` takes the place of null ones.
    """
    if regularization or not values.numel():
        return 1.0 / (values + regularization)
    largest = values.max()
    null = values <= max(torch.finfo(dtype).eps, torch.finfo(values.dtype).eps) * largest
    instead = (largest if largest > 0 else torch.ones_like(largest)) if definite else torch.inf
    return 1.0 / torch.where(null, instead, values)


@dataclass(frozen=True, eq=False)
class EkfacInverse(Inverse):
    """``(C + λI)⁻¹`` with ``C`` block-diagonal over layers: ``(Q_G ⊗ Q_A) (Λ + λ)⁻¹ (Q_G ⊗ Q_A)ᵀ`` in each.

    With λ = 0, directions whose eigenvalue is null to rounding are left out, as a pseudo-inverse does. One
    application costs ``4·o·e·(o + e)`` flops a column and layer; another λ costs nothing.

    Attributes:
        base: ``C``, the curvature that is approximated.
        regularization: λ.
        layers: By name.
        rest: Positions of the parameters that are in no layer, and their diagonal curvature.
        score_rtol: Relative error that scores of pairs may have; 0 for exact ones.
        budget: Bytes for intermediate results.
        score_dtype: What gradients of samples, and factors of test points, are rounded to where they are formed
            for scores; ``None``: not at all.
        definite: Whether it is positive definite with λ = 0 too, as a preconditioner has to be.
    """

    base: LinearOperator
    regularization: float
    layers: dict[str, EkfacLayer]
    rest: tuple[Int[Tensor, " r"], Float[Tensor, " r"]]
    score_rtol: float
    budget: int
    score_dtype: torch.dtype | None = None
    definite: bool = False
    _filters: dict[str, Filter] = field(default_factory=dict, repr=False)

    @property
    def scores_layers(self) -> bool:
        """Whether all parameters are in layers, so that scores need no per-sample gradient."""
        return len(self.rest[0]) == 0

    @property
    def coverage(self) -> str:
        """What fraction of the parameters is in Kronecker factors, how, and what became of the rest.

        A line for each layer with its parameters, its form and the shape ``groups x outputs x inputs`` of its
        gradient, and one for each parameter outside with the reason.
        """
        found = cast(LayerStatistics, self.base).cover()
        size = self.shape[0]
        covered = size - len(self.rest[0])
        fate = "its diagonal curvature" if self.rest[1].any() else "λ alone"
        lines = [f"{covered} of {size} parameters ({covered / size:.1%}) are in Kronecker factors."]
        for layer in found.layers:
            shape = " x ".join(map(str, layer.form.places.shape))
            lines.append(f"{', '.join(layer.parts.values())}: {type(layer.form).__name__}, {shape}")
        lines += [f"{name}: {fate}; {reason}" for name, reason in found.uncovered.items()]
        return "\n".join(lines)

    @property
    def spectrum(self) -> tuple[float, float] | None:
        ends = [layer.basis.extremes for layer in self.layers.values()]
        if self.rest[1].numel():
            ends.append((self.rest[1].min().item(), self.rest[1].max().item()))
        return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None

    @property
    def singular(self) -> bool:
        if self.regularization or self.definite:
            return False
        filters = (self._reciprocal(layer.basis) for layer in self.layers.values())
        return any(bool((part == 0).any()) for part in (self._of_rest(self.dtype), *filters))

    def eigenvalues(self) -> Mapping[str, Float[Tensor, "g o e"]]:
        """``Λ`` of every layer."""
        return {name: layer.basis.values for name, layer in self.layers.items()}

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        rows = columns.T
        result = torch.zeros_like(rows)
        for layer in self.layers.values():
            basis = layer.basis.load()
            matrices = rows[:, layer.places].to(basis.dtype)
            turned = basis.rotate(matrices) * self._reciprocal(basis).to(matrices)
            result[:, layer.places] = basis.rotate_back(turned).to(rows.dtype)
        index, _ = self.rest
        if len(index):
            result[:, index] = rows[:, index] * self._of_rest(rows.dtype)
        return result.T

    def _solve(self, columns: Float[Tensor, "P k"]) -> Solution:
        return approximation(self._matmat(columns), self.spectrum, singular=self.singular)

    def with_regularization(self, regularization: float) -> Self:
        """Another λ in the same bases."""
        return replace(self, regularization=regularization, _filters={})

    def preconditioner(self) -> Self:
        """The positive definite form."""
        return replace(self, definite=True, _filters={})

    def state(self) -> SavedState:
        """Bases and eigenvalues of the layers, in order, and the diagonal of the rest."""
        tensors = {"rest": self.rest[1]}
        for index, layer in enumerate(self.layers.values()):
            tensors |= {f"{index}.{name}": part for name, part in layer.basis.tensors().items()}
        return SavedState(tensors, {"layers": list(self.layers), "definite": self.definite})

    def side(self, layers: Mapping[str, LayerBatch], size: int) -> Sides:
        """What scores need of some samples: inputs and output gradients in the eigenbases."""
        dtype = self.score_dtype
        sides = {name: side_of(self.layers[name].basis, batch, dtype) for name, batch in layers.items()}
        return Sides(sides, size)

    def weighed(self, sides: Sides) -> Sides:
        """The test side with this λ applied, where less is held then, so that products alone are left."""
        found = {
            name: side if isinstance(side, Positions | Weighted) else self._weighted(name, side)
            for name, side in sides.layers.items()
        }
        return Sides(found, sides.size)

    def _weighted(self, name: str, side: Side) -> Weighted:
        spectral, basis = self._filter(name), self.layers[name].basis
        if isinstance(side, Positions):
            turned = basis.load().rotate_back(side.gradients() * spectral.made().dense).flatten(1)
            factors = turned.to(self.score_dtype or basis.dtype)
        else:
            factors = side.weighted(spectral)
        return Weighted((factors,), (self.regularization, self.definite))

    def join(self, sides: Sequence[Sides]) -> Sides:
        """Several batches as one. They give up what they hold, so that one layer at most is held twice."""
        sizes, layers = [one.size for one in sides], [one.give_up() for one in sides]
        names = list(dict.fromkeys(name for parts in layers for name in parts))
        joined = {
            name: self._joined(name, [parts.pop(name, None) for parts in layers], sizes) for name in names
        }
        return Sides(joined, sum(sizes))

    def _joined(
        self, name: str, sides: Sequence[Side | Weighted | None], sizes: Sequence[int]
    ) -> Side | Weighted:
        basis = self.layers[name].basis
        dtype = self.score_dtype or basis.dtype

        def nothing(size: int) -> Unrotated:
            return Unrotated(torch.zeros(size, *basis.shape, dtype=dtype, device=self.device), basis=basis)

        # A batch whose forward pass skipped the layer has zero gradients there.
        found = [side or nothing(size) for side, size in zip(sides, sizes, strict=True)]
        if not any(isinstance(side, Weighted) for side in found):
            return join_sides([side for side in found if not isinstance(side, Weighted)], basis)
        return join_weighted(
            [side if isinstance(side, Weighted) else self._weighted(name, side) for side in found]
        )

    def scores(self, test: Sides, train: Sides) -> Float[Tensor, "m n"]:
        """``g_mᵀ (C + λI)⁻¹ g_n`` of every pair.

        Raises:
            InvalidInputError: The test side was weighed by an inverse with another λ.
        """
        # Of many layers, half precision would lose the later ones.
        total = torch.zeros(test.size, train.size, dtype=compute_dtype(self.dtype), device=self.device)
        for name, side in test.layers.items():
            other = train.layers.get(name)
            if other is None:
                continue
            if isinstance(other, Weighted):
                raise InvalidInputError("The training side is weighed: it is the test side that may be.")
            if not isinstance(side, Weighted):
                total += pair_scores(side, other, self._filter(name), self.budget)
            elif side.key == (self.regularization, self.definite):
                total += weighted_scores(side, other, self.layers[name].basis, self.budget)
            else:
                raise InvalidInputError(
                    f"The test side is weighed with (λ, definite) = {side.key}, and this inverse has "
                    f"{(self.regularization, self.definite)}: weigh it with this one."
                )
        return total.to(self.dtype)

    def self_scores(self, side: Sides) -> Float[Tensor, " n"]:
        """``g_nᵀ (C + λI)⁻¹ g_n`` of every sample, without any pair."""
        total = torch.zeros(side.size, dtype=compute_dtype(self.dtype), device=self.device)
        for name, one in side.layers.items():
            if isinstance(one, Weighted):
                raise InvalidInputError("This side is weighed, and its samples' own scores are lost.")
            total += own_scores(one, self._reciprocal(self.layers[name].basis), self.budget)
        return total.to(self.dtype)

    def _reciprocal(self, basis: Eigenbasis | Stored) -> Float[Tensor, "g o e"]:
        return reciprocal(basis.values, self.regularization, basis.dtype, definite=self.definite)

    def _of_rest(self, dtype: torch.dtype) -> Float[Tensor, " r"]:
        return reciprocal(self.rest[1], self.regularization, dtype, definite=self.definite)

    def _filter(self, name: str) -> Filter | UnkeptFilter:
        """``1/(Λ + λ)`` of a layer with its staircase, made once where its basis is at hand."""
        if not isinstance(self.layers[name].basis, Eigenbasis):
            return UnkeptFilter(partial(self._made, name), (self.regularization, self.definite))
        if name not in self._filters:
            self._filters[name] = self._made(name)
        return self._filters[name]

    def _made(self, name: str) -> Filter:
        basis = self.layers[name].basis
        return make_filter(self._reciprocal(basis), self.score_rtol, basis.dtype)
