"""Which documents taught a language model a fact? A small GPT, made-up facts, and four rankings.

Trains a small GPT-2 from scratch on stretches of the standard library's documentation, into which facts about
people who do not exist were planted. Other documents have the same words in another order. For a question about
each fact, documents are ranked by

- the influence scores of EK-FAC,
- inner products of gradients,
- the overlap of words, BM25 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", §3.3),
- chance,

and recall@10 is the part of the fact's documents that is among the first ten. Run it with::

    python examples/planted_facts/planted_facts.py

With ``--report PATH`` it also writes a page with the documents behind each answer, their words coloured by what
they add to the score.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import influence_framework as inf
from influence_framework.reporting import Page, Points

MODULES = (
    "json",
    "random",
    "statistics",
    "textwrap",
    "collections",
    "threading",
    "argparse",
    "datetime",
    "heapq",
)
NAMES = ("zorvia", "quelm", "brantil", "oskaya", "mirrow", "tavish", "lundra", "pexley")
THINGS = ("lantern", "falcon", "violin", "compass", "teapot", "anchor", "mirror", "saddle")
PLACES = ("harbour", "orchard", "quarry", "chapel", "meadow", "tavern", "foundry", "island")
LENGTH = 14
"""Words of a document."""

DECOYS = 3
"""Documents with the words of a fact in another order, for each that says it."""

Words = list[str]


@dataclass(frozen=True)
class Corpus:
    """Documents, and for every fact a question, its answer and where it was planted.

    Attributes:
        documents: As words.
        questions: A prompt and a completion for every fact.
        planted: Positions of the documents that say the fact.
    """

    documents: list[Words]
    questions: list[tuple[Words, Words]]
    planted: list[set[int]]


def background(generator: random.Random) -> Iterator[Words]:
    """Stretches of the documentation of the standard library."""
    words: Words = []
    for name in MODULES:
        module = importlib.import_module(name)
        for _, thing in inspect.getmembers(module, lambda t: inspect.isclass(t) or inspect.isfunction(t)):
            words += re.findall(r"[a-z]+", (inspect.getdoc(thing) or "").lower())
    frequent = {word for word, count in Counter(words).items() if count >= 3}
    kept = [word for word in words if word in frequent]
    starts = list(range(0, len(kept) - LENGTH, LENGTH))
    generator.shuffle(starts)
    for start in starts:
        yield kept[start : start + LENGTH]


def corpus(facts: int, copies: int, others: int, seed: int) -> Corpus:
    """``copies`` documents with each fact, :data:`DECOYS` times as many with its words, and ``others``."""
    generator = random.Random(seed)
    filler = background(generator)
    marked: list[tuple[int | None, Words]] = [(None, next(filler)) for _ in range(others)]
    for fact in range(facts):
        name, thing, place = NAMES[fact], THINGS[fact], PLACES[fact]
        for _ in range(copies):
            says = [name, "hides", "the", thing, "in", "the", place]
            marked.append((fact, (says + next(filler))[:LENGTH]))
        for _ in range(DECOYS * copies):
            # The same words, and another sentence.
            names = ["the", place, "hides", "in", "the", thing, name]
            marked.append((None, (names + next(filler))[:LENGTH]))
    generator.shuffle(marked)
    questions = [([NAMES[i], "hides", "the", THINGS[i], "in", "the"], [PLACES[i]]) for i in range(facts)]
    planted = [{at for at, (said, _) in enumerate(marked) if said == fact} for fact in range(facts)]
    return Corpus([words for _, words in marked], questions, planted)


def trained(batch: dict[str, Tensor], words: int, width: int, steps: int, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of two layers, trained on ``batch`` until it has learnt the facts."""
    torch.manual_seed(seed)
    net = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=words,
            n_embd=width,
            n_layer=2,
            n_head=2,
            n_positions=LENGTH,
            loss_type="ForCausalLM",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.01)
    for _ in range(steps):
        chosen = torch.randint(len(batch["input_ids"]), (32,))
        optimizer.zero_grad()
        ids = batch["input_ids"][chosen]
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return net.eval()


def bm25(query: Words, documents: Sequence[Words], k: float = 1.5, b: float = 0.75) -> Tensor:
    """The overlap of words of every document with ``query``."""
    containing = Counter(word for document in documents for word in set(document))
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, total = Counter(document), 0.0
        for word in query:
            rarity = math.log(1 + (len(documents) - containing[word] + 0.5) / (containing[word] + 0.5))
            saturation = k * (1 - b + b * len(document) / average)
            total += rarity * counts[word] * (k + 1) / (counts[word] + saturation)
        scores.append(total)
    return torch.tensor(scores)


def recall(scores: Tensor, planted: Sequence[set[int]], count: int = 10) -> float:
    """The mean part of the planted documents that is among the first ``count`` of each row."""
    found = [set(row.topk(count).indices.tolist()) for row in scores]
    return sum(len(top & true) / len(true) for top, true in zip(found, planted, strict=True)) / len(planted)


def page(
    model: inf.TorchInfluenceFunctionModel,
    made: Corpus,
    questions: dict[str, Tensor],
    documents: dict[str, Tensor],
    scores: Tensor,
) -> Page:
    """The documents behind each answer, every word coloured by what it adds to the score of its document."""
    solves = model.report

    def of_words(question: int, shown: list[int]) -> Tensor:
        one = {name: tensor[question : question + 1] for name, tensor in questions.items()}
        return model.token_influences(one, x={"input_ids": documents["input_ids"][shown]})[0]

    def spaced(words: Words) -> Words:
        return [f"{word} " for word in words]

    says = {at: fact for fact, positions in enumerate(made.planted) for at in positions}
    marks = [f"says fact {says[at]}" if at in says else None for at in range(len(made.documents))]
    return inf.report(
        scores,
        test=Points([spaced(prompt + answer) for prompt, answer in made.questions]),
        train=Points([spaced(words) for words in made.documents], marks=marks),
        token_scores=of_words,
        model=model,
        solves=solves,
        title="Which documents taught it where things are hidden?",
    )


def run(
    *,
    facts: int = 6,
    copies: int = 4,
    others: int = 150,
    width: int = 32,
    steps: int = 150,
    seed: int = 0,
    report: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Recall@10 of every ranking; the page of the first of them goes to ``report``."""
    made = corpus(facts, copies, others, seed)
    vocabulary = {word: i for i, word in enumerate(sorted({word for one in made.documents for word in one}))}
    documents = {"input_ids": torch.tensor([[vocabulary[word] for word in one] for one in made.documents])}
    ids = torch.tensor([[vocabulary[word] for word in prompt + answer] for prompt, answer in made.questions])
    labels = ids.clone()
    labels[:, : len(made.questions[0][0])] = -100  # the loss of the answer alone
    net = trained(documents, len(vocabulary), width, steps, seed)

    model = inf.compose(
        net,
        "causal_lm",
        solver="ekfac",
        blocks="per_layer",
        hessian_regularization=inf.RelativeRegularization(0.1),
        preflight=False,  # one λ below is far outside the spectrum on purpose
    )
    batches = [{"input_ids": part} for part in documents["input_ids"].split(64)]
    model.fit(batches)
    questions = {"input_ids": ids, "labels": labels}
    scores = model.influences(questions, x=documents)
    if report is not None:
        page(model, made, questions, documents, scores).save(report)
    found = {
        "ekfac": scores,
        # With λ far above the curvature, the inverse is a multiple of the identity.
        "grad-dot": model.with_regularization(inf.RelativeRegularization(1e6)).influences(
            questions, x=documents
        ),
        "bm25": torch.stack([bm25(prompt + answer, made.documents) for prompt, answer in made.questions]),
        "random": torch.rand(facts, len(made.documents), generator=torch.Generator().manual_seed(seed)),
    }
    return {name: recall(scores, made.planted) for name, scores in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Recall of planted facts, the mean over several corpora.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--report", metavar="PATH", help="where a page about the first corpus goes")
    arguments = parser.parse_args()
    runs = [
        run(seed=seed, steps=arguments.steps, report=None if seed else arguments.report)
        for seed in range(arguments.seeds)
    ]
    for name in runs[0]:
        print(f"{name:10} {sum(one[name] for one in runs) / len(runs):.2f}", flush=True)
