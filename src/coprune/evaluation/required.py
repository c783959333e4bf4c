"""Conditions on a model's measurements, such as `perplexity<=dense*1.05` and `overlap>=0.8`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from coprune.evaluation.answers.answer_facts import Requirement
from coprune.evaluation.embeddings import EmbeddingChange
from coprune.evaluation.transcripts import TranscriptChange
from coprune.recipe.answers import Condition


class Figure(NamedTuple):
    """A figure of a model on one text or image set."""

    name: str
    """Name used in conditions."""
    data: str
    value: float
    dense: float | None = None
    """The dense model's figure, if measured."""


def figures_of_closeness(found: Iterable[EmbeddingChange | TranscriptChange]) -> Iterator[Figure]:
    """Yield the figures of a comparison with the dense model."""
    for one in found:
        if isinstance(one, EmbeddingChange):
            yield Figure("cosine", one.data, one.cosine)
            yield Figure("overlap", one.data, one.overlap)
        else:
            yield Figure("alike", one.data, one.agreement)
            if one.pruned is not None:
                yield Figure("word_error", one.data, one.pruned, one.dense)


def judge_measured(conditions: Sequence[Condition], figures: Sequence[Figure]) -> tuple[Requirement, ...]:
    """Check measurements against conditions.

    Args:
        conditions: the requirements.
        figures: the figures on all data.

    Returns:
        One requirement per condition and dataset with its figure, or an unmet one if there is none.
    """
    judged = []
    for condition in conditions:
        own = [one for one in figures if one.name == condition.name]
        for one in own:
            text = f"{condition.text} on {one.data}" if len(own) > 1 else condition.text
            dense = one.dense if condition.against_dense else None
            holds = not (condition.against_dense and dense is None) and condition.holds(one.value, dense)
            judged.append(Requirement(condition=text, figure=one.value, dense=dense, holds=holds))
        if not own:
            judged.append(Requirement(condition=condition.text, figure=None, dense=None, holds=False))
    return tuple(judged)
