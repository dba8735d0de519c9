"""One small cluster for all tests: two worker processes of two threads each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

WORKERS = 2


@pytest.fixture(scope="session")
def lasting() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def client(lasting: Client) -> Client:
    """With all workers there: one that a test killed takes seconds to come back."""
    lasting.wait_for_workers(WORKERS, timeout=120)
    return lasting


@pytest.fixture
def current(client: Client) -> Iterator[Client]:
    """The client as the one in use."""
    with client.as_current():
        yield client
