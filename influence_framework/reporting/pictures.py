"""Pictures as small files inside a page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from influence_framework.errors import InvalidInputError

if TYPE_CHECKING:
    from PIL import Image

LARGEST = 96
"""Pixels of the longer side at most."""

LOSSLESS = 32
"""Up to this many pixels of the longer side every one of them is kept as it is."""

CHANNELS = (1, 3, 4)


def is_picture(thing: Any) -> bool:
    """Whether ``thing`` can be shown as a picture: a PIL image, ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``."""
    if _is_pil(thing):
        return True
    shape = tuple(getattr(thing, "shape", ()))
    return len(shape) == 2 or (len(shape) == 3 and (shape[0] in CHANNELS or shape[2] in CHANNELS))


def picture(thing: Any) -> str:
    """The picture, made small, as a data URI of WebP.

    Args:
        thing: A PIL image; or a tensor or array ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` with 1, 3 or 4
            channels, of whole numbers in [0, 255] or of floats. Floats in [0, 1] are shown as they are, others
            spread from their smallest to their largest.

    Raises:
        InvalidInputError: It is none of these.
    """
    image = thing.copy() if _is_pil(thing) else _image(thing)
    image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(buffer, format="WEBP", lossless=True)
    else:
        image.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _is_pil(thing: Any) -> bool:
    return hasattr(thing, "convert") and hasattr(thing, "thumbnail")


def _image(thing: Any) -> Image.Image:
    from PIL import Image

    pixels = thing.detach().cpu().float().numpy() if isinstance(thing, Tensor) else np.asarray(thing)
    whole = not (thing.is_floating_point() if isinstance(thing, Tensor) else pixels.dtype.kind == "f")
    shape = pixels.shape
    if pixels.ndim == 3 and shape[0] in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if not is_picture(pixels) or not pixels.size:
        raise InvalidInputError(
            f"Expected a picture of shape (H, W), (C, H, W) or (H, W, C) with C = 1, 3 or 4, got {shape}."
        )
    levels = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0) / (255 if whole else 1)
    low, high = levels.min(), levels.max()
    if low < 0 or high > 1:
        levels = (levels - low) / (high - low) if high > low else np.zeros_like(levels)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[:, :, 0]
    return Image.fromarray((255 * levels).round().astype(np.uint8))
