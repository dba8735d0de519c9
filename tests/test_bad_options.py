"""Options and arguments of scores that cannot be right are refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from influence_framework_cg import CgSolver, JacobiSolver
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.inverses import Inverse, make_solution
from tests import nets
from tests.small import Action, batches, fit, fitted, model, net, points

pytestmark = pytest.mark.usefixtures("as_user")

NAN, INF = float("nan"), float("inf")


def named(**options: Any) -> Action:
    return lambda: inf.compose(net(), nn.CrossEntropyLoss(), **({"solver": "direct"} | options))


NAMES: dict[str, tuple[Action, type[Exception], str]] = {
    "solver": (
        named(solver="driect"),
        inf.UnknownMethodError,
        "solver 'driect'. Did you mean 'direct'.*cg, direct",
    ),
    "source": (
        named(source="gauss"),
        inf.UnknownMethodError,
        "curvature source 'gauss'.*Installed: .*gauss_newton",
    ),
    "option": (
        named(solver={"name": "cg", "rtoll": 1}),
        inf.UnknownOptionError,
        "no option 'rtoll'.*'rtol'.*maxiter",
    ),
    "source option": (
        named(source={"name": "hessian", "precompute": True}),
        inf.UnknownOptionError,
        "'hessian' has no option 'precompute'.*precompute_grad",
    ),
    "mapping without name": (
        named(solver={"rtol": 1.0}),
        inf.UnknownOptionError,
        r"needs the key 'name', got \['rtol'\]",
    ),
    "a class": (
        named(solver=CgSolver),
        inf.InvalidInputError,
        r"class CgSolver as solver: pass an instance, CgSolver\(\.\.\.\)",
    ),
    "not a solver": (named(solver=3), inf.InvalidInputError, "solver as a name, .* got int"),
    "not a source": (named(source=3), inf.InvalidInputError, "curvature source as a name, .* got int"),
}


@pytest.mark.parametrize("what", NAMES)
def test_names(what: str) -> None:
    action, error, message = NAMES[what]
    with pytest.raises(error, match=message):
        action()


MODES = ["Perturbation", "Up", "perturb", "", None, 1]


@pytest.mark.parametrize("mode", MODES)
def test_pitfall_an_unknown_mode_is_refused(mode: Any) -> None:
    influence = fitted()
    factors, by_block = (
        influence.influence_factors(*points(2)),
        influence.influence_factors_by_block(*points(2)),
    )
    for action in (
        lambda: influence.influences(*points(2), mode=mode),
        lambda: influence.influences_by_block(*points(2), mode=mode),
        lambda: influence.influences_from_factors(factors, *points(2), mode=mode),
        lambda: influence.influences_from_factors_by_block(by_block, *points(2), mode=mode),
    ):
        with pytest.raises(inf.InvalidInputError, match=r"Unknown influence mode .*'up', 'perturbation'"):
            action()


def test_the_nearest_mode_is_suggested() -> None:
    with pytest.raises(inf.InvalidInputError, match=r"'Perturbation'.* Did you mean 'perturbation'\?"):
        fitted().influences(*points(2), mode="Perturbation")


def strengths(value: Any, blocks: str = "full") -> Action:
    return fit(hessian_regularization=value, blocks=blocks)


REGULARIZATION: dict[str, tuple[Any, str]] = {
    "negative": (-1.0, "finite and not negative, got -1.0"),
    "NaN": (NAN, "finite and not negative, got nan"),
    "infinite": (INF, "finite and not negative, got inf"),
    "bool": (True, "is a number, .* or a mapping .* is True"),
    "string": ("0.1", "is a number, .* or a mapping .* is '0.1'"),
    "None": (None, "is a number, .* or a mapping .* is None"),
    "negative in a mapping": ({"full": -1.0}, "not negative, got -1.0 for 'full'"),
    "bool in a mapping": ({"full": True}, "'full' is True"),
    "unknown block": (
        {"full": 1.0, "fll": 1.0},
        "names the block 'fll', which does not exist. Did you mean 'full'",
    ),
    "missing block": ({}, "no value for the blocks full: name every block, or pass one number"),
}


@pytest.mark.parametrize("what", REGULARIZATION)
def test_regularization(what: str) -> None:
    value, message = REGULARIZATION[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        fit(hessian_regularization=value)()
    influence = fitted()
    before = influence.influences(*points(2))
    with pytest.raises(inf.InvalidInputError, match=message):
        influence.with_regularization(value)
    assert torch.equal(influence.influences(*points(2)), before)


@pytest.mark.parametrize("value", [-1.0, NAN, True, "0.1", {"full": INF}])
def test_what_needs_no_data_is_refused_before_the_fit(value: Any) -> None:
    with pytest.raises(inf.InvalidInputError, match="regularisation"):
        model(hessian_regularization=value)


@pytest.mark.parametrize("budget", [0, -1])
def test_memory_budget(budget: int) -> None:
    with pytest.raises(
        inf.InvalidInputError, match=f"memory_budget is a positive number of bytes, got {budget}"
    ):
        model(memory_budget=budget)


ALL = ["0.weight", "0.bias", "2.weight", "2.bias"]
BLOCKS: dict[str, tuple[Any, str]] = {
    "unknown word": ("per-layer", r"block structure 'per-layer'; .*'per_parameter'.*Did you mean 'per_layer'"),
    "not a mapping": (ALL, "a word or a mapping from block name to parameter names, not list"),
    "overlap": ({"a": ALL, "b": ["2.bias"]}, "'2.bias' is in block 'a' and in block 'b': .*exactly one"),
    "twice in one": ({"a": [*ALL, "2.bias"]}, "'2.bias' is in block 'a' and in block 'a'"),
    "missing": ({"a": ALL[:2]}, r"in no block: 2.weight, 2.bias. Add them .*requires_grad_\(False\)"),
    "unknown name": (
        {"a": [*ALL, "2.wieght"]},
        "'2.wieght', which is not a trainable .*Did you mean '2.weight'.*Known",
    ),
    "empty": ({"a": ALL, "b": []}, "Block 'b' has no parameter: remove it or fill it"),
    "no block": ({}, "in no block: 0.weight"),
    "a string": (
        {"a": "0.weight"},
        r"must list parameter names, got the string '0.weight': write \['0.weight'\]",
    ),
}


@pytest.mark.parametrize("what", BLOCKS)
def test_blocks(what: str) -> None:
    blocks, message = BLOCKS[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        fit(blocks=blocks)()


def test_a_frozen_parameter_belongs_to_no_block() -> None:
    module = nets.frozen(net(), "0.")
    with pytest.raises(inf.InvalidInputError, match=r"'0\.weight', which is not a trainable parameter"):
        model(module, blocks={"all": ALL}).fit(batches())


CG: dict[str, tuple[dict[str, Any], str]] = {
    "negative rtol": ({"rtol": -1e-3}, "rtol must be finite and not negative, got -0.001"),
    "NaN rtol": ({"rtol": NAN}, "rtol must be finite"),
    "string rtol": ({"rtol": "1e-3"}, "rtol must be finite .* got '1e-3'"),
    "infinite atol": ({"atol": INF}, "atol must be finite"),
    "no iterations": ({"maxiter": 0}, "maxiter must be a positive integer or None, got 0"),
    "half an iteration": ({"maxiter": 2.5}, "maxiter must be a positive integer or None, got 2.5"),
    "x0 as a list": ({"x0": [0.0]}, "x0 must be a tensor or None, got list"),
    "direct as preconditioner": (
        {"preconditioner": "direct"},
        "DirectSolver cannot precondition 'cg': .*'jacobi'",
    ),
    "itself as preconditioner": (
        {"preconditioner": CgSolver()},
        r"fixed symmetric positive definite .*\(fixed = True\)",
    ),
    "no preconditioner at all": ({"preconditioner": 3}, "preconditioner must be a solver instance .* got 3"),
    "a class": ({"preconditioner": JacobiSolver}, "preconditioner must be a solver instance"),
}


@pytest.mark.parametrize("what", CG)
def test_cg(what: str) -> None:
    options, message = CG[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        model(solver={"name": "cg", **options})


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (torch.zeros(3), r"x0 must be \(26,\) or \(26, 4\) .* got \(3,\)"),
        (torch.zeros(26), "x0 is torch.float32 .* right-hand sides torch.float64"),
        (torch.zeros(26, device="meta").double(), "x0 is torch.float64 on meta"),
    ],
)
def test_cg_with_an_x0_that_does_not_fit(x0: Tensor, message: str) -> None:
    with pytest.raises(inf.InvalidInputError, match=message):
        fitted(solver=CgSolver(x0=x0)).influences(*points())


@dataclass(frozen=True)
class ReturnsNothing:
    fixed: ClassVar[bool] = True

    def fit(self, operator: inf.LinearOperator, regularization: float) -> Any:
        """Fits, as is tempting, in place."""


def test_pitfall_a_preconditioner_that_returns_nothing_is_refused() -> None:
    with pytest.raises(
        inf.InvalidInputError, match=r"ReturnsNothing.fit returned NoneType .* \(26, 26\) was expected"
    ):
        fitted(solver=CgSolver(preconditioner=ReturnsNothing()))


def test_a_solver_that_returns_nothing_is_refused() -> None:
    with pytest.raises(inf.InfluenceError, match=r"ReturnsNothing.fit returned NoneType"):
        fitted(solver=ReturnsNothing())


Scores = Callable[[inf.TorchInfluenceFunctionModel], object]
UNFITTED: list[Scores] = [
    lambda m: m.influences(*points()),
    lambda m: m.influences_by_block(*points()),
    lambda m: m.influence_factors(*points()),
    lambda m: m.influence_factors_by_block(*points()),
    lambda m: m.influences_from_factors(torch.zeros(1, 26), *points()),
    lambda m: m.influences_from_factors_by_block({"full": torch.zeros(1, 26)}, *points()),
]


@pytest.mark.parametrize("scores", UNFITTED)
def test_before_the_fit(scores: Scores) -> None:
    with pytest.raises(inf.NotFittedError, match=r"not fitted: call model\.fit\(train_loader\) first"):
        scores(model())
    with pytest.raises(inf.NotFittedError):
        scores(model().with_regularization(1.0))


X, Y = points()
ROWS = torch.zeros(2, 26, dtype=torch.float64)
ARGUMENTS: dict[str, tuple[Scores, str]] = {
    "x without y": (lambda m: m.influences(X, Y, X), "Got x without y: pass both, or neither"),
    "y without x": (lambda m: m.influences(X, Y, y=Y), "Got y without x: pass both, or neither"),
    "x without y, by block": (lambda m: m.influences_by_block(X, Y, X), "Got x without y"),
    "an array": (lambda m: m.influences(X.numpy(), Y), r"x holds no tensor, got ndarray.*torch\.as_tensor"),
    "a loader": (lambda m: m.influences([], Y), r"x holds no tensor, got list.*inf\.attribute"),
    "a sample without its dimension": (
        lambda m: m.influences(X[0], Y[0].flatten()),
        r"same number of samples.*x\[i : i \+ 1\]",
    ),
    "no test target": (lambda m: m.influences(X, None), "y of the test data is missing: pass both"),
    "no test input": (lambda m: m.influences(None, Y), "x of the test data is missing"),
    "no factor target": (lambda m: m.influence_factors(X, None), "y of the points is missing"),
    "no target with factors": (
        lambda m: m.influences_from_factors(ROWS, X, None),
        "y of the training points is missing",
    ),
    "lengths of the test data": (lambda m: m.influences(X, Y[:2]), r"x: \(4, 3\), y: \(2,\)"),
    "lengths of the training points": (lambda m: m.influences(X, Y, X[:1], Y), r"x: \(1, 3\), y: \(4,\)"),
    "no test point": (lambda m: m.influences(X[:0], Y[:0]), "the test data has no sample"),
    "dtype": (lambda m: m.influences(X.float(), Y), r"test data holds torch.float32, .*\.to\(torch.float64\)"),
    "device": (lambda m: m.influences(X, Y, X.to("meta"), Y), "training points is on meta, the model on cpu"),
    "NaN": (lambda m: m.influences(X * NAN, Y), "NaN or infinity in the test data"),
    "infinity": (lambda m: m.influence_factors(X * INF, Y), r"NaN or infinity in the points \(samples 0, 1, 2"),
    "short factors": (
        lambda m: m.influences_from_factors(ROWS[:, 1:], X, Y),
        r"must be \(m, 26\), .*got \(2, 25\)",
    ),
    "factors as columns": (
        lambda m: m.influences_from_factors(ROWS.T, X, Y),
        r"must be \(m, 26\), .*got \(26, 2\)",
    ),
    "one factor": (lambda m: m.influences_from_factors(ROWS[0], X, Y), r"must be \(m, 26\), .*got \(26,\)"),
    "factors in NumPy": (
        lambda m: m.influences_from_factors(ROWS.numpy(), X, Y),
        "influence_factors returns; got ndarray",
    ),
    "factors in float32": (
        lambda m: m.influences_from_factors(ROWS.float(), X, Y),
        r"is torch.float32 .*\.to\(",
    ),
    "factors elsewhere": (lambda m: m.influences_from_factors(ROWS.to("meta"), X, Y), "on meta, the model"),
    "NaN factors": (lambda m: m.influences_from_factors(ROWS * NAN, X, Y), "z_test_factors contains NaN"),
    "blocks as a tensor": (
        lambda m: m.influences_from_factors_by_block(ROWS, X, Y),
        r"blocks \['full'\], got .*Tensor",
    ),
    "another block": (
        lambda m: m.influences_from_factors_by_block({"a": ROWS}, X, Y),
        r"blocks \['full'\], got \['a'\]",
    ),
    "short block": (
        lambda m: m.influences_from_factors_by_block({"full": ROWS[:, 1:]}, X, Y),
        r"z_test_factors\['full'\] must be \(m, 26\)",
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_of_scores(what: str) -> None:
    scores, message = ARGUMENTS[what]
    with pytest.raises(inf.InvalidInputError, match=message):
        scores(fitted())


class NoSolve(Inverse):
    """Fails the test that asks it to solve."""

    def __init__(self, base: inf.LinearOperator) -> None:
        self.base, self.regularization = base, 0.0

    def _solve(self, columns: Tensor) -> inf.Solution:
        pytest.fail(f"solved for {columns.shape[1]} right-hand sides before the input was checked")
        return make_solution(columns, torch.zeros(columns.shape[1]), [])


@dataclass(frozen=True)
class NoSolver:
    def fit(self, operator: inf.LinearOperator, regularization: float) -> NoSolve:
        return NoSolve(operator)


@pytest.mark.parametrize("blocks", ["full", "per_layer"])
def test_perturbation_needs_one_floating_point_input_and_says_so_before_solving(blocks: str) -> None:
    torch.manual_seed(0)
    tokens, labels = torch.randint(5, (3, 4)), torch.tensor([0, 1, 1])
    words = model(nets.TokenMean().double().eval(), solver=NoSolver(), blocks=blocks).fit([(tokens, labels)])
    with pytest.raises(
        inf.InvalidInputError, match=r"floating-point tensor; got a tensor of torch.int64.*mode='up'"
    ):
        words.influences(tokens, labels, mode="perturbation")
    pair, target = (torch.randn(3, 3).double(), torch.randn(3, 2).double()), torch.randn(3, 2).double()
    two = model(nets.Positional().double().eval(), nn.MSELoss(), solver=NoSolver(), blocks=blocks)
    two.fit([(pair, target)])
    with pytest.raises(inf.InvalidInputError, match=r"one floating-point tensor; got tuple"):
        two.influences(pair, target, mode=inf.InfluenceMode.Perturbation)


def test_arguments_are_checked_before_solving() -> None:
    influence = fitted(solver=NoSolver())
    for scores, message in ARGUMENTS.values():
        with pytest.raises(inf.InvalidInputError, match=message):
            scores(influence)
