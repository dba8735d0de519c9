"""Architectures of ``transformers`` at tiny size, and their dense references from ``torch.func`` in float64.

The references run every sample alone and without its padding, so that no mask is needed: what padding and
company must not change is wrong here when they do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = 7
Fields = dict[str, Any]
Parameters = Mapping[str, Tensor]


def gpt2(**options: Any) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=4,
            n_layer=1,
            n_head=2,
            n_positions=6,
            n_inner=4,
            bos_token_id=0,
            eos_token_id=0,
            **options,
        )
    )


def checkpointed() -> nn.Module:
    """In train mode, where alone checkpointing acts; nothing in it is random."""
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model.activation_checkpointing_enable()
    return model.train()


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def lora() -> nn.Module:
    options = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # peft asks for an attribute that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(gpt2(), options)


BERT = {
    "vocab_size": WORDS,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=4,
            d_kv=2,
            d_ff=4,
            num_layers=1,
            num_heads=2,
            relative_attention_num_buckets=4,
            relative_attention_max_distance=6,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=2,
        )
    )


def sequences(n: int, seed: int, *, padding: int = 0, longest: int = 4) -> Fields:
    """Token ids of 2 to ``longest`` tokens each, padded at the right, and by ``padding`` more."""
    generator = torch.Generator().manual_seed(seed)
    ids = nn.functional.pad(torch.randint(1, WORDS, (n, longest), generator=generator), (0, padding))
    lengths = longest - torch.arange(n) % (longest - 1)
    mask = (torch.arange(longest + padding) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def masked(n: int, seed: int, **options: Any) -> Fields:
    batch = sequences(n, seed, **options)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    known = (torch.arange(ids.shape[1]) % 2 == 1) | (mask == 0)
    return batch | {"labels": ids.masked_fill(known, -100), "input_ids": torch.where(known, ids, 1) * mask}


def labelled(n: int, seed: int, **options: Any) -> Fields:
    return sequences(n, seed, **options) | {"labels": torch.arange(n) % 2}


def translations(n: int, seed: int, *, padding: int = 0) -> Fields:
    given, wanted = sequences(n, seed, padding=padding), sequences(n, seed + 50, longest=3, padding=padding)
    return given | {"labels": wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)}


def images(n: int, seed: int, *, padding: int = 0) -> Fields:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.arange(n) % 2}


@dataclass(frozen=True)
class Architecture:
    """A model, its objective by name, and its data.

    ``tolerance`` is of scores: some models compute norms in single precision in whatever dtype they are.
    """

    make: Callable[[], nn.Module]
    objective: str
    batch: Callable[..., Fields]
    tolerance: float = 1e-6


ARCHITECTURES = {
    "gpt2": Architecture(gpt2, "causal_lm", sequences),
    "llama": Architecture(llama, "causal_lm", sequences, 2e-3),
    "bert": Architecture(lambda: BertForMaskedLM(BertConfig(**BERT)), "masked_lm", masked),
    "bert classifier": Architecture(
        lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=2)),
        "sequence_classification",
        labelled,
    ),
    "t5": Architecture(t5, "seq2seq_lm", translations, 2e-3),
    "vit": Architecture(vit, "sequence_classification", images),
    "checkpointed gpt2": Architecture(checkpointed, "causal_lm", sequences),
    "lora": Architecture(lora, "causal_lm", sequences),
}


@cache
def model(name: str) -> nn.Module:
    """With weights far enough from their start that biases, norms and adapters matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ARCHITECTURES[name].make().double()
        made.train(name == "checkpointed gpt2")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def training(name: str, **options: Any) -> list[Fields]:
    batch = ARCHITECTURES[name].batch
    return [batch(4, 1, **options), batch(3, 2, **options)]


def joined(batches: list[Fields]) -> Fields:
    """All samples as one batch."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def points(name: str, which: str, **options: Any) -> Fields:
    n, seed = {"test": (3, 3), "train": (5, 4)}[which]
    return ARCHITECTURES[name].batch(n, seed, **options)


def alone(batch: Fields) -> list[Fields]:
    """Every sample by itself, without padding and without a mask."""
    size = len(next(iter(batch.values())))
    found = []
    for i in range(size):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        if (mask := one.pop("attention_mask", None)) is not None:
            length = int(mask.sum())
            one["input_ids"] = one["input_ids"][:, :length]
        if (labels := one.get("labels")) is not None and labels.ndim == 2:
            longest = one["input_ids"].shape[1] if labels.shape[1] == batch["input_ids"].shape[1] else None
            kept = labels[:, :longest]
            one["labels"] = kept if longest else kept[:, : int((kept != -100).sum())]
        found.append(one)
    return found


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def outputs(name: str, values: Parameters, sample: Fields) -> Tensor:
    """The logits that losses are of, ``(positions, classes)``, of one sample."""
    kind = ARCHITECTURES[name].objective
    given = dict(sample) if kind == "seq2seq_lm" else {k: v for k, v in sample.items() if k != "labels"}
    # The same weights without checkpointing.
    net = model("gpt2" if name == "checkpointed gpt2" else name)
    with sdpa_kernel(SDPBackend.MATH):
        logits = functional_call(net, dict(values), (), given).logits[0]
    return logits[:-1] if kind == "causal_lm" else logits if logits.ndim == 2 else logits[None]


def loss(name: str, logits: Tensor, sample: Fields) -> Tensor:
    """From the definition: the mean over the labels that there are."""
    labels = sample["input_ids"][0, 1:] if ARCHITECTURES[name].objective == "causal_lm" else sample["labels"][0]
    labels = labels.reshape(-1)
    each = torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels.clamp(min=0)]
    return each[labels != -100].mean()


def flat(values: Parameters) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def unflat(name: str, vector: Tensor) -> dict[str, Tensor]:
    own = parameters(model(name))
    parts = vector.split([p.numel() for p in own.values()])
    return {key: part.view(p.shape) for (key, p), part in zip(own.items(), parts, strict=True)}


def gradients(name: str, batch: Fields) -> Tensor:
    """``(n, P)``."""
    own = parameters(model(name))
    rows = [flat(grad(lambda v, s=sample: loss(name, outputs(name, v, s), s))(own)) for sample in alone(batch)]
    return torch.stack(rows)


@cache
def dense(name: str, source: str) -> Tensor:
    """The curvature of the training data, ``(P, P)``."""
    vector = flat(parameters(model(name)))
    total, each = torch.zeros(()), [sample for batch in training(name) for sample in alone(batch)]
    for sample in each:
        total = total + SOURCES[source](name, vector, sample)
    return total / len(each)


def _hessian(name: str, vector: Tensor, sample: Fields) -> Tensor:
    # Reverse mode of torch.func over itself loses terms of the weight of a layer norm, and is not symmetric.
    leaf = vector.clone().requires_grad_()
    value = loss(name, outputs(name, unflat(name, leaf), sample), sample)
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, torch.eye(len(leaf), dtype=leaf.dtype), is_grads_batched=True)
    return second


def _gauss_newton(name: str, vector: Tensor, sample: Fields) -> Tensor:
    logits = outputs(name, unflat(name, vector), sample)
    jacobian = jacrev(lambda v: outputs(name, unflat(name, v), sample).flatten())(vector)
    middle = jacrev(jacrev(lambda o: loss(name, o.view(logits.shape), sample)))(logits.flatten())
    return jacobian.T @ middle @ jacobian


def _empirical_fisher(name: str, vector: Tensor, sample: Fields) -> Tensor:
    row = jacrev(lambda v: loss(name, outputs(name, unflat(name, v), sample), sample))(vector)
    return row[:, None] * row


SOURCES = {"hessian": _hessian, "gauss_newton": _gauss_newton, "empirical_fisher": _empirical_fisher}


@cache
def strength(name: str, source: str) -> float:
    """λ: a hundredth of the largest eigenvalue, or above the magnitude of the most negative one."""
    values = torch.linalg.eigvalsh(dense(name, source))
    return max(0.01 * values[-1].item(), -1.5 * values[0].item())


def blocks(name: str, structure: str) -> list[list[str]]:
    """Names of the parameters of every block."""
    names = list(parameters(model(name)))
    if structure == "full":
        return [names]
    if structure == "per_parameter":
        return [[one] for one in names]
    owners: dict[str, list[str]] = {}
    for one in names:
        owners.setdefault(one.rpartition(".")[0], []).append(one)
    return list(owners.values())


def inverse(name: str, curvature: Tensor, structure: str, damping: float) -> Tensor:
    """``(C + λI)⁻¹``, ``(P, P)``, with curvature between blocks left out."""
    own = parameters(model(name))
    places = dict(zip(own, torch.arange(len(curvature)).split([p.numel() for p in own.values()]), strict=True))
    whole = torch.zeros_like(curvature)
    for names in blocks(name, structure):
        at = torch.cat([places[one] for one in names])
        damped = curvature[at][:, at] + damping * torch.eye(len(at), dtype=curvature.dtype)
        whole[at[:, None], at] = torch.linalg.inv(damped)
    return whole


def scores(name: str, whole: Tensor) -> Tensor:
    """``(n_test, n_train)``."""
    return gradients(name, points(name, "test")) @ whole @ gradients(name, points(name, "train")).T
