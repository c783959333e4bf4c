"""The result of a run: its report, and the model if it is in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.words import Sheet, Shown
from coprune.report.schema import Report


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """A run's report, its model if that is in memory, and what the model reads with."""

    report: Report
    processor: Any = None
    """Tokenizer or image processor; None where no model was opened, or it has none."""
    made: Callable[[], PreTrainedModel | None] = lambda: None
    """Gives the model; one that lost parts, was trained or streamed, is built or loaded when it is first asked for."""

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """None where it was streamed and not saved, or pruned by an earlier run."""
        return self.made()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The processor of a model of text."""
        return self.processor if self.report.model.task == "text" else None

    def headline(self) -> str:
        """Return its report's headline."""
        return self.report.headline()

    def sheet(self) -> Sheet:
        """Return its report's sheet."""
        return self.report.sheet()
