"""A forward pass in which every use of some layers is noted: the only place where hooks are put on a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_framework.data import Batch
from influence_framework.layers.forms import MatrixForm
from influence_framework.problem import Problem


@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters whose gradient has a matrix form, and the modules that use them.

    Attributes:
        name: Of the module; of the first, where several share the parameters.
        modules: Names of the modules that use the parameters, each with its form.
        parts: Name within the module to name in the model, of every parameter that takes part.
    """

    name: str
    modules: Mapping[str, MatrixForm]
    parts: Mapping[str, str]

    @property
    def form(self) -> MatrixForm:
        """The form of the first module; those that share its parameters have an equal one."""
        return next(iter(self.modules.values()))


@dataclass
class Use:
    """One use of a module in a forward pass.

    Attributes:
        module: Its name.
        inputs: What it was applied to, part of the graph.
        shift: Zeros added to its output; gradients with respect to them are output gradients.
    """

    module: str
    inputs: Tensor
    shift: Tensor


@dataclass
class Tape:
    """A forward pass with its uses noted.

    Attributes:
        outputs: The model's outputs, as a function of the shifts.
        uses: In the order in which the modules were applied.
    """

    outputs: Tensor
    uses: list[Use]

    @property
    def shifts(self) -> list[Tensor]:
        """The shift of every use."""
        return [use.shift for use in self.uses]


def record(problem: Problem, modules: Iterable[str], batch: Batch) -> Tape:
    """Run the model on ``batch`` with its parameters held constant and every use of ``modules`` noted."""
    uses: list[Use] = []
    with torch.enable_grad(), _noting(problem.model, modules, uses):
        outputs = problem.outputs({}, batch)
    return Tape(outputs, uses)


@contextmanager
def _noting(model: nn.Module, names: Iterable[str], uses: list[Use]) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            (inputs, *_) = (*args, *kwargs.values())
            shift = torch.zeros_like(output, requires_grad=True)
            uses.append(Use(name, inputs, shift))
            return output + shift

        return hook

    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [modules[name].register_forward_hook(hook_for(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
