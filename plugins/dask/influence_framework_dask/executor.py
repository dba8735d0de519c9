"""The executor ``dask``: units of work on the workers of a cluster."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import dask
from distributed import Client, Future, as_completed

from influence_framework.attribution import SequentialExecutor
from influence_framework.errors import InvalidInputError
from influence_framework.protocols import Result, Unit
from influence_framework_dask.allocation import memory_kept
from influence_framework_dask.shipping import WORK, dumps, loads, recall, resolve, ship

AHEAD = 2
"""Units that are with each worker at a time: one that it works on, and one that waits."""

PATIENCE = 5.0
"""Seconds for the scheduler to take back what the workers were given."""

_clients: dict[str, Client] = {}


def check_address(address: object) -> None:
    """Raise :class:`InvalidInputError` unless it is text, or left out."""
    if address is not None and not (isinstance(address, str) and address):
        raise InvalidInputError(
            f"address must be a scheduler's, such as 'tcp://10.0.0.1:8786'; got {address!r}."
        )


def client_at(address: str | None) -> Client:
    """The client of the scheduler at ``address``; where left out, the one in use.

    Raises:
        InvalidInputError: There is none, or no scheduler answers.
    """
    if address is None:
        try:
            found: Client = Client.current()
            return found
        except ValueError:
            raise InvalidInputError(
                "There is no Dask client: make one first, client = distributed.Client(n_workers=4, "
                "threads_per_worker=1) for this machine, or name a scheduler with the option address."
            ) from None
    known = _clients.get(address)
    if known is None or known.status != "running":
        try:
            known = _clients[address] = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"No Dask scheduler answers at {address!r}: {error}.") from error
    return known


@dataclass(frozen=True)
class DaskExecutor:
    """Units on the workers of a Dask cluster, with the model sent to each of them once.

    A worker process computes one unit at a time, whatever its number of threads: give each worker one thread,
    and have as many workers as cores. A unit that was lost with its worker is worked on again by
    another; Dask gives up on one after ``distributed.scheduler.allowed-failures`` lost workers (3). Dask's
    dashboard shows the units by what is done with them.

    Attributes:
        address: Of the scheduler, such as ``"tcp://10.0.0.1:8786"``; left out, the client that is in use.
    """

    address: str | None = None

    def __post_init__(self) -> None:
        check_address(self.address)

    @property
    def workers(self) -> int:
        """Worker processes that are there now; at least one, for clusters that grow with their work."""
        return max(1, len(client_at(self.address).nthreads()))

    def run(self, job: Callable[[Unit], Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Every unit with its result, as they are done.

        Raises:
            InvalidInputError: There is no client, or no scheduler at ``address``.
            KilledWorker: A unit took several workers with it, usually for want of memory.
        """
        client = client_at(self.address)
        if not getattr(job, "alone", True):
            # Its products are worked out by the workers, which can ask for none themselves.
            yield from SequentialExecutor().run(job, units)
            return
        token = ship(client, whole := _Whole(job))
        ahead = AHEAD * self.workers
        label = f"influence-{getattr(job, 'label', type(job).__name__)}"
        waiting: dict[Any, tuple[Future[Any], Unit]] = {}
        source = iter(units)
        done = as_completed(loop=client.loop)

        def fill() -> None:
            for unit in source:
                # A unit goes with its task, so that it is still there when a worker is not.
                with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TiB"}):
                    key = f"{label}-{uuid.uuid4().hex}"
                    future = client.submit(_work, token, dumps(unit)[0], key=key, pure=False)
                waiting[future.key] = future, unit
                done.add(future)
                if len(waiting) >= ahead:
                    return

        try:
            fill()
            while waiting:
                future = next(done)
                _, unit = waiting.pop(future.key)
                result = loads(future.result())
                fill()
                yield unit, result
        finally:
            _cancelled(client, [future for future, _ in waiting.values()])
            recall(client, token)
            del whole


def _cancelled(client: Client, futures: list[Future[Any]]) -> None:
    """No worker begins with one of these any more, none of which is to be had from now on."""
    if not futures:
        return
    client.cancel(futures, force=True)
    keys, deadline = {future.key for future in futures}, time.monotonic() + PATIENCE
    # The scheduler is told, and not waited for.
    while client.status == "running" and time.monotonic() < deadline:
        if keys.isdisjoint(key for given in client.processing().values() for key in given):
            return
        time.sleep(0.005)


@dataclass(frozen=True, eq=False)
class _Whole:
    """A job under a name of its own."""

    job: Callable[[Any], Any]


def _work(token: str, unit: bytes) -> bytes:
    with WORK, memory_kept():
        content, _ = dumps(resolve(token).job(loads(unit)))
    return content
