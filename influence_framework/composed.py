"""What is composed and fitted: a model, a curvature, a solver, and what the fit left behind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Self

import torch
from torch import nn

from influence_framework.data import Batch, random_state_kept
from influence_framework.devices import to_device
from influence_framework.errors import InvalidInputError, MissingCapabilityError, NotFittedError
from influence_framework.fitted import Fitted
from influence_framework.memory import advises_on_memory
from influence_framework.objective import Loss, Objective
from influence_framework.parameters import Blocks
from influence_framework.persistence.saving import save
from influence_framework.preflight import Preflight
from influence_framework.problem import DEFAULT_MEMORY_BUDGET, Problem
from influence_framework.processes import Processes
from influence_framework.protocols import Executor, Fitting, HessianSource, InverseOperator, Solver
from influence_framework.registry import Registry, default_registry
from influence_framework.regularization import Regularization, check_regularization, per_block
from influence_framework.reports import SolveReport
from influence_framework.solving import SolveLog, act_on_failures, check_policy
from influence_framework.specs import Spec, resolve


class ComposedModel:
    """A model with the curvature of its training loss and a solver for it: everything but the scores.

    Its arguments are explained at ``TorchInfluenceFunctionModel``, which adds the scores.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        *,
        solver: Solver,
        source: HessianSource,
        blocks: str | Mapping[str, Sequence[str]] = "full",
        hessian_regularization: Regularization = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        on_failure: str = "warn",
        preflight: bool = True,
    ) -> None:
        if memory_budget <= 0:
            raise InvalidInputError(f"memory_budget is a positive number of bytes, got {memory_budget}.")
        check_regularization(hessian_regularization)
        self.model = model
        self.loss = loss
        self.solver = solver
        self.source = source
        self.blocks = blocks
        self.hessian_regularization = hessian_regularization
        self.memory_budget = memory_budget
        self.on_failure = check_policy(on_failure)
        self._report = SolveReport()
        self._probe = preflight
        self._fit: Fitted | None = None

    def __repr__(self) -> str:
        state = "fitted" if self.is_fitted else "not fitted"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, solver={self.solver}, "
            f"source={self.source}, blocks={self.blocks!r}, "
            f"hessian_regularization={self.hessian_regularization}, {state})"
        )

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` has succeeded."""
        return self._fit is not None

    @property
    def inverses(self) -> Mapping[str, InverseOperator]:
        """The inverse fitted for each block, by name, with whatever its solver lets one see of it."""
        return {name: block.inverse for name, block in self.fitted.blocks.items()}

    @property
    def report(self) -> SolveReport:
        """What came of every right-hand side of the last call that solved any."""
        return self._report

    @property
    def preflight(self) -> Preflight:
        """What the last :meth:`fit` found out beforehand; printed, it is a table."""
        return self.fitted.preflight

    @advises_on_memory(points=False)
    def fit(
        self,
        data: Iterable[Batch],
        *,
        executor: Spec | Executor = "sequential",
        registry: Registry = default_registry,
    ) -> Self:
        """Read the training data and fit one inverse per block.

        Args:
            data: A ``DataLoader`` or any re-iterable of batches ``(x, y)`` of the training data.
            executor: Where sums over the data are formed: ``"sequential"``, in this process; with
                ``"torch_distributed"`` each of several processes takes its share of the data. All of them
                have to make this call and every later one of this model, with the same arguments.
            registry: Where an executor's name is looked up.

        Returns:
            The model itself. If anything raises, what an earlier ``fit`` left stays in force.

        Raises:
            InvalidInputError: Data, model, loss, blocks or λ do not fit together.
            MissingCapabilityError: The solver needs what the source does not offer; or the executor cannot fit.
            DistributedError: Another process failed, or does something else.

        Warns:
            PreflightWarning: Parameters that the loss does not depend on; a λ far outside the spectrum.
        """
        processes = _processes(resolve("executor", executor, registry))
        with random_state_kept(), nullcontext() if processes is None else processes.together():
            if processes is not None:
                processes.check_model(self.model)
                processes.check_sampler(data)
            problem = Problem.build(
                self.model, self.loss, data, memory_budget=self.memory_budget, processes=processes
            )
            blocks = Blocks.resolve(self.blocks, problem.parameters)
            strengths = per_block(self.hessian_regularization, blocks)
            self._fit = Fitted.fit(problem, blocks, self.source, self.solver, strengths, probe=self._probe)
        return self

    @advises_on_memory(points=False)
    def with_regularization(self, hessian_regularization: Regularization) -> Self:
        """The same model at another λ; this one stays as it is.

        If fitted, so is the result: without fitting again where the inverse offers it, else by fitting
        on the curvature operator that exists already.
        """
        check_regularization(hessian_regularization)
        other = type(self).__new__(type(self))
        other.__dict__.update(
            self.__dict__, hessian_regularization=hessian_regularization, _report=SolveReport()
        )
        if self._fit is not None:
            strengths = per_block(hessian_regularization, self._fit.blocks)
            with self._fit.problem.together():
                other._fit = self._fit.with_regularization(strengths)
        return other

    def save(self, folder: str | os.PathLike[str], *, registry: Registry = default_registry) -> None:
        """Write what was fitted to a folder of safetensors and JSON, for ``influence_framework.load`` to read.

        The folder holds the composition by names and options, λ, the inverse of every block, what is needed to
        tell the net and the data again, and two training samples, on which the loss is told again. It holds
        neither the net's parameters nor code. A model saved there before is replaced at once: at every moment
        the folder holds one of the two, also if this process is killed. Of several processes between which the
        data of the fit was divided, all make the call and the first writes; what is loaded is of one process.

        Args:
            folder: Made where it does not exist; else it must be empty, or hold a saved model.
            registry: Where the solver and the source have the names by which they will be looked up.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: The net has changed since the fit; the folder holds something else; an option
                or method that cannot be written down.
            MissingCapabilityError: The solver does not take part: see :class:`Persistent`.
            ModuleNotFoundError: safetensors is not installed.
            DistributedError: The process that writes has failed.
        """
        options = {
            "solver": self.solver,
            "source": self.source,
            "blocks": self.blocks,
            "hessian_regularization": self.hessian_regularization,
            "memory_budget": self.memory_budget,
            "on_failure": self.on_failure,
            "preflight": self._probe,
        }
        processes = self.fitted.problem.processes
        with self.fitted.problem.together():
            if processes is None or processes.rank == 0:
                save(self.fitted, options, folder, registry)

    @advises_on_memory(points=False)
    def to(self, device: torch.device | str) -> Self:
        """Move the model (in place, like ``nn.Module.to``) and all that was fitted; returns itself."""
        device = torch.device(device)
        fitted = to_device(self._fit, device)
        self.model.to(device)
        self._fit = fitted
        return self

    @property
    def fitted(self) -> Fitted:
        """Everything that :meth:`fit` left behind.

        Raises:
            NotFittedError: Before ``fit``.
        """
        if self._fit is None:
            raise NotFittedError("This influence model is not fitted: call model.fit(train_loader) first.")
        return self._fit

    @contextmanager
    def solving(self) -> Iterator[SolveLog]:
        """Collect what is solved within, keep the random state, and act on what failed."""
        log = SolveLog()
        with self.fitted.problem.together():
            try:
                with random_state_kept():
                    yield log
            finally:
                self._report = log.report()
            act_on_failures(self._report, self.on_failure)


def _processes(executor: Executor) -> Processes | None:
    if isinstance(executor, Fitting):
        return executor.processes()
    raise MissingCapabilityError(
        f"{type(executor).__name__} computes scores and cannot fit: fit with 'sequential' or "
        "'torch_distributed'."
    )
