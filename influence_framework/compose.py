"""From names and options to objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from influence_framework.errors import InvalidInputError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource, Solver
from influence_framework.refinement import RefinedSolver
from influence_framework.registry import Registry, default_registry
from influence_framework.regularization import Regularization
from influence_framework.specs import Spec, resolve

__all__ = ["DEFAULT_SOURCE", "Spec", "compose", "resolve", "resolve_source"]

DEFAULT_SOURCE = "gauss_newton"


def compose(
    model: nn.Module,
    loss: Spec | Loss | Objective,
    *,
    solver: Spec | Solver,
    source: Spec | HessianSource | None = None,
    blocks: str | Mapping[str, Sequence[str]] = "full",
    hessian_regularization: Regularization = 0.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    refine: Spec | Solver | None = None,
    on_failure: str = "warn",
    preflight: bool = True,
    registry: Registry = default_registry,
) -> TorchInfluenceFunctionModel:
    """An influence model put together by name, not fitted yet.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``; or an :class:`Objective`, by name (``"causal_lm"``), by
            mapping with options, or an instance.
        solver: A name, a mapping ``{"name": ..., option: value, ...}``, or an instance. Options that are
            solvers themselves, such as a preconditioner, are written the same way.
        source: The curvature, likewise; left out, the solver's own choice, else ``"gauss_newton"``,
            which is positive semidefinite where the Hessian of a trained net is usually not.
        blocks: ``"full"``, ``"per_layer"``, ``"per_parameter"`` or a mapping from block name to parameter
            names; curvature between blocks is left out.
        hessian_regularization: λ of ``(C + λI)⁻¹``, in the units of the curvature of the *mean* loss; one
            number, or one per block name; ``RelativeRegularization(0.1)`` is a tenth of the mean eigenvalue.
            Left out, 0: right only for a curvature without null directions.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        refine: A solver that starts from what ``solver`` gives, with it as its preconditioner, and measures
            residuals: ``{"name": "cg", "maxiter": 10}`` turns a cheap approximation into an exact method.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"`` right-hand sides that were not solved.
        preflight: Look, before every fit, for parameters without effect and for a λ far outside the spectrum.
        registry: Where names are looked up.

    Raises:
        UnknownMethodError: No such name; the message lists what exists.
        UnknownOptionError: No such option; the message lists the method's own.
        InvalidInputError: Anything else that cannot be right.
    """
    chosen = resolve("solver", solver, registry)
    if refine is not None:
        chosen = RefinedSolver(chosen, resolve("solver", refine, registry))
    if source is None:
        source = getattr(chosen, "default_source", None) or DEFAULT_SOURCE
    if isinstance(loss, str | Mapping):
        loss = cast(Objective, resolve("objective", loss, registry))
    return TorchInfluenceFunctionModel(
        model,
        loss,
        solver=chosen,
        source=resolve("source", source, registry),
        blocks=blocks,
        hessian_regularization=hessian_regularization,
        memory_budget=memory_budget,
        on_failure=on_failure,
        preflight=preflight,
    )


def resolve_source(source: Spec | HessianSource, *, precompute_grad: bool) -> HessianSource:
    """The source that ``source`` stands for, with ``precompute_grad`` set beside it.

    Raises:
        InvalidInputError: ``precompute_grad`` beside an instance, which has its own.
    """
    if not precompute_grad:
        return cast(HessianSource, resolve("source", source))
    if isinstance(source, str | Mapping):
        named = {"name": source} if isinstance(source, str) else source
        return cast(HessianSource, resolve("source", {"precompute_grad": True, **named}))
    raise InvalidInputError(
        f"precompute_grad=True goes with a source given by name; set it on the instance: "
        f"{type(source).__name__}(precompute_grad=True)."
    )
