"""Memory of a worker that nannies told to trim: kept while it computes, given back afterwards."""

from __future__ import annotations

import platform
import resource
import time
from pathlib import Path

import pytest
import torch
from distributed import Client
from influence_framework_dask.allocation import IDLE_SECONDS, memory_kept

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the remedy is for glibc's allocator")

SIZE, TIMES = 2**20, 100
"""Numbers of a tensor (4 MiB), and how often one is made."""


def made() -> int:
    """Page faults of tensors that are made one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.ones(SIZE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def made_within() -> int:
    with memory_kept():
        return made()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def given_back() -> tuple[int, int]:
    """Memory in use right after 256 MiB were let go of within, and after a while."""
    with memory_kept():
        parts = [torch.ones(SIZE) for _ in range(64)]
        del parts
    kept = resident()
    deadline = time.monotonic() + 30 * IDLE_SECONDS
    while resident() > kept - 2**27 and time.monotonic() < deadline:
        time.sleep(IDLE_SECONDS / 10)
    return kept, resident()


def on_one(client: Client, work: object) -> object:
    worker = next(iter(client.nthreads()))
    return client.submit(work, workers=[worker], pure=False).result()


def test_a_worker_uses_freed_memory_again_while_it_computes_and_only_then(client: Client) -> None:
    pages = TIMES * SIZE * 4 // resource.getpagesize()
    assert on_one(client, made) > pages / 2
    assert on_one(client, made_within) < pages / 4
    assert on_one(client, made) > pages / 2


def test_a_worker_gives_memory_back_when_it_is_idle(client: Client) -> None:
    kept, left = on_one(client, given_back)
    assert left < kept - 2**27


def test_a_process_that_no_nanny_started_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    asked: list[str] = []
    monkeypatch.setattr("influence_framework_dask.allocation._glibc", lambda: asked.append("glibc"))
    with memory_kept():
        pass
    assert not asked
