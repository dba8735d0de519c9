"""What a method costs before it is run: a solver counts its work, core multiplies by what work takes here.

A solver that takes part offers :class:`Costed`: from a :class:`Workload` it tells its :class:`Cost`, in units
of :class:`Work` that do not depend on the machine. ``influence_framework.advice`` measures what a unit takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import MissingCapabilityError

Products = tuple[tuple[float, float], ...]
"""How many products, and the columns of each."""


@dataclass(frozen=True)
class Work:
    """Amounts of work. They add up; ``3 * work`` is three times as much.

    Attributes:
        products: Products with the curvature of all data, as pairs (how many, columns of each).
        minibatches: Products with the curvature of a random mini-batch, likewise.
        passes: Passes over the training data for inputs and output gradients of layers, one draw each.
        diagonals: How often the exact diagonal is taken (``Diagonal``).
        flops: Of matrix products, and of whatever goes as quickly.
        eigh: Sizes of symmetric float64 matrices that are decomposed.
        traffic: Bytes read and written beside that.
    """

    products: Products = ()
    minibatches: Products = ()
    passes: float = 0.0
    diagonals: float = 0.0
    flops: float = 0.0
    eigh: tuple[int, ...] = ()
    traffic: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __rmul__(self, factor: float) -> Work:
        if self.eigh and factor != int(factor):
            raise ValueError(f"Decompositions come in whole numbers, got a factor of {factor}.")
        return Work(
            tuple((factor * count, columns) for count, columns in self.products),
            tuple((factor * count, columns) for count, columns in self.minibatches),
            factor * self.passes,
            factor * self.diagonals,
            factor * self.flops,
            int(factor) * self.eigh if self.eigh else (),
            factor * self.traffic,
        )

    @property
    def product_count(self) -> float:
        """Products with the curvature of all data, whatever their columns: passes over the data."""
        return sum(count for count, _ in self.products)


@dataclass(frozen=True, eq=False)
class Measure:
    """A spectrum as some vector sees it: eigenvalues, and the share of its square that lies along each.

    Attributes:
        values: Ritz values, ascending, float64.
        weights: Non-negative, sum 1.
    """

    values: Float[Tensor, " m"]
    weights: Float[Tensor, " m"]

    def residuals(self, regularization: float) -> list[float]:
        """``‖b − (C + λI) x_j‖ / ‖b‖`` of conjugate gradients after ``j`` steps, as far as this measure tells.

        Exact but for rounding as long as it has more points than there are steps: Golub and Meurant (2010),
        "Matrices, Moments and Quadrature with Applications", §9.
        """
        matrix = self.values + regularization
        residual = self.weights.sqrt()
        direction, rho = residual, residual.square().sum()
        found = [1.0]
        for _ in range(len(self.values) - 1):
            image = matrix * direction
            curvature = (direction * image).sum()
            if not (curvature > 0 and rho > 0):
                break
            residual = residual - rho / curvature * image
            rho, before = residual.square().sum(), rho
            direction = residual + rho / before * direction
            found.append(rho.sqrt().item())
        return found


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What a few products tell of the eigenvalues of ``C``.

    Attributes:
        size: ``P``.
        whole: As random vectors see it: every eigenvalue counts ``1/P``, but for chance.
        gradients: As gradients of the loss of some samples see it, one each: the right-hand sides to come.
        samples: Of the training data, from which it was taken.
    """

    size: int
    whole: Measure
    gradients: Sequence[Measure]
    samples: int

    @property
    def largest(self) -> float:
        """Largest eigenvalue seen."""
        return max(m.values[-1].item() for m in (self.whole, *self.gradients))

    @property
    def smallest(self) -> float:
        """Smallest eigenvalue seen."""
        return min(m.values[0].item() for m in (self.whole, *self.gradients))

    @property
    def mean(self) -> float:
        """``tr(C)/P``, estimated."""
        return float((self.whole.values * self.whole.weights).sum())

    def count(self, above: float) -> float:
        """How many eigenvalues are larger, estimated."""
        return self.size * float(self.whole.weights[self.whole.values > above].sum())

    def at(self, rank: int) -> float:
        """The eigenvalue of that rank, estimated; 1 is the largest."""
        if rank >= self.size:
            return 0.0
        counts = self.size * self.whole.weights.flip(0).cumsum(0)
        return max(0.0, self.whole.values.flip(0)[int((counts < rank).sum().clamp(max=len(counts) - 1))].item())

    def iterations(
        self, regularization: float, rtol: float, deflated: float | None = None
    ) -> tuple[float, float]:
        """Steps of conjugate gradients to ``rtol``: the most of any right-hand side, and on average.

        Where the probes do not reach that far, they go on at the rate of their second half, or at that which
        the condition number ``(largest + λ)/λ`` allows if it is more. With a preconditioner that leaves
        eigenvalues up to ``deflated``, as many as the condition number ``(deflated + λ)/λ`` allows, if they are
        fewer: ``½ √κ ln(2/rtol)``, Saad (2003), "Iterative Methods for Sparse Linear Systems", §6.11.3.
        """
        steps = [
            self._steps(measure.residuals(regularization), regularization, rtol) for measure in self.gradients
        ]
        most, mean = max(steps), sum(steps) / len(steps)
        if deflated is None:
            return most, mean
        bound = 0.5 * math.sqrt(1 + deflated / max(regularization, 1e-300)) * math.log(2 / rtol)
        return min(most, bound), min(mean, bound)

    def _steps(self, told: Sequence[float], regularization: float, rtol: float) -> float:
        for step, residual in enumerate(told):
            if residual <= rtol:
                return step
        half = len(told) // 2
        seen = math.log(told[half] / told[-1]) / max(1, len(told) - 1 - half)
        root = math.sqrt((self.largest + regularization) / max(regularization, 1e-300))
        rate = max(seen, math.log((root + 1) / max(root - 1, 1e-12)), 1e-6)
        return min(len(told) - 1 + math.log(told[-1] / rtol) / rate, self.size)


@dataclass(frozen=True)
class LayerShape:
    """One layer in matrix form: a sample's gradient is ``Σ_t δ_t ⊗ ā_t``, ``(groups, outputs, inputs)``.

    Attributes:
        groups: ``g``.
        outputs: ``o``.
        inputs: ``e``, the one for a bias included.
        positions: ``t``, of one sample.
        one_hot: Whether ``ā`` are unit vectors, as for an embedding.
    """

    groups: int
    outputs: int
    inputs: int
    positions: int
    one_hot: bool = False

    @property
    def entries(self) -> int:
        """Of the gradient in matrix form."""
        return self.groups * self.outputs * self.inputs


@dataclass(frozen=True, eq=False)
class Workload:
    """What a solver is to do: one block of a problem, and scores of so many pairs.

    Attributes:
        parameters: ``P`` of the block.
        samples: ``N``.
        regularization: λ.
        columns: Right-hand sides solved for at a time.
        n_test: Points on the side that is solved for, the smaller one.
        n_train: Points on the other side.
        element: Bytes of a number of the operator's dtype.
        precision: ``eps`` of that dtype.
        device: Type of the device, ``"cpu"`` or another.
        outputs: Numbers that the model returns for a sample.
        batch_size: Samples of a mini-batch.
        capabilities: Names of the capability protocols that the operator offers.
        semidefinite: Whether the operator is known to have no negative eigenvalue.
        layers: Shapes of the layers in matrix form.
        uncovered: Parameters outside them, by name, each with the reason.
        forming: What the full matrix takes.
        spectrum: Estimates of eigenvalues; ``None`` where the model has no second derivatives.
    """

    parameters: int
    samples: int
    regularization: float
    columns: int
    n_test: int
    n_train: int
    element: int
    precision: float
    device: str
    outputs: int
    batch_size: int
    capabilities: frozenset[str]
    semidefinite: bool
    layers: tuple[LayerShape, ...]
    uncovered: Mapping[str, str]
    forming: Work
    spectrum: Spectrum | None

    @property
    def probed(self) -> Spectrum:
        """The spectrum.

        Raises:
            MissingCapabilityError: Nothing is known of it, since there are no products.
        """
        if self.spectrum is None:
            raise MissingCapabilityError(
                "it needs products with the curvature, and gradients of this model cannot be differentiated "
                "again"
            )
        return self.spectrum

    def vectors(self, count: float) -> float:
        """Bytes of so many vectors of the length of the block."""
        return count * self.parameters * self.element


class Fidelity(IntEnum):
    """How near to ``(C + λI)⁻¹`` a method comes, the nearest first: what advice goes by before time."""

    EXACT = 0
    LAYERS = 1
    FACTORS = 2
    LOW_RANK = 3
    DIAGONAL = 4

    @property
    def words(self) -> str:
        """What it means."""
        return _WORDS[self]


_WORDS = {
    Fidelity.EXACT: "solves with the curvature itself",
    Fidelity.LAYERS: "approximates all eigenvalues of every layer, and leaves out curvature between layers",
    Fidelity.FACTORS: "takes a layer's curvature for a Kronecker product, and leaves out that between layers",
    Fidelity.LOW_RANK: "keeps the largest eigenvalues alone",
    Fidelity.DIAGONAL: "keeps the diagonal alone",
}


@dataclass(frozen=True)
class Cost:
    """What a solver takes for a :class:`Workload`.

    Attributes:
        fidelity: How near to the inverse it comes. One that will not reach its tolerance is not ``EXACT``.
        fit: The work of ``fit``.
        solve: That of ``solve`` for ``columns`` right-hand sides.
        fit_bytes: Memory while it is fitted, beside the operator.
        held_bytes: What the inverse holds.
        solve_bytes: Memory of a solve, beside that.
        scoring: The work of all scores, of an inverse that offers ``LayerScoring``; no gradients of samples,
            no solves and no products with gradients are then needed.
        apply: As a preconditioner: the work for one column.
        deflated: As a preconditioner: the condition number that it leaves is ``(deflated + λ)/λ``; ``None``
            where that cannot be told.
        reasons: What follows from the numbers, in words.
    """

    fidelity: Fidelity
    fit: Work = field(default_factory=Work)
    solve: Work = field(default_factory=Work)
    fit_bytes: float = 0.0
    held_bytes: float = 0.0
    solve_bytes: float = 0.0
    scoring: Work | None = None
    apply: Work | None = None
    deflated: float | None = None
    reasons: tuple[str, ...] = ()


@runtime_checkable
class Costed(Protocol):
    """Capability of a solver: it tells what it takes, before it is run.

    Optional, as a static or class method: ``advised(workload)``, the mappings of options with which the
    method is worth considering; its defaults where left out.
    """

    def cost(self, workload: Workload) -> Cost:
        """Its cost with these options.

        Raises:
            InfluenceError: It cannot do it; the message says why.
        """
        ...


def in_bytes(count: float) -> str:
    """The number with a unit that leaves few digits: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def by_columns(size: int, columns: int = 256) -> Work:
    """What a full matrix takes, formed from products with that many columns of the identity at a time."""
    return Work(products=((math.ceil(size / columns), min(size, columns)),))


def layers_forming(layers: Sequence[tuple[int, int]], samples: int, outputs: int, element: int) -> Work:
    """What the matrix takes from second derivatives at the outputs of layers that are used once on vectors.

    ``layers`` are the numbers of outputs and inputs of each. A product of every pair of parameters for each
    sample, half of them mirrored, from rows that are formed for every output of a layer; and a backward pass
    for every output of the model.
    """
    size = sum(given * taken for given, taken in layers)
    rows = sum(given for given, _ in layers)
    traffic = element * (10.0 * size**2 + 3.0 * samples * rows * size)
    return Work(products=((1, outputs), (1, 1)), flops=float(samples) * size**2, traffic=traffic)
