"""The patches of its input that a convolution multiplies with its weight."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


def padded_patches(
    module: Convolution, x: Float[Tensor, "n c *in_size"]
) -> Float[Tensor, "n c *out_and_kernel"]:
    """What each output pixel sees, ``(n, c, *out, *kernel)``: views of ``x``, or of a padded copy of it."""
    margins = _margins(module)
    if any(margins):
        x = nn.functional.pad(
            x, margins, mode="constant" if module.padding_mode == "zeros" else module.padding_mode
        )
    options = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(options, start=2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return x


def _margins(module: Convolution) -> list[int]:
    """Pixels added before and after each axis, last axis first; ``"same"`` puts an odd one after."""
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [] if isinstance(module.padding, str) else [(width, width) for width in module.padding]
    return [width for side in reversed(sides) for width in side]


def patch_rows(
    patches: Float[Tensor, "n c *out_and_kernel"], groups: int, *, append_one: bool
) -> Float[Tensor, "g n t e"]:
    """``(n, c, *out, *kernel)`` as one row for each group, sample and pixel, in the order of the weight.

    The memory has pixels innermost, as images and output gradients have them: the only copy is then several
    times faster than patch by patch, and joining samples with pixels, or groups with entries, takes none.
    """
    dims = patches.ndim // 2 - 1
    grouped = patches.unflatten(1, (groups, -1))
    grouped = grouped.permute(1, 2, *range(3 + dims, 3 + 2 * dims), 0, *range(3, 3 + dims))
    entry = grouped.shape[1 : 2 + dims]  # channels of the group, *kernel
    result = patches.new_empty(groups, entry.numel() + append_one, *grouped.shape[2 + dims :])
    result[:, : entry.numel()].unflatten(1, entry).copy_(grouped)
    result[:, entry.numel() :] = 1
    return result.flatten(3).permute(0, 2, 3, 1)
