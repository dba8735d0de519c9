"""Moving fitted objects between devices."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn


def to_device(thing: Any, device: torch.device) -> Any:
    """``thing`` with every tensor in it on ``device``.

    Tensors, modules (moved in place, as ``nn.Module.to`` does) and whatever else has a ``to`` are moved
    by it; dataclasses, mappings, lists and tuples part by part; everything else is kept as it is. What is
    shared within ``thing`` is moved once and shared in the result.
    """
    # Of tensors on "cuda" the device is "cuda:0", and the two are not equal.
    return _moved(thing, torch.empty(0, device=device).device, {})


def _moved(thing: Any, device: torch.device, seen: dict[int, Any]) -> Any:
    if id(thing) not in seen:
        seen[id(thing)] = _move(thing, device, seen)
    return seen[id(thing)]


def _move(thing: Any, device: torch.device, seen: dict[int, Any]) -> Any:
    if isinstance(thing, torch.device):
        return device
    if isinstance(thing, torch.Tensor | nn.Module) or (
        hasattr(thing, "to") and not isinstance(thing, type) and not _is_loader(thing)
    ):
        return thing.to(device)
    if is_dataclass(thing) and not isinstance(thing, type):
        moved = copy.copy(thing)
        for part in fields(thing):
            object.__setattr__(moved, part.name, _moved(getattr(thing, part.name), device, seen))
        return moved
    if isinstance(thing, MutableMapping):
        mapping = copy.copy(thing)
        mapping.update({key: _moved(value, device, seen) for key, value in thing.items()})
        return mapping
    if type(thing) in (list, tuple):
        return type(thing)(_moved(value, device, seen) for value in thing)
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(_moved(value, device, seen) for value in thing))
    return thing


def _is_loader(thing: Any) -> bool:
    return isinstance(thing, torch.utils.data.DataLoader)
