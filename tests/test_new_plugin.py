"""``influence new-plugin``: what it writes can be installed, is found and passes its own tests."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import influence_framework as inf
from influence_framework.cli import new_plugin as module
from influence_framework.cli.main import main
from influence_framework.cli.new_plugin import new_plugin
from tests.distributions import ROOT, Environment, install

GUIDE = (ROOT / "docs" / "plugins.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)[0].splitlines()]
"""What the guide tells authors to type: write, install, check, test."""


def typed(environment: Environment, command: list[str]) -> str:
    program, *arguments = command
    if program == "pytest":
        return environment.python("-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *arguments)
    if program == "pip":
        assert arguments[0] == "install"
        return environment.install(*arguments[1:])
    assert program == "influence"
    return environment.influence(*arguments)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Core, and the package that its command wrote for the name ``my_method``."""
    environment = Environment(tmp_path_factory.mktemp("fresh"))
    for command in COMMANDS[:2]:
        typed(environment, command)
    return environment


class TestWhatItWrites:
    def test_is_found_by_its_name_and_computes(self, environment: Environment) -> None:
        answer = environment.answer(
            """
            import torch
            from torch import nn
            import influence_framework as inf

            method = inf.solvers["my_method"]
            answer = [list(inf.solvers), method.distribution, method.version, inf.default_registry.failures]
            net = nn.Linear(2, 1, bias=False).double()
            x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.ones(2, 1).double()
            with torch.no_grad():
                net.weight.copy_(torch.tensor([[0.0, 0.0]]))
            model = inf.compose(net, nn.MSELoss(), solver="my_method", hessian_regularization=1.0)
            answer.append(model.fit([(x, y)]).influences(x, y).flatten().tolist())
            """
        )
        solvers, distribution, version, failures, scores = answer
        assert solvers == ["my_method"]
        assert (distribution, version, failures) == ("influence-my-method", "0.1.0", [])
        # C = 2/N Σ x xᵀ = diag(1, 4), and the gradients at zero are −2 x: 4/(1 + 1) and 16/(4 + 1).
        assert scores == pytest.approx([2.0, 0.0, 0.0, 3.2])

    def test_passes_its_own_tests(self, environment: Environment) -> None:
        assert "4 passed" in typed(environment, COMMANDS[3])

    def test_conforms(self, environment: Environment) -> None:
        told = typed(environment, COMMANDS[2])
        assert "passed" in told
        assert "FAILED" not in told

    def test_is_listed(self, environment: Environment) -> None:
        assert "influence-my-method" in environment.influence("plugins")

    def test_belongs_to_this_version_of_core(self, tmp_path: Path) -> None:
        folder = new_plugin("mine", tmp_path)
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["name"] == "influence-mine"
        assert project["entry-points"] == {"influence_framework": {"mine": "influence_mine"}}
        assert project["dependencies"] == ["influence-framework>=0.1,<0.2"]
        assert (
            f"INFLUENCE_API_VERSION = {inf.PLUGIN_API_VERSION}\n" in (folder / "influence_mine.py").read_text()
        )
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
            "README.md",
            "influence_mine.py",
            "pyproject.toml",
            "tests/test_mine.py",
        ]
        assert not any("$" in path.read_text() for path in folder.rglob("*") if path.is_file())

    def test_the_command_says_what_to_do_next(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["new-plugin", "mine", "--directory", str(tmp_path)]) == 0
        folder = tmp_path / "influence-mine"
        assert capsys.readouterr().out.splitlines() == [
            f"Wrote {folder}. Next:",
            f"  pip install --editable '{folder}[test]'",
            "  influence check mine",
            f"  pytest {folder}",
        ]


def refused(name: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, having changed nothing."""
    before = sorted(directory.rglob("*")) if directory.exists() else None
    assert main(["new-plugin", name, "--directory", str(directory)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert (sorted(directory.rglob("*")) if directory.exists() else None) == before
    return printed.err


class TestWhatItRefuses:
    @pytest.mark.parametrize(
        "name",
        ["", "My", "my-method", "1st", "_mine", "mine_", "my__method", "λ", "a b", "../mine", "a.b", "a\n"],
    )
    def test_what_is_no_name(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "use lower-case letters" in refused(name, tmp_path, capsys)

    @pytest.mark.parametrize(
        ("name", "owner"),
        [
            ("direct", "influence-framework-direct"),
            ("kfac", "influence-framework-ekfac"),
            ("hessian", "influence-framework"),
        ],
    )
    def test_a_name_that_is_taken(
        self, name: str, owner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert f"The name {name!r} is taken by {owner}: choose another." in refused(name, tmp_path, capsys)

    def test_a_documented_name_that_is_not_installed(self, tmp_path: Path) -> None:
        with pytest.raises(inf.InvalidInputError, match="'cg' is taken by influence-framework-cg"):
            new_plugin("cg", tmp_path, inf.Registry(installed=False))

    def test_a_name_in_conflict(self, tmp_path: Path) -> None:
        plugins = {name: _solver_plugin() for name in ("one", "two")}
        with pytest.raises(inf.InvalidInputError, match="'same' is taken by several plugins"):
            new_plugin("same", tmp_path, inf.Registry(plugins, installed=False))

    def test_a_module_that_exists(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        site = install(tmp_path / "site", "influence-elsewhere", "")
        monkeypatch.syspath_prepend(site)
        assert find_spec("influence_elsewhere")
        # The second would be called like core itself.
        for name in ("elsewhere", "framework"):
            told = refused(name, tmp_path, capsys)
            assert f"A module 'influence_{name}' is installed already" in told

    def test_a_folder_that_exists(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "influence-mine").mkdir()
        assert "influence-mine exists already" in refused("mine", tmp_path, capsys)

    def test_a_directory_that_does_not(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "does not exist. Create it first." in refused("mine", tmp_path / "nowhere", capsys)

    def test_nothing_is_left_where_writing_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write = Path.write_text

        def full(self: Path, *arguments: object, **options: object) -> int:
            if self.suffix == ".md":
                raise OSError(28, os.strerror(28))
            return write(self, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(module.Path, "write_text", full)
        assert "No space left on device" in refused("mine", tmp_path, capsys)


def _solver_plugin() -> object:
    class Solver:
        def fit(self, operator: object, regularization: float) -> object: ...

    class Plugin:
        @staticmethod
        @inf.hookimpl
        def register_solvers(register: object) -> None:
            register("same", Solver)  # type: ignore[operator]

    return Plugin
