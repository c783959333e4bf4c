"""The report of several steps: the last one's measurements next to the dense model's, with the changes of all steps."""

from __future__ import annotations

from coprune.evaluation.answers.answer_facts import judge
from coprune.evaluation.required import judge_measured
from coprune.recipe.recipe import Recipe
from coprune.report.figures import FinetunedFacts
from coprune.report.schema import Report
from coprune.training.finetune_report import FinetuneReport

_OF_MODEL = ("blocks", "block_names", "device", "dtype", "loaded_by")
_OF_IMAGES = ("dense_top1", "dense_top1_interval", "dense_top5")


def report_with_change(recipe: Recipe, before: Report, own: Report) -> Report:
    """Return the report of all steps so far, whose last one changed the model.

    Args:
        recipe: the recipe of all steps.
        before: the report of the steps before the last.
        own: the report of the last step.
    """
    texts = {text.data: text.dense for text in before.perplexity}
    images = {one.data: {name: getattr(one, name) for name in _OF_IMAGES} for one in before.accuracy}
    walked = before if before.model.block_names else own  # a vocabulary is cut without a walk
    left = own.left or before.left or own.model.parameters
    answers = None if own.answers is None else own.answers.beside(before.answers)
    both = own.model_copy(
        update={
            "recipe": recipe,
            "model": before.model.model_copy(update={name: getattr(walked.model, name) for name in _OF_MODEL}),
            "perplexity": [one.model_copy(update={"dense": texts.get(one.data, one.dense)}) for one in own.perplexity],
            "accuracy": [one.model_copy(update=images.get(one.data, {})) for one in own.accuracy],
            "bos": before.bos or own.bos,
            "answers": answers,
            "vocabulary": before.vocabulary,
            "events": [*before.events, *own.events],
            "trainings": [*before.trainings, *own.trainings],
            "edits": [*before.edits, *own.edits],
            "covered": own.covered or before.covered,
            "left": left,
            "padding": own.padding or before.padding,
            "prune_seconds": before.prune_seconds + own.prune_seconds,
            "total_seconds": before.total_seconds + own.total_seconds,
            "earlier_seconds": before.earlier_seconds + own.earlier_seconds,
            "peak_memory_bytes": max(before.peak_memory_bytes, own.peak_memory_bytes),
        }
    )
    asked = recipe.evaluate.answers
    required = (*judge(asked.conditions, answers), *judge_measured(asked.measured, both.figures()))
    return both.model_copy(update={"required": required})


def report_with_training(recipe: Recipe, before: Report, own: FinetuneReport) -> Report:
    """Return the report of all steps, whose last one is a training. Arguments as for `report_with_change`."""
    facts = FinetunedFacts(
        mode=str(own.settings.train.mode),
        steps=own.steps,
        minutes=own.seconds / 60,
        perplexity={one.data: one.after for one in own.perplexity},
        top1={one.data: one.after_top1 for one in own.accuracy},
        near={
            **{one.data: one.after.headline() for one in own.embeddings},
            **{one.data: one.error() for one in own.transcripts},
        },
    )
    answers = own.answers
    if answers is not None and answers.reference == "before":
        answers = answers.beside(before.answers)
    asked = recipe.evaluate.answers
    dense = {(one.name, one.data): one.dense for one in before.figures()}
    figures = [one._replace(dense=one.dense or dense.get((one.name, one.data))) for one in own.figures()]
    return before.model_copy(
        update={
            "recipe": recipe,
            "finetuned": facts,
            "saved_model": own.saved_model,
            "answers": answers,
            "no_answers": own.no_answers,
            "required": (*judge(asked.conditions, own.answers), *judge_measured(asked.measured, figures)),
        }
    )
