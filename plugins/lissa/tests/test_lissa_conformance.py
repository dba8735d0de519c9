"""``lissa`` against the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest

from influence_framework.testing import check_solver


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time checks of shapes, which cost several times what these small mini-batches do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_conformance() -> None:
    # Looser than by default, which takes several times as long and checks nothing more.
    check_solver({"name": "lissa", "rtol": 1e-2, "maxiter": 300})
