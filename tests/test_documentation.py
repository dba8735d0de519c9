"""Documentation that is true: its code runs, prints what it says, and names only what exists."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import mktestdocs
import pytest
import torch

import influence_framework as inf
from influence_framework import errors, hookspecs
from influence_framework.registry import KINDS, OFFICIAL_DISTRIBUTIONS, OFFICIAL_EXECUTORS
from tests.distributions import ask, install

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted(ROOT.glob("plugins/*/README.md"))]
EVERYTHING = [
    *PAGES,
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    found: list[str] = mktestdocs.__main__.grab_code_blocks(text, lang=language)
    return found


def public(kind: type) -> list[str]:
    """Names of the classes in ``errors`` of this kind."""
    return [name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, kind)]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What the blocks of a page share, as if they were one module; global random state is put back."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with torch.random.fork_rng():
        yield vars(module)


def run(path: Path, namespace: dict[str, object]) -> dict[int, str]:
    """Run all Python blocks of a page one after the other; what was printed, by line of the page."""
    printed: dict[int, str] = {}

    def noted(*things: object) -> None:
        printed[sys._getframe(1).f_lineno] = " ".join(map(str, things))

    text = path.read_text()
    namespace["print"] = noted
    for block in blocks(text, "python"):
        above = text[: text.index(block)].count("\n")
        exec(compile("\n" * above + block, str(path), "exec"), namespace)
    return printed


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_python_blocks_run_and_print_what_they_say(path: Path, namespace: dict[str, object]) -> None:
    printed = run(path, namespace)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if said := re.fullmatch(r" *print\(.*\)  # (.*)", line):
            assert printed[number] == said[1], f"{title(path)}:{number}"


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_every_block_says_its_language(path: Path) -> None:
    fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "bash", "toml", "text"}
    assert set(fences[1::2]) <= {""}


def test_the_readme_finds_the_wrong_label(namespace: dict[str, object]) -> None:
    run(ROOT / "README.md", namespace)
    assert namespace["most_harmful"] == 7


def test_the_tutorial_prints_what_it_shows(namespace: dict[str, object]) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    printed = run(ROOT / "docs" / "tutorial.md", namespace)
    shown = re.findall(r"```python\n((?:(?!```).*\n)*)```\n\n```text\n((?:(?!```).*\n)*)```", text)
    assert len(shown) == 2
    for code, output in shown:
        first = text[: text.index(code)].count("\n") + 1
        numbered = enumerate(code.splitlines(), start=first)
        lines = [printed[number] for number, line in numbered if re.fullmatch(r"print\((?!.*  # ).*\)", line)]
        assert "\n".join(lines) == output.rstrip("\n")


def test_the_plugin_of_the_documentation_can_be_installed(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    (source,) = (block for block in blocks(text, "python") if block.startswith("# influence_cr.py"))
    (configuration,) = blocks(text, "toml")
    project = tomllib.loads(configuration)["project"]
    assert len(configuration.strip().splitlines()) == 6, "the pages promise six lines"
    assert project["entry-points"] == {"influence_framework": {"cr": "influence_cr"}}
    site = install(tmp_path / "site", project["name"], source, version=project["version"])
    answer = ask(
        """
        import influence_framework as inf
        method = inf.solvers["cr"]
        answer = [method.distribution, method.version, list(method.options), inf.default_registry.failures]
        """,
        site,
    )
    assert answer == [project["name"], project["version"], ["rtol", "maxiter"], []]


def make_targets() -> set[str]:
    (declared,) = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(declared.split())


@pytest.mark.parametrize("path", [*EVERYTHING, ROOT / ".ci" / "run"], ids=title)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    code = re.findall(r"`make ([^`]*)`", text) + re.findall(r"^ *make (.*)$", text, re.MULTILINE)
    named = {command.split()[0] for command in code}
    assert named <= make_targets()


def test_the_promised_make_targets_exist_and_are_explained() -> None:
    assert make_targets() == {"help", "demo", "test", "lint", "docs", "bench", "clean"}
    explained = re.findall(r"^([a-z]+):.*## \S", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(explained) == make_targets()
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.parametrize("path", EVERYTHING, ids=title)
def test_names_of_the_package_that_are_mentioned_exist(path: Path) -> None:
    text = path.read_text()
    for dotted in re.findall(r"\binf\.([A-Za-z_.]+[A-Za-z_])", text):
        thing: object = inf
        for name in dotted.split("."):
            if isinstance(thing, dict | str):
                break
            assert hasattr(thing, name), f"inf.{dotted}"
            thing = getattr(thing, name)
    for word in re.findall(r"`([A-Z][A-Za-z]*(?:Error|Warning))`", text):
        assert hasattr(inf, word), word
    hooks = {hook for hook, _, _ in KINDS.values()}
    for word in re.findall(r"`(register_\w+)`", text):
        assert word in hooks, word
    for distribution in re.findall(r"pip install (influence-framework-\w+)", text):
        assert distribution in {**OFFICIAL_DISTRIBUTIONS, **OFFICIAL_EXECUTORS}.values(), distribution


@pytest.mark.parametrize("path", EVERYTHING, ids=title)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


class TestChoosing:
    text = (ROOT / "docs" / "choosing.md").read_text()

    def table(self, header: str) -> set[str]:
        """First cells, in quotes, of the table with this first column."""
        (body,) = re.findall(rf"^\| `{header}=` .*\n\|[-| ]*\n((?:\|.*\n)+)", self.text, re.MULTILINE)
        return set(re.findall(r'^\| `"(\w+)"` ', body, re.MULTILINE))

    def test_every_source_is_explained_and_no_other(self) -> None:
        ours = {n for n, method in inf.hessian_sources.items() if method.distribution == "influence-framework"}
        assert self.table("source") == ours

    def test_every_solver_is_explained_and_no_other(self) -> None:
        assert self.table("solver") == set(OFFICIAL_DISTRIBUTIONS)

    def test_every_block_structure_is_explained(self) -> None:
        assert self.table("blocks") == {"full", "per_layer", "per_parameter"}


class TestTrust:
    text = (ROOT / "docs" / "trust.md").read_text()

    @pytest.mark.parametrize("name", public(errors.InfluenceError) + public(Warning))
    def test_every_error_and_warning_is_explained(self, name: str) -> None:
        assert name in inf.__all__
        assert f"`{name}`" in self.text

    @pytest.mark.parametrize("reason", list(inf.StopReason), ids=lambda reason: reason.name)
    def test_every_reason_to_stop_is_explained_in_its_own_words(self, reason: inf.StopReason) -> None:
        assert f"`{reason.name}`" in self.text
        if reason not in (inf.StopReason.CONVERGED, inf.StopReason.APPROXIMATION):
            assert f"| {reason.value.partition(':')[0]} | `{reason.name}` |" in self.text


class TestPlugins:
    text = (ROOT / "docs" / "plugins.md").read_text()

    def test_the_version_of_the_interface_is_the_present_one(self) -> None:
        assert re.findall(r"^INFLUENCE_API_VERSION = (\d+)$", self.text, re.MULTILINE) == [
            str(inf.PLUGIN_API_VERSION)
        ]
        assert f"`{hookspecs.API_VERSION_ATTRIBUTE}`" in self.text

    @pytest.mark.parametrize(
        "hook", [name for name, thing in vars(hookspecs).items() if name.startswith("register_")]
    )
    def test_every_hook_is_explained(self, hook: str) -> None:
        assert f"`{hook}`" in self.text

    @pytest.mark.parametrize(
        "capability", [inf.Diagonal, inf.Trace, inf.Dense, inf.Minibatches, inf.LayerStatistics]
    )
    def test_every_capability_is_named(self, capability: type) -> None:
        assert f"`{capability.__name__}`" in self.text

    @pytest.mark.parametrize("attribute", ["requires", "fixed", "default_source"])
    def test_every_class_attribute_of_solvers_is_named(self, attribute: str) -> None:
        assert f"``{attribute}``" in (inf.Solver.__doc__ or "")
        assert f"{attribute} = " in self.text


def defined(module: ModuleType, name: str) -> str:
    """Where a public name comes from, as a dotted path."""
    thing = getattr(module, name)
    if name == "PLUGIN_API_VERSION":
        return "influence_framework.hookspecs.API_VERSION"
    if name == "hookimpl":
        return "influence_framework.hookspecs.hookimpl"
    if not hasattr(thing, "__qualname__"):  # an instance: its class says in which module it is made
        return f"{type(thing).__module__}.{name}"
    return f"{thing.__module__}.{thing.__qualname__}"


class TestApi:
    text = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    packages = (
        "influence_framework",
        "influence_framework.evaluation",
        "influence_framework.attribution",
        "influence_framework.testing",
        *(path.name for path in sorted(ROOT.glob("plugins/*/influence_framework_*"))),
    )

    @pytest.mark.parametrize("package", packages)
    def test_every_public_name_is_on_the_page(self, package: str) -> None:
        module = importlib.import_module(package)
        expected = {defined(module, name) for name in module.__all__ if name != "evaluation"}
        assert expected - set(self.named) == set()

    def test_every_name_on_the_page_exists_and_is_there_once(self) -> None:
        assert len(self.named) == len(set(self.named))
        for path in self.named:
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path

    def test_the_site_looks_for_docstrings_in_every_plugin(self) -> None:
        configuration = (ROOT / "mkdocs.yml").read_text()
        assert set(re.findall(r"^ +- (plugins/\w+)$", configuration, re.MULTILINE)) == {
            f"plugins/{path.parent.name}" for path in ROOT.glob("plugins/*/pyproject.toml")
        }


def test_the_first_page_shows_the_picture_of_the_readme() -> None:
    readme, _ = re.findall(r"^!\[(.*)\]\(docs/(.*)\)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (index,) = re.findall(r"^!\[(.*)\]\((.*)\)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert readme == index


def test_pages_include_only_marked_parts_that_exist() -> None:
    for page in DOCS:
        for source, part in re.findall(r'^--8<-- "(.*):(.*)"$', page.read_text(), re.MULTILINE):
            text = (ROOT / source).read_text()
            for end in ("start", "end"):
                assert text.count(f"<!-- --8<-- [{end}:{part}] -->") == 1


def test_the_site_fetches_nothing_from_elsewhere() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  font: false$", configuration, re.MULTILINE)
    assert "://" not in configuration
    assert "extra_" not in configuration
