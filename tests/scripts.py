"""The scripts under ``examples/`` as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.distributions import ROOT


def example(name: str) -> ModuleType:
    """The script of an example, imported and not run."""
    path = ROOT / "examples" / name / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Its dataclasses look themselves up there.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
