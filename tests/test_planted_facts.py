"""The example of planted facts, at a size that runs in seconds."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import scripts
from tests.pages import check_self_contained, content


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return scripts.example("planted_facts")


def test_documents_with_a_fact_differ_from_their_decoys_in_the_order_of_words_alone(
    example: ModuleType,
) -> None:
    made = example.corpus(3, 4, 20, 0)
    assert len(made.documents) == 3 * 4 * (1 + example.DECOYS) + 20
    assert {len(document) for document in made.documents} == {example.LENGTH}
    for (prompt, answer), planted in zip(made.questions, made.planted, strict=True):
        said = " ".join(prompt + answer)
        assert planted == {at for at, words in enumerate(made.documents) if said in " ".join(words)}
        same = [words for words in made.documents if {*prompt, *answer} <= {*words}]
        assert len(planted) == 4
        assert len(same) == 4 * (1 + example.DECOYS)


def test_recall_counts_what_is_among_the_first(example: ModuleType) -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert example.recall(scores, [{0, 3}, {2, 3}], 2) == 0.75


def test_bm25_prefers_rare_words_and_more_of_them(example: ModuleType) -> None:
    documents = [["rare", "the"], ["the", "the"], ["a", "b"], ["rare", "rare"]]
    scores = example.bm25(["rare", "the"], documents)
    # log(1 + 2.5/2.5) for words in two of four documents; one occurrence counts 1, two 2·2.5/3.5.
    one, two = torch.tensor(2.0).log(), torch.tensor(2.0).log() * 10 / 7
    assert torch.allclose(scores, torch.tensor([2 * one, two, 0.0, two]))


def test_influence_finds_facts_that_chance_does_not(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    found = example.run(facts=3, copies=4, others=40, width=16, steps=200, report=path)
    assert list(found) == ["ekfac", "grad-dot", "bm25", "random"]
    assert found["ekfac"] >= 2 * found["random"] + 0.25
    check_page(path.read_text(encoding="utf-8"), example)


def check_page(html: str, example: ModuleType) -> None:
    """Documents are marked where they say a fact, and the words that say it add the most to their scores."""
    check_self_contained(html)
    data = content(html)
    made = example.corpus(3, 4, 40, 0)
    assert [case["item"] for case in data["tests"]] == [
        [f"{word} " for word in prompt + answer] for prompt, answer in made.questions
    ]
    said = lit = 0
    for fact, (case, planted) in enumerate(zip(data["tests"], made.planted, strict=True)):
        for place, _, _, levels in case["up"]:
            document = data["train"][place]
            assert document["item"] == [f"{word} " for word in made.documents[int(document["id"])]]
            assert len(levels) == len(document["item"])
            if int(document["id"]) in planted:
                assert document["mark"] == f"says fact {fact}"
                said += 1
                # The seventh word is the answer; digits are levels above zero.
                lit += levels[6] == max(level for level in levels if level.isdigit())
    assert said >= 6
    assert lit >= said - 2
