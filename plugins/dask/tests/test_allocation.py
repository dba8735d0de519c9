"""Memory of a worker that nannies told to trim: kept while it computes, given back afterwards."""

from __future__ import annotations

import ctypes
import platform
import resource
import time
from pathlib import Path

import pytest
import torch
from distributed import Client
from influence_framework_dask import allocation
from influence_framework_dask.allocation import IDLE_SECONDS, memory_kept

GLIBC = platform.libc_ver()[0] == "glibc"
"""Whether there is something to be changed."""

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
    before, within, after = (on_one(client, work) for work in (made, made_within, made))
    if GLIBC:
        assert before > pages / 2
        assert within < pages / 4
        assert after > pages / 2
    else:
        assert on_one(client, allocation._glibc) is None


def test_a_worker_gives_memory_back_when_it_is_idle(client: Client) -> None:
    if GLIBC:
        kept, left = on_one(client, given_back)
        assert left < kept - 2**27
    else:
        assert on_one(client, allocation._glibc) is None


class Library:
    """The C library, as far as it is asked to change something."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def mallopt(self, option: int, value: int) -> None:
        self.asked.append((option, value))

    def malloc_trim(self, pad: int) -> None:
        self.asked.append((pad,))


def test_thresholds_are_raised_and_then_those_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(allocation, "_glibc", lambda: library)
    monkeypatch.setattr(allocation, "_told_to_trim", lambda: True)
    monkeypatch.setattr(allocation, "IDLE_SECONDS", 0.01)
    trim, mmap = allocation.TRIM_THRESHOLD, allocation.MMAP_THRESHOLD
    with memory_kept():
        assert library.asked == [(trim, allocation.LARGEST_TRIM), (mmap, allocation.LARGEST_MMAP)]
    allocation._giving_back.pop().join()
    assert library.asked[2:] == [(trim, 65536), (mmap, allocation.DEFAULT), (0,)]


def test_a_c_library_that_is_not_glibc_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocation, "_told_to_trim", lambda: True)
    monkeypatch.setattr(allocation, "_glibc", allocation._glibc.__wrapped__)
    with memory_kept():
        pass
    assert not library.asked


def test_a_process_that_no_nanny_started_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    asked: list[str] = []
    monkeypatch.setattr("influence_framework_dask.allocation._glibc", lambda: asked.append("glibc"))
    with memory_kept():
        pass
    assert not asked
