"""The regularisation λ: one number, or one per block; absolute, or relative to the curvature's own size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from influence_framework.errors import InvalidInputError, did_you_mean
from influence_framework.operators import estimated_trace
from influence_framework.protocols import Diagonal, JointTrace, LinearOperator, Trace


@dataclass(frozen=True)
class RelativeRegularization:
    """λ as a fraction of the mean eigenvalue ``tr(C)/P`` of each block.

    Curvature differs by orders of magnitude between layers, and with the loss and the data; a fraction of
    its own size means the same for all. Grosse et al. (2023), "Studying Large Language Model
    Generalization with Influence Functions", §3.1, take a tenth.

    The mean eigenvalue is that of the curvature, whatever the solver makes of it: exact for
    ``gauss_newton`` of up to 64 outputs and for ``empirical_fisher``; else an estimate, the same at every call:
    of ``gauss_newton`` from 512 random targets or one for every sample, of others from 64 random vectors.

    Attributes:
        fraction: Of the mean eigenvalue.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check(self.fraction, "fraction")


Strength = float | RelativeRegularization
Regularization = Strength | Mapping[str, Strength]


def _check(value: object, which: str) -> None:
    if isinstance(value, RelativeRegularization):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInputError(
            f"The regularisation is a number, a RelativeRegularization, or a mapping from block name to "
            f"either; {which!r} is {value!r}."
        )
    if not math.isfinite(value) or value < 0:
        raise InvalidInputError(
            f"The regularisation must be finite and not negative, got {value} for {which!r}."
        )


def check_regularization(regularization: Regularization, name: str = "hessian_regularization") -> None:
    """Raise :class:`InvalidInputError` unless every value is finite and not negative."""
    values = regularization if isinstance(regularization, Mapping) else {name: regularization}
    for which, value in values.items():
        _check(value, which)


def per_block(regularization: Regularization, blocks: Iterable[str]) -> dict[str, Strength]:
    """λ of each block, by name.

    Raises:
        InvalidInputError: A name that is no block, or a block without a value.
    """
    blocks = list(blocks)
    if not isinstance(regularization, Mapping):
        return dict.fromkeys(blocks, regularization)
    for name in regularization:
        if name not in blocks:
            raise InvalidInputError(
                f"hessian_regularization names the block {name!r}, which does not exist."
                f"{did_you_mean(name, blocks)} Blocks: {', '.join(blocks)}."
            )
    missing = [name for name in blocks if name not in regularization]
    if missing:
        raise InvalidInputError(
            f"hessian_regularization gives no value for the blocks {', '.join(missing)}: name every block, "
            "or pass one number."
        )
    return {name: regularization[name] for name in blocks}


@dataclass(eq=False)
class BlockScale:
    """The size of one block's curvature, measured when a fraction of it is first asked for and then kept.

    Attributes:
        block: The block's name.
        operator: Its curvature.
        measured: ``tr(C)/P`` if anybody has asked for it.
    """

    block: str
    operator: LinearOperator
    measured: float | None = None

    @property
    def mean_eigenvalue(self) -> float:
        """``tr(C)/P``."""
        if self.measured is None:
            self.measured = mean_eigenvalue(self.operator)
        return self.measured

    def absolute(self, strength: Strength) -> float:
        """λ in the units of the curvature.

        Raises:
            InvalidInputError: A fraction of a mean eigenvalue that is negative.
        """
        if not isinstance(strength, RelativeRegularization):
            return float(strength)
        if (mean := self.mean_eigenvalue) < 0:
            raise InvalidInputError(
                f"The mean eigenvalue of block {self.block!r} is {mean:.3g}: its curvature is mostly "
                "negative, and no fraction of that is a regularisation. Give λ as a number, or use the "
                "source 'gauss_newton'."
            )
        return strength.fraction * mean


def absolute(scales: Mapping[str, BlockScale], regularization: Mapping[str, Strength]) -> dict[str, float]:
    """λ of every block in the units of its curvature; what has to be measured is measured together.

    Raises:
        InvalidInputError: A fraction of a mean eigenvalue that is negative.
    """
    unknown = {
        name: scale.operator
        for name, scale in scales.items()
        if isinstance(regularization[name], RelativeRegularization) and scale.measured is None
    }
    for operator in unknown.values():
        if isinstance(operator, JointTrace):
            for name, trace in operator.traces(unknown).items():
                scales[name].measured = trace / unknown[name].shape[0]
        break
    return {name: scale.absolute(regularization[name]) for name, scale in scales.items()}


def mean_eigenvalue(operator: LinearOperator) -> float:
    """``tr(C)/P``: exact where the operator offers it, else from :func:`estimated_trace`."""
    size = operator.shape[0]
    if isinstance(operator, Trace):
        return operator.trace() / size
    if isinstance(operator, Diagonal):
        return float(operator.diagonal().sum(dtype=torch.float64)) / size
    return estimated_trace(operator) / size
