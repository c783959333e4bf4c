"""Results that the runs of a sweep share: only those that are equal to the last bit.

The dense model's figures, its blocks' statistics and the estimates lie in the sweep's folder, for all processes and
machines; token ids are kept by each process. Nothing that depends on how a model is pruned is shared.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from coprune.base.errors import BadInput, CopruneError
from coprune.base.files import write_durably
from coprune.data import EvaluationText
from coprune.evaluation.answers.answer_records import Answers
from coprune.evaluation.answers.questions import plan_of
from coprune.evaluation.measurement import Measured, Perplexity
from coprune.evaluation.zero_shot import ZeroShot
from coprune.model.checkpoint.shards import TensorEntry, read_entries, read_header_bytes, read_tensor
from coprune.model.loaded_model import streams
from coprune.model.walk.block_events import OUTSIDE, Known, MatricesReady, Past
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import Statistic
from coprune.model.walk.walk import Walk
from coprune.recipe.parts import Decides
from coprune.recipe.recipe import Recipe
from coprune.report.schema import installed_versions
from coprune.run.context import Reuse, Run
from coprune.run.memory_estimate import Estimate
from coprune.store.store import Key, Store, key_of

SHARED_FOLDER = ".shared"
Tokens = TypeVar("Tokens")
_TEXTS_KEPT = 16


class DenseFacts(BaseModel):
    """Measurements of a dense model."""

    model_config = ConfigDict(frozen=True)

    perplexity: dict[str, Perplexity]
    zero_shot: ZeroShot | None
    text: str | None
    answers: Answers | None = None


class KeptEstimate(BaseModel):
    """An estimate of memory."""

    model_config = ConfigDict(frozen=True)

    estimate: Estimate | None
    """None for models of images."""


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
        self._store = Store(self._folder)
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
        key = estimate_key(self._recipe)
        if (kept := self._store.find(key, KeptEstimate)) is None:
            return self._store.get(key, KeptEstimate, lambda: KeptEstimate(estimate=estimate())).estimate
        self.saved.estimate += kept.seconds
        # The memory was checked before the run started.
        found = kept.record.estimate
        return None if found is None else replace(found, available_bytes=None)

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
            anew = measure()
            perplexity = {name: one for name, one in anew.items() if isinstance(one, Perplexity)}
            zero_shot, text = extras.zero_shot.get("dense"), extras.texts.get("dense")
            return DenseFacts(perplexity=perplexity, zero_shot=zero_shot, text=text, answers=extras.look.dense)

        key = dense_key(run)
        facts = self._store.get(key, DenseFacts, measure_now)
        if anew is not None:
            return anew
        kept = self._store.find(key, DenseFacts)
        self.saved.dense += 0.0 if kept is None else kept.seconds
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
        with self._store.claim(key):
            present = found = store.find()
            if len(found) < len(places):
                store.gather(present, record)
                found = store.find()
        if len(found) < len(places):
            return {}
        self.saved.statistics += sum(kept.seconds for kept in present.values())
        return {place: partial(kept.read, run.loaded.device) for place, kept in found.items()}


def kept_estimate(recipe: Recipe, folder: Path) -> KeptEstimate | None:
    """Return a stored estimate for runs like this one, or None."""
    found = Store(folder / SHARED_FOLDER).find(estimate_key(recipe), KeptEstimate)
    return None if found is None else found.record


def estimate_key(recipe: Recipe) -> Key:
    """Return the key of runs that take as much memory as this one."""
    return key_of("estimate", 3, **recipe.deciding(Decides.COST))


def dense_key(run: Run) -> Key:
    """Return the key of a dense model's measurements: its weights, the tokens, and everything that affects rounding."""
    texts = {n: data.fingerprint for n, data in run.data.items() if isinstance(data, EvaluationText)}
    names = ["seqlen", "batch_size", "tasks", "eval_zero_shot", "num_fewshot", "include_path", "limit", "prompt"]
    names += ["apply_chat_template", "gen_kwargs"]
    names += ["generate", "generate_prompts", "generate_tokens", "generate_temperature"]
    settings = {name: run.recipe.setting(name) for name in names}
    recipe = run.recipe
    plan = plan_of(recipe.evaluate.answers, recipe.output.model is not None)
    settings["answers"] = None if plan is None else plan.prompts.fingerprint
    return key_of("dense", 3, texts=texts, **_computed(run), **settings)


def statistics_key(run: Run) -> Key:
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
    return key_of("statistics", 3, **_computed(run), **facts)


def _computed(run: Run) -> dict[str, Any]:
    """Return the weights and the settings of their computation."""
    loaded, recipe = run.loaded, run.recipe
    return {
        "weights": loaded.fingerprint(run.model.every_block),
        "dtype": str(loaded.model.dtype),
        "device": str(loaded.device),
        "streamed": streams(recipe),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }


SPARE = 2
"""Factor of free disk space below which nothing is stored."""
Kind = type[Statistic] | None


def shared_places(run: Run, finished: Mapping[str, object]) -> list[str]:
    """Return the places whose statistics are those of the dense model: names of blocks, or OUTSIDE.

    finished: blocks that an earlier run finished, which need no statistics.
    """
    model = run.model
    recipe, alone = run.recipe, run.processes.size == 1
    # Permuted or rotated weights differ in every run.
    if not alone or run.samples is None or recipe.prune.reshapes:
        return []
    names = model.names
    if recipe.calibrate.propagation == "dense":
        places = [*names, OUTSIDE] if model.chosen.outside else names
    else:
        # In `sequential` propagation it would be one group, before anything in the first block is pruned.
        places = names[:1] if recipe.calibrate.propagation == "block" else []
    return [name for name in places if name not in finished]


class StatisticsStore:
    """The statistics that a run's run has in common with others.

    folder: where they lie; key: names them; places: which of them the run needs.
    """

    def __init__(self, run: Run, folder: Path, key: Key, places: Sequence[str]) -> None:
        self._run = run
        self._folder = folder
        self._key = key
        self._places = places

    def find(self) -> dict[str, Kept]:
        """Return the complete stored statistics, by place."""
        found = {place: Kept.find(self._file(place), self._run.solver.statistic) for place in self._places}
        return {place: kept for place, kept in found.items() if kept is not None}

    def gather(self, present: Container[str], record: Callable[[], Recording | None]) -> None:
        """Compute missing statistics of the dense model and store them, if the disk has room.

        present: places already stored; record: records the calibration batches. Raises NumericalError.
        """
        missing = [place for place in self._places if place not in present]
        if shutil.disk_usage(self._folder).free < SPARE * sum(map(self._bytes, missing)):
            return
        try:
            self._look(missing, record)
        except (CopruneError, OSError) as error:
            if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError | SafetensorError):
                raise
            # If the disk is full, leave it to others; any other error will recur in the run.
            for place in missing:
                self._file(place).unlink(missing_ok=True)

    def _look(self, missing: Sequence[str], record: Callable[[], Recording | None]) -> None:
        run, model, started = self._run, self._run.model, time.perf_counter()
        outside = OUTSIDE in missing
        last = max(i for i, name in enumerate(model.names) if outside or name in missing)
        model = model.first_blocks(last + 1, outside)
        with run.reporter.bar("Gathering statistics of the dense model", len(model.blocks)) as advance:
            past = Past(finished=set(model.names) - set(missing))
            walk = Walk(model, record(), run.solver.statistic, Dense(), past, advance=advance)
            gathered: dict[str, Inputs] = {}
            for event in walk:
                if isinstance(event, MatricesReady):
                    assert event.inputs is not None
                    gathered[event.matrices[0].name] = event.inputs
                    continue
                write_kept(self._file(event.block.name), gathered, time.perf_counter() - started)
                gathered, started = {}, time.perf_counter()
            if outside:
                write_kept(self._file(OUTSIDE), gathered, time.perf_counter() - started)

    def _file(self, place: str) -> Path:
        name = hashlib.sha256(f"{place}\n{self._key}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors"

    def _bytes(self, place: str) -> int:
        """Return an upper bound of the size of a place's file."""
        model = self._run.model
        groups = {block.name: model.structure.groups[block.index] for block in model.blocks}
        groups[OUTSIDE] = [[matrix] for matrix in model.chosen.outside]
        statistic, total = self._run.solver.statistic, 0
        for group in groups[place]:
            width = group[0].shape[1]
            sums = {} if statistic is None else statistic.shapes(width)
            rows = InputSample.tokens if _needs_rows(statistic) else 0
            total += 4 * (sum(math.prod(shape) for shape in sums.values()) + rows * width)
        return total


@dataclass(frozen=True)
class Kept:
    """A place's statistics, in a complete file."""

    statistic: Kind
    facts: dict[str, Any]
    """Width and counts by group, and the time to gather them all."""
    entries: dict[str, TensorEntry]

    @classmethod
    def find(cls, path: Path, statistic: Kind) -> Kept | None:
        """Read a file once to see whether it is as it was written; None if not, or if there is none."""
        try:
            header = json.loads(read_header_bytes(path))["__metadata__"]
            entries = read_entries(path)
            tensors = ((name, read_tensor(entry)) for name, entry in sorted(entries.items()))
            whole = header["digest"] == _digest(tensors, header["facts"])
            return cls(statistic, json.loads(header["facts"]), entries) if whole else None
        except (BadInput, OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def seconds(self) -> float:
        """Seconds of gathering."""
        return float(self.facts["seconds"])

    def read(self, device: torch.device) -> dict[str, Inputs]:
        """Read the inputs of every group, by the name of its first matrix."""
        return {name: self._read(name, counts, device) for name, counts in self.facts["groups"].items()}

    def _read(self, name: str, counts: dict[str, int], device: torch.device) -> Inputs:
        def tensor(part: str) -> Tensor:
            return read_tensor(self.entries[f"{name} {part}"]).to(device)

        width = counts["width"]
        statistic = None if self.statistic is None else self.statistic(width, device)
        if statistic is not None:
            statistic.restore({part: tensor(part) for part in statistic.sums}, counts["tokens"])
        sample = InputSample(width, 0, device)
        sample.restore(tensor("sample"), counts["seen"])
        return Inputs(statistic, sample)


def write_kept(path: Path, gathered: Mapping[str, Inputs], seconds: float) -> None:
    """Write what was gathered of one place, whole or not at all.

    gathered: by the name of each group's first matrix; seconds: that it took. Raises CopruneError if the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, int]] = {}
    for name, inputs in gathered.items():
        statistic, sample = inputs.statistic, inputs.sample
        sums = {} if statistic is None else statistic.sums
        rows = sample.inputs if _needs_rows(statistic) else sample.inputs[:0]
        tensors |= {f"{name} {part}": tensor.cpu().contiguous() for part, tensor in {**sums, "sample": rows}.items()}
        groups[name] = {"width": sample.width, "seen": sample.count}
        groups[name]["tokens"] = 0 if statistic is None else statistic.count
    facts = json.dumps({"groups": groups, "seconds": seconds})
    metadata = {"facts": facts, "digest": _digest(sorted(tensors.items()), facts)}
    write_durably(path, lambda temporary: save_file(tensors, temporary, metadata))


def _needs_rows(statistic: Statistic | Kind) -> bool:
    """Return whether layer errors need sampled inputs; some statistics give them without."""
    return statistic is None or not statistic.tells_errors


def _digest(tensors: Iterable[tuple[str, Tensor]], facts: str) -> str:
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
