"""The example of a plugin: built, installed with pip into a fresh environment, and used."""

from __future__ import annotations

import ast
import sys
import tomllib
from typing import Any

import pytest

import influence_framework as inf
from tests.distributions import ROOT, Environment

MINRES = ROOT / "examples" / "minres"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("fresh"), MINRES)


@pytest.fixture(scope="module")
def answer(environment: Environment) -> dict[str, Any]:
    """Scores by name and by a dense inverse, of a net whose Hessian is indefinite."""
    found: dict[str, Any] = environment.answer(
        """
        import torch
        from torch import nn
        import influence_framework as inf

        generator = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
        for parameter in net.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x, y = torch.randn(12, 2, generator=generator, dtype=torch.float64), torch.arange(12) % 2
        loss = nn.CrossEntropyLoss()

        solver = {"name": "minres", "rtol": 1e-10}
        models = [
            inf.compose(net, loss, solver=spec, source="hessian", hessian_regularization=0.01)
            for spec in ("minres", solver)
        ]
        scores = [model.fit([(x[:8], y[:8]), (x[8:], y[8:])]).influences(x, y) for model in models]

        parameters = dict(net.named_parameters())
        sizes = [p.numel() for p in parameters.values()]
        flat = torch.cat([p.detach().flatten() for p in parameters.values()])

        def losses(vector):
            parts = [v.view(p.shape) for v, p in zip(vector.split(sizes), parameters.values())]
            outputs = torch.func.functional_call(net, dict(zip(parameters, parts)), x)
            return nn.functional.cross_entropy(outputs, y, reduction="none")

        hessian = torch.autograd.functional.hessian(lambda vector: losses(vector).mean(), flat)
        rows = torch.autograd.functional.jacobian(losses, flat)
        expected = rows @ torch.linalg.inv(hessian + 0.01 * torch.eye(len(flat)).double()) @ rows.T
        method = inf.solvers["minres"]
        answer = {
            "lowest": torch.linalg.eigvalsh(hessian)[0].item(),
            "largest": expected.abs().max().item(),
            "errors": [(part - expected).abs().max().item() for part in scores],
            "method": [method.distribution, method.version, list(method.options), method.cls.__module__],
            "failures": inf.default_registry.failures,
            "file": inf.__file__,
        }
        """
    )
    return found


def test_it_is_found_by_its_name(answer: dict[str, Any]) -> None:
    project = tomllib.loads((MINRES / "pyproject.toml").read_text())["project"]
    assert answer["method"] == [
        project["name"],
        project["version"],
        ["rtol", "maxiter"],
        "influence_minres.solver",
    ]
    assert answer["failures"] == []
    assert not answer["file"].startswith(str(ROOT)), "core is meant to be installed, too"


def test_scores_are_those_of_the_dense_inverse(answer: dict[str, Any]) -> None:
    assert answer["lowest"] < -0.02, "at λ = 0.01 the system is meant to be indefinite"
    default, strict = answer["errors"]
    # The residual over the eigenvalue nearest to zero, times the norms of the gradients.
    assert default < 1e-3 * answer["largest"]
    assert strict < 1e-7 * answer["largest"]


def test_its_own_tests_pass(environment: Environment) -> None:
    folder = MINRES / "tests"
    told = environment.python("-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", str(folder))
    assert " passed" in told
    assert "failed" not in told


def test_it_uses_what_anyone_may_use() -> None:
    """Core's public names, and the modules that the documentation names to authors of plugins."""
    modules = {"influence_framework", "influence_framework.hookspecs", "influence_framework.inverses"}
    own = {"influence_minres", "jaxtyping", "numpy", "scipy", "torch", "influence_framework"}
    for path in (MINRES / "influence_minres").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
                if node.module == "influence_framework":
                    assert {alias.name for alias in node.names} <= set(inf.__all__)
            else:
                continue
            for name in found:
                assert name.partition(".")[0] in own | set(sys.stdlib_module_names)
                assert name in modules or not name.startswith("influence_framework")


def test_it_states_the_interface_of_today() -> None:
    assert (
        f"INFLUENCE_API_VERSION = {inf.PLUGIN_API_VERSION}\n"
        in (MINRES / "influence_minres" / "__init__.py").read_text()
    )
