"""The runner: it executes a plan step by step and reuses steps finished by an earlier run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from pydantic import BaseModel

from coprune.base.errors import BadInput
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Reporter
from coprune.base.words import Set, Setting
from coprune.run.step import Left, NamedStep, Step, Taking
from coprune.store.claim import claimed
from coprune.store.place import Identity, Place, said

_SOURCES = "sources"


def execute(
    steps: Sequence[Step],
    reporter: Reporter,
    processes: Processes = ALONE,
    taking: Taking = nullcontext,
    anew: bool = False,
    replaces: bool = False,
) -> tuple[list[BaseModel], Left]:
    """Execute the steps of a plan.

    Args:
        steps: the steps, in order.
        reporter: reports reused steps.
        processes: the processes of the run; all of them call this.
        taking: entered once, by the first step that is executed, around its first write.
        anew: whether to execute every step without reusing results.
        replaces: whether to replace another run's work in a step's folder.

    Returns:
        The record of each step, and what the last one left.

    Raises:
        BadInput: a step is impossible as requested, or its folder holds another result.
    """
    for step in steps:
        processes.from_first(step.check)
    records, left = list[BaseModel](), None
    for step in steps:
        # A model saved in a folder is read from there, so it is not also kept in memory.
        before = left if left is None or left.model is None else replace(left, held=None)
        left = None if anew else processes.from_first(partial(_finished, step, before, reporter, replaces))
        if left is None:
            left = step.run(before, partial(_takes, step, before, taking))
            taking = nullcontext
            # The other processes wait here for the first one to save what all will read.
            left = replace(processes.from_first(partial(replace, left, held=None)), held=left.held)
        records.append(left.record)
    assert left is not None
    return records, left


def make(steps: Iterable[NamedStep], source: Left, reporter: Reporter) -> Left:
    """Make a model from a source by steps; if several processes want a step, one does it and the others wait.

    Raises as `execute`.
    """
    for step in steps:
        step.check()
        with claimed(step.folder.with_name(f"{step.folder.name}.lock")):
            found = _finished(step, source, reporter, replaces=False)
            source = found or step.run(source, partial(_takes, step, source, nullcontext))
    return source


def is_of_others(steps: Iterable[NamedStep], source: Left) -> bool:
    """Return whether the finished results of these steps were made from another source."""
    for step in steps:
        place = _place(step, source)
        if place is None or (found := step.finished(source)) is None:
            return False
        if place.differing():
            return True
        source = found
    return False


def _place(step: Step, before: Left | None) -> Place | None:
    if step.folder is None:
        return None
    contents = {**step.settings, _SOURCES: list(step.sources(before))}
    return Place(step.folder, Identity.of(step.name, step.version, contents, step.measured))


def _finished(step: Step, before: Left | None, reporter: Reporter, replaces: bool) -> Left | None:
    """Return an earlier run's result with the same key, if any. Raises BadInput if the folder holds another run's work."""
    place = _place(step, before)
    if place is None:
        return None
    found = step.finished(before)
    differing = place.differing(finished=found is not None)
    if found is not None and differing == []:
        reporter.say(f"Done by an earlier run: {found.model or place.folder}")
        return found
    if differing and not replaces and [name for name, _, _ in differing] != [_SOURCES]:
        raise BadInput(
            f"{place.folder} holds the work of another run, in which {said(differing)}",
            field="save",
            value=place.folder,
            fix=("name another folder with ", Setting("save"), ", or replace it with ", Set("overwrite", True)),
        )
    if found is not None or differing:
        reporter.say(f"{place.folder} was made from other inputs than the present ones, so it is made again.")
    return None


@contextmanager
def _takes(step: Step, before: Left | None, taking: Taking) -> Iterator[None]:
    """Claim the folder of a step and remove other work from it."""
    place = _place(step, before)
    with taking():
        if place is not None and (place.differing() or step.finished(before) is not None):
            step.clear()
            shutil.rmtree(place.folder, ignore_errors=True)
        yield
        if place is not None:
            place.begin()
