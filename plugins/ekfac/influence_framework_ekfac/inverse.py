"""The inverse in the eigenbases: products, another λ, and scores of pairs without per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence_framework.inverses import Inverse, approximation
from influence_framework.layers import LayerBatch
from influence_framework.protocols import LayerStatistics, LinearOperator, SavedState, Solution
from influence_framework_ekfac.filters import Filter, make_filter
from influence_framework_ekfac.scores import Sides, Unrotated, join_sides, own_scores, pair_scores, side_of
from influence_framework_ekfac.statistics import Eigenbasis, compute_dtype


@dataclass(frozen=True, eq=False)
class EkfacLayer:
    """One layer's place in the flat vector and its curvature.

    Attributes:
        places: Positions of its entries, ``(g, o, e)``.
        basis: Eigenbases and eigenvalues.
    """

    places: Int[Tensor, "g o e"]
    basis: Eigenbasis


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
        definite: Whether it is positive definite with λ = 0 too, as a preconditioner has to be.
    """

    base: LinearOperator
    regularization: float
    layers: dict[str, EkfacLayer]
    rest: tuple[Int[Tensor, " r"], Float[Tensor, " r"]]
    score_rtol: float
    budget: int
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
        parts = [part for part in (*self.eigenvalues().values(), self.rest[1]) if part.numel()]
        return (min(p.min().item() for p in parts), max(p.max().item() for p in parts)) if parts else None

    @property
    def singular(self) -> bool:
        if self.regularization or self.definite:
            return False
        filters = [self._reciprocal(layer) for layer in self.layers.values()]
        return any(bool((part == 0).any()) for part in (*filters, self._of_rest(self.dtype)))

    def eigenvalues(self) -> Mapping[str, Float[Tensor, "g o e"]]:
        """``Λ`` of every layer."""
        return {name: layer.basis.values for name, layer in self.layers.items()}

    def _matmat(self, columns: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        rows = columns.T
        result = torch.zeros_like(rows)
        for layer in self.layers.values():
            matrices = rows[:, layer.places].to(layer.basis.outputs.dtype)
            turned = layer.basis.rotate(matrices) * self._reciprocal(layer).to(matrices)
            result[:, layer.places] = layer.basis.rotate_back(turned).to(rows.dtype)
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
            tensors |= {f"{index}.outputs": layer.basis.outputs, f"{index}.values": layer.basis.values}
            if layer.basis.inputs is not None:
                tensors[f"{index}.inputs"] = layer.basis.inputs
        return SavedState(tensors, {"layers": list(self.layers), "definite": self.definite})

    def side(self, layers: Mapping[str, LayerBatch], size: int) -> Sides:
        """What scores need of some samples: inputs and output gradients in the eigenbases."""
        return Sides({name: side_of(self.layers[name].basis, batch) for name, batch in layers.items()}, size)

    def join(self, sides: Sequence[Sides]) -> Sides:
        """Several batches as one."""
        size = sum(one.size for one in sides)
        names = dict.fromkeys(name for one in sides for name in one.layers)
        joined = {}
        for name in names:
            basis = self.layers[name].basis
            # A batch whose forward pass skipped the layer has zero gradients there.
            present = [
                one.layers.get(name)
                or Unrotated(basis.outputs.new_zeros(one.size, *basis.values.shape), basis=basis)
                for one in sides
            ]
            joined[name] = join_sides(present, basis)
        return Sides(joined, size)

    def scores(self, test: Sides, train: Sides) -> Float[Tensor, "m n"]:
        """``g_mᵀ (C + λI)⁻¹ g_n`` of every pair."""
        # Of many layers, half precision would lose the later ones.
        total = torch.zeros(test.size, train.size, dtype=compute_dtype(self.dtype), device=self.device)
        for name, side in test.layers.items():
            if name in train.layers:
                total += pair_scores(side, train.layers[name], self._filter(name), self.budget)
        return total.to(self.dtype)

    def self_scores(self, side: Sides) -> Float[Tensor, " n"]:
        """``g_nᵀ (C + λI)⁻¹ g_n`` of every sample, without any pair."""
        total = torch.zeros(side.size, dtype=compute_dtype(self.dtype), device=self.device)
        for name, one in side.layers.items():
            total += own_scores(one, self._reciprocal(self.layers[name]), self.budget)
        return total.to(self.dtype)

    def _reciprocal(self, layer: EkfacLayer) -> Float[Tensor, "g o e"]:
        basis = layer.basis
        return reciprocal(basis.values, self.regularization, basis.outputs.dtype, definite=self.definite)

    def _of_rest(self, dtype: torch.dtype) -> Float[Tensor, " r"]:
        return reciprocal(self.rest[1], self.regularization, dtype, definite=self.definite)

    def _filter(self, name: str) -> Filter:
        """``1/(Λ + λ)`` of a layer with its staircase, made once."""
        if name not in self._filters:
            layer = self.layers[name]
            dtype = layer.basis.outputs.dtype
            self._filters[name] = make_filter(self._reciprocal(layer), self.score_rtol, dtype)
        return self._filters[name]
