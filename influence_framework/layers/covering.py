"""Which parameters have a gradient in matrix form, which have not, and why."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from influence_framework.data import Batch, take
from influence_framework.derivatives import gradients_of
from influence_framework.errors import InvalidInputError, NonFiniteError
from influence_framework.layers.forms import FORMS, LinearForm, MatrixForm, UnsupportedLayerError, form_of
from influence_framework.layers.statistics import Recorded
from influence_framework.layers.tape import Layer, record
from influence_framework.memory import is_out_of_memory
from influence_framework.parameters import ROOT_LAYER, ParameterSpace
from influence_framework.problem import Problem


@dataclass(frozen=True)
class Cover:
    """The layers in matrix form, and the parameters outside them.

    Attributes:
        layers: In the order of the model's modules. Their ``places`` count from the start of the
            operator's flat vector.
        uncovered: Parameter names, each with the reason why no layer has it.
    """

    layers: tuple[Layer, ...]
    uncovered: Mapping[str, str]

    @property
    def plain(self) -> bool:
        """Whether all parameters are those of linear modules that share none."""
        forms = all(len(layer.modules) == 1 and type(layer.form) is LinearForm for layer in self.layers)
        return forms and not self.uncovered


def cover(problem: Problem, parameters: ParameterSpace) -> Cover:
    """The layers that own some of ``parameters``, each confirmed on two samples.

    A layer counts only if what is computed from its inputs and output gradients equals the gradients that
    autograd gives: a model may use a weight behind its module's back, or a module on something other
    than samples.
    """
    layers, uncovered = _candidates(problem.model, parameters)
    layers, refuted = _known(problem, layers) or _confirmed(problem, parameters, layers)
    for layer in refuted:
        for name in layer.parts.values():
            uncovered[name] = (
                f"the model uses it in other ways than as the {_kind(problem.model, layer)} it is in"
            )
    kept = tuple(layer for layer in layers if layer not in refuted)
    return Cover(kept, {name: uncovered[name] for name in parameters.names if name in uncovered})


def _known(problem: Problem, layers: list[Layer]) -> tuple[list[Layer], list[Layer]] | None:
    """What is known of ``layers`` from all those of the model together; ``None`` where that does not settle it.

    Blocks are many: that each runs the model by itself is needed only where some layer does not hold.
    """
    if not problem.confirmed:
        whole = problem.whole or problem.parameters
        every, _ = _candidates(problem.model, whole)
        found, refuted = _confirmed(problem, whole, every)
        ways = {} if refuted else {_key(layer): layer.shared for layer in found}
        problem.confirmed.append(ways)
    (ways,) = problem.confirmed
    if not all(_key(layer) in ways for layer in layers):
        return None
    return [replace(layer, shared=ways[_key(layer)]) for layer in layers], []


def _key(layer: Layer) -> tuple[Hashable, ...]:
    """Its modules, in what form, and its parameters: a form that is registered later is confirmed anew."""
    return *((name, type(form)) for name, form in layer.modules.items()), *layer.parts.items()


def _confirmed(
    problem: Problem, parameters: ParameterSpace, layers: list[Layer]
) -> tuple[list[Layer], list[Layer]]:
    """The layers in the way of dealing with shared inputs that the model allows, and those that do not hold."""
    shared = _shared(problem, layers)
    if not shared:
        return layers, _refuted(problem, parameters, layers)
    best: tuple[list[Layer], list[Layer]] | None = None
    ways: tuple[Literal["expanded", "alone"], ...] = ("expanded", "alone")
    for way in ways:
        tried = [replace(x, shared={name: way for name in x.modules if name in shared}) for x in layers]
        try:
            refuted = _refuted(problem, parameters, tried)
        except (RuntimeError, IndexError) as failure:  # the model does not broadcast what was expanded
            if way == "alone" or is_out_of_memory(failure):
                raise
            continue
        if not refuted:
            return tried, []
        if best is None or len(refuted) < len(best[1]):
            best = tried, refuted
    assert best is not None
    return best


def _shared(problem: Problem, layers: list[Layer]) -> set[str]:
    """The modules that are applied to as much for two samples as for one."""
    names = dict.fromkeys(name for layer in layers for name in layer.modules)
    first = torch.zeros(1, dtype=torch.long, device=problem.parameters.device)
    one, two = (record(problem, names, take(problem.example, first.repeat(count))) for count in (1, 2))
    if [use.module for use in one.uses] != [use.module for use in two.uses]:
        return set()
    pairs = zip(one.uses, two.uses, strict=True)
    return {a.module for a, b in pairs if a.inputs.shape == b.inputs.shape}


def _kind(model: nn.Module, layer: Layer) -> str:
    return type(model.get_submodule(next(iter(layer.modules)))).__name__


def _candidates(model: nn.Module, parameters: ParameterSpace) -> tuple[list[Layer], dict[str, str]]:
    places = {
        name: torch.arange(*span, device=parameters.device).view(shape)
        for name, span, shape in zip(parameters.names, parameters.spans, parameters.shapes, strict=True)
    }
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    # Of each module: its own parameters that take part, by their names in it and in the model.
    owned = {
        module_name: {
            local: named[id(parameter)]
            for local, parameter in module.named_parameters(recurse=False)
            if named[id(parameter)] in places
        }
        for module_name, module in model.named_modules()
    }
    owners: dict[str, list[tuple[str, str]]] = {name: [] for name in places}
    for module_name, parts in owned.items():
        for local, name in parts.items():
            owners[name].append((module_name, local))
    layers: list[Layer] = []
    uncovered: dict[str, str] = {}
    for module_name, parts in owned.items():
        alone = {local: name for local, name in parts.items() if len(owners[name]) == 1}
        groups = [({module_name: alone}, module_name or ROOT_LAYER)] if alone else []
        for local, name in parts.items():
            # Parameters that several modules share are a layer of their own, listed with the first of them.
            if len(owners[name]) > 1 and owners[name][0] == (module_name, local):
                groups.append(({owner: {at: name} for owner, at in owners[name]}, name))
        for users, label in groups:
            names = {local: name for part in users.values() for local, name in part.items()}
            try:
                layers.append(Layer(label, _forms(model, users, places), names))
            except UnsupportedLayerError as error:
                uncovered.update(dict.fromkeys(names.values(), str(error)))
    return layers, uncovered


def _forms(
    model: nn.Module, users: Mapping[str, Mapping[str, str]], places: Mapping[str, Tensor]
) -> dict[str, MatrixForm]:
    forms = {}
    for module_name, parts in users.items():
        module = model.get_submodule(module_name)
        form = form_of(module, FORMS)
        if form is not None:
            forms[module_name] = form(module, {local: places[name] for local, name in parts.items()})
    if not forms:
        kinds = " and ".join(sorted({type(model.get_submodule(name)).__name__ for name in users}))
        raise UnsupportedLayerError(f"{kinds} has no matrix form")
    # Of an embedding and its transpose, a linear layer, the embedding's form is that of both.
    ordered = dict(sorted(forms.items(), key=lambda item: not item[1].one_hot))
    first, *others = ordered.values()
    if not all(_agrees(other, first) for other in others):
        kinds = " and ".join(sorted({type(model.get_submodule(name)).__name__ for name in users}))
        raise UnsupportedLayerError(f"it is shared by modules of different kinds ({kinds})")
    return ordered


def _agrees(form: MatrixForm, first: MatrixForm) -> bool:
    same = form.one_hot == first.one_hot
    return torch.equal(form.places if same else form.places.mT, first.places)


def _refuted(problem: Problem, parameters: ParameterSpace, layers: list[Layer]) -> list[Layer]:
    """The layers whose gradients are not what autograd finds, for a random cotangent of the outputs."""
    cotangents: list[Tensor] = []

    def rows(outputs: Tensor, _: Batch) -> Tensor:
        generator = torch.Generator(outputs.device).manual_seed(0)
        drawn = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        cotangents.append(drawn)
        return drawn[None]

    pair = take(problem.example, slice(0, 2))
    recorded = Recorded.of(problem, layers, pair, rows)
    leaves = parameters.leaves(problem.model)
    truth = []
    for i in range(problem.objective.size(pair)):
        sample = slice(i, i + 1)
        with torch.enable_grad():
            outputs = problem.outputs(leaves, take(pair, sample), twice=False)
        gradients = gradients_of(outputs, list(leaves.values()), cotangents[0][sample], keep_graph=False)
        truth.append(parameters.flatten(dict(zip(leaves, gradients, strict=True))))
    expected = torch.stack(truth)
    if not torch.isfinite(expected).all():
        raise NonFiniteError("A gradient of the model contains NaN or infinity: check the data and the model.")
    # The square root of the precision: far above rounding, far below a missing term.
    tolerance = problem.precision**0.5
    return [
        layer
        for layer in layers
        if not _agree(recorded, layer, expected[:, layer.form.places.to(expected.device)], tolerance)
    ]


def _agree(recorded: Recorded, layer: Layer, expected: Tensor, tolerance: float) -> bool:
    try:
        found = recorded.at(layer)
        gradients = torch.zeros_like(expected) if found is None else found.gradients()[0]
    except (RuntimeError, InvalidInputError) as failure:  # a module that was not applied to samples
        if is_out_of_memory(failure):
            raise
        return False
    if gradients.shape != expected.shape:
        return False
    error = torch.linalg.vector_norm((gradients - expected).double())
    return bool(error <= tolerance * torch.linalg.vector_norm(expected.double()))
