"""Execute a sweep: check it, estimate its runs, run the unfinished ones, and collect all results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from coprune.base.errors import BadInput, CopruneError
from coprune.base.files import write_text
from coprune.base.pool import Cause, Outcome, Workers, run_all, workers_at
from coprune.base.progress import Reporter
from coprune.base.words import Setting, duration
from coprune.report.links import SWEEP_FILE
from coprune.report.run_folder import REPORT_FILE
from coprune.run.reuse import KeptEstimate, estimate_key, kept_estimate
from coprune.stages.checks import prepare_solver
from coprune.store.claim import Claim, Taken
from coprune.store.store import Store
from coprune.sweeps.execution_settings import ExecutionSettings
from coprune.sweeps.expand import Run, expand
from coprune.sweeps.file import SHARED_FOLDER, Sweep
from coprune.sweeps.finished import Ledger, finished_reports
from coprune.sweeps.job import RunJob
from coprune.sweeps.results import collect
from coprune.sweeps.sweep_result import SweepResult


def run_sweep(sweep: Sweep, how: ExecutionSettings, quiet: bool = False) -> SweepResult:
    """Execute the unfinished runs of a sweep and write its tables.

    Raises BadInput before anything starts if a run is invalid, another process is running the sweep, or its folder holds
    something else.
    """
    runs = check_sweep(sweep)
    outcome = SweepResult(sweep, runs, finished_reports(runs), ledger=Ledger.read(sweep.folder))
    waiting = [run for run in runs if run.name not in outcome.reports]
    with _alone(sweep.folder):
        write_text(sweep.folder / SWEEP_FILE, sweep.to_yaml())
        try:
            if waiting:
                _do(sweep, waiting, how, outcome, quiet)
        finally:
            outcome.reports = finished_reports(runs)
            collect(sweep, runs, outcome.reports, outcome.failures, outcome.ledger)
    return outcome


def check_sweep(sweep: Sweep) -> list[Run]:
    """List the runs of a sweep. Raises BadInput if one is invalid or the folder holds a single run."""
    if (sweep.folder / REPORT_FILE).exists():
        raise BadInput(
            f"{sweep.folder} holds a single run",
            field="save",
            value=sweep.folder,
            fix=("name another folder with ", Setting("save")),
        )
    runs, checked = expand(sweep), set[Path]()
    for run in runs:
        try:
            prepare_solver(run.recipe)
            for step in run.steps:
                if step.folder not in checked:  # runs share their equal beginnings
                    step.check()
                    checked.add(step.folder)
        except CopruneError as error:
            raise error.within(f"the run {run.name}") from None
    return runs


def _do(sweep: Sweep, waiting: list[Run], how: ExecutionSettings, outcome: SweepResult, quiet: bool) -> None:
    """Estimate and execute the unfinished runs."""
    started, reporter, ledger = time.perf_counter(), Reporter(quiet), outcome.ledger
    ledger.wall.append(0.0)
    workers = workers_at(how.ray, sweep.folder / SHARED_FOLDER / "workers.log")
    plan = Plan(sweep, how, workers, waiting)

    def note_time() -> None:
        ledger.wall[-1] = time.perf_counter() - started
        ledger.write(sweep.folder)

    def fail(run: str, why: Outcome) -> None:
        outcome.failures[run] = why.text
        reporter.say(f"failed   {run}  {why.last_line}")

    try:
        if kinds := plan.to_estimate():
            with reporter.bar(f"Estimating {len(kinds)} kinds of runs", len(kinds)) as advance:
                for _, ended in run_all(kinds, workers, how.retries):
                    advance(not ended.again)
        jobs, done = plan.to_run(), len(outcome.reports)
        for run, why in plan.too_large.items():
            fail(run, why)
        with reporter.bar("Runs", len(jobs)) as advance:
            for job, ended in run_all(jobs, workers, how.retries):
                advance(not ended.again)
                if ended.again:
                    reporter.say(f"again    {job.name}  {ended.last_line}")
                elif ended.cause is not None:
                    fail(job.name, ended)
                else:
                    done += 1
                    ledger.saved[job.name], ledger.runs[job.name] = ended.value, ended.seconds
                    reporter.say(f"done     {job.name}  {duration(ended.seconds)}  ({done} of {len(outcome.runs)})")
                    note_time()
    finally:
        workers.stop()
        note_time()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the sweep's folder. Raises BadInput if another process holds the lock."""
    try:
        claim = Claim(folder / SHARED_FOLDER / "sweep.lock")
    except Taken:
        raise BadInput(f"another process is running the sweep in {folder}", fix="wait until it ends") from None
    try:
        yield
    finally:
        claim.close()


@dataclass
class Plan:
    """The jobs of the unfinished runs. too_large: runs that need more memory than any machine has."""

    sweep: Sweep
    how: ExecutionSettings
    workers: Workers
    waiting: Sequence[Run]
    too_large: dict[str, Outcome] = field(default_factory=dict)

    def to_estimate(self) -> list[RunJob]:
        """Return one job per kind of run without an estimate; none if runs execute one at a time."""
        if self._most() == 1:
            return []
        unknown = [run for run in self.waiting if run.recipe.model.check_memory and self._kept(run) is None]
        kinds = {estimate_key(run.recipe): run for run in reversed(unknown)}
        cores = self.workers.capacity.cores_each
        return [
            RunJob(run, "estimate", self.sweep.folder, cores, self._needs_gpu(run)) for run in reversed(kinds.values())
        ]

    def to_run(self) -> list[RunJob]:
        """Return the jobs of the runs that fit, with their number of threads, and set how many run in parallel."""
        fitting, memory = [], list[int]()
        for run in self.waiting:
            kept = self._kept(run)
            if (why := self._too_large(run, kept)) is not None:
                self.too_large[run.name] = Outcome(cause=Cause.REFUSED, reason=why)
                continue
            fitting.append((run, self._memory(run, kept)))
            memory.append(fitting[-1][1] or 0)
        capacity = self.workers.capacity
        slots = min(self._most(), _how_many_fit(memory, capacity.memory))
        if any(self._needs_gpu(run) for run, _ in fitting):
            slots = min(slots, capacity.gpus)
        self.workers.at_once = max(1, slots)
        threads = self.how.threads or max(1, min(capacity.cores_each, capacity.cores // max(1, slots)))
        return [RunJob(run, "run", self.sweep.folder, threads, self._needs_gpu(run), size) for run, size in fitting]

    def _most(self) -> int:
        return min(self.how.workers or self.workers.capacity.cores, len(self.waiting))

    def _kept(self, run: Run) -> KeptEstimate | None:
        return kept_estimate(run.recipe, Store(self.sweep.folder / SHARED_FOLDER))

    def _needs_gpu(self, run: Run) -> bool:
        return self.workers.capacity.gpus > 0 and run.recipe.model.device in ("auto", "cuda")

    def _memory(self, run: Run, kept: KeptEstimate | None) -> int | None:
        """Return the bytes to reserve; None if unknown, so that the run executes alone."""
        if not run.recipe.model.check_memory:
            return 0
        if kept is None:
            return None
        needed, there = kept.estimate.peak_bytes if kept.estimate else 0, self.workers.capacity.memory_each
        # An estimate slightly above the available memory may be too high, so the run gets a whole machine.
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
    """Return how many of the smallest sizes fit together."""
    if memory is None:
        return len(sizes)
    total, count = 0, 0
    for size in sorted(sizes):
        total += size
        if total > memory:
            break
        count += 1
    return max(1, count)
