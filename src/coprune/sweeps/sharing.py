"""Results that the runs of a sweep share: only those that are equal to the last bit.

The dense model's figures, its blocks' statistics and the estimates lie in the sweep's folder, for all processes and
machines; token ids are kept by each process. Nothing that depends on how a model is pruned is shared.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from coprune.data import EvaluationText
from coprune.evaluation.answers.answer_records import Answers
from coprune.evaluation.answers.questions import plan_of
from coprune.evaluation.measurement import Measured, Perplexity
from coprune.evaluation.result_cache import EvaluationCache
from coprune.evaluation.zero_shot import ZeroShot
from coprune.model.loaded_model import streams
from coprune.model.walk.block_events import Known
from coprune.model.walk.recording import Recording
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.report.schema import installed_versions
from coprune.run.context import Reuse, Run
from coprune.run.memory_bound import Estimate
from coprune.sweeps.statistics_store import StatisticsStore, shared_places

SHARED_FOLDER = ".shared"
Tokens = TypeVar("Tokens")
_TEXTS_KEPT = 16


class DenseFacts(BaseModel):
    """Measurements of a dense model, and their time."""

    model_config = ConfigDict(frozen=True)

    perplexity: dict[str, Perplexity]
    zero_shot: ZeroShot | None
    text: str | None
    answers: Answers | None = None
    seconds: float


class KeptEstimate(BaseModel):
    """An estimate, and how long it took to make."""

    model_config = ConfigDict(frozen=True)

    estimate: Estimate | None
    """None for models of images."""
    seconds: float


@dataclass
class Saved:
    """Seconds of work that one run saved by sharing."""

    dense: float = 0.0
    tokens: float = 0.0
    estimate: float = 0.0
    statistics: float = 0.0


class SweepReuse(Reuse):
    """Takes over what another run of the sweep left.

    recipe: of the run; folder: of the sweep; texts: what this process has tokenised, with the seconds that it took.
    """

    def __init__(self, recipe: Recipe, folder: Path, texts: dict[tuple[Hashable, ...], tuple[Any, float]]) -> None:
        self.saved = Saved()
        self._recipe = recipe
        self._folder = folder / SHARED_FOLDER
        self._texts = texts

    def tokens(self, key: tuple[Hashable, ...], read: Callable[[], Tokens]) -> Tokens:
        key = (self._recipe.model.name, *key)
        if key in self._texts:
            found, seconds = self._texts[key]
            self.saved.tokens += seconds
        else:
            started = time.perf_counter()
            found, seconds = read(), time.perf_counter() - started
            if len(self._texts) >= _TEXTS_KEPT:
                self._texts.pop(next(iter(self._texts)))
            self._texts[key] = found, seconds
        tokens: Tokens = found
        return tokens

    def estimate(self, estimate: Callable[[], Estimate | None]) -> Estimate | None:
        kept, anew = self._kept_estimate(estimate)
        if kept.estimate is None or anew:
            return kept.estimate
        self.saved.estimate += kept.seconds
        # The memory was checked before the run started.
        return replace(kept.estimate, available_bytes=None)

    def _kept_estimate(self, estimate: Callable[[], Estimate | None]) -> tuple[KeptEstimate, bool]:
        """Return the estimate for runs like this one, and whether it is new."""
        anew = False

        def estimate_now() -> KeptEstimate:
            nonlocal anew
            anew, started = True, time.perf_counter()
            return KeptEstimate(estimate=estimate(), seconds=time.perf_counter() - started)

        key = estimate_key(self._recipe)
        return EvaluationCache(self._folder).get(key, KeptEstimate, estimate_now), anew

    def dense(self, run: Run, measure: Callable[[], dict[str, Measured]]) -> dict[str, Measured]:
        extras = run.extras
        texts = [data for data in run.data.values() if isinstance(data, EvaluationText)]
        alone = run.processes.size == 1 and run.loaded.task != "embeddings"  # whose vectors are not kept
        if run.recipe.evaluate.tasks.log_samples is not None and run.recipe.evaluate.runs_tasks:
            return measure()  # whose items are logged beside the run's
        if not run.recipe.evaluate.dense or len(texts) < len(run.data) or not alone:
            return measure()
        anew: dict[str, Measured] | None = None

        def measure_now() -> DenseFacts:
            nonlocal anew
            started = time.perf_counter()
            anew = measure()
            perplexity = {name: one for name, one in anew.items() if isinstance(one, Perplexity)}
            zero_shot, text = extras.zero_shot.get("dense"), extras.texts.get("dense")
            seconds, answers = time.perf_counter() - started, extras.look.dense
            return DenseFacts(perplexity=perplexity, zero_shot=zero_shot, text=text, answers=answers, seconds=seconds)

        key = dense_key(run)
        facts = EvaluationCache(self._folder).get(key, DenseFacts, measure_now)
        if anew is not None:
            return anew
        self.saved.dense += facts.seconds
        if facts.zero_shot is not None:
            extras.zero_shot["dense"] = facts.zero_shot
        if facts.text is not None:
            extras.texts["dense"] = facts.text
        extras.look.dense = facts.answers
        return dict(facts.perplexity)

    def gathered(self, run: Run, finished: Mapping[str, object], record: Callable[[], Recording | None]) -> Known:
        places = shared_places(run, finished)
        if not places:
            return {}
        key = statistics_key(run)
        store = StatisticsStore(run, self._folder, key, places)
        with self._alone(key):
            present = found = store.find()
            if len(found) < len(places):
                store.gather(present, record)
                found = store.find()
        if len(found) < len(places):
            return {}
        self.saved.statistics += sum(kept.seconds for kept in present.values())
        return {place: partial(kept.read, run.loaded.device) for place, kept in found.items()}

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Hold a lock so that one process measures and the others wait for its result; a killed process releases it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.lock"):
            yield


def kept_estimate(recipe: Recipe, folder: Path) -> KeptEstimate | None:
    """Return a stored estimate for runs like this one, or None."""
    return EvaluationCache(folder / SHARED_FOLDER).find(estimate_key(recipe), KeptEstimate)


def estimate_key(recipe: Recipe) -> str:
    """Return the key of runs that take as much memory as this one."""
    return json.dumps(recipe.deciding(Decides.COST), sort_keys=True, default=str)


def dense_key(run: Run) -> str:
    """Return the key of a dense model's measurements: its weights, the tokens, and everything that affects rounding."""
    texts = {n: data.fingerprint for n, data in run.data.items() if isinstance(data, EvaluationText)}
    names = ["seqlen", "batch_size", "tasks", "eval_zero_shot", "num_fewshot", "include_path", "limit", "prompt"]
    names += ["apply_chat_template", "gen_kwargs"]
    names += ["generate", "generate_prompts", "generate_tokens", "generate_temperature", "generate_seed"]
    settings = {name: run.recipe.setting(name) for name in names}
    recipe = run.recipe
    plan = plan_of(recipe.evaluate.answers, recipe.output.model is not None)
    settings["answers"] = None if plan is None else plan.prompts.fingerprint
    return json.dumps(_computed(run) | settings | {"texts": texts}, sort_keys=True, default=str)


def statistics_key(run: Run) -> str:
    """Return the key of the dense model's statistics: `dense_key`, and which matrices share which statistic."""
    model = run.model
    assert run.samples is not None
    statistic = run.solver.statistic
    facts = {
        "samples": run.samples.fingerprint,
        "calibrate_on": run.recipe.calibrate.calibrate_on,
        "batches": [tuple(batch.shape) for batch in run.task.batches(run.samples.tokens)],
        "statistic": None if statistic is None else statistic.__name__,
        "groups": [[[matrix.name for matrix in group] for group in groups] for groups in model.structure.groups],
        "outside": [matrix.name for matrix in model.chosen.outside],
    }
    return json.dumps(_computed(run) | facts, sort_keys=True, default=str)


def _computed(run: Run) -> dict[str, Any]:
    """Return the weights and the settings of their computation."""
    loaded, recipe = run.loaded, run.recipe
    return {
        "model": recipe.model.name,
        "weights": loaded.fingerprint(run.model.blocks),
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.device),
        "streamed": streams(recipe),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
