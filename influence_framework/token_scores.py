"""Scores of the tokens of sequences: what each adds to the score of its sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.data import Batch, split, take
from influence_framework.derivatives import PushForward, pull_back, rows_at_once
from influence_framework.errors import InvalidInputError
from influence_framework.fitted import SOLVE_COPIES, Fitted
from influence_framework.gradients import Factors, check_sample_gradients, contract_up, samples_within
from influence_framework.objective import TokenLosses
from influence_framework.problem import Problem
from influence_framework.solving import SolveLog


def token_losses(problem: Problem, leaves: dict[str, Tensor], batch: Batch) -> Float[Tensor, "n t"]:
    """What every token adds to the loss of its sequence.

    Raises:
        InvalidInputError: The objective has no losses of tokens.
    """
    objective = problem.objective
    if not isinstance(objective, TokenLosses):
        raise InvalidInputError(
            f"{type(objective).__name__} has no token_losses(outputs, batch), which scores of tokens are of: "
            "use 'causal_lm', 'masked_lm' or 'seq2seq_lm', or add that method to your objective."
        )
    return objective.token_losses(problem.outputs(leaves, batch), batch)


def of_training_tokens(
    fitted: Fitted, test: Batch, train: Batch, log: SolveLog, measured: Problem
) -> Float[Tensor, "m n t"]:
    """``f_m · ∇ℓ_nt`` with the factors ``f`` of the test points: one derivative along each for all tokens."""
    problem = fitted.problem
    problem.require_second_derivatives()
    factors = fitted.assemble(fitted.factors(test, log, measured))
    leaves = problem.parameters.leaves(problem.model)
    parts = []
    for piece in split(train, fitted.size(train), problem.max_batch):
        with torch.enable_grad():
            losses = token_losses(problem, leaves, piece)
            forward = PushForward(losses, list(leaves.values()))
        step = rows_at_once(losses.device, 2 * problem.sample_bytes * len(losses), problem.memory_budget)
        found = losses.new_zeros(len(factors), *losses.shape)
        for start in range(0, len(factors), step):
            rows = factors[start : start + step]
            derivatives = forward(problem.parameters.unflatten_rows(rows))
            if derivatives is not None:
                found[start : start + step] = derivatives
        check_sample_gradients(found.transpose(0, 1).flatten(1))
        parts.append(found)
    return torch.cat(parts, dim=1)


def of_test_tokens(fitted: Fitted, test: Batch, train: Batch, log: SolveLog) -> Float[Tensor, "m n t"]:
    """``∇ℓ_mtᵀ (C + λI)⁻¹ ∇ℓ_n``: a right-hand side for every token of the test points."""
    problem = fitted.problem
    scores = []
    for index in range(fitted.size(test)):
        found = []
        for gradients in _token_gradients(problem, take(test, slice(index, index + 1))):
            factors = {}
            for name, block in fitted.blocks.items():
                factors[name] = Factors(block.solve(gradients, log), block.index)
            found.append(torch.stack(list(contract_up(factors, problem, train).values())).sum(0))
        scores.append(torch.cat(found).T)
    return torch.stack(scores)


def _token_gradients(problem: Problem, sample: Batch) -> Iterator[Float[Tensor, "t P"]]:
    """The gradients of the tokens of one sample, as many at a time as can be solved for within the budget."""
    parameters = problem.parameters
    leaves = parameters.leaves(problem.model)
    with torch.enable_grad():
        losses = token_losses(problem, leaves, sample)[0]
    step = problem.agreed(samples_within(problem, parameters, problem.memory_budget, SOLVE_COPIES))
    for rows in torch.eye(len(losses), dtype=losses.dtype, device=losses.device).split(step):
        found = pull_back([losses], list(leaves.values()), [rows])
        like = losses.new_zeros(len(rows), parameters.numel)
        gradients = parameters.gather_rows(found, like)
        check_sample_gradients(gradients)
        yield gradients
