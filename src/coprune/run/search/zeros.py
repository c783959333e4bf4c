"""A search for which sparsity every matrix gets, of a few levels at which all were pruned before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml
from torch import Tensor

from coprune.base.files import write_text
from coprune.base.shown import per_cent
from coprune.model.walk.recording import Recording
from coprune.pruning.allocation.base import Unit, targets_by_matrix, units_of
from coprune.pruning.allocation.plan import plan_targets
from coprune.pruning.allocation.search import (
    ALLOCATION_FILE,
    LevelSearch,
    as_levels,
    exchanges_of,
    level_of,
    targets_of,
)
from coprune.pruning.evolution import Steps
from coprune.recipe.pattern import Target
from coprune.run.search.candidates import Candidates
from coprune.run.search.finds import Finds
from coprune.run.search.prepared import Prepared
from coprune.run.search.tries import STARTS, say_best, search_steps
from coprune.run.session import Session

LEVELS_FOLDER = "levels"
"""The matrices at every level, in the run's folder while the search goes on."""


def search_targets(session: Session, asked: LevelSearch, record: Callable[[int], Recording]) -> dict[str, Target]:
    """Search for every matrix's target; all together have the sparsity of the overall one.

    Args:
        session: of the run, whose model is dense, and so in the end.
        asked: how long, and among which levels.
        record: records the first calibration batches anew, those that hold so many tokens.

    Returns:
        Targets by the name of the matrix.
    """
    opened, model = session.opened, session.model
    units, grid, finds = units_of(model.chosen, model.names), asked.targets(opened.target), Finds.of(session)
    folder = opened.recipe.run_folder / LEVELS_FOLDER
    if finds.is_over(asked):
        by_slopes, steps = _by_slopes(session, asked, finds, record), say_best(session, finds)
    else:
        with _place(session, folder) as place:
            prepared = Prepared(session, place, finds.identity, units, grid)
            _say_what_it_takes(prepared)
            by_slopes = _by_slopes(session, asked, finds, record)
            steps = _searched(asked, finds, replace(prepared, outputs=_outputs(by_slopes)), by_slopes)
    if opened.around.writes:
        shutil.rmtree(folder, ignore_errors=True)
    targets = targets_of(units, steps, grid, opened.target)
    if opened.around.writes:
        write_text(opened.recipe.run_folder / ALLOCATION_FILE, _as_file(units, targets))
    return targets_by_matrix(units, targets, _outputs(by_slopes))


def _say_what_it_takes(prepared: Prepared) -> None:
    """Tell of the files, and raise BadInput where there is no room for them."""
    levels = ", ".join(per_cent(one.sparsity, 1) for one in prepared.grid)
    around = prepared.session.opened.around
    around.reporter.say(
        f"{len(prepared.matrices)} matrices are pruned at {levels}, which takes {prepared.nbytes / 2**20:,.1f} MiB in "
        f"{prepared.folder} until the search is over."
    )
    if around.processes.first:
        prepared.require_room()


def _searched(asked: LevelSearch, finds: Finds, prepared: Prepared, by_slopes: Mapping[str, Target]) -> Steps:
    """The levels with which the model stays nearest to the dense one. by_slopes: what its slopes say of every matrix."""
    session, exchanges = prepared.session, exchanges_of(prepared.units, len(prepared.grid))
    first = [] if _began(finds) else _starts(prepared, by_slopes)
    prepared.prepare()
    candidates = Candidates.of(session, prepared, (), asked.tokens)
    return search_steps(session, asked, finds, exchanges, first, candidates)


def _began(finds: Finds) -> bool:
    """Whether an earlier run tried what is tried first."""
    return len(finds.tried) >= len(STARTS)


def _by_slopes(
    session: Session, asked: LevelSearch, finds: Finds, record: Callable[[int], Recording]
) -> dict[str, Target]:
    """What the slopes of the dense model say of every matrix, by its name, the first process's word for all; nothing where an
    earlier run began and outputs do not count."""
    opened, model, processes = session.opened, session.model, session.opened.around.processes
    allocation = asked.by_slopes(opened.target)
    if _began(finds) and not allocation.tells_outputs(opened.target):
        return {}
    with opened.around.reporter.bar("Measuring what matrices lose", len(model.blocks)) as advance:
        found = plan_targets(allocation, model, record(allocation.first), opened.target, processes, advance)
    return processes.from_first(lambda: found)


def _outputs(by_slopes: Mapping[str, Target]) -> dict[str, Tensor]:
    """By how much each matrix's outputs count, by its name, where that is told."""
    return {name: own.outputs for name, own in by_slopes.items() if own.outputs is not None}


def _starts(prepared: Prepared, by_slopes: Mapping[str, Target]) -> list[Steps]:
    """All at the overall sparsity, and what the slopes of the dense model say."""
    units, grid, target = prepared.units, prepared.grid, prepared.session.opened.target
    wanted = [by_slopes[unit.members[0]] for unit in units]
    return [(level_of(grid, target),) * len(units), as_levels(units, wanted, grid, target)]


@contextmanager
def _place(session: Session, folder: Path) -> Iterator[Path]:
    """Where the levels lie: in the run's folder, or in one that is gone when the search is over; the same for all processes."""
    around = session.opened.around
    if around.processes.from_first(lambda: around.writes):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        around.processes.gather(None)  # all have read their dense weights back
        return
    made = tempfile.TemporaryDirectory(prefix="coprune-levels-") if around.processes.first else None
    try:
        yield around.processes.from_first(lambda: Path(made.name if made is not None else ""))
        around.processes.gather(None)
    finally:
        if made is not None:
            made.cleanup()


def _as_file(units: Sequence[Unit], targets: Sequence[Target]) -> str:
    """What every unit gets, as a file for `--allocation`."""
    found: Mapping[str, float | str] = {
        unit.name: target.sparsity if target.pattern.n_of_m is None else str(target.pattern)
        for unit, target in zip(units, targets, strict=True)
    }
    return yaml.safe_dump(dict(found), sort_keys=False, width=10_000)
