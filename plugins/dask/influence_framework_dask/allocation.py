"""Memory that a worker keeps for as long as it computes, and gives back once it is idle."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import distributed

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of ``mallopt`` in glibc's ``malloc.h``."""

LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 4 * 2**20 * ctypes.sizeof(ctypes.c_long)
"""The most that they may be."""

DEFAULT = 128 * 2**10
"""What both are where nothing else is asked for."""

IDLE_SECONDS = 1.0
"""After which what is kept is given back: between two units of a job it would only be asked for again."""

_giving_back: list[threading.Timer] = []


@contextmanager
def memory_kept() -> Iterator[None]:
    """Within, freed memory is used again; a second after the last of these, it goes to the operating system.

    Dask's nannies start workers with ``MALLOC_TRIM_THRESHOLD_=65536``, so that the memory of data that was let
    go of is seen to be free. It also has every tensor above 128 KiB come from the operating system as pages
    that are mapped, filled with zeros and unmapped again, which can take as long as the arithmetic. Elsewhere,
    and without glibc, nothing is changed. Enter with :data:`influence_framework_dask.shipping.WORK` held.
    """
    library = _glibc() if _told_to_trim() else None
    if library is None:
        yield
        return
    while _giving_back:
        _giving_back.pop().cancel()
    library.mallopt(TRIM_THRESHOLD, LARGEST_TRIM)
    library.mallopt(MMAP_THRESHOLD, LARGEST_MMAP)
    try:
        yield
    finally:
        for option, name in (
            (TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_"),
            (MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_"),
        ):
            library.mallopt(option, _asked(name))
        timer = threading.Timer(IDLE_SECONDS, library.malloc_trim, (0,))
        timer.daemon = True
        timer.start()
        _giving_back.append(timer)


def _told_to_trim() -> bool:
    """Whether this process was started with the variable: a nanny's own only has it in ``os.environ``."""
    try:
        worker = distributed.get_worker()
    except ValueError:
        return False
    return worker.nanny is not None and "MALLOC_TRIM_THRESHOLD_" in os.environ


def _asked(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else DEFAULT


@cache
def _glibc() -> Any | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    if not all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")):
        return None
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library
