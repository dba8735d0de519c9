"""Whether numbers are finite, against the mask of every entry."""

from __future__ import annotations

import pytest
import torch

from influence_framework.finite import all_finite, finite_rows

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "wrong", [[], [float("nan")], [float("inf")], [float("-inf")], [float("inf"), float("-inf")]]
)
def test_nothing_that_is_not_finite_is_missed_whatever_it_stands_beside(
    dtype: torch.dtype, wrong: list[float]
) -> None:
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    for place, value in enumerate(wrong):
        rows[3, 7 * place] = value
    assert all_finite(rows) == all_finite(rows.T) == (not wrong)
    assert torch.equal(finite_rows(rows), torch.isfinite(rows).all(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    rows = torch.ones(3, 300, dtype=dtype)
    rows[1] = torch.finfo(dtype).max
    assert not rows.sum(1).isfinite().all()
    assert all_finite(rows)
    assert finite_rows(rows).all()
    rows[1, 5] = float("nan")
    assert not all_finite(rows)
    assert finite_rows(rows).tolist() == [True, False, True]


def test_an_imaginary_part_counts() -> None:
    number = complex(0.0, float("inf"))
    assert not all_finite(torch.tensor([number]))
    assert not all_finite(torch.tensor([number]).conj())


@pytest.mark.parametrize("tensor", [torch.arange(3), torch.tensor([True]), torch.empty(0), torch.empty(0, 3)])
def test_integers_and_nothing_are_finite(tensor: torch.Tensor) -> None:
    assert all_finite(tensor)


def test_rows_without_columns_are_finite() -> None:
    assert finite_rows(torch.empty(2, 0)).tolist() == [True, True]
