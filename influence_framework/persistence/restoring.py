"""From a folder to a fitted model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_framework.checks import check_model, model_state
from influence_framework.data import Batch, Fingerprint, LeftOut, random_state, random_state_kept
from influence_framework.errors import InvalidInputError
from influence_framework.fitted import Fitted, FittedBlock
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective, SupervisedObjective
from influence_framework.operators import require_capabilities
from influence_framework.parameters import Blocks, ParameterSpace
from influence_framework.persistence import files
from influence_framework.persistence.codec import Decoder
from influence_framework.persistence.saving import MEASURED, described, probe
from influence_framework.persistence.states import restored
from influence_framework.preflight import BlockPreflight, Preflight
from influence_framework.problem import Problem
from influence_framework.protocols import SavedState
from influence_framework.registry import Registry, default_registry
from influence_framework.regularization import BlockScale


def load(
    folder: files.Path_,
    model: nn.Module,
    loss: Loss | Objective,
    data: Iterable[Batch] | None = None,
    *,
    registry: Registry = default_registry,
) -> TorchInfluenceFunctionModel:
    """A fitted model from a folder that ``model.save`` wrote, without fitting again.

    Factors and scores are those of the model that was saved, on the same CPU to the last bit. Before anything
    is built, the folder is checked to be whole, and ``model`` to have the parameters and buffers of the fit.
    Nothing in the folder is code: solvers and sources are looked up by name among those installed.

    Args:
        folder: What ``save`` was given.
        model: The trained model, with the same parameters, on whatever device.
        loss: The loss or objective that the model was fitted with; checked on two samples in the folder.
        data: The training data, checked to be what the model was fitted to, in whatever order. Needed where
            every solve multiplies with the curvature (``cg``, ``jacobi``, ``lissa``, ``refine``); elsewhere
            only for bounds, residuals and what is fitted again.
        registry: Where names are looked up.

    Raises:
        InvalidInputError: The folder is damaged, foreign or of a later version; model, loss or data differ from
            those of the fit, or data is left out where it is needed.
        UnknownMethodError: A solver or source is not installed.
        ModuleNotFoundError: safetensors is not installed.
    """
    path = Path(folder)
    body = files.read(path)
    check_model(model)
    parameters = ParameterSpace.of(model)
    with _understood(path):
        decoder = Decoder(
            registry, files.tensors(path, body["parts"]["model"], parameters.device), body["methods"]
        )
        options = {name: decoder.value(value) for name, value in body["composition"].items()}
        facts = _Facts.of(body, decoder)
        if data is None and any(block["multiplies"] for block in body["blocks"]):
            raise InvalidInputError(
                f"{type(options['solver']).__name__} multiplies with the curvature in every solve, so that it "
                "needs the training data again: load(folder, model, loss, data)."
            )
        _check_model(described(model_state(model), parameters.names), body["model"])
    composed = TorchInfluenceFunctionModel(model, loss, **options)
    with random_state_kept():
        problem = facts.problem(composed, parameters, data)
        composed._fit = _fitted(path, body, problem, composed)
    return composed


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """What is whole and still not as ``save`` writes it was written by something else."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if type(error).__module__.startswith("influence_framework"):
            raise
        raise InvalidInputError(
            f"{path / files.MANIFEST} is not what this version writes ({type(error).__name__}: {error}): save "
            "the model again."
        ) from error


def _check_model(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    if list(here) != list(there):
        differing = sorted(set(here) ^ set(there)) or ["the same in another order"]
        raise InvalidInputError(
            f"The saved model is of a net with other parameters and buffers: {', '.join(differing[:8])}."
        )
    for what in ("dtype", "shape", "trainable"):
        for name in here:
            if here[name][what] != there[name][what]:
                raise InvalidInputError(
                    f"{name!r} of the model has {what} {here[name][what]} here and {there[name][what]} in "
                    "the saved model: pass the net that the influence model was fitted to."
                )
    other = [name for name in here if here[name]["values"] != there[name]["values"]]
    if other:
        raise InvalidInputError(
            f"{', '.join(map(repr, other[:8]))} of the model {'has' if len(other) == 1 else 'have'} other "
            "values than in the saved model, whose curvature is that of another net: load its state_dict "
            "first, or fit again."
        )


@dataclass(frozen=True)
class _Facts:
    """What was found out about the problem at the fit.

    Attributes:
        measured: Fields of :class:`Problem`.
        fingerprint: Of the training data.
        settled: What was found out about the loss; ``None`` for an objective.
        example: Two samples; ``None`` where they are of a kind that cannot be written down.
        probe: What the loss makes of them.
    """

    measured: Mapping[str, Any]
    fingerprint: Fingerprint
    settled: Mapping[str, Any]
    example: Batch | None
    probe: Mapping[str, list[float]]

    @classmethod
    def of(cls, body: Mapping[str, Any], decoder: Decoder) -> _Facts:
        saved = body["problem"]
        return cls(
            {name: saved[name] for name in MEASURED},
            Fingerprint.of_json(saved["fingerprint"]),
            saved["objective"] or {},
            None if saved["example"] is None else decoder.value(saved["example"]),
            saved["probe"] or {},
        )

    def problem(
        self, composed: TorchInfluenceFunctionModel, parameters: ParameterSpace, data: Iterable[Batch] | None
    ) -> Problem:
        """The problem that was fitted, with its data or without."""
        model, loss, budget = composed.model, composed.loss, composed.memory_budget
        if data is not None:
            problem = Problem.build(model, loss, data, memory_budget=budget)
            self._check_data(problem)
        elif self.example is None:
            raise InvalidInputError(
                "The samples of the training data are of a kind of their own, of which none was saved, so that "
                "the data is needed again: load(folder, model, loss, data)."
            )
        else:
            problem = Problem(
                model=model,
                objective=loss if isinstance(loss, Objective) else SupervisedObjective(loss, **self.settled),
                parameters=parameters,
                data=LeftOut(),
                cached=False,
                example=self.example,
                memory_budget=budget,
                state=random_state(),
                fingerprint=self.fingerprint,
                share=self.fingerprint,
                **self.measured,
            ).validated(self.example, "samples saved with the model")
        if self.example is not None:
            self._check_loss(problem)
        return problem

    def _check_data(self, problem: Problem) -> None:
        if problem.fingerprint.agrees(self.fingerprint):
            return
        size = self.fingerprint.size
        here = f"{problem.size}" if problem.size != size else "as many, but other ones,"
        raise InvalidInputError(
            f"The model was fitted to {size} samples, and the training data has {here} here: pass the same "
            "data, in whatever order, or fit again."
        )

    def _check_loss(self, problem: Problem) -> None:
        found = probe(problem, self.example)
        # Rounding differs between machines; another loss differs in the first digits.
        tolerance = torch.finfo(problem.parameters.dtype).eps ** 0.5
        for what, values in self.probe.items():
            scale = max(map(abs, values))
            if any(abs(a - b) > tolerance * scale for a, b in zip(found[what], values, strict=True)):
                raise InvalidInputError(
                    f"The {what} of two samples are {found[what]} with this loss and were {values} at the fit: "
                    "pass the loss that the model was fitted with."
                )


def _fitted(
    path: Path, body: Mapping[str, Any], problem: Problem, composed: TorchInfluenceFunctionModel
) -> Fitted:
    """What the fit left behind, of the tensors in the folder."""
    names = Blocks.resolve(composed.blocks, problem.parameters)
    parts = {name: problem.parameters.subset(members) for name, members in names.items()}
    operators = {name: composed.source.operator(problem, part) for name, part in parts.items()}
    solver = composed.solver
    blocks, scales = {}, {}
    with _understood(path):
        saved = {block["name"]: (f"block{index}", block) for index, block in enumerate(body["blocks"])}
        for name, operator in operators.items():
            require_capabilities(type(solver).__name__, operator, getattr(solver, "requires", ()))
            part, there = saved[name]
            state = SavedState(files.tensors(path, body["parts"][part], operator.device), there["values"])
            strength = float(there["regularization"])
            inverse = restored(solver, operator, strength, state)
            place = problem.parameters.indices_of(parts[name])
            blocks[name] = FittedBlock.of(name, place, operator, solver, inverse, strength)
            scales[name] = BlockScale(name, operator, there["mean_eigenvalue"])
        preflight = _preflight(body["preflight"])
    return Fitted(problem, blocks, model_state(problem.model), scales, preflight)


def _preflight(saved: Mapping[str, Any]) -> Preflight:
    blocks = {name: BlockPreflight(**block) for name, block in saved["blocks"].items()}
    names = {which: tuple(saved[which]) for which in ("unreachable", "idle")}
    return Preflight(**{**saved, **names, "blocks": blocks})
