"""``nystroem`` against the conformance kit: at a low rank, and where the rank makes it exact."""

from __future__ import annotations

from typing import Any

import pytest

from influence_framework.testing import check_preconditioner, check_solver

LOW_RANK: list[dict[str, Any]] = [{"rank": 3}, {"rank": 3, "oversampling": 0, "power_passes": 1}]


@pytest.mark.parametrize("options", [*LOW_RANK, {"rank": "auto"}], ids=str)
def test_conformance(options: dict[str, Any]) -> None:
    check_solver({"name": "nystroem", **options})


@pytest.mark.parametrize("rank", [10, 50])
def test_full_rank_agrees_with_the_dense_inverse(rank: int) -> None:
    check_solver({"name": "nystroem", "rank": rank}, accuracy=1e-6)


@pytest.mark.parametrize("options", [*LOW_RANK, {}], ids=str)
def test_conformance_as_preconditioner(options: dict[str, Any]) -> None:
    check_preconditioner({"name": "nystroem", **options})
