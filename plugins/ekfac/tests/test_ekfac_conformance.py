"""``ekfac`` and ``kfac`` against the conformance kit."""

from __future__ import annotations

import pytest

from influence_framework.testing import check_preconditioner, check_solver

NAMES = pytest.mark.parametrize("name", ["ekfac", "kfac"])


@NAMES
def test_conformance(name: str) -> None:
    check_solver(name)


@NAMES
def test_conformance_with_exact_expectations(name: str) -> None:
    check_solver({"name": name, "samples": "exact"})


@NAMES
def test_conformance_as_preconditioner(name: str) -> None:
    check_preconditioner(name)
