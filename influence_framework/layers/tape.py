"""A forward pass in which every use of some layers is noted: the only place where hooks are put on a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

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
        shared: Of its modules, those that the model applies to something that all samples have in common, such
            as positions, and whose output it broadcasts: the output is ``"expanded"`` over the samples, or,
            where the model does not allow that, every sample goes through the model ``"alone"``.
    """

    name: str
    modules: Mapping[str, MatrixForm]
    parts: Mapping[str, str]
    shared: Mapping[str, Literal["expanded", "alone"]] = field(default_factory=dict)

    @property
    def form(self) -> MatrixForm:
        """The form of the first module; those that share its parameters have an equal or the transposed one."""
        return next(iter(self.modules.values()))

    @property
    def transposed(self) -> bool:
        """Whether one of its modules is an embedding and another the linear layer that is its transpose."""
        return any(form.one_hot != self.form.one_hot for form in self.modules.values())


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


def record(
    problem: Problem,
    modules: Iterable[str],
    batch: Batch,
    expanded: Collection[str] = (),
    leaves: Mapping[str, Tensor] | None = None,
    *,
    twice: bool = True,
) -> Tape:
    """Run the model on ``batch`` with every use of ``modules`` noted; parameters but ``leaves`` are constant.

    The outputs may be differentiated ``twice``, or once at most, by the backward pass. Inputs and outputs of
    modules that are ``expanded`` get the samples as their first dimension.
    """
    uses: list[Use] = []
    samples = dict.fromkeys(expanded, problem.objective.size(batch))
    with torch.enable_grad(), _noting(problem.model, modules, uses, samples):
        outputs = problem.outputs(dict(leaves or {}), batch, twice=twice)
    return Tape(outputs, uses)


@contextmanager
def _noting(
    model: nn.Module, names: Iterable[str], uses: list[Use], samples: Mapping[str, int]
) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            (inputs, *_) = (*args, *kwargs.values())
            if name in samples:
                inputs, output = (of_samples(part, samples[name]) for part in (inputs, output))
            # One number of memory: the zeros of all outputs would be written, read and held.
            with torch.enable_grad():
                shift = output.new_zeros((), requires_grad=True).expand(output.shape)
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


def of_samples(values: Tensor, count: int) -> Tensor:
    """What all samples have in common, ``(1, …)`` or without their dimension, for each of ``count`` samples."""
    with_samples = values if values.ndim > 1 and values.shape[0] == 1 else values[None]
    return with_samples.expand(count, *with_samples.shape[1:])
