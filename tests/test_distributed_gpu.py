"""Processes of ``torch.distributed`` whose models lie on GPUs, where there are any: the results of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import distributed_program as program
from tests.gpu_program import on_gpu
from tests.torchrun import found_by

SCORES = ("influences", "matrix", "top_k", "self")

if torch.cuda.is_available():
    # NCCL takes one process a GPU; Gloo lets several share one.
    GPUS = torch.cuda.device_count()

    @pytest.mark.parametrize(
        ("backend", "count"),
        [("cuda:nccl", GPUS), ("cpu:gloo,cuda:nccl", GPUS), ("cpu:gloo,cuda:gloo", 2)],
    )
    def test_on_gpus_the_results_are_those_of_one_process(backend: str, count: int, tmp_path: Path) -> None:
        found = found_by(count, "tests.gpu_program", tmp_path, backend)
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
