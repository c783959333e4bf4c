"""Names for what runs of a sweep take over from each other: everything that decides it to the last bit."""

from __future__ import annotations

import json
from typing import Any

import torch

from coprune.data import EvaluationText
from coprune.evaluation.answers.questions import plan_of
from coprune.model.opened import streams
from coprune.recipe.decides import Decides
from coprune.recipe.recipe import Recipe
from coprune.report.schema import installed_versions
from coprune.run.session import Session


def estimate_key(recipe: Recipe) -> str:
    """Names the runs that take about as much memory and time as this one."""
    return json.dumps(recipe.deciding(Decides.COST), sort_keys=True, default=str)


def dense_key(session: Session) -> str:
    """Names what is measured of a dense model: its weights, the tokens, and everything that may change a last bit."""
    texts = {n: data.fingerprint for n, data in session.opened.data.items() if isinstance(data, EvaluationText)}
    names = ["seqlen", "batch_size", "tasks", "eval_zero_shot", "num_fewshot", "include_path", "limit", "prompt"]
    names += ["apply_chat_template", "gen_kwargs"]
    names += ["generate", "generate_prompts", "generate_tokens", "generate_temperature", "generate_seed"]
    settings = {name: session.opened.recipe.setting(name) for name in names}
    recipe = session.opened.recipe
    plan = plan_of(recipe.answers, recipe.output.model is not None)
    settings["answers"] = None if plan is None else plan.prompts.fingerprint
    return json.dumps(_computed(session) | settings | {"texts": texts}, sort_keys=True, default=str)


def statistics_key(session: Session) -> str:
    """Names what is gathered of the dense model's blocks: as `dense_key`, and which matrices share which statistic."""
    opened, model = session.opened, session.model
    assert opened.samples is not None
    statistic = opened.solver.statistic
    facts = {
        "samples": opened.samples.fingerprint,
        "calibrate_on": opened.recipe.calibration.calibrate_on,
        "batches": [tuple(batch.shape) for batch in opened.task.batches(opened.samples.tokens)],
        "statistic": None if statistic is None else statistic.__name__,
        "groups": [[[matrix.name for matrix in group] for group in groups] for groups in model.structure.groups],
        "outside": [matrix.name for matrix in model.chosen.outside],
    }
    return json.dumps(_computed(session) | facts, sort_keys=True, default=str)


def _computed(session: Session) -> dict[str, Any]:
    """The weights, and how they are computed with."""
    loaded, recipe = session.opened.loaded, session.opened.recipe
    return {
        "model": recipe.model.name,
        "weights": loaded.fingerprint(session.model.blocks),
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.device),
        "streamed": streams(recipe),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
