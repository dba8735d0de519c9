"""Real distributions on a real path, each look at them in a process of its own so that nothing leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributions import ROOT, ask, install, packages

SOLVER = """
from influence_framework import hookimpl

class {title}Solver:
    "A solver of the tests."

    def __init__(self, strength: float = 2.0) -> None:
        self.strength = strength

    def fit(self, operator, regularization):
        return operator

@hookimpl
def register_solvers(register):
    register("{name}", {title}Solver)
"""


def solver_module(name: str) -> str:
    return SOLVER.format(name=name, title=name.title())


SURVEY = """
    import influence_framework as inf
    answer = {
        "solvers": list(inf.solvers),
        "sources": list(inf.hessian_sources),
        "failures": {f.plugin: [f.distribution, f.version, f.reason] for f in inf.default_registry.failures},
        "order": [f.distribution for f in inf.default_registry.failures],
        "conflicts": inf.default_registry.conflicts,
    }
"""


def test_a_distribution_is_found_by_its_entry_point(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "tiny-halving", solver_module("halving"))
    answer = ask(
        """
        import influence_framework as inf
        method = inf.solvers["halving"]
        answer = [method.distribution, method.version, method.description, method.options["strength"].default,
                  type(method.create(strength=3.0)).__module__, inf.default_registry.failures]
        """,
        site,
    )
    assert answer == ["tiny-halving", "1.2.3", "A solver of the tests.", 2.0, "tiny_halving", []]


def test_importing_core_neither_imports_plugins_nor_reads_entry_points(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "tiny-halving", solver_module("halving"))
    before, after = ask(
        """
        import sys
        from importlib import metadata
        asked, entry_points = [], metadata.entry_points
        # torch reads entry points of its own while it is imported.
        metadata.entry_points = lambda **query: asked.append(query.get("group")) or entry_points(**query)

        def seen():
            plugins = [m for m in sys.modules if m.startswith(("influence_framework_", "tiny_"))]
            return {"plugins": sorted(plugins), "asked": [g for g in asked if not str(g).startswith("torch")],
                    "sources": "influence_framework.sources" in sys.modules}

        import influence_framework as inf
        first = seen()
        list(inf.solvers)
        answer = [first, seen()]
        """,
        site,
    )
    assert before == {"plugins": [], "asked": [], "sources": False}
    assert after["asked"] == ["influence_framework"]
    assert "tiny_halving" in after["plugins"]
    assert after["sources"]


def test_the_order_is_fixed_whatever_the_order_on_the_path(tmp_path: Path) -> None:
    first = install(tmp_path / "first", "tiny-alpha", "raise OSError('alpha')")
    install(first, "tiny-gamma", solver_module("gamma"))
    second = install(tmp_path / "second", "tiny-beta", "raise OSError('beta')")
    forward, backward = ask(SURVEY, first, second), ask(SURVEY, second, first)
    assert forward == backward
    assert forward["order"] == ["tiny-alpha", "tiny-beta"]
    assert "gamma" in forward["solvers"]


THING = solver_module("thing")

NAMED = THING.replace("strength: float = 2.0", "name: str = 'x'").replace("= strength", "= name")
AUTHORS = "Tell its authors, or uninstall it: pip uninstall {}"
UPGRADE = (
    "Upgrade influence-framework: pip install --upgrade influence-framework; or install a version of {} "
    "written for influence-framework 0.1.0"
)
ABSENT = "Install what provides 'a_package_that_is_absent', or uninstall it: pip uninstall {}"
BROKEN = {
    "broken-raises": ("raise RuntimeError('not\\n today')", "RuntimeError: not today", AUTHORS),
    "broken-exits": ("import sys; sys.exit(3)", "it called sys.exit(3) while loading", AUTHORS),
    "broken-cancelled": ("raise GeneratorExit('enough')", "GeneratorExit: enough", AUTHORS),
    "broken-missing": (
        "import a_package_that_is_absent.part",
        "No module named 'a_package_that_is_absent'",
        ABSENT,
    ),
    "broken-syntax": ("def (:", "SyntaxError", AUTHORS),
    "broken-core": (
        "from influence_framework import of_the_future",
        "cannot import name 'of_the_future'",
        UPGRADE,
    ),
    "broken-core-module": (
        "import influence_framework.of_the_future",
        "No module named 'influence_framework.of_the_future'",
        UPGRADE,
    ),
    "broken-future": (
        "INFLUENCE_API_VERSION = 7\n" + THING,
        "it is written for version 7 of the plugin interface, and influence-framework 0.1.0 has version 1",
        UPGRADE,
    ),
    "broken-stated": (
        "INFLUENCE_API_VERSION = '1'\n" + THING,
        "its INFLUENCE_API_VERSION must be a positive int such as 1, got '1'",
        AUTHORS,
    ),
    "broken-misspelled": (
        THING.replace("register_solvers", "register_solver"),
        "unknown hook 'register_solver' in plugin",
        AUTHORS,
    ),
    "broken-argument": (
        THING.replace("(register)", "(registry)").replace("register(", "registry("),
        "Argument(s) {'registry'} are declared in the hookimpl but can not be found in the hookspec",
        AUTHORS,
    ),
    "broken-undecorated": (THING.replace("@hookimpl", ""), "it implements no hook", AUTHORS),
    "broken-instance": (
        THING.replace("ThingSolver)", "ThingSolver())"),
        "'thing' must be registered with a class, got <broken_instance.ThingSolver object",
        AUTHORS,
    ),
    "broken-fit": (THING.replace("def fit", "def fitted"), "it has no method 'fit'", AUTHORS),
    "broken-name": (
        THING.replace('"thing"', '"My-Thing"'),
        "no name for a solver: use a lower-case identifier",
        AUTHORS,
    ),
    "broken-option": (NAMED, "ThingSolver has an option called 'name', which stands for the method", AUTHORS),
    "broken-early": (
        "import influence_framework as inf; inf.solvers['first']",
        "it looks up methods while plugins are loaded",
        AUTHORS,
    ),
}
"""Source of a distribution's module, what core says is wrong with it, and the remedy it ends with."""


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What core says of an environment with every broken distribution and two working ones."""
    site = tmp_path_factory.mktemp("site")
    for name, (source, _, _) in BROKEN.items():
        install(site, name, source, version="0.9")
    install(site, "aaa-working", solver_module("first"))
    install(site, "zzz-working", solver_module("last"))
    # What an interrupted removal leaves behind, and what a broken disk does.
    for name in ("left_over", "unreadable"):
        (site / f"{name}-1.dist-info").mkdir()
        (site / f"{name}-1.dist-info" / "entry_points.txt").write_text(
            f"[influence_framework]\n{name} = {name}\n"
        )
    (site / "unreadable-1.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    answer: dict[str, Any] = ask(SURVEY, site)
    return answer | {"site": str(site)}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_distribution_is_set_aside_with_its_reason(name: str, survey: dict[str, Any]) -> None:
    distribution, version, reason = survey["failures"][name.replace("-", "_")]
    assert (distribution, version) == (name, "0.9")
    _, wrong, remedy = BROKEN[name]
    assert wrong in reason
    assert reason.endswith(f". {remedy.format(name)}")
    assert "\n" not in reason


@pytest.mark.parametrize("name", ["left_over", "unreadable"])
def test_a_folder_without_metadata_is_set_aside(name: str, survey: dict[str, Any]) -> None:
    distribution, version, reason = survey["failures"][name]
    assert (distribution, version) == ("unknown", "unknown")
    assert reason == (
        f"ModuleNotFoundError: No module named {name!r}. Install what provides {name!r}, or remove the "
        f"metadata folder (.dist-info) that declares {name!r} from {survey['site']}"
    )


def test_beside_broken_distributions_the_others_work(survey: dict[str, Any]) -> None:
    assert {"first", "last"} <= set(survey["solvers"])
    assert "thing" not in survey["solvers"]
    assert {"empirical_fisher", "gauss_newton", "hessian"} <= set(survey["sources"])
    assert set(survey["failures"]) == {"left_over", "unreadable", *(name.replace("-", "_") for name in BROKEN)}
    assert survey["order"] == sorted(survey["order"])


def test_metadata_without_a_version_does_no_harm(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "tiny-halving", solver_module("halving"), version=None)
    install(site, "tiny-broken", "raise OSError('gone')", version=None)
    answer = ask(
        """
        import influence_framework as inf
        method = inf.solvers["halving"]
        answer = [method.distribution, method.version, *map(str, inf.default_registry.failures)]
        """,
        site,
    )
    assert answer == [
        "tiny-halving",
        "unknown",
        "tiny_broken (tiny-broken unknown): OSError: gone. Tell its authors, or uninstall it: pip uninstall "
        "tiny-broken",
    ]


def test_an_interruption_while_loading_gets_through(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "tiny-halving", solver_module("halving"))
    install(site, "tiny-slow", "raise KeyboardInterrupt")
    answer = ask(
        """
        import influence_framework as inf
        try:
            list(inf.solvers)
        except KeyboardInterrupt:
            answer = "interrupted"
        """,
        site,
    )
    assert answer == "interrupted"


def test_a_stated_interface_is_the_present_one(tmp_path: Path) -> None:
    source = "INFLUENCE_API_VERSION = 1\n" + solver_module("halving")
    site = install(tmp_path / "site", "tiny-halving", source)
    answer = ask("import influence_framework as inf; answer = list(inf.solvers)", site)
    assert "halving" in answer


def test_two_distributions_that_claim_a_name_are_both_named(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "tiny-one", solver_module("same"))
    install(site, "tiny-two", solver_module("same"), version="2.0")
    install(site, "tiny-three", solver_module("other"))
    bold = solver_module("gauss_newton").replace("register_solvers", "register_hessian_sources")
    install(site, "tiny-bold", bold.replace("def fit", "def operator"))
    answer = ask(
        """
        import influence_framework as inf
        answer = []
        for mapping, name in ((inf.solvers, "same"), (inf.hessian_sources, "gauss_newton")):
            try:
                mapping[name]
            except inf.PluginConflictError as error:
                answer.append(str(error))
        answer += [inf.solvers["other"].distribution, list(inf.default_registry.conflicts)]
        mappings = (inf.solvers, inf.hessian_sources)
        answer.append([*(list(dict(mapping)) for mapping in mappings), inf.default_registry.failures])
        """,
        site,
    )
    same, source, other, conflicts, (solvers, sources, failures) = answer
    assert "tiny-one 1.2.3 (SameSolver) and tiny-two 2.0 (SameSolver)" in same
    assert "influence-framework 0.1.0 (GaussNewton) and tiny-bold 1.2.3" in source
    assert same.endswith(": uninstall tiny-one or tiny-two, or pass an instance of the class you mean.")
    assert source.endswith(": uninstall tiny-bold, or pass an instance of the class you mean.")
    assert other == "tiny-three"
    assert conflicts == [same, source]
    assert "other" in solvers
    assert "same" not in solvers
    assert {"empirical_fisher", "hessian"} <= set(sources)
    assert "gauss_newton" not in sources
    assert failures == []


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this environment without any plugin, in a folder for ``python -S``."""
    site = packages(tmp_path_factory.mktemp("core_alone"), without="influence_framework_")
    # An editable installation is a .pth file, which python -S does not read.
    if not (site / "influence_framework").exists():
        (site / "influence_framework").symlink_to(ROOT / "influence_framework")
    return site


def test_core_alone_runs_and_says_what_is_missing(core_alone: Path) -> None:
    answer = ask(
        """
        import torch
        from torch import nn
        import influence_framework as inf

        answer = {"solvers": list(inf.solvers), "repr": repr(inf.solvers), "sources": list(inf.hessian_sources),
                  "failures": list(inf.default_registry.failures)}
        net = nn.Linear(2, 1)
        for name in ("cg", "nonsense"):
            try:
                inf.compose(net, nn.MSELoss(), solver=name)
            except inf.UnknownMethodError as error:
                answer[name] = str(error)
        problem = inf.Problem.build(net, nn.MSELoss(), [(torch.ones(3, 2), torch.ones(3, 1))])
        operator = inf.hessian_sources["gauss_newton"].create().operator(problem, problem.parameters)
        answer["product"] = (operator @ torch.ones(3)).tolist()
        """,
        core_alone,
        options=("-S",),
    )
    assert answer["solvers"] == []
    assert answer["failures"] == []
    assert answer["repr"] == "<solvers: none installed>"
    assert answer["sources"] == ["empirical_fisher", "gauss_newton", "hessian"]
    assert (
        answer["cg"]
        == "Unknown solver 'cg'. Installed: none. Install it with: pip install influence-framework-cg"
    )
    assert "Solvers are plugins of their own; get all with: pip install" in answer["nonsense"]
    # J = (1, 1, 1) for every sample and the loss is (f − y)², so C = 2 J Jᵀ.
    assert answer["product"] == [6.0, 6.0, 6.0]
