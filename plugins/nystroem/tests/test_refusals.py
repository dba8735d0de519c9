"""What ``nystroem`` refuses, with what was expected in its place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from influence_framework_nystroem import NystroemSolver

from influence_framework import DenseOperator, InvalidInputError, NonFiniteError


def test_auto_needs_a_regularisation() -> None:
    with pytest.raises(InvalidInputError, match="must be positive, got 0"):
        NystroemSolver(rank="auto").fit(DenseOperator(torch.eye(4)), 0.0)


def test_products_that_are_not_finite_are_refused() -> None:
    overflowing = DenseOperator(torch.eye(4)) * float("inf")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        NystroemSolver(rank=2).fit(overflowing, 1.0)


def test_half_precision_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="float32 and float64 matrices"):
        NystroemSolver(rank=2).fit(DenseOperator(torch.eye(4, dtype=torch.bfloat16)), 1.0)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("rank", value) for value in (0, -1, 2.5, True, "all", None)],
        *[(name, value) for name in ("seed", "oversampling", "power_passes", "checks") for value in (-1, 0.5)],
        *[("max_rank", 0), ("tolerance", 0.0), ("tolerance", float("nan")), ("tolerance", "1")],
    ],
)
def test_wrong_options_are_refused(option: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"{option} must be .* got {value!r}"):
        NystroemSolver(**{option: value})


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NystroemSolver().rank = 3  # type: ignore[misc]
