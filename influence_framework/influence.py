"""Influence scores of a PyTorch model: from an inverse per block to scores per pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.bounds import BoundedScores, bounded_perturbations, bounded_scores
from influence_framework.composed import ComposedModel
from influence_framework.data import random_state_kept
from influence_framework.errors import InvalidInputError
from influence_framework.measurement import Measurement, measured
from influence_framework.memory import advises_on_memory
from influence_framework.points import check_factors, checked_pairs, checked_points
from influence_framework.protocols import InfluenceMode
from influence_framework.query_factors import QueryFactors, query_factors, scores_of
from influence_framework.regularization import RelativeRegularization, Strength, check_regularization
from influence_framework.token_scores import of_test_tokens, of_training_tokens


class TorchInfluenceFunctionModel(ComposedModel):
    """Influence of training points on predictions, for one model, curvature and solver.

    With ``C`` the curvature of the *mean* training loss, λ the regularisation and ``ℓ`` the loss of one
    sample::

        score(z_test, z) = ∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ℓ(z)        mode Up
        score(z_test, z) = ∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ₓ∇ℓ(z)      mode Perturbation

    A positive score in mode Up means that up-weighting the training point lowers the test loss;
    removing it from ``n`` training points changes the test loss by about ``+score/n``. Koh and Liang
    (2017), "Understanding Black-box Predictions via Influence Functions", §2, whose signs are the
    opposite of these.

    Nothing is written to the model: no ``.grad``, no hooks, no change of mode or of the global random
    state.

    Args:
        model: A trained model in eval mode.
        loss: ``loss(output, target) -> scalar``, or an :class:`Objective`.
        solver: How ``C + λI`` is inverted.
        source: Which curvature ``C`` is.
        blocks: Which parameters share a block; curvature between blocks is left out.
        hessian_regularization: λ, one number or one per block name; a :class:`RelativeRegularization` stands
            for a fraction of the mean eigenvalue.
        memory_budget: Bytes for caches and intermediate results beside model, data and results.
        on_failure: What to do where right-hand sides were not solved: ``"raise"`` a :class:`ConvergenceError`,
            ``"warn"`` in one line a call, or ``"ignore"`` it. :attr:`report` says what happened in each case;
            a result that is not finite is always an error.
        preflight: Look, before every fit, for parameters without effect and for a λ far outside the spectrum;
            see :attr:`preflight` for what was found.
    """

    @overload
    def influences(
        self,
        x_test: Any,
        y_test: Any = None,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
        return_bounds: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def influences(
        self,
        x_test: Any,
        y_test: Any = None,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
        return_bounds: Literal[True],
    ) -> BoundedScores: ...

    def influences(
        self,
        x_test: Any,
        y_test: Any = None,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
        return_bounds: bool = False,
    ) -> Tensor | BoundedScores:
        """Scores of every training point ``(x, y)`` for every test point.

        In mode Up the system is solved for the smaller of the two sides, which gives the same scores
        because ``(C + λI)⁻¹`` is symmetric.

        Args:
            x_test: Inputs of the test points; the first dimension counts them.
            y_test: Their targets.
            x: Inputs of the training points; with ``y`` left out too, the test points stand in.
            y: Their targets.
            mode: A member of :class:`InfluenceMode` or its value.
            measurement: ``m(outputs, batch)``, a number for every test point in place of its loss,
                ``(n_test,)``: a difference of logits, a margin. Scores are then
                ``∇m(z_test)ᵀ (C + λI)⁻¹ ∇ℓ(z)``; positive: up-weighting the training point lowers ``m``.
            return_bounds: Bound the error of every score. Needs a positive semidefinite curvature with λ > 0.
                In mode Up both sides are solved for, and their residuals correct the scores: see
                :func:`influence_framework.bounds.bounded_scores`. In mode Perturbation it costs a derivative
                along every feature of every training point.

        Returns:
            ``(n_test, n_train)`` in mode Up, ``(n_test, n_train, *features)`` in mode Perturbation; with
            ``return_bounds`` a :class:`BoundedScores` of scores and bounds of that shape.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        if not return_bounds:
            return self._total(self.influences_by_block(x_test, y_test, x, y, mode, measurement=measurement))
        return self._bounded(x_test, y_test, x, y, mode, measurement)

    @advises_on_memory(points=True)
    def influences_by_block(
        self,
        x_test: Any,
        y_test: Any = None,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
    ) -> dict[str, Tensor]:
        """Each block's part of :meth:`influences`; they add up to it."""
        fitted = self.fitted
        mode, test, train = checked_pairs(fitted, x_test, y_test, x, y, mode, measurement)
        with self.solving() as log:
            problems = measured(fitted.problem, measurement), fitted.problem
            return fitted.scores(test, train, mode, log, problems)

    @advises_on_memory(points=True)
    def token_influences(
        self,
        x_test: Any,
        y_test: Any = None,
        x: Any = None,
        y: Any = None,
        *,
        side: Literal["train", "test"] = "train",
        measurement: Measurement | None = None,
    ) -> Float[Tensor, "m n t"]:
        """What every token of the training or of the test sequences adds to :meth:`influences`.

        A sequence's loss is the sum of what its tokens add, ``ℓ_n = Σ_t ℓ_nt``, and so are scores::

            side "train":  ∇ℓ(z_test)ᵀ (C + λI)⁻¹ ∇ℓ_t(z)        one solve a test point
            side "test":   ∇ℓ_t(z_test)ᵀ (C + λI)⁻¹ ∇ℓ(z)        one solve a token of every test point

        Args:
            x_test: The test points, as for :meth:`influences`.
            y_test: Their targets.
            x: The training points; left out, the test points stand in.
            y: Their targets.
            side: Whose tokens.
            measurement: Of the test points, in place of their loss; for training tokens alone.

        Returns:
            ``(n_test, n_train, T)``, which sums over ``T`` to :meth:`influences`; zero for padding.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: An objective without losses of tokens, or what does not fit, with the remedy.
        """
        if side not in ("train", "test"):
            raise InvalidInputError(f"side is 'train' or 'test', got {side!r}.")
        if side == "test" and measurement is not None:
            raise InvalidInputError("A measurement has no tokens to take apart: use side='train'.")
        fitted = self.fitted
        _, test, train = checked_pairs(fitted, x_test, y_test, x, y, InfluenceMode.Up, measurement)
        with self.solving() as log:
            if side == "test":
                return of_test_tokens(fitted, test, train, log)
            return of_training_tokens(fitted, test, train, log, measured(fitted.problem, measurement))

    @advises_on_memory(points=True)
    def self_influences(self, x: Any, y: Any = None) -> Float[Tensor, " n"]:
        """``∇ℓ(z)ᵀ (C + λI)⁻¹ ∇ℓ(z)`` of every point: its influence on its own loss, ``(n,)``.

        High values mark points that the model had to learn by heart, wrong labels among them. The same as
        the diagonal of ``influences(x, y)``, at the cost of no pair: Feldman and Zhang (2020), "What Neural
        Networks Memorize and Why", §1, of which it is the first-order estimate.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        return self._total(self.self_influences_by_block(x, y))

    @advises_on_memory(points=True)
    def self_influences_by_block(self, x: Any, y: Any = None) -> dict[str, Tensor]:
        """Each block's part of :meth:`self_influences`; they add up to it."""
        fitted = self.fitted
        batch = checked_points(fitted, x, y, "points", outputs=fitted.layer_scorer() is None)
        with self.solving() as log:
            return fitted.self_scores(batch, log)

    @advises_on_memory(points=True)
    def residuals(self, x: Any, y: Any = None) -> Float[Tensor, " n"]:
        """Largest ``‖g − (C + λI) x̂‖ / ‖g‖`` of any block for every point's gradient ``g`` and factor ``x̂``.

        Measured against the curvature itself, at the cost of one product with it, whatever the solver: how
        far an approximation such as EK-FAC, Nyström or Arnoldi is from the inverse that it stands for.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        fitted = self.fitted
        batch = checked_points(fitted, x, y, "points")
        with self.solving() as log:
            by_block = fitted.residuals(batch, log)
        return torch.stack(list(by_block.values())).amax(0)

    @advises_on_memory(points=True)
    def explore_hessian_regularization(
        self,
        x: Any,
        y: Any,
        regularization_values: Sequence[Strength] | Strength,
        x_train: Any = None,
        y_train: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
    ) -> dict[Strength, dict[str, Tensor]]:
        """:meth:`influences_by_block` for several λ at about the cost of one.

        Gradients are computed once for all λ, and systems are solved together where the inverse can.

        Args:
            x: Inputs of the test points.
            y: Their targets.
            regularization_values: λ, the same for every block.
            x_train: Inputs of the training points; with ``y_train`` left out too, the test points stand in.
            y_train: Their targets.
            mode: A member of :class:`InfluenceMode` or its value.
            measurement: Of the test points, as for :meth:`influences`.

        Returns:
            For each λ, in the order given, the scores by block: ``(n_test, n_train)`` in mode Up,
            ``(n_test, n_train, *features)`` in mode Perturbation.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        fitted = self.fitted
        if isinstance(regularization_values, int | float | RelativeRegularization):
            regularization_values = [regularization_values]
        if not len(regularization_values):
            raise InvalidInputError("regularization_values is empty: pass at least one λ.")
        for value in regularization_values:
            check_regularization(value, "regularization_values")
        mode, test, train = checked_pairs(fitted, x, y, x_train, y_train, mode, measurement)
        problems = measured(fitted.problem, measurement), fitted.problem
        with self.solving() as log:
            return fitted.sweep(test, train, mode, list(dict.fromkeys(regularization_values)), log, problems)

    @advises_on_memory(points=True)
    def influence_factors(
        self, x: Any, y: Any = None, *, measurement: Measurement | None = None
    ) -> Float[Tensor, "n P"]:
        """``(C + λI)⁻¹ ∇ℓ(z)`` of every point, one row each, in the order of the flat vector.

        With a ``measurement``, of that in place of the loss: see :meth:`influences`.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        return self.fitted.assemble(self.influence_factors_by_block(x, y, measurement=measurement))

    @advises_on_memory(points=True)
    def influence_factors_by_block(
        self, x: Any, y: Any = None, *, measurement: Measurement | None = None
    ) -> dict[str, Tensor]:
        """Each block's columns ``(n, P_block)`` of :meth:`influence_factors`."""
        fitted = self.fitted
        batch = checked_points(fitted, x, y, "points", measurement)
        with self.solving() as log:
            return fitted.factors(batch, log, measured(fitted.problem, measurement))

    @advises_on_memory(points=True)
    def influences_from_factors(
        self,
        z_test_factors: Float[Tensor, "m P"],
        x: Any,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> Tensor:
        """Scores of training points from factors computed earlier.

        Args:
            z_test_factors: Rows of :meth:`influence_factors`, ``(m, P)``.
            x: Inputs of the training points.
            y: Their targets.
            mode: A member of :class:`InfluenceMode` or its value.

        Returns:
            ``(m, n)`` in mode Up, ``(m, n, *features)`` in mode Perturbation.
        """
        mode = InfluenceMode.parse(mode)
        fitted = self.fitted
        size = fitted.problem.parameters.numel
        check_factors(fitted, z_test_factors, size, "z_test_factors")
        train = checked_points(fitted, x, y, "training points")
        with random_state_kept():
            return fitted.contract_whole(z_test_factors, train, mode)

    @advises_on_memory(points=True)
    def query_factors(
        self, x: Any, y: Any = None, *, rank: int, measurement: Measurement | None = None, seed: int = 0
    ) -> QueryFactors:
        """:meth:`influence_factors` compressed to low rank in every layer, by ``torch.svd_lowrank``.

        A factor in a layer of ``o`` outputs and ``e`` inputs takes ``rank·(o + e)`` numbers in place of
        ``o·e``, so that more queries share one pass over the training data. Grosse et al. (2023), "Studying
        Large Language Model Generalization with Influence Functions", §3.2.2.

        Args:
            x: The queries.
            y: Their targets.
            rank: At most, of every layer's matrix; layers that would not become smaller are kept as they are.
            measurement: In place of the loss, as for :meth:`influences`.
            seed: Of the random vectors of the decomposition.

        Returns:
            For :meth:`influences_from_query`; ``error`` says what was lost of each.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        fitted = self.fitted
        batch = checked_points(fitted, x, y, "queries", measurement)
        with self.solving() as log:
            return query_factors(fitted, batch, rank, seed, log, measurement)

    @advises_on_memory(points=True)
    def influences_from_query(self, factors: QueryFactors, x: Any, y: Any = None) -> Float[Tensor, "m n"]:
        """Scores of training points with compressed queries, ``(n_queries, n_train)``, in mode Up.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: Factors of another model, or what does not fit, with the remedy.
        """
        fitted = self.fitted
        train = checked_points(fitted, x, y, "training points", outputs=not factors.layers)
        with random_state_kept():
            return scores_of(fitted, factors, train).to(fitted.problem.parameters.dtype)

    @advises_on_memory(points=True)
    def influences_from_factors_by_block(
        self,
        z_test_factors: Mapping[str, Tensor],
        x: Any,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> dict[str, Tensor]:
        """Each block's part of :meth:`influences_from_factors`, from factors by block."""
        mode = InfluenceMode.parse(mode)
        fitted = self.fitted
        if not isinstance(z_test_factors, Mapping) or set(z_test_factors) != set(fitted.blocks):
            got = sorted(z_test_factors) if isinstance(z_test_factors, Mapping) else type(z_test_factors)
            raise InvalidInputError(
                f"Expected a mapping with factors for the blocks {list(fitted.blocks)}, got {got}."
            )
        for name, block in fitted.blocks.items():
            check_factors(fitted, z_test_factors[name], block.operator.shape[0], f"z_test_factors[{name!r}]")
        train = checked_points(fitted, x, y, "training points")
        with random_state_kept():
            return fitted.contract(z_test_factors, train, mode)

    def _total(self, by_block: Mapping[str, Tensor]) -> Tensor:
        parts = iter(by_block.values())
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    @advises_on_memory(points=True)
    def _bounded(
        self,
        x_test: Any,
        y_test: Any,
        x: Any,
        y: Any,
        mode: InfluenceMode | str,
        measurement: Measurement | None,
    ) -> BoundedScores:
        fitted = self.fitted
        mode, test, train = checked_pairs(fitted, x_test, y_test, x, y, mode, measurement)
        bounded = bounded_scores if mode is InfluenceMode.Up else bounded_perturbations
        with self.solving() as log:
            return bounded(fitted, test, train, log, measured(fitted.problem, measurement))
