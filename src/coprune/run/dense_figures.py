"""The dense model's figures, measured now or taken from the store.

Each text, the tasks and the continuation of the prompt have separate keys, so a new text repeats nothing else. Answers
to prompts are stored likewise, by `coprune.evaluation.answers`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from coprune.data.windows import EvaluationText
from coprune.evaluation.measurement import Measured, Perplexity
from coprune.evaluation.zero_shot import ZeroShot
from coprune.model.checkpoint.digest import model_digest
from coprune.model.checkpoint.locate import locate
from coprune.model.loaded_model import streams
from coprune.report.schema import installed_versions
from coprune.run.context import Run
from coprune.store.store import key_of

_TASK_SETTINGS = ("tasks", "eval_zero_shot", "num_fewshot", "limit", "apply_chat_template", "gen_kwargs")
"""Settings that decide what tasks measure, besides those that affect rounding."""
_BEYOND = ("log_samples", "include_path")
"""Settings whose results a record cannot hold: logged items, and task definitions in a folder."""

Kept = TypeVar("Kept", bound=BaseModel)


class Continued(BaseModel):
    """The likeliest continuation of a prompt."""

    model_config = ConfigDict(frozen=True)

    text: str


def dense_figures(run: Run, measure: Callable[[str], Measured]) -> dict[str, Measured]:
    """Return the dense model's figures by name of the data, and set the run's other measurements.

    Args:
        run: the run.
        measure: measures the dense model on the data of one name.
    """
    if not run.recipe.evaluate.dense:
        return {}
    dense = _Dense(run)
    figures = {name: dense.on_data(name, measure) for name in run.data}
    if run.first:
        run.extras.ask_dense(run.loaded, run.reporter)
        if run.extras.runs_tasks_of(run.loaded):
            run.extras.zero_shot["dense"] = dense.tasks()
        if run.extras.continues_prompt_of(run.loaded):
            run.extras.texts["dense"] = dense.continued().text
    return figures


class _Dense:
    """Measurements of a run's dense model, each taken from the store if present."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_data(self, name: str, measure: Callable[[str], Measured]) -> Measured:
        run, data, anew = self._run, self._run.data[name], list[Measured]()
        # Vectors of embeddings are not stored, and several processes measure together.
        if not isinstance(data, EvaluationText) or run.processes.size > 1 or run.loaded.task == "embeddings":
            return measure(name)

        def measure_now() -> Perplexity:
            anew.append(found := measure(name))
            assert isinstance(found, Perplexity)
            return found

        facts = {"text": data.fingerprint, "bytes": data.bytes, "seqlen": run.recipe.setting("seqlen")}
        found = self._kept("perplexity", Perplexity, measure_now, **facts).on(name, data.source, data.fingerprint)
        if not anew:
            run.reporter.say(f"{found.of_model('dense')} (measured before)")
        return found

    def tasks(self) -> ZeroShot:
        run, recipe = self._run, self._run.recipe
        measure = partial(run.extras.run_tasks, "dense", run.loaded, run.reporter)
        if run.given.loaded is not None or any(recipe.setting(name) for name in _BEYOND):
            return measure()
        settings = {name: run.recipe.setting(name) for name in _TASK_SETTINGS}
        return self._kept("tasks", ZeroShot, measure, files=self._files(), **settings)

    def continued(self) -> Continued:
        run = self._run

        def measure() -> Continued:
            return Continued(text=run.extras.continue_prompt(run.loaded))

        if run.given.loaded is not None:
            return measure()
        return self._kept("prompt", Continued, measure, files=self._files(), prompt=run.recipe.evaluate.prompt)

    def _files(self) -> str:
        """Return a digest of the model's files, which includes the tokenizer."""
        model = self._run.recipe.model
        return model_digest(locate(model.name, model.cache_dir).path)

    def _kept(self, what: str, kind: type[Kept], measure: Callable[[], Kept], **facts: Any) -> Kept:
        """Return a stored measurement, made now if missing. facts: what decides it besides the weights."""
        store = self._run.reuse.store
        if store.folder is None:
            return measure()
        key = key_of("dense", 4, what=what, **self._computed, **facts)
        record, spared = store.get_sparing(key, kind, measure)
        self._run.reuse.saved.dense += spared
        return record

    @cached_property
    def _computed(self) -> dict[str, Any]:
        return {"batch_size": self._run.recipe.setting("batch_size"), **computed(self._run)}


def computed(run: Run) -> dict[str, Any]:
    """Return what decides a run's dense results, for a key: the weights and how they are computed with."""
    loaded = run.loaded
    return {
        "weights": loaded.fingerprint(run.model.every_block),
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.device),
        "streamed": streams(run.recipe),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
