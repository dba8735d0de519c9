"""What a fit or a score could leave behind on a model and in the random states."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, tuple(keys), *rest, tuple(torch.get_rng_state().tolist())


def hooks(model: nn.Module) -> int:
    """Hooks of any kind on any module or parameter."""
    stores = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
    on_modules = sum(len(getattr(module, store)) for module in model.modules() for store in stores)
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def trace(model: nn.Module) -> dict[str, Any]:
    """All that could be left on a model."""
    return {
        "grad": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version, b.clone()) for name, b in model.named_buffers()},
        "train mode": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": hooks(model),
        "random states": random_states(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, expected in before.items():
        # Tensors inside: compared by their values, not by ==.
        assert repr(expected) == repr(after[what]), f"{what} changed"
