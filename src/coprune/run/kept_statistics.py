"""Statistics of the dense model that several runs share, stored as one file per block."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from coprune.base.errors import CopruneError
from coprune.base.files import digest_of_files, write_durably
from coprune.model.checkpoint.shards import read_entries, read_tensor
from coprune.model.walk.block_events import OUTSIDE, Known, MatricesReady, Past
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.model.walk.recording import Dense, Recording
from coprune.model.walk.statistics import Statistic
from coprune.model.walk.walk import Walk
from coprune.run.context import Run
from coprune.run.dense_figures import computed
from coprune.store.notes import Note
from coprune.store.store import Key, key_of

SPARE = 2
"""Factor of free disk space below which nothing is stored."""


def shared_places(run: Run, finished: Mapping[str, object]) -> list[str]:
    """Return the places whose statistics come from the dense model: names of blocks, or OUTSIDE.

    finished: blocks finished by an earlier run, which need none.
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
    """Return the statistics known before the run's own walk; in `dense` propagation those of all blocks or none.

    Args:
        run: whose statistics are looked up and stored.
        finished: blocks finished by an earlier run, for which none are returned.
        record: records the calibration batches.
    """
    reuse, folder = run.reuse, run.reuse.store.folder
    places = shared_places(run, finished) if reuse.among_others and folder is not None else []
    if folder is None or not places:
        return {}
    statistics = KeptStatistics(run, folder, places)
    with reuse.store.claim(statistics.key()):
        present = found = statistics.find()
        if len(found) < len(places):
            statistics.gather(present, record)
            found = statistics.find()
    if len(found) < len(places):
        return {}
    reuse.saved.statistics += sum(note.seconds for note in present.values())
    return {place: partial(statistics.read, place, note.record.groups) for place, note in found.items()}


class Kept(BaseModel):
    """Record of a place's statistics, whose tensors are in a file."""

    digest: str
    """Digest of the file."""
    groups: dict[str, dict[str, int]]
    """Width and counts of each group, by the name of its first matrix."""


class KeptStatistics:
    """The statistics that a run shares with others, one stored result per place.

    folder: of the store; places: those that the run needs.
    """

    def __init__(self, run: Run, folder: Path, places: Sequence[str]) -> None:
        self._run, self._folder, self._places = run, folder, places
        statistic, samples = run.solver.statistic, run.samples
        assert samples is not None
        # The key holds the dense weights, the samples, and the matrices that share each statistic.
        self._facts = computed(run) | {
            "samples": samples.fingerprint,
            "calibrate_on": run.recipe.calibrate.calibrate_on,
            "batches": [tuple(batch.shape) for batch in run.task.inputs.batches(samples.tokens)],
            "statistic": None if statistic is None else statistic.__name__,
            "groups": [
                [[matrix.name for matrix in group] for group in groups] for groups in run.model.structure.groups
            ],
            "outside": [matrix.name for matrix in run.model.chosen.outside],
        }

    def key(self, place: str | None = None) -> Key:
        """Return the key of a place's statistics, or of all of them."""
        return key_of("statistics", 4, place=place, **self._facts)

    def find(self) -> dict[str, Note[Kept]]:
        """Return the stored statistics by place; each file is checked against its digest once."""
        found = {place: self._run.reuse.store.find(self.key(place), Kept) for place in self._places}
        return {place: note for place, note in found.items() if note is not None and self._is_whole(place, note.record)}

    def _is_whole(self, place: str, kept: Kept) -> bool:
        with suppress(OSError):
            return digest_of_files([self._file(place)]) == kept.digest
        return False

    def gather(self, present: Container[str], record: Callable[[], Recording | None]) -> None:
        """Compute the missing statistics of the dense model and store them if the disk has room.

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
            # A full disk is left to others; any other error will recur in the run.
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
                self._keep(event.block.name, gathered, time.perf_counter() - started)
                gathered, started = {}, time.perf_counter()
            if outside:
                self._keep(OUTSIDE, gathered, time.perf_counter() - started)

    def _file(self, place: str) -> Path:
        return self._folder / f"{self.key(place)}.safetensors"

    def _keep(self, place: str, gathered: Mapping[str, Inputs], seconds: float) -> None:
        """Store a place's statistics, whole or not at all. Raises CopruneError if the disk is full.

        gathered: by the name of each group's first matrix; seconds: that it took.
        """
        tensors: dict[str, Tensor] = {}
        groups: dict[str, dict[str, int]] = {}
        for name, inputs in gathered.items():
            statistic, sample = inputs.statistic, inputs.sample
            sums = {} if statistic is None else statistic.sums
            rows = sample.inputs if _needs_rows(statistic) else sample.inputs[:0]
            tensors |= {
                f"{name} {part}": tensor.cpu().contiguous() for part, tensor in {**sums, "sample": rows}.items()
            }
            groups[name] = {"width": sample.width, "seen": sample.count}
            groups[name]["tokens"] = 0 if statistic is None else statistic.count
        write_durably(file := self._file(place), lambda temporary: save_file(tensors, temporary))
        self._run.reuse.store.complete(self.key(place), Kept(digest=digest_of_files([file]), groups=groups), seconds)

    def read(self, place: str, groups: Mapping[str, dict[str, int]]) -> dict[str, Inputs]:
        """Read the inputs of each group of a place, by the name of its first matrix."""
        entries, device = read_entries(self._file(place)), self._run.loaded.device

        def read(name: str, width: int, seen: int, tokens: int) -> Inputs:
            def tensor(part: str) -> Tensor:
                return read_tensor(entries[f"{name} {part}"]).to(device)

            kind = self._run.solver.statistic
            statistic = None if kind is None else kind(width, device)
            if statistic is not None:
                statistic.restore({part: tensor(part) for part in statistic.sums}, tokens)
            sample = InputSample(width, 0, device)
            sample.restore(tensor("sample"), seen)
            return Inputs(statistic, sample)

        return {name: read(name, **counts) for name, counts in groups.items()}

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


def _needs_rows(statistic: Statistic | type[Statistic] | None) -> bool:
    """Return whether layer errors need sampled inputs; some statistics suffice without."""
    return statistic is None or not statistic.computes_errors
