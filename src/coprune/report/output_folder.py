"""The output folder of a run or a training, with its report.

The report marks a run as finished, so it gets its final name last, after the model. Before that it is announced, under a
hidden name: if the process is killed in between, the same command finds it, knows that the model is complete, and renames
it. So a kill at any moment loses nothing.
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
        """Write it atomically."""
        ...


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of a run."""

    run: Path
    """The folder, which holds the report."""
    model: Path | None
    """Path of the saved model; None if none is saved."""
    source: str
    """Name of the source model."""
    report_file: str
    own: tuple[str, ...]
    """Names of the run's own subfolders."""
    files: tuple[str, ...] = ()
    """Patterns of its files besides report and page."""
    mark: str | None = None
    """File by which a nonempty folder is recognised as a run's; None to accept any folder."""
    logs: tuple[Path, ...] = ()
    """Files that a run may leave without `mark`, if it failed early."""
    overwrite: bool = False
    """Whether to replace an earlier run."""

    @property
    def report(self) -> Path:
        """Path of the report of a finished run."""
        return self.run / self.report_file

    @property
    def announced(self) -> Path:
        """Path of the announced report."""
        return self.run / f".{self.report_file}"

    def prepare(self, begun: bool = False, holds: Callable[[], str] = _finished_run) -> None:
        """Refuse to overwrite anything. The folder of an unfinished run, which has no report yet, is reused.

        Args:
            begun: whether the model may be there already, from the unfinished run.
            holds: describes a folder that has a report.

        Raises:
            BadInput: the folder or the model's path is taken, or cannot be created.
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
        """Raise BadInput if the run would delete its own source model."""
        source = expand_home(self.source)
        if not source.exists():
            return
        gone = [self.run / name for name in self.own] + ([] if self.model is None else [self.model])
        if any(source.resolve().is_relative_to(folder.resolve()) for folder in gone):
            fix = ("name other folders with ", Setting("save"), " and ", Setting("save_model"))
            raise BadInput(f"the run would replace {source}, which it reads", field="overwrite", value=True, fix=fix)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Claim the prepared folder within the body, against other processes; remove it if it is empty afterwards.

        Raises BadInput if another process holds it, or has finished in the meantime.
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
            lock.unlink(missing_ok=True)  # a process that already opened it will find our report
            claim.close()
            for folder in new:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def announce(self, report: Written) -> None:
        """Write the report under its hidden name, in case the process is killed after the model is complete."""
        report.write(self.announced)

    def finish(self, write_beside: Callable[[Path], object]) -> None:
        """Write the other files, then rename the announced report, which marks the run as finished.

        write_beside: writes these files, given the path of the announced report.
        """
        remove_unfinished(self.run)
        write_beside(self.announced)
        (self.run / LOCK_FILE).unlink(missing_ok=True)  # so that a kill after the rename leaves no lock file
        self.announced.replace(self.report)

    def replace_earlier(self) -> None:
        """Remove the files of a finished run that this one replaces. Those of an unfinished run stay, to be resumed."""
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
            self.report.unlink()  # last, since it marks the rest as a finished run's
