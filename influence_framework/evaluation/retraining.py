"""Models trained again on parts of the data, and what they make of test points."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from influence_framework.attribution.fingerprints import Digest
from influence_framework.checks import model_state
from influence_framework.data import Batch, map_leaves, random_state_kept, split
from influence_framework.errors import InvalidInputError
from influence_framework.evaluation.recipes import ConvexFit, Recipe, StackedRecipe
from influence_framework.fingerprints import fingerprint
from influence_framework.memory import is_out_of_memory
from influence_framework.objective import Loss, Objective, SupervisedObjective
from influence_framework.problem import Problem

MANIFEST, RESULTS = "manifest.json", "results.npz"
SAVE_EVERY = 1.0
"""Seconds between two saves: what is trained again at most after a run was killed."""
AT_ONCE = 64
"""Models that are trained at once where the recipe can."""

Measure = Callable[[Tensor, Batch], Tensor]
"""``(outputs, batch) -> (n,)``: what is noted of each test point."""
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """One model to train.

    Attributes:
        kept: Positions of the training points it is trained on.
        seed: Of its training.
    """

    kept: Int[Tensor, " s"]
    seed: int


@dataclass(frozen=True)
class Retraining:
    """Trains a model again on parts of its data.

    Attributes:
        model: What is trained; it stays as it is.
        objective: Its loss, checked against the data.
        data: Training points.
        test: Test points.
        size: Number of training points.
        recipe: How to train.
    """

    model: nn.Module
    objective: Objective
    data: Batch
    test: Batch
    size: int
    recipe: Recipe

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss | Objective, test: Batch, data: Batch, recipe: Recipe
    ) -> Retraining:
        """Check all against each other.

        Raises:
            InvalidInputError: What does not fit, with the remedy.
        """
        if not isinstance(recipe, Recipe):
            raise InvalidInputError(
                "The recipe says how to train: ConvexFit(...), GradientDescent(...), or an object with a "
                f"method train(model, objective, data, kept, seed); got {type(recipe).__name__}."
            )
        if isinstance(recipe, ConvexFit):
            model, data, test = _doubled(model), _doubled_batch(data), _doubled_batch(test)
            loss = _doubled_loss(loss)
        problem = Problem.build(model, loss, [data])
        checked = problem.validated(test, "test data")
        return cls(model, checked.objective, data, test, problem.size, recipe)

    @property
    def test_size(self) -> int:
        """Number of test points."""
        return self.objective.size(self.test)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Measure: the loss of each test point."""
        return self.objective.sample_losses(outputs, batch)

    def run(
        self,
        jobs: Sequence[Job],
        measures: Mapping[str, Measure],
        *,
        folder: str | os.PathLike[str] | None,
        progress: bool,
        description: str,
        at_once: int = AT_ONCE,
    ) -> dict[str, Float[Tensor, "jobs m"]]:
        """What every job's model makes of the test points, by measure, float64.

        Jobs that leave out as many points as their neighbours are trained together where the recipe can. With
        a ``folder``, results are saved there as they come; a run that was killed goes on there.
        """
        found = {name: np.full((len(jobs), self.test_size), np.nan) for name in measures}
        done = np.zeros(len(jobs), dtype=bool)
        saved = None
        if folder is not None:
            saved = Saved(Path(folder), self._manifest(jobs, measures))
            saved.load(found, done)
        waiting = [i for i in range(len(jobs)) if not done[i]]
        with tqdm(
            total=len(jobs), initial=int(done.sum()), desc=description, unit="model", disable=not progress
        ) as bar:
            for _, group in groupby(waiting, key=lambda i: len(jobs[i].kept)):
                members = list(group)
                for start in range(0, len(members), at_once):
                    part = members[start : start + at_once]
                    for indices, values in self._measured(jobs, part, measures):
                        for name, value in values.items():
                            found[name][indices] = value.double().cpu().numpy()
                        done[indices] = True
                        bar.update(len(indices))
                        if saved is not None:
                            saved.note(found, done)
        if saved is not None:
            saved.save(found, done)
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def _measured(self, jobs: Sequence[Job], part: list[int], measures: Mapping[str, Measure]) -> Any:
        """Indices of jobs and what was measured, ``(len(indices), m)``, as they come."""
        stacked = self._stacked([jobs[i] for i in part], measures) if len(part) > 1 else None
        if stacked is not None:
            yield part, stacked
            return
        for i in part:
            trained = self.recipe.train(self.model, self.objective, self.data, jobs[i].kept, jobs[i].seed)
            with torch.no_grad(), random_state_kept():
                outputs = self.objective.outputs(trained, self.test)
                yield [i], {name: measure(outputs, self.test)[None] for name, measure in measures.items()}

    def _stacked(self, jobs: list[Job], measures: Mapping[str, Measure]) -> dict[str, Tensor] | None:
        """What was measured of models trained at once; ``None`` where they cannot be."""
        if not isinstance(self.recipe, StackedRecipe):
            return None
        kept, seeds = torch.stack([job.kept for job in jobs]), [job.seed for job in jobs]
        try:
            parameters = self.recipe.train_stacked(self.model, self.objective, self.data, kept, seeds)
        except RuntimeError as error:  # in-place writes to buffers, randomness, control flow: not for vmap
            if is_out_of_memory(error):
                raise
            return None
        rows = []
        with torch.no_grad(), random_state_kept():
            for i in range(len(jobs)):
                mine = {name: tensor[i] for name, tensor in parameters.items()}

                def call(*args: Any, mine: dict[str, Tensor] = mine, **kwargs: Any) -> Any:
                    return functional_call(self.model, mine, args, kwargs)

                outputs = self.objective.outputs(call, self.test)
                rows.append({name: measure(outputs, self.test) for name, measure in measures.items()})
        return {name: torch.stack([row[name] for row in rows]) for name in measures}

    def _manifest(self, jobs: Sequence[Job], measures: Mapping[str, Measure]) -> dict[str, Any]:
        plan = hashlib.blake2b(digest_size=16)
        for job in jobs:
            plan.update(f"{job.seed} {len(job.kept)} ".encode())
            plan.update(job.kept.cpu().numpy().astype("<i8").tobytes())
        return {
            "model": f"{type(self.model).__name__} {fingerprint(model_state(self.model))}",
            "loss": repr(self.objective),
            "recipe": repr(self.recipe),
            "training data": _digest(self.data, self.size),
            "test data": _digest(self.test, self.test_size),
            "jobs": [len(jobs), plan.hexdigest()],
            "measures": list(measures),
        }


class Saved:
    """Results on disk, each file written at once or not at all.

    Args:
        folder: Made where it does not exist.
        manifest: What the results are of; it must agree with the one in the folder.

    Raises:
        InvalidInputError: The folder holds something else.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self._last = time.monotonic()
        mine = json.loads(json.dumps(manifest))
        if not (folder / MANIFEST).exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InvalidInputError(
                    f"{folder} exists and holds no results of retraining (it has no {MANIFEST}): choose "
                    "another folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
            self._write(MANIFEST, lambda file: file.write(json.dumps(mine, indent=2).encode()))
            return
        try:
            there = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{folder / MANIFEST} cannot be read: {error}.") from error
        if different := [key for key in dict.fromkeys([*mine, *there]) if mine.get(key) != there.get(key)]:
            raise InvalidInputError(
                f"{folder} holds results of something else; what differs: {', '.join(different)}. Choose "
                "another folder."
            )

    def load(self, found: Mapping[str, Any], done: Any) -> None:
        """Fill in what is there."""
        if not (self.folder / RESULTS).exists():
            return
        with np.load(self.folder / RESULTS, allow_pickle=False) as there:
            done[:] = there["done"]
            for name, values in found.items():
                values[:] = there[f"of {name}"]

    def note(self, found: Mapping[str, Any], done: Any) -> None:
        """Save from time to time."""
        if time.monotonic() - self._last >= SAVE_EVERY:
            self.save(found, done)

    def save(self, found: Mapping[str, Any], done: Any) -> None:
        """Save now."""
        arrays = {f"of {name}": values for name, values in found.items()}
        self._write(RESULTS, lambda file: np.savez(file, allow_pickle=False, done=done, **arrays))
        self._last = time.monotonic()

    def _write(self, name: str, write: Callable[[Any], Any]) -> None:
        temporary = self.folder / f"{name}.new"
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(self.folder / name)


def _digest(batch: Batch, size: int) -> str:
    digest = Digest()
    for piece in split(batch, size, 1024):
        digest.update(piece)
    return digest.hexdigest()


def _doubled(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double() if isinstance(model, nn.Module) else model


def _doubled_batch(batch: Batch) -> Batch:
    return map_leaves(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def _doubled_loss(loss: Loss | Objective) -> Any:
    if isinstance(loss, SupervisedObjective):
        return replace(loss, loss=_doubled_loss(loss.loss))
    return _doubled(loss) if isinstance(loss, nn.Module) else loss
