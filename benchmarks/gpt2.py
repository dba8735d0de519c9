"""EK-FAC of a GPT-2 architecture against kronfluence, which needs its ``Conv1D`` rewritten as ``Linear``.

Both sides score the matrices of the blocks on the empirical Fisher: nothing is random, and scores must agree.
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from analyzer import IN_MEMORY, Kronfluence
from common import HEADER, quickest, relative_error, row
from growth import memory
from kronfluence.task import Task
from timing import paired
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import influence_framework as inf

BLOCKS, WIDTH, LENGTH = 6, 256, 128
TRAIN, QUERIES = 200, 20
STRENGTH = 1e-3
SIZES = (25, 50)
BUDGET = 510 * 10**6
"""Three quarters of it hold the factors of all queries, so that one pass over the training data serves all."""


class Sequences(Dataset[dict[str, Tensor]]):
    """Texts of one length as numbers of their bytes."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": part} for part in self.ids.split(size)]


def texts() -> tuple[Sequences, Sequences]:
    """Training and query sequences: pieces of the standard library's source, drawn with a seed."""
    folder = Path(random.__file__).parent
    source = "".join(path.read_text(errors="ignore") for path in sorted(folder.glob("[a-d]*.py")))
    raw = torch.tensor(list(source.encode("ascii", errors="ignore")))
    starts = torch.randint(len(raw) - LENGTH, (TRAIN + QUERIES,), generator=torch.Generator().manual_seed(0))
    ids = torch.stack([raw[start : start + LENGTH] for start in starts])
    return Sequences(ids[:TRAIN]), Sequences(ids[TRAIN:])


def blocks_only(net: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The net with all frozen but the matrices and biases of its blocks."""
    net.requires_grad_(False)
    for module in net.modules():
        if isinstance(module, Conv1D):
            module.requires_grad_(True)
    return net


def trained(data: Sequences) -> GPT2LMHeadModel:
    """A few steps of Adam; then all is frozen but the matrices of the blocks."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    net = GPT2LMHeadModel(config).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for batch in data.batches(25):
        optimizer.zero_grad()
        net(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    net.zero_grad()
    return blocks_only(net)


def rewritten(net: GPT2LMHeadModel) -> nn.Module:
    """The same function with ``Linear`` in the place of ``Conv1D``."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, linear)
    return net


class Language(Task):
    """Cross-entropy of every token given those before it, summed as kronfluence asks."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules = modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


def ours(net: GPT2LMHeadModel, train: Sequences, test: Sequences, size: int) -> Tensor:
    """Fit and all scores with ``ekfac``."""
    model = inf.compose(
        net,
        {"name": "causal_lm", "reduction": "sum"},
        solver="ekfac",
        source="empirical_fisher",
        hessian_regularization=STRENGTH,
        memory_budget=BUDGET,
    ).fit(train.batches(size))
    return model.influences({"input_ids": test.ids}, x={"input_ids": train.ids})


def theirs(net: GPT2LMHeadModel, train: Sequences, test: Sequences, folder: str) -> Kronfluence:
    """kronfluence, its files in ``folder``."""
    modules = [name for name, module in net.named_modules() if isinstance(module, Conv1D)]
    return Kronfluence(rewritten(net), Language(modules), train, test, STRENGTH, folder)


def peak(side: str, net: GPT2LMHeadModel, sizes: list[int]) -> float:
    """MB that a process of its own takes at most above what it holds with model and data."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save((net.state_dict(), net.config.to_dict()), file.name)
        command = [sys.executable, __file__, side, file.name, str(torch.get_num_threads()), *map(str, sizes)]
        # What the trial below frees would else stay in the process, and hide as much of what the method takes.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout.split()[-1])


def measure_peak(side: str, file: str, threads: str, *sizes: str) -> float:
    """What :func:`peak` runs."""
    torch.set_num_threads(int(threads))
    train, test = texts()
    weights, config = torch.load(file, weights_only=True)
    net = blocks_only(GPT2LMHeadModel(GPT2Config(**config)).eval())
    net.load_state_dict(weights)
    few = Sequences(train.ids[:10]), Sequences(test.ids[:2])
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            work: Callable[[Sequences, Sequences], Any] = partial(ours, net, size=int(sizes[0]))
        else:

            def work(some: Sequences, queries: Sequences) -> Any:
                return theirs(net, some, queries, folder).run(list(map(int, sizes)))

        # What is loaded at first use is no memory of the method.
        work(*few)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        work(train, test)
        return memory("VmHWM") - before


def report(runs: int) -> Iterator[str]:
    train, test = texts()
    net = trained(train)
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    yield from (
        "## GPT-2 architecture against kronfluence: fit + all pairwise scores, empirical Fisher",
        "",
        f"{BLOCKS} blocks of width {WIDTH}, {parameters / 1e6:.1f} M parameters in their matrices, {TRAIN} "
        f"training and {QUERIES} query sequences of {LENGTH} tokens, λ = {STRENGTH:.0e}. kronfluence gets "
        "the same function with `Linear` in the place of `Conv1D`; each side at its best batch sizes.",
        "",
        HEADER.format(peer="kronfluence"),
    )
    mine = quickest(lambda size: partial(ours, net, train, test, size), SIZES)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        peer = theirs(net, train, test, folder)
        best = peer.quickest(SIZES)
        pairing = paired(partial(ours, net, train, test, mine), lambda: peer.run(best), runs)
        off = relative_error(ours(net, train, test, mine), peer.run(best))
    notes = f"batch {mine}, scores differ by {off:.0e}", f"batches {', '.join(map(str, best))}"
    yield row("GPT-2", pairing, *notes)
    memories = peak("ours", net, [mine]), peak("kronfluence", net, best)
    yield ""
    yield "Peak memory above model and data: ours {:.0f} MB, kronfluence {:.0f} MB.".format(*memories)


if __name__ == "__main__":
    print(measure_peak(*sys.argv[1:]))
