"""TRAK (traker) 0.3.2, without projection where the net is small, and with."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from adapter import Method, Task
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType


def scores(checkpoints: int, dimension: int | None) -> Method:
    def method(task: Task, strength: float) -> Iterator[Any]:
        if len(task.checkpoints) < checkpoints:
            raise ValueError("a single optimum: all seeds end at the same parameters")
        model, device = task.model(), torch.device("cpu")
        size = sum(p.numel() for p in model.parameters())
        projector = (
            NoOpProjector(grad_dim=size, proj_dim=size, device=device)
            if dimension is None
            else BasicProjector(size, dimension, 0, ProjectionType.normal, "cpu", dtype=torch.float32)
        )
        names = {"classification": "image_classification"}
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            traker = TRAKer(
                model,
                names.get(task.kind, task.kind),
                train_set_size=len(task.x),
                save_dir=folder,
                device="cpu",
                projector=projector,
                use_half_precision=False,
                logging_level=logging.ERROR,
                # Features are gradients over √P, projected by a matrix of variance one, and their second
                # moments are summed: the same λ in these units.
                lambda_reg=strength * len(task.x) * (1 if dimension is None else dimension) / size,
            )
            for number in range(checkpoints):
                traker.load_checkpoint(task.checkpoints[number], model_id=number)
                for batch in task.loader(100):
                    traker.featurize(batch=batch, num_samples=len(batch[0]))
            traker.finalize_features()
            yield
            for number in range(checkpoints):
                traker.start_scoring_checkpoint("s", task.checkpoints[number], number, len(task.test))
                for batch in DataLoader(task.test, batch_size=100):
                    traker.score(batch=batch, num_samples=len(batch[0]))
            found = torch.as_tensor(traker.finalize_scores("s")).float()
            yield task.pairs(found.T)

    return method


METHODS = {
    "no projection": scores(1, None),
    "projection 512": scores(1, 512),
    "no projection, 5 nets": scores(5, None),
}
