"""How many runs of a sweep go at once, and what each of them gets, by their estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from coprune.base.errors import BadInput
from coprune.run.sweep.events import Cause, NotDone
from coprune.run.sweep.expand import Run
from coprune.run.sweep.file import Sweep
from coprune.run.sweep.keys import estimate_key
from coprune.run.sweep.sharing import KeptEstimate, kept_estimate
from coprune.run.sweep.work import Job
from coprune.run.sweep.workers import Workers


@dataclass(frozen=True)
class Execution:
    """Where a sweep is done, and how hard it tries.

    ray: None for local processes, an address or `local` for a cluster; workers: runs at a time at most; threads: cores
    of a run; retries: of a run that was lost with its worker or met an unforeseen error.
    """

    ray: str | None = None
    workers: int | None = None
    threads: int | None = None
    retries: int = 2


@dataclass
class Plan:
    """The jobs of the runs that are not done yet. too_large: runs that no machine has the memory for."""

    sweep: Sweep
    how: Execution
    workers: Workers
    waiting: Sequence[Run]
    too_large: list[NotDone] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """By run, what it should take, as far as known."""

    def to_estimate(self) -> list[Job]:
        """One job for all runs that take about the same, as far as nothing is known of them; none if they go singly."""
        if self._most() == 1:
            return []
        unknown = [run for run in self.waiting if run.recipe.model.check_memory and self._kept(run) is None]
        kinds = {estimate_key(run.recipe): run for run in reversed(unknown)}
        cores = self.workers.capacity.cores_each
        return [
            Job(run, "estimate", self.sweep.folder, cores, self._needs_gpu(run)) for run in reversed(kinds.values())
        ]

    def to_run(self) -> list[Job]:
        """The jobs of the runs that fit, with their shares of the cores; sets how many go at once."""
        fitting, memory = [], list[int]()
        for run in self.waiting:
            kept = self._kept(run)
            if kept is not None and kept.estimate is not None:
                self.seconds[run.name] = kept.estimate.seconds
            if (why := self._too_large(run, kept)) is not None:
                self.too_large.append(NotDone(run.name, Cause.REFUSED, why))
                continue
            fitting.append((run, self._memory(run, kept)))
            memory.append(fitting[-1][1] or 0)
        capacity = self.workers.capacity
        slots = min(self._most(), _how_many_fit(memory, capacity.memory))
        if any(self._needs_gpu(run) for run, _ in fitting):
            slots = min(slots, capacity.gpus)
        self.workers.at_once = max(1, slots)
        threads = self.how.threads or max(1, min(capacity.cores_each, capacity.cores // max(1, slots)))
        return [Job(run, "run", self.sweep.folder, threads, self._needs_gpu(run), size) for run, size in fitting]

    def _most(self) -> int:
        return min(self.how.workers or self.workers.capacity.cores, len(self.waiting))

    def _kept(self, run: Run) -> KeptEstimate | None:
        return kept_estimate(run.recipe, self.sweep.folder)

    def _needs_gpu(self, run: Run) -> bool:
        return self.workers.capacity.gpus > 0 and run.recipe.model.device in ("auto", "cuda")

    def _memory(self, run: Run, kept: KeptEstimate | None) -> int | None:
        """Bytes to reserve; None where nothing is known, for which a run goes alone."""
        if not run.recipe.model.check_memory:
            return 0
        if kept is None:
            return None
        needed, there = kept.estimate.peak_bytes if kept.estimate else 0, self.workers.capacity.memory_each
        # An estimate that is a little above what there is may be wrong; the run gets a machine for itself.
        return needed if there is None else min(needed, there)

    def _too_large(self, run: Run, kept: KeptEstimate | None) -> str | None:
        if not run.recipe.model.check_memory or kept is None or kept.estimate is None:
            return None
        here = replace(kept.estimate, available_bytes=self.workers.capacity.memory_each, resident_bytes=0)
        try:
            here.require()
        except BadInput as error:
            return str(error)
        return None


def _how_many_fit(sizes: Sequence[int], memory: int | None) -> int:
    """How many of the smallest fit together."""
    if memory is None:
        return len(sizes)
    total, count = 0, 0
    for size in sorted(sizes):
        total += size
        if total > memory:
            break
        count += 1
    return max(1, count)
