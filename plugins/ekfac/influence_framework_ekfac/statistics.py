"""Kronecker factors of each layer's curvature, their eigenbases, and the eigenvalues in them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import NonFiniteError
from influence_framework.layers import Layer, LayerBatch

WeightSharing = Literal["expand", "reduce"]

PANEL = 32
"""Columns of the narrowest panel that a symmetric product is cut into."""

SMALLEST, LARGEST = 1e-12, 1e12
"""Between these the largest of some rows has to be for their products to be taken in single precision."""

ROWS = 4096
"""Rows of inputs or output gradients whose products are summed in their own precision."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rotations and products are done in: half precision is too coarse for sums of squares."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """``F ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ`` of one layer, for each of its groups.

    Attributes:
        outputs: ``Q_G``, ``(g, o, o)``.
        inputs: ``Q_A``, ``(g, e, e)``; ``None`` where it is the identity.
        values: ``Λ``, ``(g, o, e)``, float64 or what was asked for.
    """

    outputs: Float[Tensor, "g o o"]
    inputs: Float[Tensor, "g e e"] | None
    values: Float[Tensor, "g o e"]

    def load(self) -> Eigenbasis:
        """Itself, as a basis that is kept elsewhere becomes by its own ``load``."""
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(g, o, e)``."""
        groups, outputs, columns = self.values.shape
        return groups, outputs, columns

    @property
    def dtype(self) -> torch.dtype:
        """Of the eigenvectors."""
        return self.outputs.dtype

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest of ``Λ``."""
        return (self.values.min().item(), self.values.max().item()) if self.values.numel() else (0.0, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        found = {"outputs": self.outputs, "values": self.values}
        return found if self.inputs is None else found | {"inputs": self.inputs}

    def rotated(self, batch: LayerBatch) -> LayerBatch:
        """The batch with inputs ``Q_Aᵀ ā`` and output gradients ``Q_Gᵀ δ``, in at least single precision."""
        wide = in_dtype(batch, self.dtype)
        inputs = wide.inputs if self.inputs is None else _times(wide.inputs, self.inputs)
        return LayerBatch(inputs, _times(wide.output_gradients, self.outputs), batch.columns)

    def gradients(self, batch: LayerBatch) -> Float[Tensor, "s n g o e"]:
        """``Q_Gᵀ G Q_A`` of every draw and sample, with the rotation where it takes fewer flops."""
        outputs, columns, positions = self.values.shape[1], self.values.shape[2], batch.positions
        inside = 0 if self.inputs is None else columns
        before = positions * (outputs**2 + inside**2)
        after = outputs * columns * (outputs + inside)
        if before <= after:
            return self.rotated(batch).gradients()
        return self.rotate(in_dtype(batch, self.dtype).gradients())

    def rotate(self, matrices: Float[Tensor, "*k g o e"]) -> Float[Tensor, "*k g o e"]:
        """``Q_Gᵀ M Q_A``."""
        turned = self.outputs.mT @ matrices
        return turned if self.inputs is None else turned @ self.inputs

    def rotate_back(self, matrices: Float[Tensor, "*k g o e"]) -> Float[Tensor, "*k g o e"]:
        """``Q_G M Q_Aᵀ``."""
        turned = self.outputs @ matrices
        return turned if self.inputs is None else turned @ self.inputs.mT


def in_dtype(batch: LayerBatch, dtype: torch.dtype) -> LayerBatch:
    """The batch in another precision."""
    inputs = batch.inputs if batch.one_hot else batch.inputs.to(dtype)
    return LayerBatch(inputs, batch.output_gradients.to(dtype), batch.columns)


def _times(vectors: Float[Tensor, "*s g n t i"], basis: Float[Tensor, "g i j"]) -> Float[Tensor, "*s g n t j"]:
    """Every vector times its group's basis, as one matrix product a group."""
    if basis.shape[0] == 1:
        return vectors @ basis[0]
    return vectors @ basis[:, None]


def multiplies_halves(rows: Tensor) -> bool:
    """Whether the device multiplies ``rows`` of half precision as they are and adds up in single precision."""
    half = rows.dtype in (torch.float16, torch.bfloat16)
    return half and rows.is_cuda and "dtype" in torch.ops.aten.bmm.overloads()


def gram(rows: Float[Tensor, "g n i"]) -> Float[Tensor, "g i i"]:
    """``Σ_n r_n r_nᵀ``: of wide rows the blocks above the diagonal only, with the others mirrored.

    Rows of half precision are multiplied as they are where that is exact: a product of two of their numbers
    has no more digits than single precision, in which they are added up.
    """
    if multiplies_halves(rows):
        return torch.bmm(rows.mT, rows, out_dtype=torch.float32)
    width = rows.shape[2]
    if width < 4 * PANEL:
        return rows.mT @ rows
    panel = max(PANEL, -(-width // 4))
    total = rows.new_empty(rows.shape[0], width, width)
    for start in range(0, width, panel):
        part = slice(start, start + panel)
        torch.matmul(rows[:, :, part].mT, rows[:, :, start:], out=(block := total[:, part, start:]))
        total[:, start + panel :, part] = block[:, :, panel:].mT
    return total


class Covariances:
    """Sums of ``ā āᵀ`` and ``δ δᵀ`` of one layer, and the number of positions.

    Sums are held in ``dtype``. Products of a few thousand rows are taken in the precision of these rows,
    single precision at least: they are rounded as the rows themselves are.

    With ``"expand"`` every position counts by itself; with ``"reduce"`` a sample's positions are first
    averaged (inputs) and summed (output gradients). Eschenhagen et al. (2023), "Kronecker-Factored
    Approximate Curvature for Modern Neural Network Architectures", §3.
    """

    def __init__(
        self, layer: Layer, sharing: WeightSharing, dtype: torch.dtype, sums: list[Tensor] | None = None
    ) -> None:
        self.groups, self.outputs, self.columns = layer.form.places.shape
        self.one_hot = layer.form.one_hot
        # Columns of a whole gradient are no positions that could be averaged.
        self.sharing = "expand" if layer.transposed else sharing
        self.dtype = dtype
        device = layer.form.places.device
        width = () if self.one_hot else (self.columns,)
        self.sums = sums or [
            torch.zeros(self.groups, self.outputs, self.outputs, dtype=dtype, device=device),
            torch.zeros(self.groups, self.columns, *width, dtype=dtype, device=device),
            torch.zeros((), dtype=torch.float64, device="cpu"),
        ]

    def add(self, batch: LayerBatch) -> None:
        """Add one batch's sums."""
        deltas, inputs = batch.output_gradients, batch.inputs
        if self.sharing == "reduce":
            deltas = deltas.sum(3, keepdim=True)
        # All draws, samples and positions of a group, one after the other.
        outer, inner, positions = self.sums
        outer += self._sum(deltas.transpose(0, 1).flatten(1, 3))
        present = batch.present
        places = batch.size * batch.positions if present is None else int(present.sum())
        positions += batch.size if self.sharing == "reduce" else places
        if self.one_hot:
            inner += self._one_hot(batch)
            return
        if self.sharing == "reduce":
            counts = batch.positions if present is None else present.sum(1)[:, None, None]
            inputs = inputs.sum(2, keepdim=True) / counts
        inner += self._sum(inputs.flatten(1, 2))

    def _sum(self, rows: Float[Tensor, "g n i"]) -> Float[Tensor, "g i i"]:
        # Several times faster than the maximum norm.
        largest = max(abs(float(end)) for end in torch.aminmax(rows)) if rows.numel() else 0.0
        # Beyond these bounds squares would overflow in single precision, or vanish.
        own = compute_dtype(rows.dtype) if SMALLEST < largest < LARGEST else self.dtype
        dtype = torch.float32 if self.dtype is torch.float32 else own
        exact = dtype is torch.float32 and multiplies_halves(rows)
        parts = (rows if exact else rows.to(dtype)).split(ROWS, dim=1)
        total = gram(parts[0]).to(self.dtype)
        for part in parts[1:]:
            total += gram(part)
        return total

    def _one_hot(self, batch: LayerBatch) -> Float[Tensor, "1 e"]:
        """The diagonal of the covariance of unit vectors, all of it that there is under ``"expand"``."""
        size, positions = batch.inputs.shape
        counted = batch.inputs if batch.present is None else batch.inputs[batch.present]
        if self.sharing == "expand":
            return torch.bincount(counted.flatten(), minlength=self.columns).to(self.dtype)[None]
        sample = torch.arange(size, device=batch.inputs.device)[:, None].expand(size, positions)
        places, each = (
            (sample * self.columns + batch.inputs).flatten(),
            torch.full_like(sample[:, 0], positions),
        )
        if batch.present is not None:
            places, each = places[batch.present.flatten()], batch.present.sum(1)
        pairs, counts = torch.unique(places, return_counts=True)
        squares = (counts.to(self.dtype) / each[pairs // self.columns]).square()
        total = torch.zeros(1, self.columns, dtype=self.dtype, device=batch.inputs.device)
        return total.index_add_(1, pairs % self.columns, squares[None])

    def decompose(self, name: str, samples: int, dtype: torch.dtype, device: torch.device) -> Eigenbasis:
        """Eigenbases in ``dtype``, and the Kronecker products of the eigenvalues: ``Λ = λ_G ⊗ λ_A``."""
        outer, inner, positions = self.sums
        if not positions:
            # The model never applied this layer, and its gradient is zero.
            shape = (self.groups, self.outputs, self.columns)
            basis = torch.eye(self.outputs, dtype=dtype, device=device).expand(self.groups, -1, -1)
            return Eigenbasis(basis, None, torch.zeros(shape, dtype=self.dtype, device=device))
        left, outputs = _eigh(outer / samples, f"output gradients of {name!r}")
        covariance = inner / float(positions)
        if self.one_hot:
            return Eigenbasis(outputs.to(dtype), None, left[:, :, None] * covariance[:, None, :])
        right, inputs = _eigh(covariance, f"inputs of {name!r}")
        return Eigenbasis(outputs.to(dtype), inputs.to(dtype), left[:, :, None] * right[:, None, :])


def _eigh(covariance: Float[Tensor, "g i i"], what: str) -> tuple[Float[Tensor, "g i"], Float[Tensor, "g i i"]]:
    if not torch.isfinite(covariance).all():
        raise NonFiniteError(
            f"The covariance of the {what} contains NaN or infinity: check the data and the model."
        )
    values, vectors = torch.linalg.eigh(covariance)
    # Covariances have no negative eigenvalues but for rounding.
    return values.clamp_min(0), vectors


TRIAL_WIDTH = 256
"""Of the matrix whose eigendecomposition is timed: from there on the cost grows with the cube at most."""


def seconds_of_eigh(dtype: torch.dtype, device: torch.device) -> float:
    """What an eigendecomposition takes, divided by the cube of the width; wider ones take somewhat less."""
    matrix = torch.diag(torch.arange(TRIAL_WIDTH, dtype=dtype, device=device)) + 1
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        # A number of it, for which an accelerator has to be done.
        float(torch.linalg.eigh(matrix)[0][0])
        seconds.append(time.perf_counter() - start)
    return min(seconds) / TRIAL_WIDTH**3


def identity(layer: Layer, dtype: torch.dtype, precise: torch.dtype) -> Eigenbasis:
    """A basis of the layer's shape."""
    groups, outputs, columns = layer.form.places.shape
    device = layer.form.places.device

    def vectors(width: int) -> Float[Tensor, "g i i"]:
        return torch.eye(width, dtype=dtype, device=device).repeat(groups, 1, 1)

    values = torch.zeros(groups, outputs, columns, dtype=precise, device=device)
    return Eigenbasis(vectors(outputs), None if layer.form.one_hot else vectors(columns), values)


class SecondMoments:
    """The eigenvalues of one layer refitted in its eigenbasis: ``Λ = 1/N Σ_n Σ_s (Q_Gᵀ G[s,n] Q_A)²``.

    The best diagonal in that basis. George et al. (2018), "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", §3.
    """

    def __init__(self, basis: Eigenbasis, budget: int, sums: list[Tensor] | None = None) -> None:
        self.basis = basis
        self.budget = budget
        self.sums = sums or [torch.zeros_like(basis.values)]

    def add(self, batch: LayerBatch) -> None:
        """Add one batch's squares."""
        if batch.one_hot:
            self._add_one_hot(self.basis.rotated(batch))
        elif batch.positions == 1:
            # (Σ_t δ ⊗ ā)² = δ² ⊗ ā²: no sample's gradient is formed.
            turned = self.basis.rotated(batch)
            squares = turned.output_gradients.square().sum(0)[:, :, 0]
            self.sums[0] += squares.mT @ turned.inputs[:, :, 0].square()
        else:
            for part in in_parts(batch, self.budget):
                self.sums[0] += self.basis.gradients(part).square_().sum((0, 1))

    def _add_one_hot(self, turned: LayerBatch) -> None:
        """Sum the positions of a sample that hold the same index, square, and add up over samples."""
        draws, _, size, positions, outputs = turned.output_gradients.shape
        sample = torch.arange(size, device=turned.inputs.device)[:, None].expand(size, positions)
        pairs, place = torch.unique((sample * turned.columns + turned.inputs).flatten(), return_inverse=True)
        flat = turned.output_gradients[:, 0].flatten(1, 2)
        sums = flat.new_zeros(draws, len(pairs), outputs).index_add_(1, place, flat)
        (total,) = self.sums
        squares = sums.square().sum(0).T.to(total)
        total[0].index_add_(1, pairs % turned.columns, squares)

    def eigenbasis(self, samples: int) -> Eigenbasis:
        """The basis with its refitted eigenvalues."""
        return Eigenbasis(self.basis.outputs, self.basis.inputs, self.sums[0] / samples)


def in_parts(batch: LayerBatch, budget: int) -> Iterable[LayerBatch]:
    """The batch in pieces whose gradients take at most ``budget`` bytes."""
    draws, groups, _, _, outputs = batch.output_gradients.shape
    element = max(4, batch.output_gradients.element_size())
    return batch.parts(max(1, budget // (2 * draws * groups * outputs * batch.columns * element)))
