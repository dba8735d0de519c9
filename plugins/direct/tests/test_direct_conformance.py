"""``direct`` against the conformance kit."""

from __future__ import annotations

from influence_framework.testing import check_solver


def test_conformance() -> None:
    check_solver("direct")
