"""A model as a function of its parameters and inputs, twice differentiable where its operations are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

CHECKPOINTED = "gradient_checkpointing"
"""The attribute by which modules of ``transformers`` say that they checkpoint."""


def as_function(
    model: nn.Module, parameters: Mapping[str, Tensor], *, twice: bool = True
) -> Callable[..., Any]:
    """The model as a function of its inputs, with ``parameters`` in place of its own; it is left as it is.

    Without ``twice`` it may be differentiated once at most, by the backward pass, and attention takes the
    kernels that it takes in training.
    """
    merged = {name: p.detach() for name, p in model.named_parameters()} | dict(parameters)
    # Copies, for the modules that write to their buffers.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.enabled and not recurrent

    def call(*args: Any, **kwargs: Any) -> Any:
        # Neither the fused attention kernels nor cuDNN's recurrent ones have a second derivative.
        with (
            sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(),
            torch.backends.cudnn.flags(enabled=cudnn),
            _activations_kept(model),
        ):
            return functional_call(model, {**buffers, **merged}, args, kwargs)

    return call


@contextmanager
def _activations_kept(model: nn.Module) -> Iterator[None]:
    """Switch off the checkpointing of ``transformers`` meanwhile.

    It computes activations again in the backward pass, where these parameters are no longer in place.
    """
    checkpointed = [m for m in model.modules() if m.training and getattr(m, CHECKPOINTED, False)]
    for module in checkpointed:
        setattr(module, CHECKPOINTED, False)
    try:
        yield
    finally:
        for module in checkpointed:
            setattr(module, CHECKPOINTED, True)
