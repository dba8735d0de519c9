"""Computing an array with a bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask.array as da
import numpy as np
from dask.callbacks import Callback
from distributed import Client, as_completed, futures_of
from tqdm import tqdm


def computed(array: da.Array, client: Client | None, progress: bool) -> np.ndarray[Any, np.dtype[Any]]:
    """The array's numbers, with a bar that counts its chunks."""
    keys = set(_flat(array.__dask_keys__()))
    with tqdm(total=len(keys), desc="Chunks", unit="chunk", disable=not progress) as bar:
        if client is None:
            with _counting(bar, keys):
                return np.asarray(array.compute())
        held = client.persist(array)
        for _ in as_completed(futures_of(held, client=client), loop=client.loop):
            bar.update()
        return np.asarray(client.compute(held).result())


@contextmanager
def _counting(bar: Any, keys: set[Any]) -> Iterator[None]:
    def done(key: Any, *_: Any) -> None:
        if key in keys:
            bar.update()

    with Callback(posttask=done):
        yield


def _flat(keys: Any) -> Iterator[Any]:
    if not isinstance(keys, list):
        yield keys
        return
    for key in keys:
        yield from _flat(key)
