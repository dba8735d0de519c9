"""Where eigenbases are kept between uses: on the device, in host memory, or in files that are mapped."""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.errors import InvalidInputError
from influence_framework.persistence.files import mapped, safetensors_torch
from influence_framework_ekfac.statistics import Eigenbasis

DEVICE, HOST = "device", "host"
"""The storages that are no folder."""

ROUNDED = (None, torch.bfloat16, torch.float32, torch.float64)
"""What bases and factors may be rounded to; ``None``: nothing. Half precision has no room for eigenvalues."""


def check_folder(path: str) -> None:
    """Raise :class:`InvalidInputError` unless ``path`` is a folder, or nothing yet."""
    if Path(path).exists() and not Path(path).is_dir():
        raise InvalidInputError(
            f"storage is 'device', 'host' or a folder's path; {path!r} is a file: choose another."
        )


class _File:
    """One basis in a file of its own, removed with the last inverse of this process that refers to it."""

    def __init__(self, folder: str, tensors: Mapping[str, Tensor]) -> None:
        safetensors = safetensors_torch()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                f"The folder {folder} given as storage cannot be made ({error}): make it, or choose another."
            ) from error
        self.path = str(Path(folder).absolute() / f"{uuid.uuid4().hex}.safetensors")
        unfinished = f"{self.path}.new"
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        try:
            safetensors.save_file(
                {name: part.detach().cpu().contiguous() for name, part in tensors.items()}, unfinished
            )
            Path(unfinished).replace(self.path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
        weakref.finalize(self, _remove, self.path, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process reads the file and leaves it where it is.
        return _seen, (self.path, self.nbytes)

    def tensor(self, name: str) -> Tensor | None:
        """One of the tensors, mapped; ``None`` where there is none of that name."""
        if not os.path.exists(self.path):
            raise InvalidInputError(
                f"{self.path}, which holds part of a fitted inverse, is gone: leave the folder given as "
                "storage alone while the model is in use, and fit again."
            )
        return mapped(self.path, name)


def _remove(path: str, owner: int) -> None:
    # A process that was forked off has a copy of the inverse, and not of the file.
    if os.getpid() == owner:
        Path(path).unlink(missing_ok=True)


def _seen(path: str, nbytes: int) -> _File:
    file = _File.__new__(_File)
    file.path, file.nbytes = path, nbytes
    return file


@dataclass(frozen=True, eq=False)
class Stored:
    """An eigenbasis kept elsewhere, or in another precision, than where it is worked with.

    :meth:`load` brings in all of it; nothing of that is held here.

    Attributes:
        kept: By name: on the device or in host memory; or a file.
        shape: ``(g, o, e)``.
        extremes: Smallest and largest of ``Λ``.
        dtype: Of the eigenvectors that are worked with.
        precise: Of ``Λ`` that is worked with.
        device: Where that is done.
        follows: Whether what is kept is on that device too.
    """

    kept: Mapping[str, Tensor] | _File
    shape: tuple[int, int, int]
    extremes: tuple[float, float]
    dtype: torch.dtype
    precise: torch.dtype
    device: torch.device
    follows: bool

    def load(self) -> Eigenbasis:
        """The basis, where and in what it is worked with."""
        outputs = self._part("outputs", self.dtype)
        assert outputs is not None
        return Eigenbasis(outputs, self._part("inputs", self.dtype), self.values)

    @property
    def values(self) -> Float[Tensor, "g o e"]:
        """``Λ`` alone."""
        values = self._part("values", self.precise)
        assert values is not None
        return values

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, as it is kept."""
        names = ("outputs", "inputs", "values")
        found = {name: self._kept(name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Memory or disk that is taken where the basis is kept."""
        return self.kept.nbytes if isinstance(self.kept, _File) else sum(t.nbytes for t in self.kept.values())

    def to(self, device: torch.device) -> Stored:
        """Worked with on another device."""
        if self.follows and not isinstance(self.kept, _File):
            moved = {name: part.to(device) for name, part in self.kept.items()}
            return replace(self, kept=moved, device=device)
        return replace(self, device=device)

    def _kept(self, name: str) -> Tensor | None:
        return self.kept.tensor(name) if isinstance(self.kept, _File) else self.kept.get(name)

    def _part(self, name: str, dtype: torch.dtype) -> Tensor | None:
        found = self._kept(name)
        if found is None:
            return None
        # Fewer bytes travel, and the device converts them, in this order.
        moved = found.to(self.device, non_blocking=True).to(dtype)
        # A mapped file is aligned in its own way, and products with it may be rounded otherwise.
        return moved.clone() if moved is found and isinstance(self.kept, _File) else moved


@dataclass(frozen=True)
class Shelf:
    """How eigenbases are kept.

    Attributes:
        storage: ``"device"``, ``"host"``, or a folder for files.
        dtype: What they are rounded to; ``None``: nothing.
    """

    storage: str
    dtype: torch.dtype | None

    def keep(
        self, basis: Eigenbasis, work: torch.dtype, precise: torch.dtype, device: torch.device
    ) -> Eigenbasis | Stored:
        """``basis`` put away, or what stays as it is.

        Args:
            basis: Anywhere and in any precision.
            work: What its eigenvectors are worked with in.
            precise: What its eigenvalues are worked with in.
            device: Where it is worked with.
        """
        given = basis.tensors()
        rounded = given if self.dtype is None else {name: part.to(self.dtype) for name, part in given.items()}
        wanted = {"outputs": work, "inputs": work, "values": precise}
        if self.storage == DEVICE and all(rounded[name].dtype is wanted[name] for name in rounded):
            return Eigenbasis(rounded["outputs"], rounded.get("inputs"), rounded["values"])
        extremes = Eigenbasis(basis.outputs, basis.inputs, rounded["values"]).extremes
        kept: Mapping[str, Tensor] | _File
        if self.storage == DEVICE:
            kept = rounded
        elif self.storage == HOST:
            kept = {name: _on_host(part) for name, part in rounded.items()}
        else:
            kept = _File(self.storage, rounded)
        return Stored(kept, basis.shape, extremes, work, precise, device, self.storage == DEVICE)


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    # From locked pages the way back takes a third of the time.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
