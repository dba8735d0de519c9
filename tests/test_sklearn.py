"""Scores of scikit-learn's estimators: closed forms, refits, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge, RidgeCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import influence_framework as inf
from influence_framework.ecosystem.penalty import Penalized
from influence_framework.ecosystem.sklearn import EstimatorInfluence
from influence_framework.operators import dense_by_columns, to_dense
from influence_framework.sources import GaussNewton

Arrays = tuple[Any, Any]


@cache
def numbers() -> Arrays:
    x, y = load_diabetes(return_X_y=True)
    return x[:90] * 20, y[:90] / 100


@cache
def flowers(classes: int = 3, noise: float = 1.5) -> Arrays:
    """Iris, blurred so that no classes are separable."""
    x, y = load_iris(return_X_y=True)
    x = x + noise * np.random.default_rng(0).normal(size=x.shape)
    return x[y < classes], y[y < classes]


def exact(**options: Any) -> LogisticRegression:
    return LogisticRegression(tol=1e-10, max_iter=2000, **options)


def with_ones(x: Any, intercept: bool) -> Any:
    return np.c_[x, np.ones(len(x))] if intercept else x


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_leaving_a_row_out_of_ridge_has_a_closed_form_in_the_scores(alpha: float, intercept: bool) -> None:
    """With q = x_iᵀ A⁻¹ x_j r_j, score/n is 2 r_i q, and the exact change (r_i + q/(1 − h_j))² − r_i²."""
    x, y = numbers()
    x, y, x_test, y_test = x[:80], y[:80], x[80:], y[80:]
    options = {"fit_intercept": intercept}

    def make() -> Any:
        return Ridge(alpha, **options) if alpha else LinearRegression(**options)

    fitted = make().fit(x, y)
    influence = EstimatorInfluence(fitted).fit(x, y)
    scores = influence.influences(x_test, y_test).to_numpy()

    z, z_test = with_ones(x, intercept), with_ones(x_test, intercept)
    penalty = alpha * np.eye(z.shape[1])
    if intercept:
        penalty[-1, -1] = 0.0
    inverse = np.linalg.inv(z.T @ z + penalty)
    r, r_test = fitted.predict(x) - y, fitted.predict(x_test) - y_test
    q = z_test @ inverse @ z.T * r
    np.testing.assert_allclose(scores / 80, 2 * r_test[:, None] * q, rtol=1e-9, atol=1e-12)

    leverage = np.einsum("np,pq,nq->n", z, inverse, z)
    np.testing.assert_allclose(influence.self_influences() / 80, 2 * r**2 * leverage, rtol=1e-9)
    change = (r_test[:, None] + q / (1 - leverage)) ** 2 - r_test[:, None] ** 2
    for j in (0, 17, 79):
        rest = np.arange(80) != j
        again = make().fit(x[rest], y[rest])
        np.testing.assert_allclose(
            (again.predict(x_test) - y_test) ** 2 - r_test**2, change[:, j], rtol=1e-7, atol=1e-11
        )


CLASSIFIERS: dict[str, tuple[int, Callable[[], Any]]] = {
    "binary": (2, exact),
    "binary, strong penalty": (2, lambda: exact(C=0.02)),
    "binary, no intercept": (2, lambda: exact(C=0.3, fit_intercept=False)),
    "binary, penalised intercept": (2, lambda: exact(C=0.05, solver="liblinear", intercept_scaling=0.5)),
    "multinomial": (3, lambda: exact(C=0.1)),
    "multinomial, no intercept": (3, lambda: exact(C=0.1, fit_intercept=False)),
    "multinomial, no penalty": (3, lambda: exact(C=np.inf, solver="newton-cholesky")),
    "pipeline": (3, lambda: make_pipeline(StandardScaler(), exact(C=0.1))),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_of_a_classifier_foretell_refits_in_rank_and_size(name: str) -> None:
    classes, make = CLASSIFIERS[name]
    x, y = flowers(classes)
    fitted = make().fit(x, y)

    def losses(model: Any) -> Any:
        return -np.log(model.predict_proba(x[::14])[range(len(x[::14])), y[::14]])

    scores = EstimatorInfluence(fitted).fit(x, y).influences(x[::14], y[::14]).to_numpy()
    points = range(0, len(x), 6)
    changes = []
    for j in points:
        rest = np.arange(len(x)) != j
        # The steps before the classifier are held as they are.
        if isinstance(fitted, Pipeline):
            again = Pipeline([("scaler", fitted[0]), ("last", exact(C=0.1))])
            again[-1].fit(fitted[0].transform(x[rest]), y[rest])
        else:
            again = make().fit(x[rest], y[rest])
        changes.append(losses(again) - losses(fitted))
    truth = np.array(changes).T
    predicted = scores[:, list(points)] / len(x)
    assert np.corrcoef(truth.ravel(), predicted.ravel())[0, 1] > 0.99
    # A refit magnifies by 1/(1 - leverage), hence a little more than one.
    slope = (truth * predicted).sum() / (predicted**2).sum()
    assert 1.0 < slope < 1.25


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_of_a_classifier_are_those_of_the_dense_formula(name: str) -> None:
    classes, make = CLASSIFIERS[name]
    x, y = flowers(classes)
    fitted = make().fit(x, y)
    last = fitted[-1] if isinstance(fitted, Pipeline) else fitted
    inputs = fitted[0].transform(x) if isinstance(fitted, Pipeline) else x
    z = torch.tensor(with_ones(inputs, last.fit_intercept))
    weight = torch.tensor(np.c_[last.coef_, last.intercept_] if last.fit_intercept else last.coef_)
    strength = 0.0 if np.isinf(last.C) else 1 / (last.C * len(x))
    decay = torch.full_like(weight, strength)
    if last.fit_intercept:
        decay[:, -1] = strength / last.intercept_scaling**2 if last.solver == "liblinear" else 0.0
    targets = torch.tensor(y)

    def each(flat: torch.Tensor) -> torch.Tensor:
        outputs = z @ flat.view_as(weight).T
        if classes == 2:
            outputs = torch.cat([torch.zeros_like(outputs), outputs], 1)
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    flat = weight.flatten()
    hessian = torch.autograd.functional.hessian(lambda v: each(v).mean(), flat) + decay.flatten().diag()
    rows = torch.autograd.functional.jacobian(each, flat)
    # The pseudo-inverse leaves out what is singular; gradients have no part in it.
    expected = rows @ torch.linalg.pinv(hessian, rtol=1e-12, hermitian=True) @ rows.T
    scores = EstimatorInfluence(fitted).fit(x, y).influences(x, y).to_numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-7, atol=1e-8 * expected.abs().max().item())


def test_several_targets_and_other_solvers() -> None:
    x, y = numbers()
    both = np.c_[y, x[:, 0] - y**2]
    fitted = Ridge(2.0).fit(x, both)
    scores = EstimatorInfluence(fitted).fit(x, both).influences(x[:4], both[:4]).to_numpy()
    alone = [
        EstimatorInfluence(Ridge(2.0).fit(x, t)).fit(x, t).influences(x[:4], t[:4]).to_numpy() for t in both.T
    ]
    # A loss is the mean over the targets, each of which has its own part of the system.
    np.testing.assert_allclose(scores, (alone[0] + alone[1]) / 2, rtol=1e-8, atol=1e-10)
    solver = {"name": "cg", "rtol": 1e-12, "maxiter": 1000}
    iterated = EstimatorInfluence(fitted, solver=solver).fit(x, both).influences(x[:4], both[:4])
    np.testing.assert_allclose(iterated, scores, rtol=1e-6, atol=1e-8)


def test_frames_keep_their_indices_and_labels_may_be_words() -> None:
    x, y = flowers(2)
    frame = pd.DataFrame(x, columns=list("abcd"), index=[f"flower {i}" for i in range(len(x))])
    words = pd.Series(np.where(y == 1, "zinnia", "aster"), index=frame.index)
    fitted = exact().fit(frame, words)
    influence = EstimatorInfluence(fitted).fit(frame, words)
    scores = influence.influences(frame.iloc[[5, 2]], words.iloc[[5, 2]])
    assert list(scores.index) == ["flower 5", "flower 2"]
    assert scores.columns.equals(frame.index)
    assert influence.self_influences().index.equals(frame.index)
    assert scores.loc["flower 5", "flower 5"] == pytest.approx(influence.self_influences()["flower 5"])
    plain = EstimatorInfluence(exact().fit(x, y)).fit(x, y).influences(x[[5, 2]], y[[5, 2]])
    np.testing.assert_allclose(scores, plain, rtol=1e-6, atol=1e-9)
    assert list(plain.index) == [0, 1]


def test_a_dependent_feature_needs_a_regularisation() -> None:
    x, y = numbers()
    doubled = np.c_[x, x[:, :1] + x[:, 1:2]]
    fitted = LinearRegression().fit(doubled, y)
    with pytest.raises(inf.SingularOperatorError):
        EstimatorInfluence(fitted).fit(doubled, y)
    damped = (
        EstimatorInfluence(fitted, hessian_regularization=1e-9).fit(doubled, y).influences(x_more := doubled, y)
    )
    plain = EstimatorInfluence(LinearRegression().fit(x, y)).fit(x, y).influences(x, y)
    assert len(x_more) == len(damped)
    np.testing.assert_allclose(damped, plain, rtol=1e-3, atol=1e-5)


def test_the_operator_is_what_its_products_say() -> None:
    net = torch.nn.Linear(3, 2, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(9, 3, dtype=torch.float64, generator=generator), torch.arange(9) % 2)]
    problem = inf.Problem.build(net, torch.nn.CrossEntropyLoss(), data)
    source = Penalized(GaussNewton(), {"weight": 0.3}, frozenset({"bias"}))
    operator = source.operator(problem, problem.parameters)
    plain = to_dense(GaussNewton().operator(problem, problem.parameters))
    added = torch.diag(torch.tensor([0.3] * 6 + [0.0] * 2, dtype=torch.float64))
    added[6:, 6:] += 0.5
    torch.testing.assert_close(to_dense(operator), plain + added)
    torch.testing.assert_close(dense_by_columns(operator), plain + added)
    assert operator.positive_semidefinite is True  # type: ignore[attr-defined]
    with pytest.raises(inf.InvalidInputError, match=r"named for head; .* are weight, bias"):
        Penalized(GaussNewton(), {"head": 1.0}).operator(problem, problem.parameters)


def fit(estimator: Any, data: Arrays | None = None) -> Callable[[], Any]:
    x, y = data or flowers()
    return lambda: EstimatorInfluence(estimator.fit(x, y)).fit(x, y)


def ovr() -> Any:
    """A classifier whose probabilities are not those of a softmax."""
    x, y = flowers()
    fitted = exact().fit(x, y)
    fitted.predict_proba = lambda _: np.full((len(x), 3), 1 / 3)
    return EstimatorInfluence(fitted).fit(x, y)


def used(what: str) -> Any:
    x, y = flowers(2)
    frame, series = pd.DataFrame(x), pd.Series(y)
    influence = EstimatorInfluence(exact().fit(x, y))
    actions: dict[str, Callable[[], Any]] = {
        "other rows": lambda: influence.fit(x[10:], y[10:]),
        "other indices": lambda: influence.fit(frame, series[::-1]),
        "other lengths": lambda: influence.fit(x, y[1:]),
        "other features": lambda: influence.fit(x[:, 1:], y),
        "an unknown class": lambda: influence.fit(x, y + 1),
        "several columns": lambda: influence.fit(x, np.c_[y, y]),
    }
    return actions[what]()


def weighted() -> Any:
    x, y = flowers(2)
    fitted = exact().fit(x, y, sample_weight=1 + np.arange(len(x)) % 3)
    return EstimatorInfluence(fitted).fit(x, y)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another estimator": (
        lambda: EstimatorInfluence(Lasso()),
        "Ridge or LinearRegression.*got Lasso",
    ),
    "a search": (lambda: EstimatorInfluence(RidgeCV()), r"got RidgeCV.*with the parameters"),
    "another meta-estimator": (
        lambda: EstimatorInfluence(OneVsRestClassifier(exact())),
        "got OneVsRestClassifier",
    ),
    "a class": (lambda: EstimatorInfluence(Ridge), "got the class Ridge"),
    "L1": (
        fit(LogisticRegression(l1_ratio=1.0, solver="saga", tol=10.0)),
        "L1 penalty has no second derivative",
    ),
    "class weights": (fit(exact(class_weight="balanced")), "class_weight=None"),
    "bounds": (fit(Ridge(positive=True), numbers()), "positive=True"),
    "an alpha a target": (
        fit(Ridge([1.0, 2.0]), (numbers()[0], np.c_[numbers()[1], numbers()[1]])),
        "alpha for each target",
    ),
    "not a softmax": (ovr, r"predictions differ .* One-vs-rest"),
    "sample weights": (weighted, r"do not minimise .* sample_weight"),
    "not to the end": (lambda: unfinished(), r"do not minimise .* raise max_iter"),
    "an exact fit": (
        lambda: fit(LinearRegression(), (numbers()[0], numbers()[0] @ np.arange(10.0) + 3))(),
        "fits its training data exactly",
    ),
    "other rows": (lambda: used("other rows"), "do not minimise .* very data"),
    "other indices": (lambda: used("other indices"), r"different indices.*y\.loc\[X\.index\]"),
    "other lengths": (lambda: used("other lengths"), r"100 training rows and 99 targets"),
    "other features": (lambda: used("other features"), r"rows of 4 features, got shape \(100, 3\)"),
    "an unknown class": (lambda: used("an unknown class"), r"targets hold 2; .* classes 0, 1"),
    "several columns": (lambda: used("several columns"), r"one class for each training row"),
    "one target of two": (
        lambda: EstimatorInfluence(Ridge().fit(*numbers())).fit(numbers()[0], numbers()[0][:, :2]),
        "Expected 1 targets",
    ),
}


def unfinished() -> Any:
    x, y = flowers(2)
    return EstimatorInfluence(exact(C=10.0).fit(x, y).set_params(C=0.01)).fit(x, y)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    action, message = REFUSED[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        action()


def test_before_fits() -> None:
    with pytest.raises(NotFittedError):
        EstimatorInfluence(Ridge())
    influence = EstimatorInfluence(Ridge().fit(*numbers()))
    for action in (
        lambda: influence.influences(*numbers()),
        influence.self_influences,
        lambda: influence.model,
    ):
        with pytest.raises(inf.NotFittedError, match=r"fit\(X, y\)"):
            action()


@pytest.mark.parametrize(
    ("module", "distribution"), [("pandas", "pandas"), ("sklearn.pipeline", "scikit-learn")]
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, module: str, distribution: str) -> None:
    fitted = Ridge().fit(*numbers())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {distribution}: .*influence-framework\[sklearn\]"):
        EstimatorInfluence(fitted)


def test_neither_is_imported_before_it_is_used() -> None:
    program = (
        "import sys, influence_framework.ecosystem.sklearn\n"
        "sys.exit(bool({'sklearn', 'pandas'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_measurement_in_place_of_the_loss() -> None:
    """Of ridge regression the gradient of a prediction is (x, 1), and that of the loss 2 r (x, 1)."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(20, 3)), generator.normal(size=20)
    fitted = Ridge(2.0).fit(x, y)
    influence = EstimatorInfluence(fitted).fit(x, y)
    ones = np.hstack([x, np.ones((20, 1))])
    penalty = np.diag([2.0, 2.0, 2.0, 0.0]) / 20
    curvature = 2 * (ones.T @ ones / 20 + penalty)
    residual = fitted.predict(x) - y
    expected = ones[:4] @ np.linalg.solve(curvature, (2 * residual[:, None] * ones).T)
    found = influence.influences(x[:4], y[:4], measurement=lambda outputs, batch: outputs.flatten()).to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
