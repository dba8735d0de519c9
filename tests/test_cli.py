"""The command ``influence``: what it prints, what it writes, and what it says when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import influence_framework as inf
from influence_framework.cli import demo, demo_page
from influence_framework.cli.demo_text import report
from influence_framework.cli.main import main
from influence_framework.inverses import Inverse, make_solution
from influence_framework.reporting.templating import number
from tests.pages import Elements, check_self_contained, content, image, said

SMALL = demo.Settings(solver="direct", training_images=400, test_images=60)


@dataclass(frozen=True, eq=False)
class Times(Inverse):
    """A multiple of the identity; negative ones are remarked on."""

    base: inf.LinearOperator
    regularization: float
    factor: float

    def _solve(self, columns: torch.Tensor) -> inf.Solution:
        if self.factor < 0:
            warnings.warn("it is negative", inf.IndefiniteOperatorWarning, stacklevel=2)
        count = columns.shape[1]
        return make_solution(self.factor * columns, torch.zeros(count), [inf.StopReason.CONVERGED] * count)


class Negative:
    def fit(self, operator: inf.LinearOperator, regularization: float) -> Times:
        return Times(operator, regularization, -1.0)


class NotANumber:
    def fit(self, operator: inf.LinearOperator, regularization: float) -> Times:
        return Times(operator, regularization, float("nan"))


def plugin(**solvers: type[Any]) -> Any:
    @inf.hookimpl
    def register_solvers(register: Any) -> None:
        for name, solver in solvers.items():
            register(name, solver)

    return SimpleNamespace(register_solvers=register_solvers)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run(SMALL)


@pytest.fixture(scope="module")
def html(result: demo.Result) -> str:
    return demo_page.page(result).html


class TestDemo:
    def test_flipped_labels(self) -> None:
        data = demo.load(SMALL)
        assert int(data.flipped.sum()) == 40
        assert data.y.min() >= 0
        assert data.y.max() < demo.CLASSES
        assert len(data.y) == 400
        assert len(data.y_test) == 60
        again = demo.load(SMALL)
        assert torch.equal(data.y, again.y)
        assert not torch.equal(data.y, demo.load(replace(SMALL, seed=1)).y)

    def test_threads_are_left_alone(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        with pytest.raises(inf.UnknownMethodError):
            demo.run(replace(SMALL, solver="none"))
        assert torch.get_num_threads() == 2
        torch.set_num_threads(before)

    def test_global_random_state_is_left_alone(self) -> None:
        state = torch.get_rng_state()
        first = demo.train(demo.load(SMALL), replace(SMALL, epochs=1))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        second = demo.train(demo.load(SMALL), replace(SMALL, epochs=1))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_too_many_images(self) -> None:
        with pytest.raises(inf.InvalidInputError, match="1797 digits"):
            demo.load(replace(SMALL, training_images=1797))

    def test_finds_flipped_labels(self, result: demo.Result) -> None:
        """Far better than chance, which is 4 of 40 in a tenth of the ranking."""
        flipped = result.data.flipped
        for ranking in result.rankings:
            assert ranking.found(flipped, 0.1) >= 16, ranking.name
            assert ranking.found(flipped, 0.2) >= 20, ranking.name

    def test_rankings_are_recomputed(self, result: demo.Result) -> None:
        """Counts as a plain loop would have them, from scores by one dense solve in double precision."""
        data = result.data
        net = demo.train(data, SMALL).double()
        x, x_test = data.x.double(), data.x_test.double()
        model = inf.compose(
            net, nn.CrossEntropyLoss(), solver="direct", source="gauss_newton", hessian_regularization=0.02
        ).fit([(x, data.y)])
        own = model.influences(x, data.y).diagonal().tolist()
        mean = model.influences(x_test, data.y_test, x, data.y).mean(0)
        losses = [nn.functional.cross_entropy(net(x[i]), data.y[i]).item() for i in range(len(x))]
        torch.testing.assert_close(
            result.self_influence.double(), torch.tensor(own).double(), rtol=1e-2, atol=1e-2
        )
        suspicions = (own, (-mean).tolist(), losses)
        for ranking, suspicion in zip(result.rankings, suspicions, strict=True):
            first = sorted(range(len(x)), key=lambda i: -suspicion[i])[:80]
            assert ranking.found(data.flipped, 0.1) == sum(bool(data.flipped[i]) for i in first[:40])
            assert ranking.found(data.flipped, 0.2) == sum(bool(data.flipped[i]) for i in first)

    def test_loss_after_training_again(self, result: demo.Result) -> None:
        data, ranking = result.data, result.rankings[1]
        kept = [i for i in range(len(data.y)) if i not in ranking.order[:40].tolist()]
        rest = replace(data, x=data.x[kept], y=data.y[kept], truth=data.truth[kept])
        net = demo.train(rest, SMALL)
        expected = nn.functional.cross_entropy(net(data.x_test), data.y_test).item()
        assert ranking.loss_without == pytest.approx(expected)
        assert ranking.loss_without < result.test_loss

    def test_report(self, result: demo.Result) -> None:
        text = report(result)
        flipped = result.data.flipped
        for ranking in result.rankings:
            row = next(line for line in text.splitlines() if line.startswith(f"  {ranking.name}"))
            counts = [str(ranking.found(flipped, fraction)) for fraction in (0.1, 0.2)]
            assert row.removeprefix(f"  {ranking.name}").split() == [*counts, f"{ranking.loss_without:.3f}"]
        assert re.search(r"chance +4\.0 +8\.0 ", text)
        assert "400 training images, 40 with a flipped label" in text
        assert "λ = 0.02" in text

    @pytest.mark.parametrize(("source", "strength"), [("hessian", 0.2), ("empirical_fisher", 0.02)])
    def test_regularization_suits_the_source(self, source: str, strength: float) -> None:
        settings = replace(SMALL, source=source, training_images=200, epochs=10)
        result = demo.run(settings)
        assert result.composition["hessian_regularization"] == strength
        assert demo.run(replace(settings, regularization=0.5)).settings.strength == 0.5

    def test_cg_agrees_with_direct(self, result: demo.Result) -> None:
        iterative = demo.run(replace(SMALL, solver="cg"))
        assert iterative.warnings == ()
        torch.testing.assert_close(iterative.scores, result.scores, rtol=1e-2, atol=0.05)

    def test_what_the_solver_reports_is_shown_once(self) -> None:
        registry = inf.Registry({"one": plugin(negative=Negative)}, installed=False)
        result = demo.run(replace(SMALL, solver="negative"), registry=registry)
        assert result.warnings == ("it is negative",)
        html = demo_page.page(result).html
        assert html.count("The solver reported: it is negative") == 1

    def test_nan_is_no_ranking(self) -> None:
        registry = inf.Registry({"one": plugin(nan=NotANumber)}, installed=False)
        with pytest.raises(inf.InfluenceError, match="NaN"):
            demo.run(replace(SMALL, solver="nan"), registry=registry)


class TestPage:
    def test_is_self_contained(self, html: str) -> None:
        check_self_contained(html)

    def test_every_chart_is_described(self, html: str) -> None:
        assert all(chart["aria-label"] for chart in Elements(html).of("svg"))

    def test_flipped_labels_are_marked_in_words(self, result: demo.Result, html: str) -> None:
        data = content(html)
        for point in data["train"]:
            index = int(point["id"])
            assert point["label"] == f"labelled {result.data.y[index]}"
            flipped = bool(result.data.flipped[index])
            assert point.get("mark") == (f"really {result.data.truth[index]}" if flipped else None)
        suspicious = data["ranks"][-1]["entries"]
        first = result.rankings[0].order[: demo_page.SUSPICIOUS].tolist()
        assert [int(data["train"][entry[0]]["id"]) for entry in suspicious] == first
        assert f"{int(result.data.flipped[first].sum())} of these 50 labels were flipped" in said(html)

    def test_counts(self, result: demo.Result, html: str) -> None:
        cells = re.findall(r'class="found" role="cell">([^<]+)<', html)
        expected = [
            text
            for ranking in result.rankings
            for text in (
                *(str(ranking.found(result.data.flipped, fraction)) for fraction in (0.1, 0.2)),
                f"{ranking.loss_without:.3f}",
            )
        ]
        assert cells[: len(expected)] == expected
        assert cells[len(expected) :] == ["4.0", "8.0", f"{result.chance.loss_without:.3f}"]

    def test_cases(self, result: demo.Result, html: str) -> None:
        """Misread ones come first; each shows the extremes of its row of scores."""
        cases = content(html)["tests"]
        with torch.no_grad():
            read = result.net(result.data.x_test).argmax(1)
        right = (read == result.data.y_test).tolist()
        assert [right[int(case["id"])] for case in cases] == sorted(right)
        assert 0 < right.count(False) == sum(case.get("mark") == "misread" for case in cases)
        for case in cases[:20]:
            index = int(case["id"])
            scores = result.scores[index]
            assert case["label"].startswith(f"{result.data.y_test[index]}, read as {read[index]}; loss ")
            assert case["down"][0][1] == number(scores.min().item(), signed=True)
            assert case["up"][0][1] == number(scores.max().item(), signed=True)
            assert case["down"][0][1].startswith("−")
            assert case["up"][0][1].startswith("+")
            assert len(case["down"]) == len(case["up"]) == demo_page.TILES

    def test_pieces_of_a_ranking_hold_all_flipped_labels(self, result: demo.Result) -> None:
        for ranking in result.rankings:
            bins = demo_page._row(ranking, result.data.flipped).bins
            assert sum(share / 100 * 8 for share in bins) == pytest.approx(40)

    def test_ink_is_dark(self, result: demo.Result, html: str) -> None:
        case = content(html)["tests"][0]
        pixels = torch.from_numpy(np.asarray(image(case["item"]).convert("L")).copy()).double() / 255
        expected = 1 - result.data.x_test[int(case["id"])].double().reshape(8, 8)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0.003)


class TestCommand:
    def test_demo(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        small = replace(SMALL, seed=3)

        def settings(solver: str, source: str, regularization: float | None, seed: int) -> demo.Settings:
            return replace(small, solver=solver, source=source, regularization=regularization, seed=seed)

        monkeypatch.setattr(demo, "Settings", settings)
        assert main(["demo", "--solver", "direct", "--seed", "3", "--output", str(tmp_path)]) == 0
        printed = capsys.readouterr()
        path = tmp_path / "influence-demo.html"
        assert f"Wrote {path} (" in printed.out
        result = demo.run(small)
        assert printed.out.startswith(report(result))
        assert path.read_text(encoding="utf-8") == demo_page.page(result).html
        assert printed.err == ""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--solver", "direkt"], "Unknown solver 'direkt'. Did you mean 'direct'?"),
            (["--source", "hessien"], "Unknown curvature source 'hessien'. Did you mean 'hessian'?"),
            (["--output", "/no/such/folder/page.html"], "the folder /no/such/folder does not exist"),
        ],
    )
    def test_wrong_arguments(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["demo", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("influence: ")
        assert message in printed.err
        assert printed.err.count("\n") == 1

    @pytest.mark.parametrize("module", ["sklearn.datasets", "jinja2", "PIL.Image"])
    def test_missing_extra(
        self, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        assert main(["demo"]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert "pip install 'influence-framework[demo]'" in printed.err
        assert main(["plugins"]) == 0

    @pytest.mark.parametrize(
        "arguments", [[], ["demo", "--seed", "-1"], ["demo", "--seed", "x"], ["new-plugin"], ["unknown"]]
    )
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "usage: influence" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["demo", "--help"], ["plugins", "--help"], ["new-plugin", "--help"], ["--version"]],
    )
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert "influence" in capsys.readouterr().out

    def test_reader_that_stops_reading(self) -> None:
        code = "import sys; from influence_framework.cli.main import main; sys.exit(main(['plugins', '-v']))"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout
        process.stdout.close()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert errors == b""

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def run(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "run", run)
        assert main(["demo"]) == 130
        assert capsys.readouterr().err == "influence: interrupted\n"

    def test_plugins_imports_nothing_of_the_extra(self) -> None:
        code = (
            # A plugin may bring the third of them, jinja2, itself.
            "import sys; from influence_framework.cli.main import main; main(['plugins']); "
            "sys.exit(bool({'sklearn', 'PIL', 'influence_framework.cli.demo'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
