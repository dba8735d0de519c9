"""What all tests share: run-time checks of types and shapes, and fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings

from tests import typechecked

# Before anything imports them.
typechecked.install("influence_framework")

# Timings on a shared machine vary; what is slow shows in the durations instead.
settings.register_profile("quiet", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("quiet")

# Starting threads costs more than tensors this small gain from them.
torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def as_user() -> Iterator[None]:
    """Without the run-time checks of shapes, so that a wrong argument meets the package's own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
