"""Answers that a model in files gave before: kept by content, as other measurements are, so that none is asked twice."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable

from coprune.evaluation.answers.answered import Answers
from coprune.evaluation.answers.questions import Plan
from coprune.evaluation.cache import EvaluationCache, default_cache_folder, model_fingerprint
from coprune.model.checkpoint.locate import locate
from coprune.model.opened import choose_device
from coprune.recipe.parts import ModelPart


def answers_key(fingerprint: str, asked: ModelPart, plan: Plan, **more: str) -> str:
    """Names answers, or what is measured along them, by everything that decides them but the batch size.

    Args:
        fingerprint: of the model's files, the tokenizer's among them.
        asked: how the model is held.
        plan: the prompts and settings.
        more: what else decides what is kept.
    """
    facts = {
        "what": "answers",
        "model": fingerprint,
        "dtype": asked.dtype,
        "device": choose_device(asked.device).type,  # "auto" is one of them, by another name
        "prompts": plan.prompts.fingerprint,
        "new_tokens": plan.new_tokens,
        "temperature": plan.temperature,
        "seed": plan.seed,
        **more,
        "versions": [importlib.metadata.version(package) for package in ("torch", "transformers")],
    }
    return json.dumps(facts, sort_keys=True)


def kept_answers(model: ModelPart, plan: Plan, answer: Callable[[], Answers]) -> Answers:
    """The answers of a model in files, from the user's cache or asked for now.

    Args:
        model: names the model.
        plan: what it is asked.
        answer: asks it.
    """
    fingerprint = model_fingerprint(locate(model.name, model.cache_dir).path)
    cache = EvaluationCache(default_cache_folder())
    return cache.get(answers_key(fingerprint, model, plan), Answers, answer)
