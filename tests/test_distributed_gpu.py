"""Processes of ``torch.distributed`` whose models lie on GPUs, where there are any: the results of one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import distributed_program as program
from tests.gpu_program import on_gpu

ROOT = Path(__file__).parents[1]
SCORES = ("influences", "matrix", "top_k", "self")

if torch.cuda.is_available():
    # NCCL takes one process a GPU; Gloo lets several share one.
    GPUS = torch.cuda.device_count()

    @pytest.mark.parametrize(
        ("backend", "count"),
        [("cuda:nccl", GPUS), ("cpu:gloo,cuda:nccl", GPUS), ("cpu:gloo,cuda:gloo", 2)],
    )
    def test_on_gpus_the_results_are_those_of_one_process(backend: str, count: int, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        ended = subprocess.run(
            [*command, "-m", "tests.gpu_program", str(tmp_path), backend],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        found = [pickle.loads((tmp_path / f"{number}.pickle").read_bytes()) for number in range(count)]
        for name, case in program.SOLVERS.items():
            with on_gpu(0):
                alone = case("sequential")
            for results in found:
                assert isinstance(results[name], dict), f"{name}: {results[name]}"
                for what in SCORES:
                    # Sums in another order, through matrices whose condition number is below 1e4.
                    atol = 1e-10 * np.abs(alone[what]).max()
                    np.testing.assert_allclose(
                        results[name][what], alone[what], rtol=0, atol=atol, err_msg=f"{name}, {what}"
                    )
