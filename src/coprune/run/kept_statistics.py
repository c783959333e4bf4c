"""Statistics of the dense model that runs have in common, kept in the store's folder, a file for each block."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from coprune.base.errors import BadInput, CopruneError
from coprune.base.files import write_durably
from coprune.model.checkpoint.shards import TensorEntry, read_entries, read_header_bytes, read_tensor
from coprune.model.walk.block_events import OUTSIDE, Known, MatricesReady, Past
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import Statistic
from coprune.model.walk.walk import Walk
from coprune.run.context import Run
from coprune.run.dense_figures import computed
from coprune.store.store import Key, key_of

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


def kept_statistics(run: Run, finished: Mapping[str, object], record: Callable[[], Recording | None]) -> Known:
    """Return what is known of the blocks' inputs before the run's own walk; in `dense` propagation of all blocks or none.

    Args:
        run: whose statistics are looked up, and kept for others.
        finished: blocks that an earlier run finished, of which nothing is known.
        record: records the calibration batches.
    """
    reuse, folder = run.reuse, run.reuse.store.folder
    places = shared_places(run, finished) if reuse.among_others and folder is not None else []
    if folder is None or not places:
        return {}
    key = statistics_key(run)
    statistics = StatisticsFiles(run, folder, key, places)
    with reuse.store.claim(key):
        present = found = statistics.find()
        if len(found) < len(places):
            statistics.gather(present, record)
            found = statistics.find()
    if len(found) < len(places):
        return {}
    reuse.saved.statistics += sum(kept.seconds for kept in present.values())
    return {place: partial(kept.read, run.loaded.device) for place, kept in found.items()}


def statistics_key(run: Run) -> Key:
    """Return the key of the dense model's statistics: its weights, the samples, and which matrices share which statistic."""
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
    return key_of("statistics", 3, **computed(run), **facts)


class StatisticsFiles:
    """The statistics that a run has in common with others.

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
