"""What is asked of a problem before any method is chosen: its size, its layers, and a look at its spectrum."""

from __future__ import annotations

import math
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.costs import LayerShape, Measure, Spectrum, Workload, by_columns
from influence_framework.data import take
from influence_framework.gradients import sample_gradients, samples_within
from influence_framework.lanczos import tridiagonals
from influence_framework.layers import Layer, layer_batch, true_gradients
from influence_framework.problem import Problem
from influence_framework.protocols import (
    Dense,
    Diagonal,
    LayerStatistics,
    LinearOperator,
    Minibatches,
    Trace,
)

SAMPLES, FEWEST = 512, 24
"""Samples whose curvature stands for that of all: so many, or fewer where they take long, within bounds."""

STEPS, LEAST_STEPS = 60, 16
"""Lanczos steps, likewise."""

RANDOM, GRADIENTS = 2, 4
"""Random vectors and gradients of samples that they start from."""

FLOPS = 2**32
"""What all steps together may take in forward passes."""

RELATIVE = 3e-3
"""λ where nobody gave one, in units of the largest eigenvalue: the middle of the range 1e-3 to 1e-2."""

CAPABILITIES = (Dense, Diagonal, LayerStatistics, Minibatches, Trace)


def effort(problem: Problem) -> tuple[int, int]:
    """Samples and Lanczos steps of the probes: the same for the same problem, however quick the machine."""
    each = max(1, problem.sample_flops) * (RANDOM + GRADIENTS)
    samples = min(problem.size, max(FEWEST, min(SAMPLES, FLOPS // (each * STEPS))))
    return samples, max(LEAST_STEPS, min(STEPS, FLOPS // (each * samples)))


def spectrum(few: Problem, operator: LinearOperator, steps: int, seed: int) -> Spectrum:
    """Lanczos steps with the curvature of a few samples, from random vectors and from gradients."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = operator.shape[0]
    random = torch.randn(size, RANDOM, generator=generator, dtype=torch.float64, device="cpu")
    batch, count = next(few.batches())
    chosen = torch.randperm(count, generator=generator, device="cpu")[:GRADIENTS].to(operator.device)
    gradients = sample_gradients(few, few.parameters, take(batch, chosen)).T
    start = torch.cat([random.to(operator.device, operator.dtype), gradients], dim=1)
    empty = torch.linalg.vector_norm(start, dim=0) == 0
    # Of a sample that is fitted exactly there is nothing to solve for.
    start = start[:, ~empty]
    *_, last = islice(tridiagonals(operator, start), steps)
    measures = [_measure(matrix) for matrix in last]
    whole = _together(measures[:RANDOM])
    return Spectrum(size, whole, measures[RANDOM:] or measures[:RANDOM], few.size)


def _measure(tridiagonal: Float[Tensor, "m m"]) -> Measure:
    """Golub and Meurant (2010), "Matrices, Moments and Quadrature with Applications", §3.4."""
    values, vectors = torch.linalg.eigh(tridiagonal)
    return Measure(values, vectors[0].square())


def _together(measures: list[Measure]) -> Measure:
    values, order = torch.cat([measure.values for measure in measures]).sort()
    weights = torch.cat([measure.weights for measure in measures])[order]
    return Measure(values, weights / len(measures))


def layer_shapes(problem: Problem, operator: LinearOperator) -> tuple[tuple[LayerShape, ...], dict[str, str]]:
    """The layers in matrix form, with their positions in the first sample, and the parameters outside them."""
    if not isinstance(operator, LayerStatistics):
        return (), {}
    cover = operator.cover()
    first = take(problem.example, slice(0, 1))
    found = layer_batch(problem, cover.layers, first, true_gradients(problem))
    shapes = [
        LayerShape(
            *_shape(layer),
            found[layer].positions if layer in found else 1,
            layer.form.one_hot,
        )
        for layer in cover.layers
    ]
    return tuple(shapes), dict(cover.uncovered)


def _shape(layer: Layer) -> tuple[int, int, int]:
    groups, outputs, inputs = layer.form.places.shape
    return groups, outputs, inputs


def workload(
    problem: Problem,
    operator: LinearOperator,
    found: Spectrum | None,
    regularization: float,
    pairs: tuple[int, int],
    copies: int,
) -> Workload:
    """Everything that a solver may want to know; ``copies`` vectors are held for each right-hand side."""
    n_test, n_train = sorted(pairs)
    at_once = samples_within(problem, problem.parameters, problem.memory_budget, copies)
    shapes, uncovered = layer_shapes(problem, operator)
    forming = getattr(operator, "forming", None)
    return Workload(
        parameters=operator.shape[0],
        samples=problem.size,
        regularization=regularization,
        columns=min(n_test, at_once),
        n_test=n_test,
        n_train=n_train,
        element=torch.empty(0, dtype=operator.dtype).element_size(),
        precision=torch.finfo(operator.dtype).eps,
        device=operator.device.type,
        outputs=problem.outputs_of_a_sample(),
        batch_size=min(problem.batch_size, problem.size),
        capabilities=frozenset(c.__name__ for c in CAPABILITIES if isinstance(operator, c)),
        semidefinite=bool(getattr(operator, "positive_semidefinite", False)),
        layers=shapes,
        uncovered=uncovered,
        forming=by_columns(operator.shape[0]) if forming is None else forming(),
        spectrum=found,
    )


def advised_regularization(found: Spectrum) -> float:
    """A few thousandths of the largest eigenvalue, to one digit."""
    value = RELATIVE * found.largest
    digits = 10.0 ** math.floor(math.log10(value))
    return round(value / digits) * digits
