"""Answers as one of the measurements of `coprune eval` and `coprune compare`: of one model, or of two side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.evaluation.answers.answered import Along, Answers
from coprune.evaluation.answers.asking import ask, divergence, rows_along
from coprune.evaluation.answers.facts import AnswerFacts, facts_of
from coprune.evaluation.answers.kept import answers_key
from coprune.evaluation.answers.questions import Plan, Questions, asked_of, questions_for
from coprune.evaluation.cache import EvaluationCache
from coprune.model.opened import Loaded
from coprune.recipe.recipe import Recipe


class MeasuredAnswers:
    """What one model answers, asked when it is not in the cache.

    Args:
        recipe: its model, and how it is held.
        plan: what it is asked.
        fingerprint: of its files.
        loaded: gives the model.
        cache: what was measured before.
        reporter: who hears of it.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        fingerprint: str,
        loaded: Callable[[], Loaded],
        cache: EvaluationCache,
        reporter: Reporter,
    ) -> None:
        self._recipe, self._plan, self.fingerprint = recipe, plan, fingerprint
        self._loaded, self._cache, self._reporter = loaded, cache, reporter

    @cached_property
    def _questions(self) -> Questions:
        loaded = self._loaded()
        if loaded.tokenizer is None:
            raise BadInput(f"{loaded.source} has no tokenizer, which prompts need", field="generate")
        return questions_for(self._plan, loaded.tokenizer, loaded.model)

    @cached_property
    def answers(self) -> Answers:
        """The model's answers. Raises BadInput as `questions_for`."""
        key = answers_key(self.fingerprint, self._recipe.model, self._plan)
        return self._cache.get(key, Answers, self._ask)

    def _ask(self) -> Answers:
        questions, loaded = self._questions, self._loaded()
        assert loaded.tokenizer is not None
        size = self._recipe.calibration.batch_size
        return ask(loaded.model, loaded.tokenizer, questions, self._reporter, size)

    def facts(self, dense: MeasuredAnswers | None) -> AnswerFacts:
        """The answers, beside another model's. Raises BadInput where the two do not read the same tokens."""
        asked = asked_of(self._plan, self.answers.chat, self._plan.new_tokens)
        if dense is None:
            return facts_of(asked, self._plan.prompts.texts, (None, self.answers))
        key = answers_key(self.fingerprint, self._recipe.model, self._plan, along=dense.fingerprint)
        along = self._cache.get(key, Along, lambda: self._along(dense))
        return facts_of(asked, self._plan.prompts.texts, (dense.answers, self.answers), along)

    def _along(self, dense: MeasuredAnswers) -> Along:
        models = [one._loaded().model for one in (dense, self)]
        sizes = [model.config.get_text_config().vocab_size for model in models]
        if sizes[0] != sizes[1] or dense._questions.ids != self._questions.ids:
            raise BadInput(
                "the models cut the prompts into different tokens, so their answers cannot be compared",
                field="against",
                fix="give a dense model of the same family",
            )
        with self._reporter.bar("KL along the dense model's answers", 1):
            rows = [rows_along(model, self._questions, dense.answers) for model in models]
            return divergence(*rows)
