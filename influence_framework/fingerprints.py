"""Hashes of tensors, which tell one model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's entries, row by row; of one in the CPU's memory, without a copy."""
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    # What is conjugate or negative only by a flag has other bytes than it has entries.
    entries: Any = plain.resolve_conj().resolve_neg().view(torch.uint8).numpy()
    return memoryview(entries)


def fingerprint(named: Mapping[str, Tensor]) -> str:
    """Of named tensors, such as the parameters and buffers of a model: 32 hexadecimal digits."""
    whole = hashlib.blake2b(digest_size=16)
    for name, tensor in named.items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(raw(tensor))
    return whole.hexdigest()
