"""Influence in fitted scikit-learn estimators, as data frames."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence_framework.compose import Spec, compose, resolve
from influence_framework.ecosystem.penalty import Penalized
from influence_framework.errors import InvalidInputError, NotFittedError
from influence_framework.influence import TorchInfluenceFunctionModel
from influence_framework.measurement import Measurement
from influence_framework.protocols import Solver

if TYPE_CHECKING:
    import pandas as pd

SUPPORTED = ("LogisticRegression", "Ridge", "LinearRegression")

SAME = 1e-8
"""How far predictions of the estimator and of the net may differ, relative to their size."""

MINIMUM = 1e-2
"""Distance from the minimum, as a share of that of an estimator fitted to other data of the same kind."""


@dataclass(frozen=True, eq=False)
class Converted:
    """A linear estimator as a net, with the loss and penalty that it was fitted with.

    Attributes:
        net: ``torch.nn.Linear`` in float64.
        loss: Of one sample.
        weight_decay: By parameter name, in the units of the mean loss.
        free: See :class:`~influence_framework.ecosystem.penalty.Penalized`.
    """

    net: nn.Linear
    loss: nn.Module
    weight_decay: dict[str, float]
    free: frozenset[str]


class EstimatorInfluence:
    """Scores of training rows for test rows, of a fitted scikit-learn estimator.

    Takes ``LogisticRegression``, ``Ridge`` and ``LinearRegression``, alone or as the last step of a
    ``Pipeline``, whose other steps are held as they are. The estimator becomes a ``torch.nn.Linear`` in
    float64. With ``n`` training rows, ``k`` targets, ``w`` the coefficients and ``b`` the intercepts, which are
    not penalised, scikit-learn minimises ``n`` or ``n/C`` times ::

        LogisticRegression   1/n Σ ℓ_i + λ/2 ‖w‖²    ℓ_i = −log p(y_i | x_i)         λ = 1/(C·n)
        Ridge                1/n Σ ℓ_i + λ/2 ‖w‖²    ℓ_i = ‖y_i − w·x_i − b‖² / k    λ = 2·alpha/(n·k)
        LinearRegression     the same                the same                        λ = 0

    (with ``solver="liblinear"``, ``λ/2 (b/intercept_scaling)²`` besides), and scores are ::

        score(z_test, z) = ∇ℓ(z_test)ᵀ H⁻¹ ∇ℓ(z),    H = ∇²(1/n Σ ℓ_i + λ/2 ‖w‖²) + hessian_regularization·I

    Positive: the training row helped, that is, up-weighting it lowers the loss of the test row. Fitting again
    without row ``j``, with ``C`` or ``alpha`` as they are, changes the loss of test row ``i`` by about
    ``+score[i, j]/n``.

    Args:
        estimator: A fitted estimator or pipeline.
        solver: How ``H`` is inverted: a name, a mapping with options, or an instance.
        hessian_regularization: Added to ``H`` for all parameters; for a ``LinearRegression`` whose features are
            linearly dependent, say.

    Raises:
        ModuleNotFoundError: scikit-learn or pandas is not installed.
        InvalidInputError: Another estimator, or one with options that have no smooth, unweighted objective.
    """

    def __init__(
        self, estimator: Any, *, solver: Spec | Solver = "direct", hessian_regularization: float = 0.0
    ) -> None:
        validation = _needed("sklearn.utils.validation", "scikit-learn")
        _needed("pandas", "pandas")
        self.estimator = estimator
        self._steps, self._last = _taken_apart(estimator)
        validation.check_is_fitted(self._last)
        _check_options(self._last)
        self.solver: Solver = resolve("solver", solver)
        self.hessian_regularization = hessian_regularization
        self._model: TorchInfluenceFunctionModel | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.estimator!r}, solver={self.solver!r})"

    @property
    def model(self) -> TorchInfluenceFunctionModel:
        """The influence model of the net, over the features that the estimator itself is given.

        Raises:
            NotFittedError: Before ``fit``.
        """
        if self._model is None:
            raise NotFittedError("Call fit(X, y) with the data that the estimator was fitted to first.")
        return self._model

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Measure the curvature at the estimator's coefficients; the estimator itself is not fitted again.

        Args:
            X: The rows that the estimator was fitted to.
            y: Their targets.

        Raises:
            InvalidInputError: The net's predictions are not the estimator's, or its coefficients do not
                minimise the objective on this data: it was fitted to other data, with sample weights, or not to
                the end.
        """
        features, targets, index = self._rows(X, y, "training")
        made = _converted(self._last, len(features), targets)
        self._compare(made, X, features)
        source = Penalized(resolve("source", "gauss_newton"), made.weight_decay, made.free)
        model = compose(
            made.net,
            made.loss,
            solver=self.solver,
            source=source,
            hessian_regularization=self.hessian_regularization,
        )
        model.fit([(features, targets)])
        self_influences = model.self_influences(features, targets)
        _check_minimum(model, made, features, targets, float(self_influences.mean()))
        self._model, self._train = model, (features, targets, index, self_influences)
        return self

    def influences(
        self,
        X_test: Any,  # noqa: N803
        y_test: Any,
        *,
        measurement: Measurement | None = None,
    ) -> pd.DataFrame:
        """Scores of every training row for every test row.

        Args:
            X_test: Test rows.
            y_test: Their targets.
            measurement: Of the test rows, in place of their loss, as the ``influences`` of a model takes it.

        Returns:
            A row for every test row and a column for every training row, under the indices of ``X_test`` and of
            the ``X`` of ``fit`` where they are data frames, else numbered.

        Raises:
            NotFittedError: Before ``fit``.
            InvalidInputError: Rows and targets that do not fit each other or the estimator.
        """
        model = self.model
        x, y, index, _ = self._train
        features, targets, test_index = self._rows(X_test, y_test, "test")
        scores = model.influences(features, targets, x, y, measurement=measurement)
        pandas = _needed("pandas", "pandas")
        return pandas.DataFrame(scores.numpy(), index=test_index, columns=index)

    def self_influences(self) -> pd.Series:
        """Every training row's influence on its own loss, ``∇ℓ(z)ᵀ H⁻¹ ∇ℓ(z)``; high values mark odd labels.

        Returns:
            Under the index of the training rows.

        Raises:
            NotFittedError: Before ``fit``.
        """
        _ = self.model
        _, _, index, values = self._train
        pandas = _needed("pandas", "pandas")
        return pandas.Series(values.numpy(), index=index, name="self_influence")

    def _rows(self, X: Any, y: Any, which: str) -> tuple[Float[Tensor, "n d"], Tensor, Any]:  # noqa: N803
        """Features as the last step takes them, targets as the loss takes them, and the index of the rows."""
        pandas = _needed("pandas", "pandas")
        frame = isinstance(X, pandas.DataFrame)
        if frame and isinstance(y, pandas.Series | pandas.DataFrame) and not X.index.equals(y.index):
            raise InvalidInputError(
                f"The {which} rows and targets have different indices: rows would be taken for others. Pass "
                "y.loc[X.index], or arrays."
            )
        features = self._features(X)
        values = np.asarray(y)
        if len(values) != len(features):
            raise InvalidInputError(f"There are {len(features)} {which} rows and {len(values)} targets.")
        taken = _classes if _classifies(self._last) else _numbers
        targets = taken(self._last, values, which)
        return features, targets, X.index if frame else pandas.RangeIndex(len(features))

    def _features(self, X: Any) -> Float[Tensor, "n d"]:  # noqa: N803
        features = X if self._steps is None else self._steps.transform(X)
        if hasattr(features, "toarray"):
            features = features.toarray()
        array = np.asarray(features)
        if array.ndim != 2 or array.shape[1] != self._last.n_features_in_:
            raise InvalidInputError(
                f"Expected rows of {self._last.n_features_in_} features, got shape {array.shape}."
            )
        return torch.tensor(array.astype(np.float64))

    def _compare(self, made: Converted, X: Any, features: Float[Tensor, "n d"]) -> None:  # noqa: N803
        """Raise unless the net predicts what the estimator does, by the estimator's own methods."""
        with torch.no_grad():
            outputs = made.net(features)
        if _classifies(self._last):
            expected = self.estimator.predict_proba(X)
            positive = outputs.sigmoid()
            found = outputs.softmax(1) if outputs.shape[1] > 1 else torch.cat([1 - positive, positive], 1)
        else:
            expected, found = self.estimator.predict(X), outputs
        difference = np.abs(np.asarray(expected, np.float64).reshape(found.shape) - found.numpy()).max()
        if not difference <= SAME * max(1.0, float(found.abs().max())):
            raise InvalidInputError(
                f"The net's predictions differ from those of the {type(self._last).__name__} by up to "
                f"{difference:.1e}: it is not the linear model that its class says. One-vs-rest classifiers of "
                "more than two classes are not supported; pass data in float64."
            )


def _needed(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"EstimatorInfluence needs {distribution}: pip install 'influence-framework[sklearn]'",
            name=error.name,
        ) from error


def _taken_apart(estimator: Any) -> tuple[Any, Any]:
    """The steps before the last one, if there are any, and the last one."""
    linear = _needed("sklearn.linear_model", "scikit-learn")
    pipeline = _needed("sklearn.pipeline", "scikit-learn").Pipeline
    steps, last = None, estimator
    if isinstance(estimator, pipeline):
        last = estimator.steps[-1][1]
        steps = estimator[:-1] if len(estimator.steps) > 1 else None
    if type(last) not in [getattr(linear, name) for name in SUPPORTED]:
        got = f"the class {last.__name__}" if isinstance(last, type) else type(last).__name__
        raise InvalidInputError(
            f"Expected a fitted {', '.join(SUPPORTED[:-1])} or {SUPPORTED[-1]}, or a Pipeline that ends in "
            f"one, got {got}. Of a search or a ...CV estimator, fit one of these with the parameters it found."
        )
    return steps, last


def _classifies(last: Any) -> bool:
    return hasattr(last, "classes_")


def _check_options(last: Any) -> None:
    """Raise for what has another objective than the one that is differentiated."""
    if _classifies(last):
        penalty = getattr(last, "penalty", "l2")
        if penalty not in ("l2", None, "none", "deprecated") or getattr(last, "l1_ratio", None):
            raise InvalidInputError(
                "The L1 penalty has no second derivative: fit the LogisticRegression with an L2 penalty."
            )
        if last.class_weight is not None:
            raise InvalidInputError(
                "class_weight weighs the training rows, and scores are of rows that all weigh the same: fit "
                "the LogisticRegression with class_weight=None."
            )
    elif getattr(last, "positive", False):
        raise InvalidInputError(
            f"The {type(last).__name__} was fitted with positive=True: at a bound, its coefficients do not "
            "move with the data as the formula has it. Fit it with positive=False."
        )
    elif np.ndim(getattr(last, "alpha", 0.0)) > 0:
        raise InvalidInputError("A Ridge with an alpha for each target is one model a target: fit them apart.")


def _converted(last: Any, size: int, targets: Tensor) -> Converted:
    weight = np.atleast_2d(np.asarray(last.coef_, np.float64))
    outputs, features = weight.shape
    net = nn.Linear(features, outputs, bias=bool(last.fit_intercept), dtype=torch.float64).eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
        if last.fit_intercept:
            net.bias.copy_(torch.tensor(np.asarray(last.intercept_, np.float64)).expand(outputs))
    if not _classifies(last):
        strength = 2 * float(getattr(last, "alpha", 0.0)) / targets.numel()
        return Converted(net, nn.MSELoss(), {"weight": strength}, frozenset())
    unpenalised = getattr(last, "penalty", "l2") in (None, "none") or math.isinf(last.C)
    strength = 0.0 if unpenalised else 1 / (last.C * size)
    decay = {"weight": strength}
    if last.fit_intercept and last.solver == "liblinear":
        decay["bias"] = strength / last.intercept_scaling**2
    free = frozenset(name for name, _ in net.named_parameters() if outputs > 1 and not decay.get(name, 0.0))
    loss = nn.CrossEntropyLoss() if outputs > 1 else nn.BCEWithLogitsLoss()
    return Converted(net, loss, decay, free)


def _classes(last: Any, values: Any, which: str) -> Tensor:
    """Positions in ``classes_``, as numbers ``(n, 1)`` where there are two."""
    classes = last.classes_
    if values.ndim != 1:
        raise InvalidInputError(f"Expected one class for each {which} row, got targets {values.shape}.")
    known = np.isin(values, classes)
    if not known.all():
        strange = sorted(set(map(str, values[~known])))[:5]
        raise InvalidInputError(
            f"The {which} targets hold {', '.join(strange)}; the estimator knows the classes "
            f"{', '.join(map(str, classes))}."
        )
    positions = torch.tensor(np.searchsorted(classes, values))
    return positions[:, None].double() if len(classes) == 2 else positions


def _numbers(last: Any, values: Any, which: str) -> Float[Tensor, "n k"]:
    numbers = torch.tensor(values.astype(np.float64))
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    outputs = np.atleast_2d(last.coef_).shape[0]
    if numbers.ndim != 2 or numbers.shape[1] != outputs:
        raise InvalidInputError(f"Expected {outputs} targets for each {which} row, got targets {values.shape}.")
    return numbers


def _check_minimum(
    model: TorchInfluenceFunctionModel, made: Converted, x: Tensor, y: Tensor, mean_self_influence: float
) -> None:
    """Raise unless the gradient ``g`` of the objective is small: ``n·gᵀH⁻¹g`` beside the mean self-influence.

    The two are about equal for coefficients fitted to other data of the same distribution, in whatever units
    features and targets are: ``E[g gᵀ] = 1/n E[∇ℓ ∇ℓᵀ]`` there.
    """
    with torch.enable_grad():
        copies = {name: p.detach().requires_grad_() for name, p in made.net.named_parameters()}
        outputs = torch.func.functional_call(made.net, copies, (x,))
        penalty = sum(rate / 2 * copies[name].square().sum() for name, rate in made.weight_decay.items())
        parts = torch.autograd.grad(made.loss(outputs, y) + penalty, list(copies.values()))
    gradient = torch.cat([part.flatten() for part in parts])
    distance = len(x) * float(gradient @ (model.inverses["full"] @ gradient))
    scale = float(y.double().square().mean() + outputs.detach().square().mean())
    if mean_self_influence <= torch.finfo(torch.float64).eps * scale:
        raise InvalidInputError(
            "The estimator fits its training data exactly: every gradient is zero, and scores would be "
            "rounding."
        )
    if not distance <= MINIMUM * mean_self_influence:
        raise InvalidInputError(
            "The coefficients do not minimise the estimator's objective on this data: the gradient there is "
            f"{distance / mean_self_influence:.1e} of what it would be on other data of the same kind, where "
            f"less than {MINIMUM} was expected. Pass the very data that it was fitted to, without "
            "sample_weight, and fit it to the end: scale the features, raise max_iter, lower tol."
        )
