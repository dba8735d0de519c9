"""What each process of ``tests/test_distributed_gpu.py`` does: fits and scores with the model on a GPU.

``torchrun --nproc-per-node N -m tests.gpu_program FOLDER BACKEND`` writes what each has found to FOLDER.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import distributed, nn

from tests import distributed_program as program


@contextmanager
def on_gpu(index: int) -> Iterator[None]:
    """Within it, the program's models and points lie on a GPU."""
    made, device = program.net, f"cuda:{index}"

    def net() -> nn.Module:
        return made().to(device)

    def points(data: program.Points) -> program.Points:
        return data[0].to(device), data[1].to(device)

    torch.cuda.set_device(index)
    there = {"net": net, "TRAIN": points(program.TRAIN), "TEST": points(program.TEST)}
    with mock.patch.multiple(program, **there):
        yield


def main(folder: Path, backend: str) -> None:
    index = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    with on_gpu(index):
        distributed.init_process_group(backend, timeout=timedelta(seconds=60))
        found = {name: program.tried(partial(case, program.MANY)) for name, case in program.SOLVERS.items()}
    (folder / f"{distributed.get_rank()}.pickle").write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
