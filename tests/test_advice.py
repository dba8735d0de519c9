"""Advice: what is predicted holds, within a factor of three, for work and memory; and the advice is good."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.advice.probes import spectrum
from influence_framework.costs import Cost, Fidelity, Measure, Spectrum, Work, Workload
from influence_framework.lanczos import tridiagonals
from influence_framework.sources.streaming import MinibatchOperator, StreamingOperator
from tests import nets
from tests.test_memory import measured

FACTOR = 3.0
LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Case:
    """A trained net and its data."""

    net: nn.Module
    x: Tensor
    y: Tensor

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(50), self.y.split(50), strict=True))

    def advise(self, **options: Any) -> inf.Advice:
        return inf.advise(self.net, LOSS, self.data, **{"n_test": 10, **options})

    def run(self, composition: Any) -> Tensor:
        model = inf.compose(self.net, LOSS, **composition, on_failure="ignore", preflight=False)
        return model.fit(self.data).influences(self.x[:10], self.y[:10], self.x, self.y)


def trained(net: nn.Module, x: Tensor, y: Tensor, steps: int = 60) -> Case:
    net = net.to(x.dtype) if x.is_floating_point() else net.double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Case(net.eval(), x, y)


def labelled(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, dtype=torch.float64)
    flat = x.flatten(1)
    return x, (flat @ torch.randn(flat.shape[1], 3, dtype=torch.float64)).argmax(1)


def logistic() -> Case:
    return trained(nn.Linear(12, 3), *labelled(200, 12))


def perceptron() -> Case:
    return trained(nets.mlp(10, 24, 12, 3), *labelled(250, 10))


def convolutional() -> Case:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    )
    return trained(net, *labelled(150, 1, 6, 6))


def transformer() -> Case:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.TransformerEncoderLayer(4, 1, 6, 0.0, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.layer(x).mean(1))
            return result

    return trained(Net(), *labelled(100, 5, 4))


PROBLEMS = {case.__name__: case for case in (logistic, perceptron, convolutional, transformer)}


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    found: Case = PROBLEMS[request.param]()
    return found


@dataclass
class Counts:
    """What was done: columns multiplied, and passes for statistics of layers."""

    products: int = 0
    columns: float = 0.0
    minibatches: int = 0
    passes: float = 0.0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """The work of every operator from here on."""
    found = Counts()
    product, part, sums = StreamingOperator._matmat, MinibatchOperator._matmat, StreamingOperator.layer_sums

    def counted(self: StreamingOperator, columns: Tensor) -> Tensor:
        found.products += 1
        found.columns += columns.shape[1]
        return product(self, columns)

    def counted_part(self: MinibatchOperator, columns: Tensor) -> Tensor:
        found.minibatches += 1
        return part(self, columns)

    def counted_sums(self: StreamingOperator, *arguments: Any) -> Any:
        found.passes += 1
        return sums(self, *arguments)

    monkeypatch.setattr(StreamingOperator, "_matmat", counted)
    monkeypatch.setattr(MinibatchOperator, "_matmat", counted_part)
    monkeypatch.setattr(StreamingOperator, "layer_sums", counted_sums)
    return found


def columns(products: tuple[tuple[float, float], ...]) -> float:
    return sum(count * width for count, width in products)


def within(predicted: float, found: float, what: str, slack: float = 0.0) -> None:
    """Within the factor; both zero, or both at most ``slack``, will do too."""
    close = found / FACTOR <= predicted <= found * FACTOR
    assert close or max(predicted, found) <= slack, f"{what}: {predicted:.3g} predicted, {found:.3g} found"


@pytest.mark.parametrize("case", PROBLEMS, indirect=True)
@pytest.mark.filterwarnings("ignore::influence_framework.ConvergenceWarning")
def test_work_is_predicted_within_a_factor_of_three(case: Case, counts: Counts) -> None:
    advice = case.advise(hessian_regularization=0.1, budget={"seconds": 600})
    done = []
    for candidate in advice.candidates:
        predicted = candidate.prediction
        if predicted is None:
            continue
        counts.__init__()  # type: ignore[misc]
        case.run(candidate.composition)
        work = predicted.fit + predicted.score
        what = f"{candidate.name}, "
        # A few single products, such as those that confirm a result, are not worth foretelling.
        within(work.product_count, counts.products, what + "products", slack=5)
        within(columns(work.products), counts.columns, what + "columns", slack=15)
        within(sum(count for count, _ in work.minibatches), counts.minibatches, what + "mini-batches")
        within(predicted.fit.passes, counts.passes, what + "passes")
        done.append(candidate.composition["solver"]["name"])
    assert {"direct", "cg", "nystroem", "arnoldi", "ekfac", "kfac", "jacobi", "lissa"} <= set(done)


@pytest.mark.parametrize("case", PROBLEMS, indirect=True)
def test_the_advised_method_is_as_good_as_any(case: Case) -> None:
    """By rank correlation with the exact scores, at the advised λ."""
    advice = case.advise()
    exact = case.run({"solver": "direct", "hessian_regularization": advice.regularization})
    scores = case.run(advice.recommended)
    assert min(spearmanr(one, other).statistic for one, other in zip(scores, exact, strict=True)) > 0.999


MEMORY = """
import sys

import torch
from torch import nn

import influence_framework as inf
from tests.peak import peak


def run(widths, solver, count):
    torch.manual_seed(0)
    layers = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers[:-1]).eval()
    x, y = torch.randn(count, widths[0]), torch.randint(widths[-1], (count,))
    options = {"solver": solver, "hessian_regularization": 0.1, "on_failure": "ignore", "preflight": False}
    model = inf.compose(net, nn.CrossEntropyLoss(), **options)
    model.fit([(x, y)]).influences(x[:100], y[:100], x, y)


torch.set_num_threads(1)
widths, solver, count = eval(sys.argv[1])
run((8, 8, 3), solver, 50)
baseline = peak()
run(widths, solver, count)
print(peak() - baseline)
"""


@pytest.mark.parametrize(
    ("widths", "solver", "count"),
    [
        ((40, 60, 10), "direct", 200),
        ((900, 900, 3), "ekfac", 200),
        ((400, 200, 3), "nystroem", 400),
        ((400, 200, 3), "cg", 200),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peak_memory_is_predicted_within_a_factor_of_three(
    widths: tuple[int, ...], solver: str, count: int
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(count, widths[0]), torch.randint(widths[-1], (count,))
    advice = inf.advise(nets.mlp(*widths).eval(), LOSS, [(x, y)], hessian_regularization=0.1)
    found = next(c for c in advice.candidates if c.composition["solver"]["name"] == solver and c.prediction)
    assert found.prediction is not None
    assert found.prediction.peak_bytes > 30 * 2**20  # above what an allocator's habits amount to
    (grown,) = measured(MEMORY, repr((widths, found.composition["solver"], count)))
    within(found.prediction.peak_bytes, grown, "peak memory")


def diagonal(values: Tensor) -> inf.DenseOperator:
    return inf.DenseOperator(torch.diag(values))


class TestSpectrum:
    def test_residuals_are_those_of_conjugate_gradients(self) -> None:
        values = torch.tensor([0.1, 0.5, 1.0, 4.0, 9.0], dtype=torch.float64)
        b = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
        found = Measure(values, b.square() / b.square().sum()).residuals(0.2)
        matrix = torch.diag(values + 0.2)
        for steps, residual in enumerate(found):
            # The k-th iterate is the best in the Krylov space, in the energy norm.
            space = torch.stack(
                [torch.linalg.matrix_power(matrix, k) @ b for k in range(steps)] or [0 * b], dim=1
            )
            basis = torch.linalg.qr(space).Q[:, :steps]
            x = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
            assert residual == pytest.approx(float((b - matrix @ x).norm() / b.norm()), rel=1e-9)
        assert len(found) == 5

    def test_of_a_matrix_with_few_eigenvalues_it_is_exact(self) -> None:
        case = PROBLEMS["logistic"]()
        problem = inf.Problem.build(case.net, LOSS, case.data)
        operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
        dense = torch.linalg.eigvalsh(inf.operators.to_dense(operator))
        found = spectrum(problem, operator, 39, seed=0)
        assert found.largest == pytest.approx(dense[-1].item(), rel=1e-8)
        # Hutchinson's error with two vectors.
        assert found.mean == pytest.approx(dense.mean().item(), rel=0.5)
        middle = float(dense[-13:-11].mean())
        assert 12 / 2 < found.count(middle) < 12 * 2
        assert dense[-20] < found.at(12) < dense[-5]

    def test_beyond_the_probes_steps_go_on_at_their_rate(self) -> None:
        """A uniform spectrum to a condition number of 400: √κ/2 · ln(2/rtol) steps are the bound."""
        values = torch.linspace(0, 1, 2000, dtype=torch.float64)
        weights = torch.full((2000,), 1 / 2000, dtype=torch.float64)
        whole = Measure(values, weights)
        full, _ = Spectrum(2000, whole, [whole], 1).iterations(1 / 400, 1e-6)
        start = torch.ones(2000, 1, dtype=torch.float64)
        *_, last = islice(tridiagonals(diagonal(values), start), 25)
        few = torch.linalg.eigh(last[0])
        short = Measure(few[0], few[1][0].square())
        told, _ = Spectrum(2000, whole, [short], 1).iterations(1 / 400, 1e-6)
        assert told == pytest.approx(full, rel=0.5)
        assert full > 60

    def test_the_same_seed_gives_the_same_spectrum(self) -> None:
        case = PROBLEMS["perceptron"]()
        one, other, third = (case.advise(seed=seed).workload.spectrum for seed in (1, 1, 2))
        assert one is not None
        assert other is not None
        assert third is not None
        assert torch.equal(one.whole.values, other.whole.values)
        assert not torch.equal(one.whole.values, third.whole.values)


@pytest.fixture(scope="module")
def net() -> Case:
    torch.manual_seed(0)
    return perceptron()


class TestAdvice:
    def test_it_composes(self, net: Case) -> None:
        advice = net.advise(hessian_regularization=0.05)
        assert advice.best is advice.candidates[0]
        one = inf.compose(net.net, LOSS, **advice.recommended)
        other = advice.compose(memory_budget=2**24)
        assert one.solver == other.solver
        assert one.hessian_regularization == other.hessian_regularization == 0.05
        assert other.memory_budget == 2**24

    def test_it_leaves_nothing_on_the_model(self, net: Case) -> None:
        state = torch.random.get_rng_state()
        before = {name: value.clone() for name, value in net.net.state_dict().items()}
        net.advise()
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(before[name], value) for name, value in net.net.state_dict().items())
        assert all(p.grad is None for p in net.net.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.net.modules())

    def test_regularization_follows_from_the_largest_eigenvalue(self, net: Case) -> None:
        problem = inf.Problem.build(net.net, LOSS, net.data)
        operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
        largest = torch.linalg.eigvalsh(inf.operators.to_dense(operator))[-1].item()
        # To one digit.
        assert net.advise().regularization == pytest.approx(3e-3 * largest, rel=0.5)

    def test_a_fraction_of_the_mean_eigenvalue_is_kept(self, net: Case) -> None:
        fraction = inf.RelativeRegularization(0.1)
        advice = net.advise(hessian_regularization=fraction)
        assert advice.recommended["hessian_regularization"] == fraction
        assert advice.workload.probed.mean / 10 == pytest.approx(advice.workload.regularization)

    def test_within_the_budget_the_nearest_to_the_inverse_comes_first(self, net: Case) -> None:
        advice = net.advise()
        known = [c for c in advice.candidates if c.prediction is not None]
        assert [c.fidelity for c in known if c.fits] == sorted(c.fidelity for c in known if c.fits)  # type: ignore[type-var]
        assert advice.best.fidelity is Fidelity.EXACT

    def test_what_takes_too_much_memory_is_not_advised(self, net: Case) -> None:
        size = sum(p.numel() for p in net.net.parameters())
        advice = net.advise(budget={"memory": 4 * 8 * size**2})
        direct = next(c for c in advice.candidates if c.name == "direct")
        assert "needs" in direct.excess
        assert not direct.fits
        assert advice.best.name != "direct"

    def test_without_time_for_exact_solves_factors_are_advised(self, net: Case) -> None:
        """Between what they take and what every exact method takes."""
        every = net.advise(budget=inf.Budget(seconds=1e9), n_test=200, hessian_regularization=1e-5)
        exact = min(
            c.prediction.seconds for c in every.candidates if c.fidelity is Fidelity.EXACT and c.prediction
        )
        factors = next(c for c in every.candidates if c.name == "ekfac")
        assert factors.prediction is not None
        order = [c.fidelity for c in every.candidates if c.fidelity is not None]
        assert order == sorted(order)
        seconds = (exact * factors.prediction.seconds) ** 0.5
        kept = [c for c in every.candidates if c.prediction is not None and c.prediction.seconds <= seconds]
        assert min(kept, key=lambda c: c.order).fidelity is Fidelity.LAYERS

    def test_no_candidate_within_the_budget_is_an_error_that_says_what_would_do(self, net: Case) -> None:
        advice = net.advise(budget=inf.Budget(seconds=1e-9))
        assert "no candidate fits" in str(advice)
        with pytest.raises(inf.InvalidInputError, match=r"the quickest takes .* s"):
            _ = advice.recommended

    def test_it_says_why(self, net: Case) -> None:
        advice = net.advise(hessian_regularization=0.01)
        said = str(advice)
        size = sum(p.numel() for p in net.net.parameters())
        assert f"P = {size} parameters, N = 250 samples, 10 x 250 scores" in said
        assert f"Recommended: {advice.best.name}. It solves with the curvature itself" in said
        assert f"the matrix of {size} x {size} takes" in said
        assert "condition number" in said
        assert "eigendecompositions of up to 25 x 25" in said  # the larger of widths, with one for the bias

    def test_uncovered_parameters_are_named(self) -> None:
        torch.manual_seed(0)
        case = trained(nn.Sequential(nn.Linear(6, 5), nn.PReLU(), nn.Linear(5, 3)), *labelled(80, 6))
        advice = case.advise()
        named = {c.name: c for c in advice.candidates}
        assert named["ekfac"].prediction is None
        assert "no LayerStatistics for 1.weight: PReLU has no matrix form" in named["ekfac"].reason
        assert named["ekfac (uncovered=diagonal)"].prediction is not None

    def test_negative_curvature_rules_out_conjugate_gradients(self) -> None:
        torch.manual_seed(0)
        net = nets.mlp(6, 8, 3).double().eval()
        x, y = labelled(60, 6)
        advice = inf.advise(net, LOSS, [(x, y)], source="hessian", hessian_regularization=1e-4)
        named = {c.name: c for c in advice.candidates}
        assert "stops at negative curvature" in named["cg (rtol=0.0001)"].reason
        assert advice.best.name == "direct"
        assert advice.recommended["source"] == "hessian"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_test": 0}, "n_test counts points"),
            ({"n_train": True}, "n_train counts points"),
            ({"budget": {"time": 3}}, "Budget"),
            ({"budget": {"seconds": -1}}, "positive"),
            ({"hessian_regularization": {"full": 0.1}}, "one λ"),
            ({"hessian_regularization": -1.0}, "negative"),
        ],
    )
    @pytest.mark.usefixtures("as_user")
    def test_bad_input_is_refused(self, net: Case, options: dict[str, Any], message: str) -> None:
        with pytest.raises(inf.InvalidInputError, match=message):
            net.advise(**options)

    def test_curvature_of_zero_is_refused(self) -> None:
        net = nn.Linear(3, 2).double()
        with torch.no_grad():
            net.weight.zero_()
        data = [(torch.randn(8, 3, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64))]

        def flat(output: Tensor, target: Tensor) -> Tensor:
            return (output - target).mean()

        with pytest.raises(inf.InvalidInputError, match="no positive eigenvalue"):
            inf.advise(net, flat, data)


@dataclass(frozen=True)
class Silent:
    """A third party's solver that does not say what it takes."""

    def fit(self, operator: Any, regularization: float) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Free(Silent):
    """And one that says so."""

    rank: int = 1
    asked: list[Workload] = field(default_factory=list, compare=False)

    @staticmethod
    def advised(workload: Workload) -> Iterator[dict[str, Any]]:
        yield {"rank": workload.parameters}

    def cost(self, workload: Workload) -> Cost:
        return Cost(Fidelity.EXACT, fit=Work(flops=self.rank), reasons=(f"rank {self.rank}",))


def test_solvers_of_others_take_part(net: Case) -> None:
    @inf.hookimpl
    def register_solvers(register: Any) -> None:
        register("silent", Silent)
        register("free", Free)

    registry = inf.Registry({"theirs": SimpleNamespace(register_solvers=register_solvers)})
    advice = net.advise(registry=registry)
    named = {c.name: c for c in advice.candidates}
    assert "not predicted" in named["silent"].reason
    size = sum(p.numel() for p in net.net.parameters())
    assert named[f"free (rank={size})"].fits
    assert advice.best.name == f"free (rank={size})"


def test_work_adds_up() -> None:
    one = Work(products=((2.0, 3.0),), passes=1.0, eigh=(4,), flops=5.0)
    total = one + 2 * one
    assert total.product_count == 6
    assert columns(total.products) == 18
    assert total.passes == 3
    assert total.flops == 15
    assert total.eigh == (4, 4, 4)
    with pytest.raises(ValueError, match="whole numbers"):
        _ = 0.5 * one
    assert math.isclose((0.5 * Work(flops=3.0)).flops, 1.5)
