"""A page for several runs: the result of each, and the Pareto front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coprune.base.errors import BadInput
from coprune.base.words import Command, per_cent
from coprune.evaluation.zero_shot import MAIN_METRIC, main_of, shown
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.recipe.command import command_of
from coprune.report.figures import AccuracyFacts, PerplexityFacts
from coprune.report.html import copyable, header, name_of, of_several, page, section, table, text
from coprune.report.links import PAGE_FILE, links_of_run, target
from coprune.report.page import number, run_page
from coprune.report.plot import Reached, fronts
from coprune.report.schema import Report

_Text = tuple[str, str, int]
_Images = tuple[str, str, int]


@dataclass(frozen=True)
class Run:
    """A finished run: its name on the page, its report, and the size of its saved model if that is there."""

    name: str
    report: Report
    size: int | None
    folder: Path | None = None

    @classmethod
    def read(cls, path: Path, name: str = "") -> Run:
        """Read a run folder or a report.json. name: by default the folder's. Raises BadInput if there is no report."""
        file = path if path.is_file() else path / "report.json"
        report = Report.read(file)
        saved = report.saved_model
        size = None
        if saved is not None and saved.exists():
            size = bytes_of_weights(saved) if saved.is_dir() else saved.stat().st_size
        return cls(name or file.parent.name or str(path), report, size, file.parent)

    def perplexity(self, on: _Text) -> PerplexityFacts | None:
        """Return its perplexity on a text, if measured."""
        return next((facts for facts in self.report.perplexity if _text_of(facts) == on), None)

    def accuracy(self, on: _Images) -> AccuracyFacts | None:
        """Return its accuracy on a set of images, if measured."""
        return next((facts for facts in self.report.accuracy if _images_of(facts) == on), None)


@dataclass(frozen=True)
class Top:
    """The top of a page of several runs. made: HTML; tables: sections, HTML; commands: by the run's name."""

    kind: str
    title: str
    made: str = ""
    tables: Sequence[str] = ()


def report_page(paths: Sequence[Path], beside: Path | None = None) -> str:
    """Return the page of one run, or of several. Raises BadInput if a report is missing or cannot be read.

    beside: the folder that the page is for, from which links lead; by default that of a single run.
    """
    if not paths:
        raise BadInput("no run is named", fix=("for example: ", Command("report", Path("out/MODEL/2-4/wanda"))))
    runs = [Run.read(path, name) for path, name in zip(paths, names_apart(paths), strict=True)]
    if len(runs) > 1:
        return runs_page(runs, beside=beside)
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    return run_page(runs[0].report, links_of_run(folder, beside or folder))


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Return a unique name for every run: its folder's, with as many of the parents' as needed."""
    folders = [(path.parent if path.is_file() else path).absolute().parts for path in paths]
    for depth in range(1, max(map(len, folders))):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(path) for path in paths]


def runs_page(runs: Sequence[Run], top: Top | None = None, beside: Path | None = None) -> str:
    """Build the page for several runs. top: what is said first; beside: the folder that the page is for."""
    top = top or Top("Several runs", f"{len(runs)} runs")
    texts = Counter(_text_of(facts) for run in runs for facts in run.report.perplexity)
    sets = Counter(_images_of(facts) for run in runs for facts in run.report.accuracy)
    made = of_several([run.report.made for run in runs])
    lead = f'<p class="soft">{text(_models(runs))}</p>' + (f'<p class="soft">{text(made)}</p>' if made else "")
    parts = [header(top.kind, top.title, lead, top.made), *top.tables]
    for on, count in texts.most_common():
        said = f"Sequence length {on[2]}, {count} of {len(runs)} runs; lower is better."
        parts += fronts(f"Perplexity on {on[0]}", said, _of_text(runs, on))
    for images, count in sets.most_common():
        said = f"{images[2]:,} images, {count} of {len(runs)} runs; higher is better."
        parts += fronts(f"Top-1 accuracy on {images[0]}", said, _of_images(runs, images), less=False)
    parts += [_table(runs, sorted(texts), list(sets), beside), _commands(runs)]
    return page(top.title, "\n".join(parts))


def _text_of(facts: PerplexityFacts) -> _Text:
    return facts.data, facts.fingerprint, facts.seqlen


def _images_of(facts: AccuracyFacts) -> _Images:
    return facts.data, facts.source, facts.images


def _models(runs: Sequence[Run]) -> str:
    return "Of " + ", ".join(dict.fromkeys(run.report.model.source for run in runs)) + "."


def _of_text(runs: Sequence[Run], on: _Text) -> list[Reached]:
    """Return the perplexity of every run's final model and every dense model on a text."""
    found = []
    for number_, run in enumerate(runs, 1):
        if (facts := run.perplexity(on)) is not None:
            tuned = run.report.finetuned
            value = facts.pruned if tuned is None else tuned.perplexity.get(facts.data, facts.pruned)
            found += _reached(run, number_, value, facts.dense)
    return list(dict.fromkeys(found))


def _of_images(runs: Sequence[Run], on: _Images) -> list[Reached]:
    found = []
    for number_, run in enumerate(runs, 1):
        if (facts := run.accuracy(on)) is not None:
            tuned = run.report.finetuned
            value = facts.pruned_top1 if tuned is None else tuned.top1.get(facts.data, facts.pruned_top1)
            found += _reached(run, number_, value, facts.dense_top1)
    return list(dict.fromkeys(found))


def _reached(run: Run, number_: int, value: float, dense: float | None) -> list[Reached]:
    """Return a run's point and its dense model's; equal ones of several runs are merged."""
    before = [] if dense is None else [Reached(f"dense {name_of(run.report.model.source)}", "dense", dense, 0.0, None)]
    # A few weights more or less, as rounding gives them, make no run better than another.
    zeros = round(run.report.sparsity.model, 4)
    return [*before, Reached(run.name, run.report.recipe.way, value, zeros, run.size, str(number_))]


def _table(runs: Sequence[Run], texts: Sequence[_Text], sets: Sequence[_Images], beside: Path | None) -> str:
    titles = ["run", "method", "pattern", "zeros", "of all"]
    titles += [f"perplexity {name} ({length})" for name, _, length in texts]
    titles += [f"top-1 % {name} ({count:,})" for name, _, count in sets]
    names = dict.fromkeys(task.task for run in runs if run.report.zero_shot for task in run.report.zero_shot.tasks)
    titles += [*names]
    titles += ["mean accuracy", "difference to dense", "prune time", "size"]
    rows = []
    for number_, run in enumerate(runs, 1):
        report, facts = run.report, run.report.zero_shot
        row = [f"{number_} {run.name}", report.recipe.way, report.recipe.shape]
        row += [per_cent(report.sparsity.matrices), per_cent(report.sparsity.model)]
        row += [_perplexity(run, on) for on in texts] + [_top1(run, on) for on in sets]
        scores = {} if facts is None else {task.task: task.pruned for task in facts.tasks}
        row += [
            shown(main_of(scores[name]), scores[name][main_of(scores[name])]) if name in scores else "–"
            for name in names
        ]
        row += [shown(MAIN_METRIC, None if facts is None else facts.mean_pruned)]
        row += [shown(MAIN_METRIC, None if facts is None else facts.mean_delta, "+"), f"{report.prune_seconds:.1f} s"]
        rows.append([*row, "–" if run.size is None else f"{run.size / 2**20:,.1f} MiB"])
    told = [column for column in range(len(titles)) if any(row[column] != "–" for row in rows)]
    pages = [None if run.folder is None or beside is None else target(run.folder / PAGE_FILE, beside) for run in runs]
    runs_told = table([titles[c] for c in told], [[row[c] for c in told] for row in rows], pages)
    return section("Runs", runs_told, note="Charts call the runs by these numbers where names have no room.")


def _perplexity(run: Run, on: _Text) -> str:
    facts = run.perplexity(on)
    if facts is None:
        return "–"
    tuned = {} if run.report.finetuned is None else run.report.finetuned.perplexity
    return number(facts.pruned) + (f" → {number(tuned[facts.data])}" if facts.data in tuned else "")


def _top1(run: Run, on: _Images) -> str:
    facts = run.accuracy(on)
    if facts is None:
        return "–"
    tuned = {} if run.report.finetuned is None else run.report.finetuned.top1
    return f"{100 * facts.pruned_top1:.2f}" + (f" → {100 * tuned[facts.data]:.2f}" if facts.data in tuned else "")


def _commands(runs: Sequence[Run]) -> str:
    """Return the command of every run but those that were handed Python objects."""
    lines = [f"# {run.name}\n{command_of(run.report.recipe)}" for run in runs if not run.report.recipe.given]
    return section("Commands", copyable("commands", "\n\n".join(lines)), note="Each repeats one run.") if lines else ""
