"""Scores as a page of HTML: pictures, texts, tokens or rows, with how the scores were made."""

from influence_framework.reporting.page import Page, report
from influence_framework.reporting.points import Points
from influence_framework.reporting.templating import MissingExtraError

__all__ = ["MissingExtraError", "Page", "Points", "report"]
