"""What tells one model, one data set and one composition from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_framework.attribution.blocks import Identifiers, blocks
from influence_framework.data import Batch, leaves
from influence_framework.errors import InvalidInputError
from influence_framework.fingerprints import raw

READ = 1024
"""Samples read at a time."""


class Digest:
    """A hash of samples that does not depend on how they are cut into batches."""

    def __init__(self) -> None:
        self._parts: list[hashlib.blake2b] = []

    def update(self, batch: Batch) -> None:
        """Add the samples of ``batch``."""
        tensors = list(leaves(batch))
        while len(self._parts) < len(tensors):
            self._parts.append(hashlib.blake2b(digest_size=16))
        for part, tensor in zip(self._parts, tensors, strict=False):
            part.update(f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode() if tensor.shape[0] else b"")
            part.update(raw(tensor))

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        whole = hashlib.blake2b(digest_size=16)
        for part in self._parts:
            whole.update(part.digest())
        return whole.hexdigest()


@dataclass(frozen=True)
class Survey:
    """What one pass over a loader tells.

    Attributes:
        ids: Identifiers of all samples, in order.
        digest: Fingerprint of samples and identifiers.
    """

    ids: Identifiers
    digest: str

    @classmethod
    def of(cls, loader: Iterable[Any], what: str) -> Survey:
        """Read ``loader`` once, without the model.

        Raises:
            InvalidInputError: No sample; or batches that cannot be worked with.
        """
        digest, ids = Digest(), []
        for block in blocks(loader, READ):
            for batch in block.batches:
                digest.update(batch)
            ids.append(block.ids)
        if not ids:
            raise InvalidInputError(f"The loader of the {what} yielded no batch.")
        joined = np.concatenate(ids)
        whole = hashlib.blake2b(digest.hexdigest().encode(), digest_size=16)
        whole.update(joined.tobytes() if joined.dtype.kind != "U" else "\n".join(joined.tolist()).encode())
        return cls(joined, whole.hexdigest())

    def check(self, start: int, ids: Identifiers, what: str) -> None:
        """Raise unless the samples from ``start`` on are those of the first pass."""
        if not np.array_equal(self.ids[start : start + len(ids)], ids):
            raise InvalidInputError(
                f"The loader of the {what} yields another order in every pass: pass shuffle=False, or a "
                "generator with a fixed seed."
            )
