"""A whole sweep: check it, estimate its runs, do those that are not done, and collect what all of them found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from coprune.base.errors import BadInput, CopruneError
from coprune.base.files import write_text
from coprune.base.words import Setting
from coprune.report.folder import REPORT_FILE
from coprune.report.links import SWEEP_FILE
from coprune.run.checks import prepare_solver
from coprune.run.sweep.board import Board
from coprune.run.sweep.conduct import conduct
from coprune.run.sweep.events import Done, JobEvent, NotDone
from coprune.run.sweep.expand import Run, expand
from coprune.run.sweep.file import Sweep
from coprune.run.sweep.finished import finished_reports
from coprune.run.sweep.ledger import Ledger
from coprune.run.sweep.on_ray import RayWorkers
from coprune.run.sweep.plan import Execution, Plan
from coprune.run.sweep.pool import LocalWorkers
from coprune.run.sweep.result import SweepResult
from coprune.run.sweep.results import collect
from coprune.run.sweep.sharing import SHARED_FOLDER
from coprune.run.sweep.workers import Workers


def run_sweep(sweep: Sweep, how: Execution, quiet: bool = False) -> SweepResult:
    """Do the runs of a sweep that are not done yet and write its tables.

    Raises BadInput before anything is done if one of its runs cannot be as asked, another process is at the sweep, or
    its folder belongs to something else.
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
    """List the runs of a sweep. Raises BadInput for one that cannot be, or a folder that is no sweep's."""
    if (sweep.folder / REPORT_FILE).exists():
        raise BadInput(
            f"{sweep.folder} holds a single run",
            field="save",
            value=sweep.folder,
            fix=("name another folder with ", Setting("save")),
        )
    runs = expand(sweep)
    for run in runs:
        try:
            prepare_solver(run.recipe)
        except CopruneError as error:
            raise error.within(f"the run {run.name}") from None
    return runs


def _do(sweep: Sweep, waiting: list[Run], how: Execution, outcome: SweepResult, quiet: bool) -> None:
    """Do the runs that are not done yet."""
    started = time.perf_counter()
    outcome.ledger.wall.append(0.0)
    workers: Workers = (
        LocalWorkers(sweep.folder / SHARED_FOLDER / "workers.log") if how.ray is None else RayWorkers(how.ray)
    )
    plan = Plan(sweep, how, workers, waiting)
    board = Board([run.name for run in waiting], len(outcome.runs) - len(waiting), quiet)

    def note_time() -> None:
        outcome.ledger.wall[-1] = time.perf_counter() - started
        outcome.ledger.write(sweep.folder)

    def listen(event: JobEvent, again: bool) -> None:
        board.note(event, again)
        if isinstance(event, Done):
            outcome.ledger.saved[event.run] = dict(event.saved)
            outcome.ledger.runs[event.run] = board.states[event.run].seconds or 0.0
            note_time()
        elif isinstance(event, NotDone) and not again:
            outcome.failures[event.run] = event.text

    try:
        with board.shown():
            kinds = plan.to_estimate()
            if kinds:
                board.say(f"Estimating {len(kinds)} kinds of runs")
            conduct(kinds, workers, how.retries, board.estimating)
            jobs = plan.to_run()
            board.expect(plan.seconds, workers.at_once)
            for event in plan.too_large:
                listen(event, False)
            conduct(jobs, workers, how.retries, listen)
    finally:
        workers.stop()
        note_time()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of the folder. Raises BadInput if one is at it."""
    shared = folder / SHARED_FOLDER
    shared.mkdir(parents=True, exist_ok=True)
    lock = FileLock(shared / "sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(
            f"another process is doing the sweep in {folder} at this moment", fix="wait for its end"
        ) from None
    try:
        yield
    finally:
        lock.release()
