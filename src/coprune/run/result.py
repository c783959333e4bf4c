"""The result of a run: its report, and the model if it is in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.words import Set, Sheet, Shown, Words
from coprune.model.transformers_private import Processor
from coprune.report.schema import Report


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """A run's report, its model if in memory, and the model's processor."""

    report: Report
    processor: Processor | None = None
    """Tokenizer, image processor or both in one; None if no model was opened or it has none."""
    made: Callable[[], PreTrainedModel | None] = lambda: None
    """Returns the model; one that lost parts, was trained or streamed is built or loaded on first use."""

    @cached_property
    def held(self) -> PreTrainedModel | None:
        """The model; None if it was streamed and not saved, or pruned by an earlier run."""
        return self.made()

    @property
    def model(self) -> PreTrainedModel:
        """The model in memory. Raises BadInput if there is none."""
        if self.held is None:
            saved = self.report.saved_model
            fix: Words = (
                f"It is in {saved}"
                if saved
                else ("keep it with ", Set("save_model", ...), " or ", Set("stream", False))
            )
            raise BadInput("the run left no model in memory", field="model", fix=fix)
        return self.held

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor of a text model. Raises BadInput if there is none."""
        if not isinstance(self.processor, PreTrainedTokenizerBase):
            raise BadInput("the run left no tokenizer in memory", field="tokenizer")
        return self.processor

    def headline(self) -> str:
        """Return its report's headline."""
        return self.report.headline()

    def sheet(self) -> Sheet:
        """Return its report's sheet."""
        return self.report.sheet()
