"""From names and options to objects."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

from torch import nn

from influence_framework.errors import InvalidInputError, UnknownOptionError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.objective import Loss, Objective
from influence_framework.problem import DEFAULT_MEMORY_BUDGET
from influence_framework.protocols import HessianSource, Solver
from influence_framework.refinement import RefinedSolver
from influence_framework.registry import KINDS, Kind, Method, Registry, default_registry
from influence_framework.regularization import Regularization

Spec = str | Mapping[str, Any]
DEFAULT_SOURCE = "gauss_newton"


def compose(
    model: nn.Module,
    loss: Loss | Objective,
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
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        solver: A name, a mapping ``{"name": ..., option: value, ...}``, or an instance. Options that are
            solvers themselves, such as a preconditioner, are written the same way.
        source: The curvature, likewise; left out, the solver's own choice, else ``"gauss_newton"``,
            which is positive semidefinite where the Hessian of a trained net is usually not.
        blocks: ``"full"``, ``"per_layer"``, ``"per_parameter"`` or a mapping from block name to parameter
            names; curvature between blocks is left out.
        hessian_regularization: λ of ``(C + λI)⁻¹``, in the units of the curvature of the *mean* loss; one
            number, or one per block name; ``RelativeRegularization(0.1)`` is a tenth of the mean eigenvalue.
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


def resolve(kind: Kind, spec: Any, registry: Registry = default_registry) -> Any:
    """The solver, source or executor that ``spec`` (a name, a mapping or an instance) stands for."""
    _, required, label = KINDS[kind]
    if isinstance(spec, str):
        return registry.lookup(kind, spec).create()
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise UnknownOptionError(
                f"A {label} given as a mapping needs the key 'name', got {sorted(map(str, spec))}."
            )
        method = registry.lookup(kind, spec["name"])
        options = {option: value for option, value in spec.items() if option != "name"}
        return method.create(**_resolve_nested(method, options, registry))
    if inspect.isclass(spec):
        raise InvalidInputError(
            f"Got the class {spec.__qualname__} as {label}: pass an instance, {spec.__qualname__}(...)."
        )
    if not callable(getattr(spec, required, None)):
        raise InvalidInputError(
            f"Expected a {label} as a name, a mapping with 'name', or an instance with {required!r}, got "
            f"{type(spec).__name__}."
        )
    return spec


def _resolve_nested(method: Method, options: dict[str, Any], registry: Registry) -> dict[str, Any]:
    """Replace names and mappings in options that are annotated as solvers by instances."""
    nested = _solver_options(method.cls)
    return {
        option: resolve("solver", value, registry)
        if option in nested and isinstance(value, str | Mapping)
        else value
        for option, value in options.items()
    }


def _solver_options(cls: type[Any]) -> set[str]:
    """The options annotated as solvers, be it on the class, on a base or on ``__init__``."""
    return {
        name
        for owner in (*cls.__mro__, cls.__init__)
        for name, annotation in inspect.get_annotations(owner).items()
        if _is_solver(annotation, owner)
    }


def _is_solver(annotation: Any, owner: Any) -> bool:
    module = sys.modules.get(owner.__module__)
    namespace = getattr(owner, "__globals__", None) or vars(module or object)
    alone = SimpleNamespace(__annotations__={"option": annotation})
    try:
        # One by one, since an annotation that exists for the type checker alone cannot be looked up.
        hint = get_type_hints(alone, globalns=dict(namespace))["option"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return False
    return Solver in (hint, *get_args(hint))
