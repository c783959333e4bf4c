"""The folder in which a run or a training leaves its report: prepared, claimed, announced, finished and replaced alike.

A report marks a run as finished, so it gets its name last, after the model got its own. Between the two it lies there
announced, and the same command finds it, knows that the model is whole, and gives it its name: a kill at any moment loses
nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.files import is_unfinished, remove_unfinished, require_apart, require_own_name, require_usable
from coprune.base.words import Set, Setting
from coprune.model.edits import is_coprunes
from coprune.report.links import PAGE_FILE
from coprune.store.claim import Claim, Taken

LOCK_FILE = ".running.lock"
_ANOTHER = ("name another run folder with ", Setting("save"))


def _finished_run() -> str:
    return "a finished run"


class Written(Protocol):
    """A report."""

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        ...


@dataclass(frozen=True)
class OutputFolder:
    """Where a run writes."""

    run: Path
    """Its folder, with the report."""
    model: Path | None
    """The folder of the model that it saves."""
    source: str
    """Name of the model that it reads."""
    report_file: str
    own: tuple[str, ...]
    """Folders that it keeps in its own."""
    files: tuple[str, ...] = ()
    """Patterns of its files beside report and page."""
    mark: str | None = None
    """File without which a folder with anything in it is no run's; None to write beside anything."""
    logs: tuple[Path, ...] = ()
    """What may be there without that: a run that failed early left no more."""
    overwrite: bool = False
    """Whether an earlier run is replaced."""

    @property
    def report(self) -> Path:
        """The report of a finished run."""
        return self.run / self.report_file

    @property
    def announced(self) -> Path:
        """The report of a run that is finished but for its last files."""
        return self.run / f".{self.report_file}"

    def prepare(self, begun: bool = False, holds: Callable[[], str] = _finished_run) -> None:
        """Refuse to write where something is already. A folder without a report is an unfinished run's, and is reused.

        Args:
            begun: whether the folder of the model may have the run's own already.
            holds: says what a folder with a report holds.

        Raises:
            BadInput: it is not this run's, or no folder can be there.
        """
        self._require_folder()
        if self.overwrite:
            self._refuse_own_source()
        else:
            self._refuse_finished(holds)
        if self.mark is not None and not (self.run / self.mark).exists():
            there = {path for path in self.run.glob("*") if not is_unfinished(path) and path.name != LOCK_FILE}
            if there - {*self.logs}:
                other = f"{self.run} already holds something other than a run"
                raise BadInput(other, field="save", value=self.run, fix=_ANOTHER)
        if self.model is not None and not begun:
            self._require_free(self.model)

    def _refuse_finished(self, holds: Callable[[], str]) -> None:
        if self.report.exists():
            fix = (*_ANOTHER, ", or replace it with ", Set("overwrite", True))
            raise BadInput(f"{self.run} already holds {holds()}", field="save", value=self.run, fix=fix)

    def _require_folder(self) -> None:
        require_usable(self.run, "save")
        if self.run.exists() and not self.run.is_dir():
            raise BadInput(f"{self.run} is a file", field="save", value=self.run, fix=_ANOTHER)

    def _require_free(self, model: Path) -> None:
        require_own_name(model, "save_model")
        require_apart(self.run, model, self.own)
        if model.exists() and (not model.is_dir() or any(model.iterdir())):
            mine = is_coprunes(model)
            if not (mine and self.overwrite):
                replace = (", or replace that model with ", Set("overwrite", True)) if mine else ()
                fix = ("name another folder with ", Setting("save_model"), *replace)
                raise BadInput(f"{model} already exists and is not empty", field="save_model", value=model, fix=fix)

    def _refuse_own_source(self) -> None:
        """Raise BadInput where a run would remove the model that it reads."""
        source = expand_home(self.source)
        if not source.exists():
            return
        gone = [self.run / name for name in self.own] + ([] if self.model is None else [self.model])
        if any(source.resolve().is_relative_to(folder.resolve()) for folder in gone):
            fix = ("name other folders with ", Setting("save"), " and ", Setting("save_model"))
            raise BadInput(f"the run would replace {source}, which it reads", field="overwrite", value=True, fix=fix)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes out while the body runs, once the folder is prepared; a folder that is left empty goes.

        Raises BadInput if another process is at work, or has finished in the meantime.
        """
        new = [folder for folder in (self.run, *self.run.parents) if not folder.exists()]
        lock = self.run / LOCK_FILE
        try:
            claim = Claim(lock)
        except Taken:
            fix = "wait for its end, or choose another name"
            raise BadInput(f"another run is writing {self.run}", field="save", value=self.run, fix=fix) from None
        try:
            if not self.overwrite:
                self._refuse_finished(_finished_run)
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits with it open finds what this one left
            claim.close()
            for folder in new:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def announce(self, report: Written) -> None:
        """Keep a report for the case that the run is killed once its model is whole."""
        report.write(self.announced)

    def finish(self, write_beside: Callable[[Path], object]) -> None:
        """Write what lies beside the announced report, and give that its name: last, since it says that all is there.

        write_beside: called with the announced report.
        """
        remove_unfinished(self.run)
        write_beside(self.announced)
        (self.run / LOCK_FILE).unlink(missing_ok=True)  # a finished run that is killed before its end leaves none
        self.announced.replace(self.report)

    def replace_earlier(self) -> None:
        """Remove what a finished run left where this one writes. What an unfinished one left stays, to resume from."""
        finished = self.report.is_file()
        if finished:
            for pattern in (self.announced.name, PAGE_FILE, *self.files):
                for file in self.run.glob(pattern):
                    file.unlink()
            for name in self.own:
                shutil.rmtree(self.run / name, ignore_errors=True)
        if self.model is not None and is_coprunes(self.model):
            shutil.rmtree(self.model)
        if finished:
            self.report.unlink()  # last, since it says that the rest is of a finished run
