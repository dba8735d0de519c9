"""Which versions computed what is written to disk."""

from __future__ import annotations

from importlib import metadata


def versions(*names: str) -> dict[str, str]:
    """Of the distributions that are installed, of core, PyTorch, NumPy and ``names``."""
    found = {}
    for name in ("influence-framework", "torch", "numpy", *names):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
