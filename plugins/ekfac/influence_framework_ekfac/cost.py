"""What ``ekfac`` and ``kfac`` take."""

from __future__ import annotations

from influence_framework.costs import Cost, Fidelity, LayerShape, Work, Workload, in_bytes

STAIRCASE = 0.25
"""Part of a layer's directions that the staircase of its filter takes up, before anything is known of it."""


def covariances(layer: LayerShape, samples: int, draws: int) -> Work:
    """Sums of ``ā āᵀ`` and ``δ δᵀ``, and their eigenvectors."""
    rows = float(samples * layer.positions)
    inputs = 0 if layer.one_hot else layer.inputs
    flops = 2 * rows * layer.groups * (draws * layer.outputs**2 + inputs**2)
    sizes = (layer.outputs,) if layer.one_hot else (layer.outputs, layer.inputs)
    return Work(flops=flops, eigh=sizes * layer.groups)


def second_moments(layer: LayerShape, samples: int, draws: int, element: int) -> Work:
    """Squares of gradients in the eigenbasis: of vectors where there is one position, of matrices elsewhere."""
    outputs, inputs, positions = layer.outputs, layer.inputs, layer.positions
    inside = 0 if layer.one_hot else inputs
    turned = positions * (outputs**2 + inside**2)
    if positions == 1 and not layer.one_hot:
        return Work(
            flops=2.0 * samples * layer.groups * (draws * outputs**2 + inputs**2 + layer.outputs * inputs)
        )
    each = min(turned, outputs * inputs * (outputs + inside)) + positions * outputs * inputs
    return Work(
        flops=2.0 * samples * draws * layer.groups * each,
        traffic=6.0 * element * samples * draws * layer.entries,
    )


def scores(layer: LayerShape, workload: Workload, *, exact: bool) -> Work:
    """All pairs in a layer, by the order of contraction that takes the fewest flops, about."""
    test, train, positions = workload.n_test, workload.n_train, layer.positions
    width = layer.outputs + layer.inputs
    forming = 2.0 * positions * layer.entries * (test + train)
    gradients = 2.0 * test * train * layer.entries + forming
    traffic = 2.0 * workload.element * layer.entries * (test + train)
    turned = 4.0 * test * layer.entries * width
    if exact or positions**2 * width > layer.outputs * layer.inputs:
        return Work(flops=gradients + turned, traffic=traffic)
    stairs = 2.0 * test * train * (positions**2 * layer.groups * width + STAIRCASE * layer.entries)
    return Work(
        flops=min(gradients, stairs + 2.0 * (test + train) * positions * layer.groups * width**2),
        traffic=2.0 * workload.element * (layer.groups * positions * width * (test + train) + test * train),
    )


def cost_of_kronecker(
    workload: Workload, draws: int, element: int, uncovered: str, *, refits: bool, exact: bool
) -> Cost:
    """Of factors of every layer, with ``draws`` targets for each sample; sums are of ``element`` bytes."""
    size, layers = workload.parameters, workload.layers
    covered = sum(layer.entries for layer in layers)
    # One draw takes a forward and a backward pass, of which further draws repeat the latter.
    passes = (1 + draws) / 2 * (2 if refits else 1)
    fit = Work(passes=passes, diagonals=float(uncovered == "diagonal" and covered < size))
    held = factors = 0.0
    applied = Work(traffic=workload.vectors(6))
    for layer in layers:
        fit += covariances(layer, workload.samples, draws)
        if refits:
            fit += second_moments(layer, workload.samples, draws, max(4, workload.element))
        squares = layer.groups * (layer.outputs**2 + (0 if layer.one_hot else layer.inputs**2))
        held += max(4, workload.element) * squares + element * layer.entries
        factors += element * squares
        inside = 0 if layer.one_hot else layer.inputs
        applied += Work(flops=4.0 * layer.entries * (layer.outputs + inside))
    scoring = None
    if covered == size:
        scoring = Work(passes=(workload.n_test + workload.n_train) / workload.samples)
        for layer in layers:
            scoring += scores(layer, workload, exact=exact)
    widest = max((max(layer.outputs, 0 if layer.one_hot else layer.inputs) for layer in layers), default=0)
    return Cost(
        Fidelity.LAYERS if refits else Fidelity.FACTORS,
        fit=fit,
        solve=workload.columns * applied,
        fit_bytes=held + 2 * factors + 3 * element * widest**2,
        held_bytes=held,
        solve_bytes=workload.vectors(4 * workload.columns),
        scoring=scoring,
        apply=applied,
        reasons=(
            f"{passes:g} pass{'es' * (passes != 1)} over the data and {len(fit.eigh)} eigendecompositions of "
            f"up to {widest} x {widest}; factors take {in_bytes(held)}",
            *([] if covered == size else [f"{covered / size:.0%} of the parameters are in factors"]),
        ),
    )
