"""EK-FAC of the GPT-2 architecture on one accelerator: time, peak memory and the share of the card's rate.

``python benchmarks/card.py`` measures GPT-2 small (12 blocks of width 768) in bfloat16 with 4,000 training and
400 query sequences of 512 tokens. Weights and tokens are drawn at random: neither changes what is computed.
The matrices of the blocks are scored, 85 million parameters; embeddings and norms are frozen.

The share is what the work needs, counted below, over the time it took, over the rate of a matrix product of
bfloat16 numbers measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import influence_framework as inf

Tokens = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """An architecture, and how many sequences of which length."""

    blocks: int
    width: int
    vocabulary: int
    length: int
    train: int
    queries: int
    batch: int
    device: torch.device
    dtype: torch.dtype

    def model(self) -> GPT2LMHeadModel:
        """Random weights; all frozen but the matrices and biases of the blocks."""
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_embd=self.width,
            n_layer=self.blocks,
            n_head=max(1, self.width // 64),
            n_positions=self.length,
            bos_token_id=0,
            eos_token_id=0,
        )
        net = GPT2LMHeadModel(config).to(self.device, self.dtype).eval().requires_grad_(False)
        for module in net.modules():
            if isinstance(module, Conv1D):
                module.requires_grad_(True)
        return net

    def sequences(self, count: int, seed: int) -> list[Tokens]:
        """Batches of sequences."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (count, self.length), generator=generator).to(self.device)
        return [{"input_ids": part} for part in ids.split(self.batch)]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Outputs and inputs of every matrix, the bias among the inputs."""
        w = self.width
        return self.blocks * [(3 * w, w + 1), (w, w + 1), (4 * w, w + 1), (w, 4 * w + 1)]

    @property
    def entries(self) -> int:
        """Parameters that are scored."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    def passing(self, sequences: int) -> float:
        """Flops of one forward pass and of the backward pass to the outputs of all layers."""
        layers = self.entries + self.vocabulary * self.width
        return 2 * 2.0 * sequences * self.length * (layers + self.blocks * self.width * self.length)

    @property
    def fit(self) -> float:
        """Flops of fit: two passes, covariances, and the gradients of samples in the eigenbasis."""
        positions = self.train * self.length
        squares = sum(outputs**2 + inputs**2 for outputs, inputs in self.matrices)
        turned = sum(
            min(
                2.0 * self.length * (outputs**2 + inputs**2),
                2.0 * outputs * inputs * (outputs + inputs),
            )
            for outputs, inputs in self.matrices
        )
        gradients = 2.0 * self.length * self.entries
        return 2 * self.passing(self.train) + 1.0 * positions * squares + self.train * (turned + gradients)

    @property
    def scores(self) -> float:
        """Flops of scores: one pass of each side, gradients of all sequences, a product of each pair."""
        sequences = self.train + self.queries
        gradients = 2.0 * sequences * self.length * self.entries
        return self.passing(sequences) + gradients + 2.0 * self.train * self.queries * self.entries


def rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Flops a second of a large matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    return 10 * 2.0 * size**3 / timed(lambda: [left @ right for _ in range(10)], device)[0]


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds and peak bytes of ``work``, with everything the device still has to do."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else 0


def measured(setting: Setting, budget: int, options: dict[str, Any]) -> Iterator[str]:
    """One row for the fit and one for all scores."""
    card = torch.cuda.get_device_name() if setting.device.type == "cuda" else "CPU"
    peak = rate(setting.device, setting.dtype, 8192 if setting.device.type == "cuda" else 1024)
    speed = f"{peak / 1e12:.0f} TFLOP/s"
    yield (
        f"{card}; {setting.entries / 1e6:.0f} M parameters, {setting.train:,} training and "
        f"{setting.queries} queries of {setting.length} tokens, {setting.dtype}, float32 products at "
        f"{torch.get_float32_matmul_precision()!r}; matrix products of {setting.dtype}: {speed}."
    )
    yield "| | s | peak memory, GB | Tflop needed | share of the rate |"
    yield "|---|---|---|---|---|"
    net, train, queries = (
        setting.model(),
        setting.sequences(setting.train, 1),
        setting.sequences(setting.queries, 2),
    )
    model = inf.compose(
        net,
        "causal_lm",
        solver={"name": "ekfac", "dtype": torch.float32, "memory_budget": budget // 8, **options},
        blocks="per_layer",
        hessian_regularization=inf.RelativeRegularization(0.1),
        memory_budget=budget,
    )
    yield row("fit", *timed(lambda: model.fit(train), setting.device), setting.fit, peak)
    found: list[Tensor] = []
    every = {"input_ids": torch.cat([batch["input_ids"] for batch in queries])}

    def score() -> None:
        found.append(inf.attribute(model, [every], train).array)

    yield row("scores", *timed(score, setting.device), setting.scores, peak)
    sampled = model.influences(
        {"input_ids": every["input_ids"][:2]}, x={"input_ids": train[0]["input_ids"][:2]}
    )
    off = (
        torch.as_tensor(found[0])[:2, :2].double() - sampled.double().cpu()
    ).norm() / sampled.double().cpu().norm()
    yield f"\nFour scores differ by {float(off):.0e} from those of their points alone."


def row(what: str, seconds: float, peak: int, flops: float, best: float) -> str:
    return f"| {what} | {seconds:.1f} | {peak / 1e9:.1f} | {flops / 1e12:.0f} | {flops / seconds / best:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--precision", default="highest", choices=("highest", "high"), help="float32 products")
    parser.add_argument("--budget", default=24 * 2**30, type=int, help="memory_budget in bytes")
    sizes = {"blocks": 12, "width": 768, "vocabulary": 50257, "length": 512, "train": 4000, "queries": 400}
    for name, default in {**sizes, "batch": 16}.items():
        parser.add_argument(f"--{name}", default=default, type=int)
    parser.add_argument("--partitions", default=1, type=int, help="groups of layers")
    parser.add_argument("--storage", default="device", help="of eigenvectors: device, host or a folder")
    for name in ("storage-dtype", "score-dtype"):
        parser.add_argument(f"--{name}", choices=("bfloat16", "float32"), help="as the option of 'ekfac'")
    given = vars(parser.parse_args())
    options = {name: given.pop(name) for name in ("partitions", "storage")}
    for name in ("storage_dtype", "score_dtype"):
        chosen = given.pop(name)
        options[name] = None if chosen is None else getattr(torch, chosen)
    torch.set_float32_matmul_precision(given.pop("precision"))
    budget, dtype = given.pop("budget"), getattr(torch, given.pop("dtype"))
    for line in measured(Setting(**given, dtype=dtype), budget, options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
