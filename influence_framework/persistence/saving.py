"""From a fitted model to a folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_framework.checks import check_unchanged
from influence_framework.data import Batch, random_state_kept, take
from influence_framework.errors import InvalidInputError
from influence_framework.fingerprints import fingerprint
from influence_framework.fitted import Fitted
from influence_framework.gradients import sample_gradients
from influence_framework.objective import SupervisedObjective
from influence_framework.persistence import files
from influence_framework.persistence.codec import Encoder
from influence_framework.persistence.states import multiplies, state_of
from influence_framework.problem import Problem
from influence_framework.registry import Registry
from influence_framework.versions import versions

EXAMPLE = 2
"""Training samples kept: enough to confirm the matrix form of layers, and that the loss is the same one."""

MEASURED = ("size", "batch_size", "sample_bytes", "sample_flops", "twice_differentiable", "precision")
"""What was found out about a problem, beside its objective."""


def save(fitted: Fitted, options: Mapping[str, Any], folder: files.Path_, registry: Registry) -> None:
    """Write what was fitted, and the options of the model, to ``folder``; see ``ComposedModel.save``."""
    problem = fitted.problem
    check_unchanged(problem.model, fitted.state)
    files.check_writable(Path(folder))
    blocks = []
    parts: dict[str, Mapping[str, Tensor]] = {}
    for index, (name, block) in enumerate(fitted.blocks.items()):
        state = state_of(block.solver, block.inverse)
        parts[f"block{index}"] = state.tensors
        blocks.append(
            {
                "name": name,
                "regularization": block.regularization,
                "mean_eigenvalue": fitted.scales[name].measured,
                "multiplies": multiplies(block.inverse),
                "values": state.values,
            }
        )
    encoder = Encoder(registry)
    composition = {
        "solver": encoder.method("solver", options["solver"]),
        "source": encoder.method("source", options["source"]),
        **{
            name: encoder.value(value, name)
            for name, value in options.items()
            if name not in ("solver", "source")
        },
    }
    body: dict[str, Any] = {"versions": versions("safetensors"), "composition": composition}
    body["problem"] = _problem(problem, encoder)
    body["model"] = described(fitted.state, problem.parameters.names)
    body["preflight"] = asdict(fitted.preflight)
    body |= {"blocks": blocks, "methods": encoder.methods}
    files.write(Path(folder), body, {"model": encoder.tensors, **parts}.items())


def described(state: Mapping[str, Tensor], trainable: Collection[str]) -> dict[str, Any]:
    """What tells the model from another: every parameter and buffer, in order."""
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "trainable": name in trainable,
            "values": fingerprint({name: tensor}),
        }
        for name, tensor in state.items()
    }


def _problem(problem: Problem, encoder: Encoder) -> dict[str, Any]:
    objective = problem.objective
    found: dict[str, Any] = {name: getattr(problem, name) for name in MEASURED}
    found["fingerprint"] = asdict(problem.fingerprint)
    found["objective"] = None
    if isinstance(objective, SupervisedObjective):
        found["objective"] = {name: getattr(objective, name) for name in ("reduction", "vectorize", "hard")}
    example = take(problem.example, slice(0, EXAMPLE))
    found |= {"example": None, "probe": None}
    try:
        found["example"] = encoder.value(example, "a sample")
    except InvalidInputError:
        return found  # samples of a kind of their own: the data is then needed when the model is loaded
    found["probe"] = probe(problem, example)
    return found


def probe(problem: Problem, example: Batch) -> dict[str, list[float]]:
    """Loss and norm of the gradient of each of the samples: another loss has others."""
    with torch.no_grad(), random_state_kept():
        losses = problem.sample_losses({}, example)
    with random_state_kept():
        gradients = sample_gradients(problem, problem.parameters, example)
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    return {"losses": losses.double().tolist(), "gradients": norms.tolist()}
