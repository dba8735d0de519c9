"""What language models cannot be given is said in so many words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import influence_framework as inf
from tests import language
from tests.language import Fields


def batch(**changes: Any) -> Fields:
    """Four sequences, with some fields changed; ``None`` takes one away."""
    fields = language.sequences(4, 1) | changes
    return {name: value for name, value in fields.items() if value is not None}


def fit(name: str, fields: Any, objective: Any = None, **options: Any) -> inf.TorchInfluenceFunctionModel:
    chosen = objective or language.ARCHITECTURES[name].objective
    settings = {"solver": "direct", "hessian_regularization": 1.0} | options
    return inf.compose(language.model(name), chosen, preflight=False, **settings).fit([fields])


def filled(value: int, *, row: int = 1, column: int = 1) -> Tensor:
    ids = language.sequences(4, 1)["input_ids"].clone()
    ids[row, column] = value
    return ids


def labels(value: int) -> Tensor:
    found = torch.full((4, 4), -100)
    found[:, 1] = 2
    found[2, 1] = value
    return found


IDS = language.sequences(4, 1)["input_ids"]
MASK = language.sequences(4, 1)["attention_mask"]
PADDED = {"name": "causal_lm", "pad_token_id": 0}

# Model, batch, objective where it is another than the model's own, what is said.
WRONG: dict[str, tuple[str, Callable[[], Any], Any, str]] = {
    "padding without a mask": ("gpt2", lambda: batch(attention_mask=None), PADDED, "no attention_mask"),
    "padding that the config names": (
        "bert",
        lambda: batch(attention_mask=None, labels=labels(1)),
        None,
        "no attention_mask",
    ),
    "sequences in a list": (
        "gpt2",
        lambda: {"input_ids": [torch.tensor([1, 2, 3]), torch.tensor([1, 2])]},
        None,
        "pad sequences of unequal length",
    ),
    "one sequence without a batch": (
        "gpt2",
        lambda: {"input_ids": torch.tensor(3)},
        None,
        "same number of samples",
    ),
    "fields of different lengths": ("gpt2", lambda: batch(input_ids=IDS[:2]), None, "same number of samples"),
    "a row of padding": (
        "gpt2",
        lambda: batch(attention_mask=MASK * torch.tensor([[1], [0], [1], [1]])),
        None,
        r"Rows \[1\] of attention_mask are all zero",
    ),
    "a mask of another shape": ("gpt2", lambda: batch(attention_mask=MASK[:, :2]), None, "one entry a token"),
    "an id beyond the embedding": (
        "gpt2",
        lambda: batch(input_ids=filled(7)),
        None,
        "embedding has 7 rows: the tokenizer",
    ),
    "a negative id": ("gpt2", lambda: batch(input_ids=filled(-1)), None, "holds the ids -1 to"),
    "an id beyond a vocabulary of one's own": (
        "gpt2",
        lambda: batch(input_ids=filled(6)),
        {"name": "causal_lm", "vocabulary": 6},
        "embedding has 6 rows",
    ),
    "ids that are no numbers": ("gpt2", lambda: batch(input_ids=IDS.double()), None, "token ids"),
    "a label beyond the vocabulary": (
        "gpt2",
        lambda: batch(labels=labels(7)),
        None,
        "label 7 is outside the 7 tokens",
    ),
    "a negative label": ("bert", lambda: batch(labels=labels(-1)), None, "label -1 is outside the 7 tokens"),
    "a label that is no number": ("gpt2", lambda: batch(labels=labels(1).double()), None, "whole numbers"),
    "no label in a row": (
        "bert",
        lambda: batch(labels=labels(-100)),
        None,
        r"Rows \[2\] have no token that counts",
    ),
    "a sequence of one token": ("gpt2", lambda: {"input_ids": IDS[:, :1]}, None, "too short to predict"),
    "no labels": ("bert", lambda: batch(), None, "masked_lm needs 'labels'"),
    "no ids": (
        "gpt2",
        lambda: {"inputs_embeds": torch.randn(4, 3, 4, dtype=torch.float64)},
        None,
        "needs 'input_ids'",
    ),
    "labels twice": ("gpt2", lambda: (batch(labels=labels(1)), labels(1)), None, "pass them once"),
    "a tensor": ("gpt2", lambda: IDS, None, "use the objective 'supervised'"),
    "a class beyond the output": (
        "bert classifier",
        lambda: batch(labels=torch.tensor([0, 1, 2, 0])),
        None,
        "label 2 is outside the 2 classes",
    ),
    "a sample without a class": (
        "bert classifier",
        lambda: batch(labels=torch.tensor([0, 1, -100, 0])),
        None,
        "leave it out",
    ),
    "a class for every token": ("bert classifier", lambda: batch(labels=labels(1)), None, r"labels \(n,\)"),
    "a class where tokens were expected": (
        "bert",
        lambda: batch(labels=torch.tensor([0, 1, 1, 0])),
        None,
        r"logits \(n, T, vocabulary\)",
    ),
}


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("name", "fields", "objective", "said"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said(name: str, fields: Callable[[], Any], objective: Any, said: str) -> None:
    with pytest.raises(inf.InvalidInputError, match=said):
        fit(name, fields(), objective)


@pytest.mark.usefixtures("as_user")
def test_points_are_looked_at_like_training_data() -> None:
    model = fit("gpt2", batch())
    for wrong, said in ((batch(input_ids=filled(7)), "tokenizer"), (batch(labels=labels(9)), "outside")):
        with pytest.raises(inf.InvalidInputError, match=said):
            model.influences(wrong)
        with pytest.raises(inf.InvalidInputError, match=said):
            model.influences(batch(), x=wrong)
    with pytest.raises(inf.InvalidInputError, match=r"got dict.*by name.*influences\(test, x=train\)"):
        model.influences(batch(), batch())
    with pytest.raises(inf.InvalidInputError, match="floating-point"):
        model.influences(batch(), mode="perturbation")
    with pytest.raises(inf.InvalidInputError, match="x of the test data is missing"):
        model.influences(None)


@pytest.mark.usefixtures("as_user")
def test_options_are_looked_at() -> None:
    for options, said in (
        ({"reduction": "none"}, "reduction is 'mean' or 'sum'"),
        ({"vocabulary": 0}, "vocabulary is a whole number"),
        ({"pad_token_id": -1}, "pad_token_id is a whole number"),
    ):
        with pytest.raises(inf.InvalidInputError, match=said):
            inf.CausalLM(**options)


def test_padding_that_is_real_needs_a_mask_of_ones() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 1, 2]])
    fit("gpt2", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, PADDED)
    fit("gpt2", {"input_ids": ids}, None)


def test_rows_that_pad_alike_need_no_mask() -> None:
    fit("gpt2", {"input_ids": torch.tensor([[1, 2, 0], [3, 1, 0]])}, PADDED)


class Plain(nn.Module):
    """No layer that has a matrix form, and a result that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(language.WORDS, language.WORDS, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.table[input_ids]


def test_a_model_without_a_supported_layer_is_told() -> None:
    model = inf.compose(Plain(), "causal_lm", solver="ekfac", hessian_regularization=1.0)
    with pytest.raises(inf.InvalidInputError, match=r"cover 0 of 49 .* Plain has no matrix form"):
        model.fit([batch()])


def test_a_result_without_logits_is_told() -> None:
    class Wordless(Plain):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return {"scores": self.table[input_ids]}

    with pytest.raises(inf.InvalidInputError, match="returned dict"):
        inf.compose(Wordless(), "causal_lm", solver="direct", hessian_regularization=1.0).fit([batch()])


def test_dropout_is_told_before_anything_else() -> None:
    net = GPT2LMHeadModel(
        GPT2Config(vocab_size=7, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(inf.InvalidInputError, match=r"model.eval\(\)"):
        inf.compose(net.train(), "causal_lm", solver="direct").fit([batch()])


def test_nothing_is_left_on_the_model() -> None:
    net = language.model("checkpointed gpt2")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    layer = next(m for m in net.modules() if getattr(m, "gradient_checkpointing", False))
    fit("checkpointed gpt2", batch(), solver="ekfac").influences(batch())
    assert layer.gradient_checkpointing
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(inf.InvalidInputError):
        fit("checkpointed gpt2", batch(labels=labels(7)))
    assert layer.gradient_checkpointing
