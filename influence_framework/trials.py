"""What a trial of a model on a few samples tells."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from influence_framework.errors import InvalidInputError
from influence_framework.memory import is_out_of_memory


def check_one_sample_at_a_time(outputs: Callable[[slice], Tensor], size: int, precision: float) -> None:
    """Raise unless a sample's output depends on that sample alone.

    Args:
        outputs: From some of the samples to the model's outputs for them.
        size: Their number.
        precision: ``eps`` of the coarsest dtype that the model computes in.

    Raises:
        InvalidInputError: Samples are mixed, or outputs are random.
    """
    every, first, half = slice(0, size), slice(0, 1), slice(size // 2, size)
    once, again, alone, rest = (outputs(part) for part in (every, every, first, half))
    # Far above rounding, which differs with the size of the batch.
    tolerance = precision**0.5 * once.abs().max()
    if (once - again).abs().max() > tolerance:
        raise InvalidInputError(
            "Two forward passes over the same batch gave different outputs: the model draws random "
            "numbers. Call model.eval(), and switch off functional dropout."
        )
    if alone.shape != once[first].shape:
        raise InvalidInputError(
            f"The model returned shape {tuple(once.shape)} for a batch and {tuple(alone.shape)} for its "
            "first sample alone: it must keep the first dimension. Use squeeze(-1), not squeeze()."
        )
    # A recurrent layer that takes samples for time steps leaves the first sample alone.
    if (once[first] - alone).abs().max() > tolerance or (once[half] - rest).abs().max() > tolerance:
        raise InvalidInputError(
            "The output for a sample differs with the other samples of its batch, so no sample has a loss "
            "of its own: use running statistics, batch_first=True in recurrent layers and attention, or "
            "whatever else keeps samples apart."
        )


def saved_by_autograd(work: Callable[[], object], model: nn.Module) -> tuple[int, float] | None:
    """Bytes that autograd keeps of ``work``, parameters of ``model`` left out, and the coarsest ``eps`` there.

    ``None`` where it cannot be told.
    """
    seen: dict[int, int] = {}
    precisions = {0.0}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        if tensor.is_floating_point():
            precisions.add(torch.finfo(tensor.dtype).eps)
        return tensor

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            work()
    except RuntimeError as error:  # torch.func inside the model does not allow these hooks
        if is_out_of_memory(error):
            raise
        return None
    for tensor in model.parameters():
        seen.pop(tensor.data_ptr(), None)
    return sum(seen.values()), max(precisions)
