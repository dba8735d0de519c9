"""Derivatives by autograd: ``Jᵀ u``, ``J v``, and whether a model has second ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_framework.memory import is_out_of_memory


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], rows: Sequence[Tensor]
) -> list[Tensor | None]:
    """``Jᵀ u`` for ``k`` stacked cotangents.

    ``rows[j]`` is ``(k, *outputs[j].shape)``; the results are ``(k, *inputs[i].shape)``.

    Outputs through which no gradient flows, and inputs that none reaches, come out as ``None``.
    """
    live = [(o, r) for o, r in zip(outputs, rows, strict=True) if o.requires_grad]
    if not live:
        return [None] * len(inputs)
    count = live[0][1].shape[0]

    def backward(cotangents: list[Tensor], *, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            [output for output, _ in live],
            inputs,
            grad_outputs=cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    if count > 1:
        return list(backward([row for _, row in live], batched=True))
    single = backward([row[0] for _, row in live], batched=False)
    return [None if gradient is None else gradient[None] for gradient in single]


CACHE_BYTES = 24 * 2**20
"""Working set up to which several cotangents at a time are faster than one after the other on a CPU."""


def rows_at_once(device: torch.device, row_bytes: int, budget: int) -> int:
    """How many cotangents, each of which takes ``row_bytes``, to pull back together."""
    if device.type != "cpu":
        return max(1, budget // row_bytes)
    together = min(CACHE_BYTES, budget) // row_bytes
    # Batching a handful of rows gains less than the layouts that it forces cost.
    return together if together >= 8 else 1


class PushForward:
    """``v ↦ J v`` with ``J`` the Jacobian of ``outputs`` with respect to ``leaves``, from reverse mode alone.

    ``w ↦ Jᵀ w`` is linear, and pulling ``v`` back through its graph gives ``J v``. That needs no
    forward-mode rules and shares the one forward pass.
    """

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor]) -> None:
        self._cotangent = torch.zeros_like(outputs, requires_grad=True)
        self._transposed = gradients_of(outputs, leaves, self._cotangent)

    def __call__(self, tangents: Sequence[Tensor]) -> Tensor | None:
        """``(k, *outputs.shape)`` for ``k`` stacked tangents; ``None`` where ``J`` is zero."""
        return pull_back(self._transposed, [self._cotangent], tangents)[0]


def has_second_derivatives(outputs: Tensor, losses: Tensor, leaves: Sequence[Tensor], precision: float) -> bool:
    """Whether :class:`PushForward` is the adjoint of the backward pass, of the outputs and of the losses.

    A ``torch.autograd.Function`` with ``once_differentiable`` cuts its backward pass off from what it was
    computed from, so that derivatives of it are zero, or parts of them are missing, and nothing is raised.
    ``precision`` is that of the model's own arithmetic.
    """
    try:
        of_outputs, scale = _adjoint_gap(outputs, leaves)
        of_losses, loss_scale = _adjoint_gap(losses, leaves)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    # Far above rounding; a part that is missing from J moves the gap by about its own norm. Where a model
    # fits its data, the gradients of losses are rounding errors of those of outputs. Gradients with NaN or
    # infinity in them are not for this test to report.
    wrong = of_outputs > precision**0.5 * scale
    return not wrong and not of_losses > precision**0.5 * loss_scale + 64 * precision * scale


def _adjoint_gap(outputs: Tensor, leaves: Sequence[Tensor]) -> tuple[float, float]:
    """``|w·(J v) - (Jᵀw)·v|`` for random ``w`` and ``v``, and ``‖Jᵀw‖``."""
    generator = torch.Generator(outputs.device).manual_seed(0)

    def random(like: Tensor) -> Tensor:
        # Drawn where it is needed: a batch of a language model returns hundreds of millions of numbers.
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=outputs.device)

    cotangent, tangents = random(outputs), [random(leaf) for leaf in leaves]
    transposed = [gradient.detach().double() for gradient in gradients_of(outputs, leaves, cotangent)]
    pushed = PushForward(outputs, leaves)([tangent[None] for tangent in tangents])
    forward = 0.0 if pushed is None else _inner(pushed[0].detach(), cotangent)
    backward = sum(float((one * v.double()).sum()) for one, v in zip(transposed, tangents, strict=True))
    return abs(forward - backward), sum(float(one.square().sum()) for one in transposed) ** 0.5


def _inner(left: Tensor, right: Tensor) -> float:
    """``Σ left·right`` in double precision, without a copy of either in it."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def gradients_of(
    output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor | None = None, *, keep_graph: bool = True
) -> list[Tensor]:
    """Gradients of ``output`` (of its product with ``cotangent``), zero for inputs it does not depend on.

    With ``keep_graph`` they can be differentiated again.
    """
    if not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(torch.autograd.grad(output, inputs, cotangent, create_graph=keep_graph, materialize_grads=True))
