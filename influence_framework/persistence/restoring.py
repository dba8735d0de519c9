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
from influence_framework.data import Batch, Fingerprint, random_state, random_state_kept
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
from influence_framework.protocols import SavedState, Solver
from influence_framework.registry import Registry, default_registry
from influence_framework.regularization import BlockScale


class LeftOut:
    """Stands in the place of training data that was not given."""

    def __iter__(self) -> Iterator[Batch]:
        raise InvalidInputError(
            "The model was loaded without its training data, and this needs it: pass the data as well, "
            "load(folder, model, loss, data)."
        )


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
            every solve multiplies with the curvature (``cg``, ``lissa``, ``refine``); elsewhere only for
            bounds, residuals and what is fitted again.
        registry: Where names are looked up.

    Raises:
        InvalidInputError: The folder is damaged, foreign or of a later version; model, loss or data differ from
            those of the fit, or data is left out where it is needed.
        UnknownMethodError: A solver or source is not installed.
        ModuleNotFoundError: safetensors is not installed.
    """
    path = Path(folder)
    body = files.read(path)
    with _understood(path), random_state_kept():
        check_model(model)
        parameters = ParameterSpace.of(model)
        decoder = Decoder(
            registry, files.tensors(path, body["parts"]["model"], parameters.device), body["methods"]
        )
        options = {name: decoder.value(value) for name, value in body["composition"].items()}
        needing = [block["name"] for block in body["blocks"] if block["multiplies"]]
        if needing and data is None:
            raise InvalidInputError(
                f"{type(options['solver']).__name__} multiplies with the curvature in every solve, so that it "
                "needs the training data again: load(folder, model, loss, data)."
            )
        saved = _Saved(path, body, decoder, options["memory_budget"])
        composed = TorchInfluenceFunctionModel(model, loss, **options)
        problem = saved.problem(model, loss, parameters, data)
        composed._fit = saved.fitted(problem, composed)
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


@dataclass(frozen=True)
class _Saved:
    """A folder that was found to be whole."""

    path: Path
    body: Mapping[str, Any]
    decoder: Decoder
    memory_budget: int

    def problem(
        self, model: nn.Module, loss: Loss | Objective, parameters: ParameterSpace, data: Iterable[Batch] | None
    ) -> Problem:
        """The problem that was fitted, with its data or without."""
        saved = self.body["problem"]
        self._check_model(model, parameters)
        example = None if saved["example"] is None else self.decoder.value(saved["example"])
        fingerprint = Fingerprint.of_json(saved["fingerprint"])
        if data is not None:
            problem = Problem.build(model, loss, data, memory_budget=self.memory_budget)
            self._check_data(problem, fingerprint)
        elif example is None:
            raise InvalidInputError(
                "The samples of the training data are of a kind of their own, of which none was saved, so that "
                "the data is needed again: load(folder, model, loss, data)."
            )
        else:
            settled = {} if saved["objective"] is None else saved["objective"]
            problem = Problem(
                model=model,
                objective=loss if isinstance(loss, Objective) else SupervisedObjective(loss, **settled),
                parameters=parameters,
                data=LeftOut(),
                cached=False,
                example=example,
                memory_budget=self.memory_budget,
                state=random_state(),
                fingerprint=fingerprint,
                **{name: saved[name] for name in MEASURED},
            )
            problem = problem.validated(example, "samples saved with the model")
        if example is not None:
            _check_loss(problem, probe(problem, example), saved["probe"])
        return problem

    def _check_model(self, model: nn.Module, parameters: ParameterSpace) -> None:
        here, there = described(model_state(model), parameters.names), self.body["model"]
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

    @staticmethod
    def _check_data(problem: Problem, fingerprint: Fingerprint) -> None:
        if problem.fingerprint.agrees(fingerprint):
            return
        there = f"{fingerprint.size} samples"
        here = f"{problem.size}" if problem.size != fingerprint.size else "as many, but other ones,"
        raise InvalidInputError(
            f"The model was fitted to {there}, and the training data has {here} here: pass the same data, in "
            "whatever order, or fit again."
        )

    def fitted(self, problem: Problem, composed: TorchInfluenceFunctionModel) -> Fitted:
        """What the fit left behind, of the tensors in the folder."""
        names = Blocks.resolve(composed.blocks, problem.parameters)
        saved = {block["name"]: (index, block) for index, block in enumerate(self.body["blocks"])}
        parts = {name: problem.parameters.subset(members) for name, members in names.items()}
        operators = {name: composed.source.operator(problem, part) for name, part in parts.items()}
        blocks, scales = {}, {}
        for name, operator in operators.items():
            index, there = saved[name]
            solver: Solver = composed.solver
            require_capabilities(type(solver).__name__, operator, getattr(solver, "requires", ()))
            entry = self.body["parts"][f"block{index}"]
            state = SavedState(files.tensors(self.path, entry, operator.device), there["values"])
            strength = float(there["regularization"])
            inverse = restored(solver, operator, strength, state)
            place = problem.parameters.indices_of(parts[name])
            blocks[name] = FittedBlock.of(name, place, operator, solver, inverse, strength)
            scales[name] = BlockScale(name, operator, there["mean_eigenvalue"])
        return Fitted(problem, blocks, model_state(problem.model), scales, _preflight(self.body["preflight"]))


def _check_loss(problem: Problem, here: Mapping[str, list[float]], there: Mapping[str, list[float]]) -> None:
    # Rounding differs between machines; another loss differs in the first digits.
    tolerance = torch.finfo(problem.parameters.dtype).eps ** 0.5
    for what, values in there.items():
        scale = max(map(abs, values))
        if any(abs(a - b) > tolerance * scale for a, b in zip(here[what], values, strict=True)):
            raise InvalidInputError(
                f"The {what} of two samples are {here[what]} with this loss and were {values} at the fit: "
                "pass the loss that the model was fitted with."
            )


def _preflight(saved: Mapping[str, Any]) -> Preflight:
    blocks = {name: BlockPreflight(**block) for name, block in saved["blocks"].items()}
    names = {which: tuple(saved[which]) for which in ("unreachable", "idle")}
    return Preflight(**{**saved, **names, "blocks": blocks})
