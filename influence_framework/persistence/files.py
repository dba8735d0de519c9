"""A folder with one manifest, which is replaced at once, and files that are named by their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_framework.errors import InvalidInputError

FORMAT = "influence_framework.model"
VERSION = 1
MANIFEST = "model.json"
CONTENT = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.new")
EXTRA = "pip install 'influence-framework[save]'"

Path_ = str | os.PathLike[str]


def check_writable(folder: Path) -> None:
    """Raise :class:`InvalidInputError` unless ``folder`` is missing, empty, or a saved model.

    What an interrupted save left is a saved model too.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file: choose another path for the folder.")
    names = {path.name for path in folder.iterdir()}
    strange = sorted(name for name in names if not (CONTENT.fullmatch(name) or UNFINISHED.fullmatch(name)))
    if strange == [MANIFEST]:
        _body(folder)
    elif strange:
        raise InvalidInputError(
            f"{folder} holds something else than a saved model ({', '.join(strange[:4])}): choose another path."
        )


def write(folder: Path, body: Mapping[str, Any], parts: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Write tensors and manifest so that at every moment the folder holds either the earlier model or this one.

    Files carry new names and are synchronised to disk before the manifest that names them takes the place of
    the earlier one, in one step; only then are those of the earlier one removed.
    """
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = {part: _write_tensors(folder, tensors) for part, tensors in parts}
    whole = {"format": FORMAT, "version": VERSION, **body, "parts": written}
    text = json.dumps({**whole, "checksum": _checksum(whole)}, indent=1, allow_nan=False)
    temporary = folder / f".{uuid.uuid4().hex}.new"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    _synchronise(folder)
    kept = {entry["file"] for entry in written.values()}
    for path in folder.iterdir():
        if path.name not in kept and (CONTENT.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)):
            path.unlink()


def read(folder: Path) -> dict[str, Any]:
    """The manifest, after it and every file that it names were found to be whole.

    Raises:
        InvalidInputError: What is missing, damaged, foreign or of a later version.
    """
    body = _body(folder)
    if body.pop("checksum", None) != _checksum(body):
        raise InvalidInputError(
            f"{folder / MANIFEST} is damaged: its checksum does not hold. Restore or refit."
        )
    for entry in body["parts"].values():
        name = entry["file"]
        # Nothing but a name of this form is looked for, and only in the folder itself.
        if not isinstance(name, str) or not CONTENT.fullmatch(name):
            raise InvalidInputError(
                f"{folder / MANIFEST} names the file {name!r}, which is none of a saved model."
            )
        path = folder / name
        if not path.is_file():
            raise InvalidInputError(f"{path} is missing: the folder was copied or restored only in part.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise InvalidInputError(f"{path} is damaged: it has {size} bytes in place of {entry['bytes']}.")
        if _digest(path) != name.partition(".")[0]:
            raise InvalidInputError(f"{path} is damaged: its checksum does not hold.")
    return body


def tensors(folder: Path, entry: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of one part, each with the order of dimensions in memory that it had."""
    safetensors = safetensors_torch()
    stored = safetensors.load_file(folder / entry["file"])
    laid_out: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    found = {}
    for name, (of, order) in entry["tensors"].items():
        key = of, tuple(order)
        if key not in laid_out:
            # A clone: a file in memory is aligned otherwise, and its products may be rounded otherwise.
            plain = stored[of].clone().to(device)
            laid_out[key] = plain.permute([order.index(d) for d in range(plain.ndim)])
        found[name] = laid_out[key]
    return found


def mapped(path: Path_, name: str) -> Tensor | None:
    """One tensor of a file, which is mapped: its pages are read where they are used; ``None`` without it."""
    safetensors_torch()
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        found: Tensor | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
    return found


def _body(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"is no saved model: it has no {MANIFEST}"
        raise InvalidInputError(f"{folder} {what}, or its first save was interrupted.")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is damaged and cannot be read: {error}.") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise InvalidInputError(f"{path} is of something else than a model saved by influence_framework.")
    if not isinstance(body.get("version"), int) or body["version"] > VERSION:
        raise InvalidInputError(
            f"{path} has version {body.get('version')!r} of the format, and this is for {VERSION}: "
            "upgrade influence-framework."
        )
    return body


def _checksum(body: Mapping[str, Any]) -> str:
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(plain.encode(), digest_size=32).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _write_tensors(folder: Path, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Each once, however many names it has, and in the order of dimensions in which it lies in memory."""
    safetensors = safetensors_torch()
    stored: dict[str, Tensor] = {}
    places: dict[str, tuple[str, list[int]]] = {}
    first: dict[Any, str] = {}
    held: set[int] = set()
    for name, tensor in named.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        of = first.setdefault(key, name)
        if of == name:
            order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
            plain = tensor.detach().permute(order)
            if not plain.is_contiguous():
                order, plain = list(range(tensor.ndim)), tensor.detach()
            memory = plain.untyped_storage().data_ptr()
            # Whatever else lies in the same memory is written by itself.
            alone = plain.is_contiguous() and memory not in held
            stored[name] = plain if alone else plain.clone(memory_format=torch.contiguous_format)
            held.add(memory)
            places[name] = (name, order)
        else:
            places[name] = places[of]
    temporary = folder / f".{uuid.uuid4().hex}.new"
    safetensors.save_file(stored, temporary)
    _synchronise(temporary)
    name = f"{_digest(temporary)}.safetensors"
    size = temporary.stat().st_size
    temporary.replace(folder / name)
    return {"file": name, "bytes": size, "tensors": places}


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_torch() -> Any:
    """The module ``safetensors.torch``, which is an extra; an error that names it where it is missing."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Saving and loading need safetensors: {EXTRA}", name="safetensors"
        ) from error
    return safetensors.torch
