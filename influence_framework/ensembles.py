"""Scores averaged over several models, such as checkpoints or seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch
from influence_framework.errors import InvalidInputError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.measurement import Measurement
from influence_framework.protocols import InfluenceMode
from influence_framework.regularization import Regularization


def ensemble(
    models: Mapping[str, TorchInfluenceFunctionModel] | Sequence[TorchInfluenceFunctionModel],
) -> EnsembleModel:
    """One influence model out of several, whose scores are the mean of theirs.

    For checkpoints of one training, or for nets of one architecture from several seeds, on the same training
    data: what one net owes to its seed averages out, which raises the linear datamodeling score of every
    method.
    Park et al. (2023), "TRAK: Attributing Model Behavior at Scale", §3.3 and §5.

    Args:
        models: By name, or in order with the names ``"0"``, ``"1"``, …; fitted or not.

    Raises:
        InvalidInputError: There is none, or one is no influence model.
    """
    named = models if isinstance(models, Mapping) else {str(i): model for i, model in enumerate(models)}
    return EnsembleModel(named)


class EnsembleModel:
    """The mean of several influence models, itself one: see :func:`ensemble`.

    ``score(z_test, z) = 1/K Σ_k ∇ℓ_k(z_test)ᵀ (C_k + λ_k I)⁻¹ ∇ℓ_k(z)``, with the signs and units of a single
    model: removing the training point from ``n`` changes the test loss, averaged over the models, by about
    ``+score/n``.

    Args:
        models: The members by name.
    """

    def __init__(self, models: Mapping[str, TorchInfluenceFunctionModel]) -> None:
        if not models:
            raise InvalidInputError("An ensemble has at least one influence model; none was given.")
        for name, model in models.items():
            if not isinstance(model, TorchInfluenceFunctionModel):
                raise InvalidInputError(
                    f"The member {name!r} is a {type(model).__name__}; expected influence models, as compose() "
                    "returns them."
                )
        self.models = dict(models)

    def __repr__(self) -> str:
        return f"EnsembleModel({self.models!r})"

    @property
    def is_fitted(self) -> bool:
        """Whether all members are."""
        return all(model.is_fitted for model in self.models.values())

    def fit(self, data: Iterable[Batch]) -> Self:
        """Fit every member to the same training data; returns itself.

        Raises:
            InvalidInputError: Of the first member that cannot be fitted.
        """
        for model in self.models.values():
            model.fit(data)
        return self

    def with_regularization(self, hessian_regularization: Regularization) -> EnsembleModel:
        """The same members at another λ; these stay as they are."""
        return EnsembleModel(
            {name: model.with_regularization(hessian_regularization) for name, model in self.models.items()}
        )

    def influences(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
    ) -> Tensor:
        """Mean of the members' scores, ``(n_test, n_train)``, or ``(n_test, n_train, *features)``.

        With a ``measurement`` of the test points in place of their loss, as a single model takes it.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: What does not fit, with the remedy.
        """
        members = self.influences_by_member(x_test, y_test, x, y, mode, measurement=measurement)
        return _mean(list(members.values()))

    def influences_by_member(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
        *,
        measurement: Measurement | None = None,
    ) -> dict[str, Tensor]:
        """The scores of each member, by name; their mean is that of :meth:`influences`."""
        return {
            name: model.influences(x_test, y_test, x, y, mode, measurement=measurement)
            for name, model in self.models.items()
        }

    def self_influences(self, x: Any, y: Any) -> Float[Tensor, " n"]:
        """Mean of the members' self-influences, ``(n,)``."""
        return _mean([model.self_influences(x, y) for model in self.models.values()])

    def influence_factors(
        self, x: Any, y: Any, *, measurement: Measurement | None = None
    ) -> Float[Tensor, "n P"]:
        """The members' factors side by side, ``(n, ΣP)`` in the order of the members."""
        found = [model.influence_factors(x, y, measurement=measurement) for model in self.models.values()]
        return torch.cat(found, dim=1)

    def influences_from_factors(
        self,
        z_test_factors: Float[Tensor, "m P"],
        x: Any,
        y: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> Tensor:
        """Scores from rows of :meth:`influence_factors`; see there.

        Raises:
            InvalidInputError: The factors are not as wide as those of all members together.
        """
        sizes = [model.fitted.problem.parameters.numel for model in self.models.values()]
        if z_test_factors.ndim != 2 or z_test_factors.shape[1] != sum(sizes):
            raise InvalidInputError(
                f"z_test_factors must be (m, {sum(sizes)}), the rows that influence_factors returns; got "
                f"{tuple(z_test_factors.shape)}."
            )
        parts = z_test_factors.split(sizes, dim=1)
        members = zip(self.models.values(), parts, strict=True)
        return _mean([model.influences_from_factors(part, x, y, mode) for model, part in members])


def _mean(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / len(parts)
