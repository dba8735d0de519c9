"""What is found before a fit: parameters without effect, and a λ outside the spectrum."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.data import Fingerprint
from influence_framework.preflight import (
    CLOSER_LOOK,
    BlockPreflight,
    _with_spectrum,
    ritz_values,
    without_effect,
)
from influence_framework.problem import Problem
from tests import cases, nets, reference, small
from tests.reference import assert_close


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return basis @ torch.diag(values) @ basis.T


@dataclass
class Bare:
    """An operator as a third party may write it: nothing but ``@``, one column at a time, counted."""

    matrix: Tensor
    products: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.matrix), len(self.matrix))

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def __matmul__(self, columns: Tensor) -> Tensor:
        assert columns.ndim == 1
        self.products += 1
        return self.matrix @ columns


def found(operator: Bare, steps: int) -> tuple[float, float]:
    """The values after so many steps, or all that there are."""
    *_, last = islice(ritz_values(operator), steps)
    return last


class TestRitzValues:
    def test_they_are_exact_after_as_many_steps_as_there_are_eigenvalues(self) -> None:
        values = torch.tensor([-3.0, -1.0, 0.5, 2.0, 7.0], dtype=torch.float64)
        operator = Bare(symmetric(values))
        assert found(operator, 5) == pytest.approx((-3.0, 7.0), rel=1e-10)
        assert operator.products == 5

    def test_they_lie_within_the_spectrum_and_close_to_its_ends(self) -> None:
        values = torch.cat([normal(97).clamp(-1, 1), torch.tensor([-9.0, 8.0, 20.0], dtype=torch.float64)])
        operator = Bare(symmetric(values))
        smallest, largest = found(operator, 6)
        assert -9.0 <= smallest < -6.0
        assert 19.0 < largest <= 20.0
        assert operator.products == 6

    @pytest.mark.parametrize("size", [1, 2, 9])
    def test_equal_eigenvalues_take_one_step(self, size: int) -> None:
        operator = Bare(3.0 * torch.eye(size, dtype=torch.float32))
        assert found(operator, 6) == pytest.approx((3.0, 3.0), rel=1e-5)
        assert operator.products == 1

    def test_a_closer_look_goes_on_where_the_first_ended(self) -> None:
        operator = Bare(symmetric(torch.linspace(-1, 5, 100, dtype=torch.float64)))
        block = BlockPreflight(100, 0.1, torch.finfo(torch.float64).eps)
        closer = _with_spectrum(block, operator, 6)
        assert operator.products == CLOSER_LOOK
        assert (closer.smallest, closer.largest) == found(operator, CLOSER_LOOK)
        assert closer.indefinite

    def test_a_zero_matrix(self) -> None:
        assert found(Bare(torch.zeros(4, 4)), 6) == (0.0, 0.0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_products_that_are_not_finite(self, value: float) -> None:
        with pytest.raises(inf.NonFiniteError, match="NaN or infinity"):
            found(Bare(torch.full((4, 4), value)), 6)


def problem(module: nn.Module, loss: Any = None, data: Any = None, **options: Any) -> Problem:
    return Problem.build(module, loss or nn.CrossEntropyLoss(), data or small.batches(), **options)


class Parts(nn.Module):
    """A parameter in use, one outside the graph, one whose gradient is zero, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.outside, self.masked, self.frozen = (
            nn.Linear(3, 2, dtype=torch.float64) for _ in "1234"
        )
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + 0.0 * self.masked(x) + self.frozen(x)


class TestParameters:
    def test_those_outside_the_graph_are_told_from_those_without_a_gradient(self) -> None:
        with pytest.warns(inf.PreflightWarning) as caught:
            found = small.fitted(module=Parts()).preflight
        (message,) = (str(warning.message) for warning in caught)
        assert "'outside.weight', 'outside.bias' (not part of its graph)" in message
        assert "'masked.weight', 'masked.bias' (gradient exactly zero for each of 7 samples tried)" in message
        assert "requires_grad_(False)" in message
        assert found.unreachable == ("outside.weight", "outside.bias")
        assert found.idle == ("masked.weight", "masked.bias")
        assert (found.parameters, found.total, found.samples) == (24, 32, 7)

    def test_gradients_that_cancel_between_samples_are_no_gradient_of_zero(self) -> None:
        x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        model = nn.Linear(1, 1, dtype=torch.float64)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        # The gradient of the mean loss with respect to the bias is exactly zero.
        assert without_effect(problem(model, nn.MSELoss(), [(x, x)])) == ((), ())

    def test_a_perfect_fit_blames_nobody(self) -> None:
        model = nn.Linear(3, 2, dtype=torch.float64)
        x = normal(5, 3)
        assert without_effect(problem(model, nn.MSELoss(), [(x, model(x).detach())])) == ((), ())

    def test_a_parameter_that_any_batch_depends_on_is_in_use(self) -> None:
        class Sometimes(nets.Unused):
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = super().forward(x)
                high = x[:, :1] > 2
                # To one output: what is added to all leaves the gradient of a softmax to rounding.
                more = high * self.spare.sum() * torch.eye(1, out.shape[1], dtype=out.dtype)
                return out + more if high.any() else out

        (x, y), second = small.batches()
        x[0, 0] = 3.0
        whole = problem(Sometimes().double())
        assert without_effect(replace(whole, data=[second, (x, y)])) == ((), ())
        assert without_effect(replace(whole, data=[second])) == (("spare",), ())

    def test_a_model_that_depends_on_nothing(self) -> None:
        class Constant(nets.Unused):
            def forward(self, x: Tensor) -> Tensor:
                return x

        names = ("spare", "head.weight", "head.bias")
        assert without_effect(problem(Constant().double())) == (names, ())

    def test_the_probe_can_be_left_out(self) -> None:
        found = small.fitted(module=Parts(), preflight=False).preflight
        assert (found.unreachable, found.idle, found.tried) == ((), (), 0)
        assert (found.parameters, found.total) == (24, 32)
        block = found.blocks["full"]
        assert (block.regularization, block.smallest, block.largest, block.suggested) == (0.1, None, None, None)

    def test_a_block_without_effect_is_blamed_once(self) -> None:
        with pytest.warns(inf.PreflightWarning) as caught:
            found = small.fitted(module=Parts(), blocks="per_layer").preflight
        assert len(caught) == 1
        assert found.blocks["outside"].largest is None
        assert found.blocks["head"].largest is not None


def extremes(source: str) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(
        reference.CURVATURES[source](small.net(), nn.CrossEntropyLoss(), small.batches())
    )
    return values[0].item(), values[-1].item()


class TestSpectrum:
    @pytest.mark.parametrize("source", ["gauss_newton", "empirical_fisher", "hessian"])
    def test_the_estimate_is_of_the_curvature(self, source: str) -> None:
        low, high = extremes(source)
        block = small.fitted(source=source, hessian_regularization=2 * high).preflight.blocks["full"]
        assert block.smallest is not None
        assert block.largest is not None
        assert low - 1e-12 <= block.smallest
        assert 0.95 * high <= block.largest <= high * (1 + 1e-12)
        assert block.indefinite == (source == "hessian")
        if source == "hessian":
            assert block.smallest < 0.99 * low

    def test_blocks_have_spectra_of_their_own(self) -> None:
        found = small.fitted(blocks="per_layer").preflight.blocks
        matrix = reference.gauss_newton(small.net(), nn.CrossEntropyLoss(), small.batches())
        for name, span in (("0", slice(0, 16)), ("2", slice(16, 26))):
            expected = torch.linalg.eigvalsh(matrix[span, span])[-1].item()
            assert found[name].largest == pytest.approx(expected, rel=0.05)
            assert found[name].parameters == span.stop - span.start

    @pytest.mark.parametrize(
        ("source", "multiple", "message"),
        [
            ("gauss_newton", 12.0, "far above the curvature"),
            ("gauss_newton", 8.0, None),
            ("gauss_newton", 1e-3, None),
            ("gauss_newton", 1e-17, "lost in the rounding"),
            ("gauss_newton", 0.0, None),
            ("hessian", 1e-3, "does not make up for a negative eigenvalue.*'gauss_newton'"),
            ("hessian", 2.0, None),
            ("hessian", 0.0, "does not make up for a negative eigenvalue.*'gauss_newton'"),
        ],
    )
    def test_what_is_warned_of(self, source: str, multiple: float, message: str | None) -> None:
        strength = multiple * extremes(source)[1]
        # A solver that takes any matrix, and reports nothing of itself.
        influence = small.model(solver=Pseudoinverse(), source=source, hessian_regularization=strength)
        if message is None:
            influence.fit(small.batches())  # warnings are errors here
            return
        with pytest.warns(inf.PreflightWarning, match=message) as caught:
            influence.fit(small.batches())
        assert len(caught) == 1
        low, high = influence.preflight.blocks["full"].suggested or (0.0, 0.0)
        assert f"try {low:.1e} to {high:.1e}" in str(caught[0].message)
        assert "on 7 of 7 samples" in str(caught[0].message)
        assert caught[0].filename == __file__
        options = {"solver": Pseudoinverse(), "source": source}
        for better in (low, high):
            small.fitted(hessian_regularization=better, **options)
        small.fitted(hessian_regularization=strength, preflight=False, **options)

    def test_the_precision_is_that_of_the_model(self) -> None:
        x, y = small.points(7)
        strength = 1e-10 * extremes("gauss_newton")[1]
        for dtype, warns in ((torch.float64, False), (torch.float32, True)):
            module = small.net().to(dtype)
            influence = small.model(module, solver=Pseudoinverse(), hessian_regularization=strength)
            if warns:
                with pytest.warns(inf.PreflightWarning, match="rounding"):
                    influence.fit([(x.to(dtype), y)])
            else:
                influence.fit([(x.to(dtype), y)])

    def test_another_regularization_is_looked_at_again(self) -> None:
        influence = small.fitted()
        with pytest.warns(inf.PreflightWarning, match="far above"):
            other = influence.with_regularization(1e4)
        assert other.preflight.blocks["full"].regularization == 1e4
        assert other.preflight.blocks["full"].largest == influence.preflight.blocks["full"].largest
        assert influence.preflight.blocks["full"].regularization == 0.1

    @pytest.mark.parametrize("solver", ["ekfac", "kfac", Ellipsis], ids=str)
    def test_a_solver_that_takes_negative_eigenvalues_is_not_told_of_them(self, solver: Any) -> None:
        solver = Taking() if solver is Ellipsis else solver
        influence = small.fitted(solver=solver, source="hessian", hessian_regularization=1e-3)
        block = influence.preflight.blocks["full"]
        assert block.smallest is not None
        assert block.smallest < 0
        assert block.indefinite
        assert not block.exceeded
        # λ at which C + λI is singular is no advice, whoever takes it.
        assert block.suggested is not None
        assert block.suggested[0] >= -2 * block.smallest

    def test_a_solver_that_looks_for_them_is_not_told_what_a_sample_shows(self) -> None:
        counted = {}
        for kind in (Pseudoinverse, Looking):
            source = Indefinite()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                influence = small.fitted(solver=kind(), source=source, hessian_regularization=1e-3)
            block = influence.preflight.blocks["full"]
            assert block.indefinite
            assert block.exceeded == (kind is Pseudoinverse)
            told = [w for w in caught if issubclass(w.category, inf.PreflightWarning)]
            assert bool(told) == (kind is Pseudoinverse)
            counted[kind] = source.made[-1].products
            assert (block.suggested is None) == (kind is Looking)
        assert counted == {Pseudoinverse: 20, Looking: 6}

    def test_what_was_sought_at_one_regularization_says_nothing_at_a_smaller_one(self) -> None:
        influence = small.fitted(solver=Looking(), source=Indefinite(), hessian_regularization=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", inf.PreflightWarning)
            influence.with_regularization(2e-2)
        with pytest.warns(inf.PreflightWarning, match="negative eigenvalue"):
            influence.with_regularization(1e-3)

    def test_a_refined_approximation_is_what_its_refiner_is(self) -> None:
        with pytest.warns(inf.PreflightWarning, match="negative eigenvalue"):
            small.fitted(solver="ekfac", refine="cg", source="hessian", hessian_regularization=1e-3)

    def test_a_model_without_second_derivatives_is_not_asked_for_products(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x.tanh()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                (x,) = ctx.saved_tensors
                return gradient * (1 - x.tanh() ** 2)

        class Tanh(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = Once.apply(x)
                return result

        module = nn.Sequential(nn.Linear(3, 4), Tanh(), nn.Linear(4, 2)).double()
        assert small.fitted(module=module, solver="ekfac").preflight.tried == 0

    def test_many_samples_and_blocks_cost_a_bounded_number_of_products(self) -> None:
        source = Counting()
        module = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12))).double()
        x, y = small.points(2000)
        options = {"solver": Pseudoinverse(), "source": source, "blocks": "per_layer"}
        found = small.model(module, **options).fit([(x, y)])
        probed = [operator for operator in source.made if operator.samples < 2000]
        assert len(probed) == 8
        assert {operator.samples for operator in probed} == {256}
        assert {operator.products for operator in probed} == {4}
        assert sum(block.largest is None for block in found.preflight.blocks.values()) == 4


@dataclass(frozen=True)
class Pseudoinverse:
    """Takes any symmetric matrix and any λ."""

    def fit(self, operator: Any, regularization: float) -> inf.InverseOperator:
        dense = operator @ torch.eye(operator.shape[0], dtype=operator.dtype)
        values, vectors = torch.linalg.eigh(dense)
        return inf.LowRankInverse(operator, regularization, values, vectors)


@dataclass(frozen=True)
class Taking(Pseudoinverse):
    """The same, and says so."""

    takes_indefinite: ClassVar[bool] = True


@dataclass(frozen=True)
class Looking(Pseudoinverse):
    """The same, and says that it looks for negative eigenvalues."""

    finds_indefinite: ClassVar[bool] = True


class Counted(Bare):
    samples: int = 0

    def __matmul__(self, columns: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ columns


class Counting:
    """A source whose operators do nothing but count their products."""

    def __init__(self) -> None:
        self.made: list[Counted] = []

    def operator(self, problem: Problem, parameters: inf.ParameterSpace) -> Counted:
        operator = Counted(torch.diag(torch.arange(parameters.numel, dtype=torch.float64)))
        operator.samples = problem.size
        self.made.append(operator)
        return operator


class Indefinite(Counting):
    """Half of the eigenvalues are negative."""

    def operator(self, problem: Problem, parameters: inf.ParameterSpace) -> Counted:
        operator = super().operator(problem, parameters)
        operator.matrix -= parameters.numel / 2 * torch.eye(parameters.numel, dtype=torch.float64)
        return operator


def test_the_result_reads_as_a_table() -> None:
    found = small.fitted(blocks="per_layer", hessian_regularization=0.125).preflight
    assert found.reduction == "mean"
    lines = str(found).splitlines()
    assert lines[0] == "26 of 26 parameters take part; the loss is the mean over samples, of 7."
    assert lines[1].split() == ["block", "parameters", "λ", "smallest", "largest", "suggested", "λ"]
    assert lines[2].split()[:3] == ["0", "16", "0.125"]
    assert f"{found.blocks['2'].largest:.2e}" in lines[3]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert "on 7 of 7 samples" in lines[4]
    with pytest.warns(inf.PreflightWarning):
        text = str(small.fitted(module=Parts()).preflight)
    assert "not in the graph: outside.weight, outside.bias." in text
    assert "zero gradient: masked.weight, masked.bias." in text
    summed = small.fitted(loss=nn.CrossEntropyLoss(reduction="sum")).preflight
    assert summed.reduction == "sum"


def test_there_is_none_before_a_fit() -> None:
    with pytest.raises(inf.NotFittedError):
        _ = small.model().preflight


@pytest.mark.parametrize("budget", [1, 2**20])
@pytest.mark.parametrize(("count", "size"), [(1, 1), (4, 4), (5, 5), (7, 7), (100, 7)])
def test_the_first_samples_of_a_problem(count: int, size: int, budget: int) -> None:
    whole = problem(small.net(), memory_budget=budget)
    part = whole.first(count)
    assert part.size == size
    x = torch.cat([x for (x, _), _ in part.batches()])
    assert torch.equal(x, torch.cat([x for x, _ in small.batches()])[:size])
    assert whole.size == 7
    assert sum(n for _, n in whole.batches()) == 7
    data = [
        (x[:count], y[:count]) for x, y in [tuple(torch.cat(t) for t in zip(*small.batches(), strict=True))]
    ]
    expected = reference.gauss_newton(small.net(), nn.CrossEntropyLoss(), data)
    operator = inf.hessian_sources["gauss_newton"].create().operator(part, part.parameters)
    assert_close(operator @ torch.eye(26, dtype=torch.float64), expected, 1e-10)


class Stream:
    """Batches of two, each pass as ``order`` and ``change`` make it."""

    def __init__(
        self,
        order: Callable[[int], list[int]] = lambda n: list(range(n)),
        change: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.order, self.change = order, change
        self.x, self.y = small.points(9)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(len(self.x))
        for start in range(0, len(order), 2):
            index = order[start : start + 2]
            yield self.change(self.x[index]), self.y[index]


def hidden_order(count: int) -> list[int]:
    """From a generator whose state nobody can restore."""
    return random.SystemRandom().sample(range(count), count)


def augmented(x: Tensor) -> Tensor:
    noise = torch.frombuffer(bytearray(os.urandom(x.numel())), dtype=torch.uint8)
    return x + noise.reshape(x.shape) / 256


class TestPasses:
    def test_the_order_of_a_pass_does_not_matter(self) -> None:
        for solver in ("direct", {"name": "ekfac", "samples": "exact"}, {"name": "cg", "rtol": 1e-12}):
            options = {"solver": solver, "memory_budget": 1}
            expected = small.model(**options).fit(Stream()).influences(*small.points(3, 5))
            scores = small.model(**options).fit(Stream(hidden_order)).influences(*small.points(3, 5))
            assert_close(scores, expected, 1e-8)

    @pytest.mark.parametrize("solver", ["direct", "ekfac", "lissa"])
    @pytest.mark.parametrize(
        ("stream", "held"),
        [
            (Stream(change=augmented), "as many, but not the same"),
            (Stream(lambda n: hidden_order(n)[: n - 1]), "as many, but not the same"),
            (Stream(lambda n: [random.SystemRandom().randrange(n) for _ in range(n)]), "as many"),
        ],
        ids=["augmented", "dropped last", "with replacement"],
    )
    def test_other_contents_are_refused(self, stream: Stream, held: str, solver: str) -> None:
        message = f"held . samples .* {held}.*augmentation and drop_last.*memory_budget"
        influence = small.model(solver=solver, memory_budget=1)

        def several() -> None:
            # A draw may happen to be the same as the one before.
            for _ in range(4):
                influence.fit(stream).influences(*small.points(3, 5))

        with pytest.raises(inf.InvalidInputError, match=message):
            several()

    def test_what_is_held_in_memory_is_read_once(self) -> None:
        assert small.model().fit(Stream(change=augmented)).is_fitted

    def test_random_states_that_can_be_restored_are(self) -> None:
        stream = Stream(lambda n: torch.randperm(n).tolist(), lambda x: x + random.random())
        scores = small.model(memory_budget=1).fit(stream).influences(*small.points(3, 5))
        assert scores.isfinite().all()


class TestFingerprint:
    BATCH = (normal(6, 4, 3), torch.arange(6))

    def whole(self, batch: Any = None) -> Fingerprint:
        return Fingerprint.of(self.BATCH if batch is None else batch, 6)

    def test_it_depends_neither_on_order_nor_on_batches(self) -> None:
        x, y = self.BATCH
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        cut = Fingerprint.of((x[order][:4], y[order][:4]), 4) + Fingerprint.of((x[order][4:], y[order][4:]), 2)
        assert cut.agrees(self.whole())

    def test_it_depends_on_all_else(self) -> None:
        x, y = self.BATCH
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        one = x.clone()
        one[2, 1, 1] += 1e-2
        for other in ((x.flip(2), y), (x[order], y), (one, y), (x, y.flip(0)), (x.transpose(1, 2), y), (-x, y)):
            assert not self.whole(other).agrees(self.whole())
        assert not Fingerprint.of((x[:5], y[:5]), 5).agrees(self.whole())
        assert not self.whole((x * float("nan"), y)).agrees(self.whole())

    def test_one_sample_among_many(self) -> None:
        x = torch.randn(50_000, 8, generator=torch.Generator().manual_seed(0))
        other = x.clone()
        other[31_415] = x[0]
        mine = Fingerprint.of([x], len(x))
        assert not Fingerprint.of([other], len(x)).agrees(mine)
        pieces = [Fingerprint.of([part], len(part)) for part in x.flip(0).split(777)]
        assert sum(pieces, start=Fingerprint()).agrees(mine)

    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.bool, torch.int64, torch.bfloat16, torch.float16, torch.complex64]
    )
    def test_any_dtype(self, dtype: torch.dtype) -> None:
        x = (torch.arange(12).reshape(6, 2) % 5).to(dtype)
        assert Fingerprint.of({"x": x}, 6).agrees(Fingerprint.of({"x": x.flip(0)}, 6))
        assert not Fingerprint.of({"x": x}, 6).agrees(Fingerprint.of({"x": x.flip(1)}, 6))


@pytest.mark.parametrize(
    "name", ["conv", "batch_norm", "recurrent", "embedding", "mapping_inputs", "tuple_inputs"]
)
@pytest.mark.parametrize("budget", [1, 2**20])
def test_models_of_all_kinds_pass(name: str, budget: int) -> None:
    instance = cases.make(name)
    influence = inf.compose(
        instance.model, instance.loss, solver="direct", hessian_regularization=0.01, memory_budget=budget
    )
    assert influence.fit(instance.data).preflight.tried == influence.preflight.samples


def test_rounding_is_that_of_the_solver() -> None:
    """λ is lost in bfloat16, and not in the single precision of Kronecker factors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16().eval()
    data = [(torch.randn(64, 4).bfloat16(), torch.randint(3, (64,)))]

    def preflight(solver: str) -> inf.BlockPreflight:
        settings = {"solver": solver, "hessian_regularization": 1e-4}
        fitted = inf.compose(net, nn.CrossEntropyLoss(), **settings).fit(data)
        return fitted.preflight.blocks["full"]

    block = preflight("ekfac")
    assert block.scale is not None
    assert not block.below
    assert block.regularization < torch.finfo(torch.bfloat16).eps * block.scale
    with pytest.warns(inf.PreflightWarning, match="lost in the rounding"):
        assert preflight("jacobi").below
