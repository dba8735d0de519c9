"""Scores on disk: what is in the folder, what is refused, and runs that were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch import nn

import influence_framework as inf
from influence_framework import attribution
from influence_framework.attribution import attribute, store
from tests import nets
from tests.test_attribution import ROOMY, TEST, TIGHT, TRAIN, batches, fitted_once

OUTPUTS: list[Any] = ["matrix", {"name": "top_k", "k": 5}, "mean", "self_influence", "factors"]


def run(path: Path | None, output: Any, budget: int = TIGHT) -> inf.Scored:
    test = None if output in ("self_influence", "factors") else batches(TEST, 4)
    return attribute(fitted_once("direct", budget), test, batches(TRAIN, 17), output=output, store=path)


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_a_store_holds_what_the_result_holds(output: Any, tmp_path: Path) -> None:
    plain = run(None, output)
    for scored in (run(tmp_path / "s", output), run(tmp_path / "s", output)):
        if output == "factors":
            np.testing.assert_array_equal(scored.array[:], plain.array)
            continue
        for name, column in plain.columns.items():
            np.testing.assert_array_equal(scored.columns[name], column)


def test_a_full_matrix_is_a_zarr_array_of_version_3(tmp_path: Path) -> None:
    run(tmp_path / "s", "matrix")
    array = zarr.open_array(tmp_path / "s" / "scores.zarr", mode="r")
    assert array.metadata.zarr_format == 3
    assert array.shape == (len(TEST[0]), len(TRAIN[0]))
    assert array.nchunks > 4
    np.testing.assert_array_equal(array[:], run(None, "matrix").array)


def test_an_array_carries_what_it_is(tmp_path: Path) -> None:
    run(tmp_path / "s", "matrix")
    array = zarr.open_array(tmp_path / "s" / "scores.zarr", mode="r")
    assert array.metadata.dimension_names == ("test", "train")
    assert array.attrs["units"].startswith("∇ℓ(test)ᵀ (C + λI)⁻¹")
    assert array.attrs["shape"] == [len(TEST[0]), len(TRAIN[0])]
    assert array.attrs["solver"].startswith("DirectSolver(")


def test_factors_on_disk_are_those_of_the_model(tmp_path: Path) -> None:
    fitted = fitted_once("direct", TIGHT)
    scored = attribute(fitted, None, batches(TEST, 4), output="factors", store=tmp_path / "s")
    array = zarr.open_array(tmp_path / "s" / "scores.zarr", mode="r")
    factors = torch.from_numpy(array[:])
    torch.testing.assert_close(factors, fitted.influence_factors(*TEST), rtol=1e-9, atol=1e-11)
    assert array.nchunks > 4
    assert len(scored.train_ids) == len(TEST[0])
    scores = fitted.influences_from_factors(factors, *TRAIN)
    torch.testing.assert_close(scores, fitted.influences(*TEST, *TRAIN), rtol=1e-9, atol=1e-11)


def test_a_table_is_readable_with_pandas(tmp_path: Path) -> None:
    found = run(tmp_path / "s", OUTPUTS[1]).to_pandas()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "s" / "table.parquet"), found)
    with np.load(tmp_path / "s" / "table.npz", allow_pickle=False) as columns:
        np.testing.assert_array_equal(columns["score"], found["score"])


def test_the_manifest_says_what_the_scores_are(tmp_path: Path) -> None:
    run(tmp_path / "s", "matrix")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["solver"].startswith("DirectSolver(")
    assert manifest["blocks"] == {"full": 0.01}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["training points"]["count"] == len(TRAIN[0])
    assert "+score/n" in manifest["units"]


def other(change: str) -> dict[str, Any]:
    """The arguments of a run that differs in one thing."""
    torch.manual_seed(0)
    net = nets.mlp(4, 6, 3).double().eval()
    settings: dict[str, Any] = {"solver": "direct", "hessian_regularization": 1e-2, "memory_budget": TIGHT}
    data, test, train, output = TRAIN, TEST, TRAIN, "matrix"
    if change == "model":
        with torch.no_grad():
            net[0].weight[0, 0] += 1e-9
    elif change == "solver":
        settings["solver"] = "jacobi"
    elif change == "λ":
        settings["hessian_regularization"] = 2e-2
    elif change == "fitted to":
        data = (TRAIN[0], 2 - TRAIN[1])
    elif change == "test points":
        test = (TEST[0] + 1e-9, TEST[1])
    elif change == "training points":
        train = (TRAIN[0][:-1], TRAIN[1][:-1])
    else:
        output = "mean"
    composed = inf.compose(net, nn.CrossEntropyLoss(), **settings).fit(batches(data, 40))
    return {"model": composed, "test": batches(test, 4), "train": batches(train, 17), "output": output}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model", "model: "),
        ("solver", "solver: 'DirectSolver"),
        ("λ", "'full': 0.01} there, {'full': 0.02} here"),
        ("fitted to", "fitted to: "),
        ("test points", "test points: "),
        ("training points", "'count': 150"),
        ("output", "'name': 'matrix'"),
    ],
)
def test_a_store_of_something_else_is_refused_with_the_difference(
    change: str, named: str, tmp_path: Path
) -> None:
    run(tmp_path / "s", "matrix")
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    with pytest.raises(inf.InvalidInputError, match=r"holds scores of something else") as error:
        attribute(**other(change), store=tmp_path / "s")
    assert named in str(error.value)
    assert before == {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(inf.InvalidInputError, match="exists and is no store"):
        run(tmp_path, "mean")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(inf.InvalidInputError, match="cannot be read"):
        run(tmp_path, "mean")


def test_only_what_is_missing_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", 0.0)
    stopped = Stopping(after=5)
    settings: dict[str, Any] = {"test": batches(TEST, 4), "train": batches(TRAIN, 17), "store": tmp_path / "s"}
    with pytest.raises(KeyboardInterrupt):
        attribute(fitted_once("direct", TIGHT), **settings, executor=stopped)
    rest = Stopping(after=10**9)
    scored = attribute(fitted_once("direct", TIGHT), **settings, executor=rest)
    whole = Stopping(after=10**9)
    plain = attribute(fitted_once("direct", TIGHT), settings["test"], settings["train"], executor=whole)
    # Of the first group of test points three blocks were collected: its solving and the rest are done again.
    assert rest.computed == whole.computed - 3
    np.testing.assert_array_equal(scored.array[:], plain.array)


class Stopping:
    """Counts the blocks it computes, and is interrupted with one that it has computed."""

    def __init__(self, after: int) -> None:
        self.after, self.computed = after, 0

    def run(self, job: Any, blocks: Any) -> Any:
        for block in blocks:
            result = job(block)
            self.computed += 1
            if self.computed == self.after:
                raise KeyboardInterrupt
            yield block, result


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each output, by its place in ``OUTPUTS``, stores of runs that were killed at ten random moments."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.killing", str(folder), json.dumps(OUTPUTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, check=True, capture_output=True, text=True
    )
    for index, line in enumerate(done.stdout.splitlines()):
        stores, kills = json.loads(line)
        assert kills == 10
        assert len(list((folder / str(index)).iterdir())) == stores + 1
    return folder


@pytest.mark.parametrize("index", range(len(OUTPUTS)), ids=lambda index: str(OUTPUTS[index]))
def test_a_run_that_was_killed_goes_on_to_the_same_result(index: int, killed: Path) -> None:
    """File by file, to the last byte; how the solves went is kept of all runs together."""
    whole, *others = sorted((killed / str(index)).iterdir(), key=lambda path: path.name != "whole")
    expected = contents(whole)
    assert len(expected) > 3
    for other in others:
        found = contents(other)
        assert found.keys() == expected.keys()
        assert [name for name, content in expected.items() if found[name] != content] == []
        once, together = (attribution.Stored.read(path).solves for path in (whole, other))
        assert [block.block for block in together] == [block.block for block in once]
        # What a run had not noted as done before it was killed is solved for again.
        for one, all_ in zip(once, together, strict=True):
            assert all_.solved >= one.solved > 0


@pytest.mark.parametrize("output", ["matrix", "factors"])
def test_a_half_written_chunk_of_a_killed_run_is_cleared_away(tmp_path: Path, output: str) -> None:
    run(tmp_path / "s", output, ROOMY)
    expected = contents(tmp_path / "s")
    (tmp_path / "s" / "scores.zarr" / "c" / "0" / f"0.{'5c' * 16}.partial").write_bytes(b"half")
    run(tmp_path / "s", output, ROOMY)
    assert contents(tmp_path / "s") == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != store.SOLVES
    }


def test_without_zarr_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'influence-framework\[store\]'"):
        run(tmp_path / "s", "matrix", ROOMY)
