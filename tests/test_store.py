"""Scores on disk: what is in the folder, what is refused, and runs that were killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch import nn

import influence_framework as inf
from influence_framework.attribution import attribute, store
from tests import nets
from tests.test_attribution import ROOMY, TEST, TIGHT, TRAIN, batches, model

OUTPUTS: list[Any] = ["matrix", {"name": "top_k", "k": 5}, "mean", "self_influence"]


def run(path: Path | None, output: Any, budget: int = TIGHT) -> inf.Scored:
    test = None if output == "self_influence" else batches(TEST, 4)
    return attribute(model("direct", budget), test, batches(TRAIN, 17), output=output, store=path)


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_a_store_holds_what_the_result_holds(output: Any, tmp_path: Path) -> None:
    kept, plain = run(tmp_path / "s", output), run(None, output)
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(kept.columns[name], column)
    again = run(tmp_path / "s", output)
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)


def test_a_full_matrix_is_a_zarr_array_of_version_3(tmp_path: Path) -> None:
    run(tmp_path / "s", "matrix")
    array = zarr.open_array(tmp_path / "s" / "scores.zarr", mode="r")
    assert array.metadata.zarr_format == 3
    assert array.shape == (len(TEST[0]), len(TRAIN[0]))
    assert array.nchunks > 4
    np.testing.assert_array_equal(array[:], run(None, "matrix").array)


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
        attribute(model("direct", TIGHT), **settings, executor=stopped)
    rest = Stopping(after=10**9)
    scored = attribute(model("direct", TIGHT), **settings, executor=rest)
    whole = Stopping(after=10**9)
    plain = attribute(model("direct", TIGHT), settings["test"], settings["train"], executor=whole)
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


SCRIPT = """
import sys
import time
from pathlib import Path
from influence_framework.attribution import store
from tests.test_store import run

store.SAVE_EVERY = 0.0
class Slow(store.Store):
    def finished(self, *arguments):
        super().finished(*arguments)
        print("block", flush=True)
        time.sleep(0.02)
import influence_framework.attribution.run as module
module.Store = Slow
import json
run(Path(sys.argv[1]), json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("output", OUTPUTS[:3], ids=str)
def test_a_run_that_was_killed_goes_on_to_the_same_result(output: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    generator = np.random.default_rng(0)
    command = [sys.executable, "-c", SCRIPT, str(path), json.dumps(output)]
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(generator.uniform(0, 0.1)))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
    killed, plain = run(path, output), run(None, output)
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(killed.columns[name], column)


def test_without_zarr_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'influence-framework\[store\]'"):
        run(tmp_path / "s", "matrix", ROOMY)
