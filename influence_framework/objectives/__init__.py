"""How batches become outputs and losses, by name: registered through the same hook as anyone's."""

from influence_framework.hookspecs import Register, hookimpl
from influence_framework.objective import SupervisedObjective
from influence_framework.objectives.classification import SequenceClassification
from influence_framework.objectives.tokens import CausalLM, MaskedLM, Seq2SeqLM


@hookimpl
def register_objectives(register: Register) -> None:
    """Register core's own."""
    register("supervised", SupervisedObjective)
    register("causal_lm", CausalLM)
    register("masked_lm", MaskedLM)
    register("seq2seq_lm", Seq2SeqLM)
    register("sequence_classification", SequenceClassification)


__all__ = [
    "CausalLM",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassification",
    "SupervisedObjective",
    "register_objectives",
]
