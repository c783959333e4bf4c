"""The result of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field

from coprune.base.errors import CopruneError
from coprune.base.words import Sheet, Shown, per_cent
from coprune.recipe.command import command_of
from coprune.report.schema import Report
from coprune.sweeps.expand import Run
from coprune.sweeps.file import Sweep
from coprune.sweeps.finished import Ledger
from coprune.sweeps.paper_tables import perplexity_of, top1_of
from coprune.sweeps.results import FAILURES


@dataclass(repr=False)
class SweepResult(Shown):
    """The runs of a sweep and their reports."""

    sweep: Sweep
    runs: list[Run]
    reports: dict[str, Report]
    """Reports of the finished runs, by name."""
    failures: dict[str, str] = field(default_factory=dict)
    """Reasons of failed runs, by name."""
    ledger: Ledger = field(default_factory=Ledger)
    """Cost of the sweep."""

    @property
    def commands(self) -> list[str]:
        """The commands equivalent to the runs; those of finished runs are marked."""
        return [command_of(run.recipe) + ("  # done" if run.name in self.reports else "") for run in self.runs]

    def headline(self) -> str:
        """Return the sweep's folder and the number of finished runs."""
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"{self.sweep.folder}: {len(self.reports)} of {len(self.runs)} runs done{failed}"

    def sheet(self) -> Sheet:
        """Return a line per run."""
        return Sheet(
            self.headline(), [self._row(run) for run in self.runs], ("run", "", "zeros", "measured", "seconds")
        )

    def _row(self, run: Run) -> tuple[str, ...]:
        report = self.reports.get(run.name)
        if report is None:
            return (run.name, "failed" if run.name in self.failures else "not done", "", "", "")
        measured = [f"perplexity {perplexity_of(report, text):.2f} on {text.data}" for text in report.perplexity]
        measured += [f"top-1 {per_cent(top1_of(report, images))} on {images.data}" for images in report.accuracy]
        zeros, seconds = per_cent(report.sparsity.matrices), f"{report.total_seconds:.1f}"
        return (run.name, "done", zeros, ", ".join(measured), seconds)

    def require_success(self) -> None:
        """Raise CopruneError, with the first reason, if a run failed."""
        if not self.failures:
            return
        name, text = next(iter(self.failures.items()))
        raise CopruneError(
            f"{len(self.failures)} of {len(self.runs)} runs failed, first {name}: {text.splitlines()[-1]}",
            fix=f"All reasons are in {self.sweep.folder / FAILURES}",
        )
