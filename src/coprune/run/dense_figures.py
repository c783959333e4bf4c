"""The dense model's figures: measured, or found where this model was measured on the same texts before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from coprune.data import EvaluationText
from coprune.evaluation.answers.answer_records import Answers
from coprune.evaluation.answers.questions import plan_of
from coprune.evaluation.measurement import Measured, Perplexity
from coprune.evaluation.zero_shot import ZeroShot
from coprune.model.loaded_model import streams
from coprune.report.schema import installed_versions
from coprune.run.context import Run
from coprune.store.store import Key, key_of

_SETTINGS = (
    *("seqlen", "batch_size", "tasks", "eval_zero_shot", "num_fewshot", "include_path", "limit", "prompt"),
    *("apply_chat_template", "gen_kwargs"),
    *("generate", "generate_prompts", "generate_tokens", "generate_temperature"),
)
"""Settings that decide what is measured, and how it rounds."""


class DenseFacts(BaseModel):
    """Measurements of a dense model."""

    model_config = ConfigDict(frozen=True)

    perplexity: dict[str, Perplexity]
    zero_shot: ZeroShot | None
    text: str | None
    answers: Answers | None = None


def dense_figures(run: Run, measure: Callable[[], dict[str, Measured]]) -> dict[str, Measured]:
    """Return the dense model's figures by the name of the data, and fill in the run's other measurements.

    Args:
        run: of which model, on what.
        measure: does it.
    """
    if not _can_be_kept(run):
        return measure()
    extras, anew = run.extras, dict[str, Measured]()

    def measure_now() -> DenseFacts:
        anew.update(measure())
        perplexity = {name: one for name, one in anew.items() if isinstance(one, Perplexity)}
        zero_shot, text = extras.zero_shot.get("dense"), extras.texts.get("dense")
        return DenseFacts(perplexity=perplexity, zero_shot=zero_shot, text=text, answers=extras.look.dense)

    key, store = dense_key(run), run.reuse.store
    known = store.find(key, DenseFacts)
    facts = store.get(key, DenseFacts, measure_now) if known is None else known.record
    if known is None and anew:
        return anew
    run.reuse.saved.dense += 0.0 if known is None else known.seconds
    if facts.zero_shot is not None:
        extras.zero_shot["dense"] = facts.zero_shot
    if facts.text is not None:
        extras.texts["dense"] = facts.text
    extras.look.dense = facts.answers
    for one in facts.perplexity.values():
        run.reporter.say(f"{one.of_model('dense')} (measured before)")
    return dict(facts.perplexity)


def _can_be_kept(run: Run) -> bool:
    """Return whether all that is measured of the dense model can be told again from a record."""
    recipe, data = run.recipe, run.data.values()
    if run.processes.size > 1 or run.loaded.task == "embeddings":  # whose vectors are not kept
        return False
    if recipe.evaluate.tasks.log_samples is not None and recipe.evaluate.runs_tasks:
        return False  # items are logged beside the run's
    return bool(recipe.evaluate.dense) and all(isinstance(one, EvaluationText) for one in data)


def dense_key(run: Run) -> Key:
    """Return the key of a dense model's measurements: its weights, the tokens, and everything that affects rounding."""
    recipe = run.recipe
    texts = {name: data.fingerprint for name, data in run.data.items() if isinstance(data, EvaluationText)}
    settings = {name: recipe.setting(name) for name in _SETTINGS}
    plan = plan_of(recipe.evaluate.answers, recipe.output.model is not None)
    answers = None if plan is None else plan.prompts.fingerprint
    return key_of("dense", 3, texts=texts, answers=answers, **computed(run), **settings)


def computed(run: Run) -> dict[str, Any]:
    """Return the weights of a run's dense model and the circumstances of their computation, for a key."""
    loaded = run.loaded
    return {
        "weights": loaded.fingerprint(run.model.every_block),
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.device),
        "streamed": streams(run.recipe),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
