"""What a method must leave as it was: the global random states, and the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import jaxtyping
import numpy as np
import torch
from torch import nn

from influence_framework.data import random_state


def changed_random_states(
    action: Callable[[], object], of: Collection[str] = ("Python", "NumPy", "torch")
) -> Iterator[str]:
    """A line where ``action`` changes a global random state, of those that are looked at."""
    with _without_runtime_type_checks():
        before = random_state()
        action()
        after = random_state()
    same = {
        "Python": before.of_python == after.of_python,
        "NumPy": all(np.array_equal(a, b) for a, b in zip(before.of_numpy, after.of_numpy, strict=True)),
        "torch": torch.equal(before.of_torch, after.of_torch),
    }
    if changed := [name for name in of if not same[name]]:
        yield f"changed: {', '.join(changed)}"


@contextmanager
def _without_runtime_type_checks() -> Iterator[None]:
    """Checkers behind jaxtyping draw from Python's generator: they look at one element of a list at random."""
    disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", disabled)


def changed_model(model: nn.Module, action: Callable[[], object]) -> Iterator[str]:
    """A line for each parameter, gradient, buffer, mode or hook of ``model`` that ``action`` changes."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    action()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, kept[name]):
            yield f"{name} was changed"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None or not parameter.requires_grad:
            yield f"{name} has {'a gradient' if parameter.grad is not None else 'requires_grad=False'}"
    if [module.training for module in model.modules()] != modes:
        yield "the mode (train or eval) of a module was changed"
    for name, module in model.named_modules():
        if any(value for key, value in vars(module).items() if key.endswith("_hooks")):
            yield f"a hook was left on {name or 'the model'}"
