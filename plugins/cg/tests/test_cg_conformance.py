"""``cg`` and ``jacobi`` against the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest

from influence_framework.testing import check_preconditioner, check_solver

OPTIONS: list[dict[str, Any]] = [
    {},
    {"block": True},
    {"rtol": 1e-10, "atol": 0.0},
    {"rtol": 1e-3},
    {"preconditioner": "jacobi"},
    {"preconditioner": "nystroem", "block": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conformance(options: dict[str, Any]) -> None:
    check_solver({"name": "cg", **options})


def test_conformance_of_jacobi() -> None:
    check_solver("jacobi")


def test_conformance_of_jacobi_as_preconditioner() -> None:
    check_preconditioner("jacobi")
