"""Which method suits a problem: what each would take here, and why one is recommended."""

from influence_framework.advice.advising import advise
from influence_framework.advice.answer import Advice, Candidate
from influence_framework.advice.budget import Budget
from influence_framework.advice.predictions import Prediction

__all__ = ["Advice", "Budget", "Candidate", "Prediction", "advise"]
