"""``arnoldi`` against the conformance kit: at a low rank, and where the rank makes it exact."""

from __future__ import annotations

from typing import Any

import pytest

from influence_framework.testing import check_solver

LOW_RANK: list[dict[str, Any]] = [
    {"rank": 3, "krylov_dimension": 5},
    {"rank": 3, "krylov_dimension": 5, "backend": "arpack"},
    {"rank": 3, "complement": False},
]


@pytest.mark.parametrize("options", LOW_RANK, ids=str)
def test_conformance(options: dict[str, Any]) -> None:
    check_solver({"name": "arnoldi", **options})


@pytest.mark.parametrize("rank", [10, 100])
def test_all_eigenpairs_agree_with_the_dense_inverse(rank: int) -> None:
    check_solver({"name": "arnoldi", "rank": rank}, accuracy=1e-6)
