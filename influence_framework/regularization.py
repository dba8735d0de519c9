"""The regularisation λ: one number, or one per block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from influence_framework.errors import InvalidInputError, did_you_mean

Regularization = float | Mapping[str, float]


def check_regularization(regularization: Regularization, name: str = "hessian_regularization") -> None:
    """Raise :class:`InvalidInputError` unless every value is finite and not negative."""
    values = regularization if isinstance(regularization, Mapping) else {name: regularization}
    for which, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInputError(
                f"The regularisation is a number or a mapping from block name to number; {which!r} is "
                f"{value!r}."
            )
        if not math.isfinite(value) or value < 0:
            raise InvalidInputError(
                f"The regularisation must be finite and not negative, got {value} for {which!r}."
            )


def per_block(regularization: Regularization, blocks: Iterable[str]) -> dict[str, float]:
    """λ of each block, by name.

    Raises:
        InvalidInputError: A name that is no block, or a block without a value.
    """
    blocks = list(blocks)
    if not isinstance(regularization, Mapping):
        return dict.fromkeys(blocks, float(regularization))
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
    return {name: float(regularization[name]) for name in blocks}
