"""The examples for images, convolutional nets and tabular data, at sizes that run in seconds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests import scripts
from tests.distributions import ROOT


def test_the_most_harmful_pictures_explain_a_misread_digit() -> None:
    result: Any = scripts.example("images").run(training=600, epochs=15, count=15)
    _, label, read = result.picture
    assert label != read
    assert len(result.helpful) == len(result.harmful) == 15
    scores = [score for *_, score in result.helpful] + [score for *_, score in reversed(result.harmful)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0 > scores[-1]
    # One picture in twenty has a wrong label.
    assert result.wrong >= 3
    before, after, chance = result.losses
    assert after < before - 1
    assert after < chance - 1


def test_pictures_are_drawn_side_by_side() -> None:
    module = scripts.example("images")
    ramp = torch.linspace(0, 1, 64)
    lines = module.drawn([(ramp, "one"), (1 - ramp, "two")]).splitlines()
    assert len(lines) == 9
    assert {len(line) for line in lines} == {16 + 3 + 16}
    assert lines[0].startswith("  ")
    assert lines[7].startswith("OO", 0) or lines[7].startswith("oo", 0)
    assert lines[7][14:16] == "@@"
    assert lines[0][19:21] == "@@"
    assert lines[8].split() == ["one", "two"]


def test_wrong_labels_of_a_convolutional_net_are_found() -> None:
    result: Any = scripts.example("convolution").run(training=500, epochs=10)
    assert list(result.found) == ["influence on itself", "influence on the test loss", "loss"]
    # A tenth is what chance would find.
    assert result.found["influence on itself"] > 0.7
    assert result.found["influence on the test loss"] > 0.3
    assert result.auroc["influence on itself"] > 0.95
    assert set(result.accuracy) == {"as trained", *result.found}
    assert all(0.5 < share < 1 for share in result.accuracy.values())


def test_scores_of_rows_foretell_fits_without_them() -> None:
    result: Any = scripts.example("tabular").run(refits=20, shown=2)
    assert (
        list(result.rows["score"])
        == sorted(result.rows["score"], reverse=True)[:2] + sorted(result.rows["score"])[:2]
    )
    assert result.correlation > 0.99
    assert 1.0 < result.slope < 1.1
    assert len(result.patient) == 1


@pytest.mark.parametrize("name", ["images", "convolution", "tabular", "planted_facts"])
def test_every_script_is_explained_with_the_command_that_runs_it(name: str) -> None:
    command = f"python examples/{name}/{name}.py"
    assert command in (ROOT / "examples" / name / "README.md").read_text()
    assert command in (ROOT / "examples" / name / f"{name}.py").read_text()
    assert command in (ROOT / "docs" / "examples.md").read_text()


def test_every_example_is_on_the_page() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    folders = {path.parent.name for path in ROOT.glob("examples/*/README.md")}
    assert folders == set(re.findall(r"`(?:python )?examples/(\w+)", page))
