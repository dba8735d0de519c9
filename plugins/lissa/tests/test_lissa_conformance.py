"""``lissa`` against the conformance kit."""

from __future__ import annotations

import pytest

from influence_framework.testing import check_solver


@pytest.mark.usefixtures("as_user")
def test_conformance() -> None:
    # Looser than by default, which takes several times as long and checks nothing more.
    check_solver({"name": "lissa", "rtol": 1e-2, "maxiter": 300})
