"""The three curvatures against their definitions, over the case table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from influence_framework import Diagonal, LinearOperator, Problem, hessian_sources
from influence_framework.operators import to_dense
from tests import cases, reference
from tests.cases import CASES
from tests.reference import CURVATURES, assert_close

EXACT = 1e-10
SOURCES = list(CURVATURES)
CONVEX = [
    "ragged_last_batch",
    "relu",
    "conv",
    "mse",
    "bce_with_logits",
    "embedding",
    "soft_labels",
    "quartic_loss",
]


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# PyTorch, of recurrent layers on a GPU.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition(name: str, source: str, device: torch.device) -> None:
    expected = cases.dense(name, source)
    operator = cases.operator(source, cases.problem(cases.make(name).to(torch.float64, device)))
    assert isinstance(operator, LinearOperator)
    assert operator.shape == tuple(expected.shape)
    assert_close(cases.by_columns(operator), expected, EXACT, "products with the identity")
    assert_close(to_dense(operator), expected, EXACT, "the full matrix")
    assert_close(
        operator @ cases.columns(operator), expected @ cases.columns(operator).cpu(), EXACT, "one vector"
    )
    if isinstance(operator, Diagonal):
        assert_close(operator.diagonal(), expected.diagonal(), EXACT, "the diagonal")


@pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher"])
def test_offers_its_diagonal(source: str) -> None:
    assert isinstance(cases.operator(source, cases.problem(cases.make("mse"))), Diagonal)


@pytest.mark.parametrize("count", [0, 1, 3, 70])
def test_any_number_of_columns(count: int, source: str) -> None:
    expected = cases.dense("tied_weights", source)
    operator = cases.operator(source, cases.problem(cases.make("tied_weights")))
    columns = cases.columns(operator, count)
    product = operator @ columns
    assert product.shape == columns.shape
    assert_close(product, expected @ columns, EXACT)


@pytest.mark.parametrize("name", ["ragged_last_batch", "module_used_twice", "conv", "embedding", "mse"])
def test_float32_agrees_with_float64(name: str, source: str, device: torch.device) -> None:
    instance = cases.make(name)
    operator = cases.operator(source, cases.problem(instance.to(torch.float32, device)))
    product = cases.by_columns(operator)
    assert product.dtype == torch.float32
    # Every entry is a sum over N samples of chained inner products, together at most P terms long,
    # each of whose terms went once forward and once back: 2(N + P) roundings.
    terms = 2 * (sum(len(y) for _, y in instance.data) + operator.shape[0])
    assert_close(product, cases.dense(name, source), terms * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", ["tied_weights", "conv", "root_and_scalar_parameters", "recurrent"])
def test_on_some_of_the_parameters(name: str, source: str) -> None:
    instance = cases.make(name)
    problem = cases.problem(instance)
    # In reverse, to see that the order asked for is the order of the columns.
    chosen = problem.parameters.names[::-2]
    operator = hessian_sources[source].create().operator(problem, problem.parameters.subset(chosen))
    own = reference.positions(instance.model, chosen)
    expected = cases.dense(name, source)[own][:, own]
    assert_close(cases.by_columns(operator), expected, EXACT)
    assert_close(to_dense(operator), expected, EXACT)
    if isinstance(operator, Diagonal):
        assert_close(operator.diagonal(), expected.diagonal(), EXACT)


def test_on_parameters_that_nothing_depends_on(source: str) -> None:
    problem = cases.problem(cases.make("unused_parameter"))
    operator = hessian_sources[source].create().operator(problem, problem.parameters.subset(["spare"]))
    assert torch.equal(cases.by_columns(operator), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(to_dense(operator), torch.zeros(2, 2, dtype=torch.float64))
    if isinstance(operator, Diagonal):
        assert torch.equal(operator.diagonal(), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("name", CONVEX)
def test_gauss_newton_is_positive_semidefinite(name: str) -> None:
    matrix = to_dense(cases.operator("gauss_newton", cases.problem(cases.make(name))))
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    # Rounding of a symmetric matrix moves its eigenvalues by at most the norm of the rounding.
    assert values[0] >= -len(matrix) * torch.finfo(matrix.dtype).eps * values[-1]
    assert values[-1] > 0


@pytest.mark.parametrize("name", ["linear_model", "linear_classifier", "linear_model_linear_loss"])
def test_gauss_newton_of_a_linear_model_is_its_hessian(name: str) -> None:
    problem = cases.problem(cases.make(name))
    hessian = to_dense(cases.operator("hessian", problem))
    assert_close(to_dense(cases.operator("gauss_newton", problem)), hessian, EXACT)


@pytest.mark.parametrize("name", ["relu", "conv", "mse", "soft_labels"])
def test_pitfall_gauss_newton_is_not_the_empirical_fisher(name: str) -> None:
    problem = cases.problem(cases.make(name))
    fisher = cases.by_columns(cases.operator("empirical_fisher", problem))
    newton = cases.by_columns(cases.operator("gauss_newton", problem))
    assert reference.relative_error(fisher, newton) > 0.1
    assert_close(newton, cases.dense(name, "gauss_newton"), EXACT)
    assert_close(fisher, cases.dense(name, "empirical_fisher"), EXACT)


def test_pitfall_gauss_newton_is_divided_by_samples_and_not_by_rows() -> None:
    x, y = (torch.cat(parts) for parts in zip(*cases.make("linear_model").data, strict=True))
    operator = cases.operator("gauss_newton", cases.problem(cases.make("linear_model")))
    extended = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    # The mean squared error averages over the outputs: each has 2/2 of the second moment of its inputs.
    second_moment = extended.T @ extended / len(x) * (2 / y.shape[1])
    outputs, inputs = y.shape[1], x.shape[1]
    expected = torch.kron(torch.eye(outputs, dtype=x.dtype), second_moment)
    # From rows of [weight, bias] to all weights followed by all biases.
    order = torch.arange(len(expected)).view(outputs, inputs + 1)
    flat = torch.cat([order[:, :inputs].reshape(-1), order[:, inputs]])
    assert_close(cases.by_columns(operator), expected[flat][:, flat], EXACT)


def test_pitfall_hessian_of_a_net_is_indefinite_and_gauss_newton_is_not() -> None:
    problem = cases.problem(cases.make("mse"))
    lowest, *_, largest = torch.linalg.eigvalsh(to_dense(cases.operator("hessian", problem)))
    assert lowest < -1e-2 * largest
    lowest, *_, largest = torch.linalg.eigvalsh(to_dense(cases.operator("gauss_newton", problem)))
    assert lowest > -1e-12 * largest


@pytest.mark.parametrize(
    ("loss", "claim"),
    [
        (lambda output, target: output.diff(dim=1).square().log1p().mean(), False),
        (lambda output, target: (output - target).square().mean(), True),
    ],
    ids=["saturating difference", "squared error"],
)
def test_a_loss_that_fits_two_classes_by_accident_is_not_called_convex(
    loss: Callable[[Tensor, Tensor], Tensor], claim: bool
) -> None:
    """``log(1 + d²)`` is convex for ``|d| < 1`` alone, where these outputs are, and zero on constants."""
    model = nn.Linear(3, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 0.0, 0.2], [0.0, -0.1, 0.1]]))
    x = torch.eye(3, dtype=torch.float64)
    operator = cases.operator("gauss_newton", Problem.build(model, loss, [(x, torch.ones_like(x[:, :2]))]))
    assert getattr(operator, "positive_semidefinite", None) is claim


@pytest.mark.parametrize(
    ("loss", "targets", "claim"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, 1]), True),
        (nn.CrossEntropyLoss(label_smoothing=0.3), torch.tensor([0, 1, 1]), True),
        (
            nn.CrossEntropyLoss(torch.tensor([0.5, 2.0]).double(), reduction="sum"),
            torch.tensor([0, 1, 1]),
            True,
        ),
        (
            nn.CrossEntropyLoss(torch.tensor([0.5, -2.0]).double(), reduction="sum"),
            torch.tensor([0, 1, 1]),
            False,
        ),
        (nn.CrossEntropyLoss(), torch.tensor([[2.0, -3.0], [1.0, 0.0], [0.5, 0.5]]).double(), False),
        (nn.HuberLoss(), torch.ones(3, 2).double(), True),
    ],
    ids=["labels", "smoothing", "weights", "a negative weight", "numbers for labels", "huber"],
)
def test_losses_known_to_be_convex_are_taken_at_their_word(
    loss: nn.Module, targets: Tensor, claim: bool
) -> None:
    model = nn.Linear(3, 2).double().eval()
    problem = Problem.build(model, loss, [(torch.eye(3, dtype=torch.float64), targets)])
    assert getattr(cases.operator("gauss_newton", problem), "positive_semidefinite", None) is claim


def test_pitfall_sum_is_scaled_to_the_mean(source: str) -> None:
    mean, total = cases.make("ragged_last_batch"), cases.make("sum")
    expected = cases.by_columns(cases.operator(source, cases.problem(mean)))
    assert_close(cases.by_columns(cases.operator(source, cases.problem(total))), expected, EXACT)


@pytest.mark.parametrize(
    "name", ["tied_weights", "module_used_twice", "root_and_scalar_parameters", "unused_parameter"]
)
def test_pitfall_tied_reused_and_root_parameters_count_once_and_fully(name: str, source: str) -> None:
    instance = cases.make(name)
    operator = cases.operator(source, cases.problem(instance))
    assert operator.shape[0] == sum(p.numel() for p in instance.model.parameters())
    assert_close(cases.by_columns(operator), cases.dense(name, source), EXACT)
