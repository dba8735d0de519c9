"""From names, mappings and instances to a model that is ready to fit."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pytest
import torch
from torch import Tensor, nn

import influence_framework as inf
from influence_framework.compose import resolve
from influence_framework.inverses import Inverse, make_solution, relative_residuals

if TYPE_CHECKING:
    from a_package_for_the_type_checker import Gadget

pytestmark = pytest.mark.usefixtures("as_user")


@dataclass(frozen=True)
class ExactInverse(Inverse):
    """The inverse of a formed matrix."""

    base: inf.LinearOperator
    regularization: float
    matrix: Tensor

    def _solve(self, columns: Tensor) -> inf.Solution:
        value = torch.linalg.solve(self.matrix, columns)
        residual = relative_residuals(self.base, self.regularization, value, columns)
        return make_solution(value, residual, [inf.StopReason.CONVERGED] * columns.shape[1])


@dataclass(frozen=True)
class Exact:
    """Solves exactly, for these tests.

    Attributes:
        jitter: Added to the diagonal.
        partner: Another solver.
        spare: Yet another one.
        gadget: Something of a type that exists for the type checker alone.
        label: A string that is no name of a solver.
    """

    jitter: float = 0.0
    partner: inf.Solver | None = None
    spare: inf.Solver | None = None
    gadget: Gadget | None = None
    label: str = "plain"

    def fit(self, operator: inf.LinearOperator, regularization: float) -> ExactInverse:
        identity = torch.eye(operator.shape[0], dtype=operator.dtype)
        return ExactInverse(
            operator, regularization, operator @ identity + (regularization + self.jitter) * identity
        )


class FisherOnly(Exact):
    """Made for one source, named here."""

    default_source: ClassVar[str] = "empirical_fisher"


class Plain:
    """No dataclass: its options are those of ``__init__``."""

    def __init__(self, depth: int, partner: inf.Solver | None = None, **anything: Any) -> None:
        self.depth = depth
        self.partner = partner

    def fit(self, operator: Any, regularization: float) -> Any: ...


@dataclass(frozen=True)
class Scaled:
    """A source that wraps another one."""

    factor: float = 1.0

    def operator(self, problem: inf.Problem, parameters: inf.ParameterSpace) -> inf.LinearOperator:
        whole = inf.hessian_sources["gauss_newton"].create().operator(problem, parameters)
        return self.factor * whole


@inf.hookimpl
def register_solvers(register: Any) -> None:
    register("exact", Exact)
    register("fisher_only", FisherOnly)
    register("plain", Plain)


@inf.hookimpl
def register_hessian_sources(register: Any) -> None:
    register("scaled", Scaled)


REGISTRY = inf.Registry(
    {
        "tests": SimpleNamespace(
            register_solvers=register_solvers, register_hessian_sources=register_hessian_sources
        )
    },
    installed=False,
)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(12, 3, generator=generator, dtype=torch.float64),
        torch.randint(0, 2, (12,), generator=generator),
    )


def composed(net: nn.Module, **arguments: Any) -> inf.TorchInfluenceFunctionModel:
    return inf.compose(net, nn.CrossEntropyLoss(), registry=REGISTRY, **arguments)


class TestSpecifications:
    @pytest.mark.parametrize(
        "spec",
        ["exact", {"name": "exact"}, {"name": "exact", "jitter": 0.0}, Exact()],
        ids=["name", "mapping", "options", "instance"],
    )
    def test_a_name_a_mapping_and_an_instance_are_the_same(
        self, spec: Any, net: nn.Module, data: tuple[Tensor, Tensor]
    ) -> None:
        model = composed(net, solver=spec, hessian_regularization=0.1)
        assert model.solver == Exact()
        assert not model.is_fitted
        scores = model.fit([data]).influences(*data)
        expected = composed(net, solver=Exact(), hessian_regularization=0.1).fit([data]).influences(*data)
        assert torch.equal(scores, expected)

    def test_sources_too(self, net: nn.Module) -> None:
        for spec in ("scaled", {"name": "scaled"}, Scaled()):
            assert composed(net, solver="exact", source=spec).source == Scaled()

    def test_options_reach_the_objects_and_change_the_scores(
        self, net: nn.Module, data: tuple[Tensor, Tensor]
    ) -> None:
        plain = composed(net, solver="exact", hessian_regularization=0.3).fit([data]).influences(*data)
        shifted = composed(net, solver={"name": "exact", "jitter": 0.2}, hessian_regularization=0.1)
        assert torch.allclose(shifted.fit([data]).influences(*data), plain)
        # (4C + 4λI)⁻¹ is a quarter of (C + λI)⁻¹.
        quartered = composed(
            net, solver="exact", source={"name": "scaled", "factor": 4.0}, hessian_regularization=1.2
        )
        assert torch.allclose(4 * quartered.fit([data]).influences(*data), plain)

    def test_the_mapping_is_left_as_it_was(self, net: nn.Module) -> None:
        spec = {"name": "exact", "partner": {"name": "exact", "jitter": 1.0}}
        composed(net, solver=spec)
        assert spec == {"name": "exact", "partner": {"name": "exact", "jitter": 1.0}}

    def test_everything_else_is_passed_on(self, net: nn.Module) -> None:
        model = composed(
            net,
            solver="exact",
            blocks="per_parameter",
            hessian_regularization={"weight": 0.1, "bias": 0.2},
            memory_budget=12345,
        )
        assert model.model is net
        assert model.blocks == "per_parameter"
        assert model.hessian_regularization == {"weight": 0.1, "bias": 0.2}
        assert model.memory_budget == 12345


class TestDefaultSource:
    def test_is_gauss_newton(self, net: nn.Module) -> None:
        assert type(composed(net, solver="exact").source).__name__ == "GaussNewton"
        assert type(composed(net, solver=Exact()).source).__name__ == "GaussNewton"

    def test_unless_the_solver_has_its_own(self, net: nn.Module) -> None:
        assert type(composed(net, solver="fisher_only").source).__name__ == "EmpiricalFisher"
        assert type(composed(net, solver=FisherOnly()).source).__name__ == "EmpiricalFisher"
        assert type(composed(net, solver="fisher_only", source="hessian").source).__name__ == "Hessian"


class TestNestedSolvers:
    @pytest.mark.parametrize(
        "partner",
        ["exact", {"name": "exact"}, {"name": "exact", "jitter": 0.0}, Exact()],
        ids=["name", "mapping", "options", "instance"],
    )
    @pytest.mark.parametrize(
        "outer", [{"name": "exact"}, {"name": "plain", "depth": 1}], ids=["dataclass", "class"]
    )
    def test_by_name_mapping_or_instance(self, outer: dict[str, Any], partner: Any) -> None:
        assert resolve("solver", {**outer, "partner": partner}, REGISTRY).partner == Exact()

    def test_several_and_deeper(self) -> None:
        spec = {
            "name": "exact",
            "spare": "exact",
            "partner": {"name": "exact", "partner": {"name": "plain", "depth": 7}},
        }
        solver = resolve("solver", spec, REGISTRY)
        assert solver.spare == Exact()
        assert solver.partner.partner.depth == 7

    def test_other_options_keep_their_strings_and_mappings(self) -> None:
        solver = resolve("solver", {"name": "exact", "label": "exact", "gadget": {"name": "exact"}}, REGISTRY)
        assert solver.label == "exact"
        assert solver.gadget == {"name": "exact"}

    def test_left_out_or_none(self) -> None:
        assert resolve("solver", {"name": "exact", "partner": None}, REGISTRY).partner is None

    def test_what_is_wrong_with_one_is_told(self) -> None:
        with pytest.raises(inf.UnknownMethodError, match=r"'exakt'. Did you mean 'exact'\?"):
            resolve("solver", {"name": "exact", "partner": "exakt"}, REGISTRY)
        with pytest.raises(inf.UnknownOptionError, match=r"no option 'jiter'. Did you mean 'jitter'\?"):
            resolve("solver", {"name": "exact", "partner": {"name": "exact", "jiter": 1.0}}, REGISTRY)

    def test_the_registry_is_the_one_given(self) -> None:
        with pytest.raises(inf.UnknownMethodError, match="'jacobi'"):
            resolve("solver", {"name": "exact", "partner": "jacobi"}, REGISTRY)

    def test_cg_with_a_preconditioner(self, net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        by_name = inf.compose(net, nn.CrossEntropyLoss(), solver={"name": "cg", "preconditioner": "jacobi"})
        by_mapping = inf.compose(
            net,
            nn.CrossEntropyLoss(),
            solver={"name": "cg", "preconditioner": {"name": "jacobi", "probes": 64}},
        )
        assert type(by_name.solver).__name__ == "CgSolver"
        assert type(by_name.solver.preconditioner).__name__ == "JacobiSolver"
        assert by_mapping.solver.preconditioner.probes == 64


class TestMistakes:
    def test_an_unknown_option_lists_the_options_and_suggests_the_nearest(self, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownOptionError) as error:
            composed(net, solver={"name": "exact", "jiter": 1.0})
        assert str(error.value) == (
            "'exact' has no option 'jiter'. Did you mean 'jitter'? "
            "Its options: jitter, partner, spare, gadget, label."
        )

    def test_an_option_of_no_name_near_any(self, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownOptionError, match=r"no option 'rank'\. Its options: jitter"):
            composed(net, solver={"name": "exact", "rank": 1})

    def test_a_required_option(self, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownOptionError, match="'plain' needs the option 'depth'"):
            composed(net, solver="plain")

    def test_an_option_that_only_kwargs_would_take(self, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownOptionError, match="no option 'width'"):
            composed(net, solver={"name": "plain", "depth": 1, "width": 2})

    def test_a_mapping_without_a_name(self, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownOptionError, match=r"needs the key 'name', got \['jitter'\]"):
            composed(net, solver={"jitter": 1.0})
        with pytest.raises(inf.UnknownOptionError, match="A curvature source given as a mapping"):
            composed(net, solver="exact", source={})

    @pytest.mark.parametrize("name", [None, 3, ["exact"]])
    def test_a_name_that_is_none(self, name: Any, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownMethodError, match="Unknown solver"):
            composed(net, solver={"name": name})

    def test_a_class_in_place_of_an_instance(self, net: nn.Module) -> None:
        with pytest.raises(
            inf.InvalidInputError, match=r"Got the class Exact as solver: pass .* Exact\(\.\.\.\)"
        ):
            composed(net, solver=Exact)
        with pytest.raises(inf.InvalidInputError, match="Got the class Scaled as curvature source"):
            composed(net, solver="exact", source=Scaled)

    @pytest.mark.parametrize("spec", [None, 3, ["exact"], Scaled()])
    def test_something_else(self, spec: Any, net: nn.Module) -> None:
        with pytest.raises(inf.InvalidInputError, match=r"Expected a solver as a name.*'fit'.*got"):
            composed(net, solver=spec)

    def test_solver_and_source_mixed_up(self, net: nn.Module) -> None:
        with pytest.raises(inf.UnknownMethodError, match="Unknown solver 'gauss_newton'"):
            composed(net, solver="gauss_newton")
        with pytest.raises(inf.UnknownMethodError, match="Unknown curvature source 'exact'"):
            composed(net, solver="exact", source="exact")


class Annotated(Protocol):
    """Not a solver, whatever its name."""


def test_only_solvers_are_nested() -> None:
    @dataclass(frozen=True)
    class Picky:
        other: Annotated | None = None

        def fit(self, operator: Any, regularization: float) -> Any: ...

    plugin = SimpleNamespace(register_solvers=inf.hookimpl(lambda register: register("picky", Picky)))
    solver = resolve(
        "solver", {"name": "picky", "other": "exact"}, inf.Registry({"p": plugin}, installed=False)
    )
    assert solver.other == "exact"
