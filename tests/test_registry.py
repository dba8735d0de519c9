"""Methods by name: what a look-up tells, and who owns a name."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import influence_framework as inf
from influence_framework.registry import OFFICIAL_DISTRIBUTIONS, OFFICIAL_EXECUTORS, REQUIRED
from tests.plugins import Flat, Halving, OtherSolver, Stating, isolated, plugin, solver_plugin, source_plugin

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("as_user")


class OnDemand(OtherSolver):
    requires = property(lambda self: (inf.Diagonal,))
    fixed = property(lambda self: True)
    default_source = property(lambda self: "hessian")


class Selfish(OtherSolver):
    def __init__(me, self: int) -> None:  # noqa: N805
        me.value = self


class TestLookUp:
    def test_a_method_tells_what_it_is(self) -> None:
        method = isolated(mine=solver_plugin(halving=Halving)).solvers["halving"]
        assert (method.name, method.kind, method.cls) == ("halving", "solver", Halving)
        assert (method.distribution, method.version) == ("mine", "unknown")
        assert method.description == "Halves its right-hand sides."
        assert list(method.options) == ["strength", "times"]
        assert method.options["strength"].default is REQUIRED
        assert method.options["times"].default == 1
        assert method.options["times"].annotation == "int"

    def test_core_registers_its_sources_like_any_plugin(self) -> None:
        sources = isolated().hessian_sources
        assert list(sources) == ["empirical_fisher", "gauss_newton", "hessian"]
        assert {method.distribution for method in sources.values()} == {"influence-framework"}
        assert {method.version for method in sources.values()} == {"0.1.0"}
        assert sources["hessian"].options["precompute_grad"].default is False

    def test_core_registers_its_executors_like_any_plugin(self) -> None:
        executors = isolated().executors
        assert list(executors) == ["sequential", "torch_distributed"]
        assert {method.distribution for method in executors.values()} == {"influence-framework"}
        assert isinstance(executors["sequential"].create(), inf.Executor)

    def test_mappings_are_read_only(self) -> None:
        registry = isolated(mine=solver_plugin(halving=Halving))
        ours = (inf.solvers, inf.hessian_sources, inf.executors)
        for mapping in (registry.solvers, registry.hessian_sources, registry.executors, *ours):
            assert isinstance(mapping, Mapping)
            assert not isinstance(mapping, MutableMapping)
            assert not hasattr(mapping, "__setitem__")
            assert not hasattr(mapping, "__delitem__")
        assert len(registry.solvers) == 1
        assert "halving" in registry.solvers
        assert "hessian" not in registry.solvers
        assert repr(registry.solvers) == "<solvers: halving>"
        assert repr(isolated().solvers) == "<solvers: none installed>"

    def test_names_are_sorted_whatever_the_order_of_the_plugins(self) -> None:
        first, second = solver_plugin(zeta=Halving, alpha=OtherSolver), solver_plugin(middle=Halving)
        forward, backward = isolated(a=first, b=second), isolated(b=second, a=first)
        assert list(forward.solvers) == list(backward.solvers) == ["alpha", "middle", "zeta"]

    def test_a_registry_shares_nothing_with_another(self) -> None:
        one = isolated(mine=solver_plugin(halving=Halving))
        assert "halving" in one.solvers
        assert "halving" not in isolated().solvers
        assert "halving" not in inf.solvers

    def test_plugins_are_not_touched_before_the_first_look_up(self) -> None:
        calls = []
        registry = isolated(mine=plugin(register_solvers=lambda register: calls.append(register)))
        assert calls == []
        list(registry.solvers)
        assert registry.failures == ()
        assert len(calls) == 1
        list(registry.hessian_sources)
        assert len(calls) == 1, "the plugins were read twice"

    def test_rescan_sees_what_changed(self) -> None:
        methods = {"one": Halving}
        registry = isolated(
            mine=plugin(register_solvers=lambda register: [register(*m) for m in methods.items()])
        )
        assert list(registry.solvers) == ["one"]
        methods["two"] = Halving
        assert list(registry.solvers) == ["one"]
        registry.rescan()
        assert list(registry.solvers) == ["one", "two"]

    def test_options_reach_the_object_and_unknown_ones_are_told(self) -> None:
        method = isolated(mine=solver_plugin(halving=Halving)).solvers["halving"]
        assert method.create(strength=2.0, times=3) == Halving(2.0, 3)
        with pytest.raises(inf.UnknownOptionError, match=r"no option 'tmes'. Did you mean 'times'\?") as error:
            method.create(strength=2.0, tmes=3)
        assert "Its options: strength, times." in str(error.value)
        with pytest.raises(inf.UnknownOptionError, match="needs the option 'strength'"):
            method.create()

    def test_what_a_class_states_about_itself(self) -> None:
        methods = isolated(mine=solver_plugin(stating=Stating, halving=Halving)).solvers
        assert (methods["stating"].requires, methods["stating"].fixed) == (("Diagonal", "Trace"), True)
        assert methods["stating"].default_source == "hessian"
        assert (methods["halving"].requires, methods["halving"].fixed) == ((), False)
        assert methods["halving"].default_source is None

    def test_what_depends_on_the_options_is_not_stated_by_the_class(self) -> None:
        method = isolated(mine=solver_plugin(thing=OnDemand)).solvers["thing"]
        assert (method.requires, method.fixed, method.default_source) == ((), False, None)

    def test_an_option_may_be_called_self(self) -> None:
        method = isolated(mine=solver_plugin(thing=Selfish)).solvers["thing"]
        assert method.create(self=3).value == 3


class TestUnknownNames:
    def test_the_message_lists_what_exists_and_suggests_the_nearest(self) -> None:
        registry = isolated(mine=solver_plugin(halving=Halving, other=OtherSolver))
        with pytest.raises(inf.UnknownMethodError) as error:
            registry.solvers["halfing"]
        assert (
            str(error.value) == "Unknown solver 'halfing'. Did you mean 'halving'? Installed: halving, other."
        )
        with pytest.raises(inf.UnknownMethodError, match="Unknown curvature source 'fisher'") as error:
            registry.hessian_sources["fisher"]
        assert "Installed: empirical_fisher, gauss_newton, hessian." in str(error.value)

    def test_it_is_a_key_error_so_that_get_works(self) -> None:
        assert isolated().solvers.get("nonsense") is None
        with pytest.raises(KeyError):
            isolated().solvers["nonsense"]

    @pytest.mark.parametrize("name", [3, None, ["cg"], {}])
    def test_something_that_is_no_name(self, name: Any) -> None:
        with pytest.raises(inf.UnknownMethodError, match="Unknown solver"):
            isolated().solvers[name]
        assert name not in isolated().solvers

    def test_a_documented_executor_that_is_absent_says_what_to_install(self) -> None:
        with pytest.raises(
            inf.UnknownMethodError, match=r"executor 'dask'\. .*pip install influence-framework-dask"
        ):
            isolated().executors["dask"]

    @pytest.mark.parametrize("name", list(OFFICIAL_DISTRIBUTIONS))
    def test_a_documented_solver_that_is_absent_says_what_to_install(self, name: str) -> None:
        with pytest.raises(inf.UnknownMethodError) as error:
            isolated().solvers[name]
        assert str(error.value).endswith(f"Install it with: pip install {OFFICIAL_DISTRIBUTIONS[name]}")

    def test_without_any_solver_all_of_them_are_offered(self) -> None:
        with pytest.raises(inf.UnknownMethodError, match=r"influence-framework\[all\]"):
            isolated().solvers["nonsense"]
        with pytest.raises(inf.UnknownMethodError) as error:
            isolated(mine=solver_plugin(halving=Halving)).solvers["nonsense"]
        assert "[all]" not in str(error.value)

    def test_plugins_that_failed_are_named(self) -> None:
        registry = isolated(broken=plugin(register_solvers=lambda register: 1 / 0))
        with pytest.raises(inf.UnknownMethodError) as error:
            registry.solvers["nonsense"]
        assert "failed to load: broken (broken unknown): ZeroDivisionError: division by zero." in str(
            error.value
        )
        assert "pip install" not in str(error.value)

    def test_what_failed_is_not_said_to_be_missing(self) -> None:
        registry = inf.Registry(
            {"influence-framework-cg": plugin(register_solvers=lambda register: 1 / 0)}, installed=False
        )
        with pytest.raises(inf.UnknownMethodError, match="ZeroDivisionError") as error:
            registry.solvers["cg"]
        assert "pip install" not in str(error.value)
        with pytest.raises(inf.UnknownMethodError, match="pip install influence-framework-direct"):
            registry.solvers["direct"]


class TestConflicts:
    def test_two_plugins_that_claim_a_name_are_both_told(self) -> None:
        registry = isolated(one=solver_plugin(same=Halving, left=Halving), two=solver_plugin(same=OtherSolver))
        with pytest.raises(inf.PluginConflictError) as error:
            registry.solvers["same"]
        assert "one unknown (Halving) and two unknown (OtherSolver)" in str(error.value)
        assert registry.conflicts == (str(error.value),)
        assert registry.failures == ()
        assert registry.solvers["left"].cls is Halving

    def test_it_says_what_to_uninstall_which_is_never_core(self) -> None:
        registry = isolated(one=solver_plugin(same=Halving), two=solver_plugin(same=OtherSolver))
        assert registry.conflicts[0].endswith(
            "uninstall one or two, or pass an instance of the class you mean."
        )
        (conflict,) = isolated(bold=source_plugin(hessian=Flat)).conflicts
        assert conflict.endswith(": uninstall bold, or pass an instance of the class you mean.")

    def test_a_name_in_conflict_is_an_error_only_to_who_asks_for_it(self) -> None:
        solvers = isolated(
            one=solver_plugin(same=Halving, left=Halving), two=solver_plugin(same=OtherSolver)
        ).solvers
        assert {name: method.cls for name, method in dict(solvers).items()} == {"left": Halving}
        assert (list(solvers), len(solvers), repr(solvers)) == (["left"], 1, "<solvers: left>")
        assert "same" not in solvers
        for ask in (solvers.__getitem__, solvers.get):
            with pytest.raises(inf.PluginConflictError):
                ask("same")

    def test_a_built_in_name_can_not_be_taken_over(self) -> None:
        registry = isolated(bold=source_plugin(hessian=Flat, flat=Flat))
        with pytest.raises(inf.PluginConflictError, match=r"influence-framework 0\.1\.0 \(Hessian\) and bold"):
            registry.hessian_sources["hessian"]
        assert registry.hessian_sources["flat"].cls is Flat
        assert registry.hessian_sources["gauss_newton"].distribution == "influence-framework"

    def test_a_solver_and_a_source_may_share_a_name(self) -> None:
        registry = isolated(one=solver_plugin(same=Halving), two=source_plugin(same=Flat))
        assert registry.solvers["same"].cls is Halving
        assert registry.hessian_sources["same"].cls is Flat
        assert registry.conflicts == ()

    def test_the_same_class_twice_is_no_conflict(self) -> None:
        """As when a plugin under test is installed, too."""
        registry = isolated(one=solver_plugin(same=Halving), two=solver_plugin(same=Halving))
        assert registry.solvers["same"].cls is Halving
        assert registry.conflicts == ()

    def test_conflicts_reach_the_user_of_compose(self) -> None:
        registry = isolated(one=solver_plugin(same=Halving), two=solver_plugin(same=OtherSolver))
        with pytest.raises(inf.PluginConflictError, match="pass an instance"):
            inf.compose(nn.Linear(1, 1), nn.MSELoss(), solver="same", registry=registry)


class TestOurOwnPlugins:
    """What the repository holds, what is installed and what core says of it agree."""

    def projects(self) -> dict[str, dict[str, Any]]:
        parsed = [tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]
        return {project["project"]["name"]: project["project"] for project in parsed}

    def test_all_of_them_load_without_a_failure_or_a_conflict(self) -> None:
        assert inf.default_registry.failures == ()
        assert inf.default_registry.conflicts == ()
        installed = {method.distribution for method in [*inf.solvers.values(), *inf.executors.values()]}
        assert set(self.projects()) <= installed

    def test_core_knows_which_distribution_brings_which_solver(self) -> None:
        ours = {
            name: method.distribution
            for name, method in inf.solvers.items()
            if method.distribution in self.projects()
        }
        assert ours == OFFICIAL_DISTRIBUTIONS

    def test_and_which_executor(self) -> None:
        ours = {
            name: method.distribution
            for name, method in inf.executors.items()
            if method.distribution in self.projects()
        }
        assert ours == OFFICIAL_EXECUTORS

    def test_versions_are_those_of_the_distributions(self) -> None:
        projects = self.projects()
        for method in inf.solvers.values():
            if method.distribution in projects:
                assert method.version == projects[method.distribution]["version"]

    def test_the_extra_named_all_is_all(self) -> None:
        core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert sorted(core["optional-dependencies"]["all"]) == sorted(self.projects())

    @pytest.mark.parametrize("name", sorted(OFFICIAL_DISTRIBUTIONS))
    def test_each_has_a_description_and_only_annotated_options(self, name: str) -> None:
        method = inf.solvers[name]
        assert len(method.description) > 20
        assert inspect.getdoc(method.cls)
        assert all(option.annotation != "inspect._empty" for option in method.options.values())
