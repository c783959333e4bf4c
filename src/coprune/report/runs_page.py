"""A page for several runs: the result of each, and the Pareto front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coprune.base.errors import BadInput
from coprune.base.words import Cell, Command, Sheet, per_cent
from coprune.evaluation.zero_shot import MAIN_METRIC, main_of, shown
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.recipe.command import command_of
from coprune.report.figures import AccuracyFacts, PerplexityFacts
from coprune.report.fronts import Reached, fronts
from coprune.report.links import PAGE_FILE, links_of_run, target
from coprune.report.provenance import of_several
from coprune.report.run_page import run_page
from coprune.report.schema import Report
from coprune.report.view import Copyable, Page, Paragraph, Section
from coprune.report.wording import name_of, number

_Text = tuple[str, str, int]
_Images = tuple[str, str, int]


@dataclass(frozen=True)
class Run:
    """A finished run: its name on the page, its report, and the size of its saved model if it exists."""

    name: str
    report: Report
    size: int | None
    folder: Path | None = None

    @classmethod
    def read(cls, path: Path, name: str = "") -> Run:
        """Read a run folder or a report.json. name: the folder's by default. Raises BadInput if there is no report."""
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
    """The top of a page of several runs. command: the command that made them; tables: sections before the runs."""

    kind: str
    title: str
    command: Copyable | None = None
    tables: Sequence[Section] = ()


def report_page(paths: Sequence[Path], beside: Path | None = None) -> str:
    """Return the page of one run, or of several. Raises BadInput if a report is missing or cannot be read.

    beside: the page's folder, to which links are relative; for a single run, its folder by default.
    """
    if not paths:
        raise BadInput("no run is given", fix=("for example: ", Command("report", Path("out/MODEL/2-4/wanda"))))
    runs = [Run.read(path, name) for path, name in zip(paths, names_apart(paths), strict=True)]
    if len(runs) > 1:
        return runs_page(runs, beside=beside)
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    return run_page(runs[0].report, links_of_run(folder, beside or folder))


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Return a unique name for every run: its folder's, prefixed with parents as needed."""
    folders = [(path.parent if path.is_file() else path).absolute().parts for path in paths]
    for depth in range(1, max(map(len, folders))):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(path) for path in paths]


def runs_page(runs: Sequence[Run], top: Top | None = None, beside: Path | None = None) -> str:
    """Build the page for several runs. top: the top of the page; beside: the page's folder."""
    top = top or Top("Several runs", f"{len(runs)} runs")
    texts = Counter(_text_of(facts) for run in runs for facts in run.report.perplexity)
    sets = Counter(_images_of(facts) for run in runs for facts in run.report.accuracy)
    models = ", ".join(dict.fromkeys(run.report.model.source for run in runs))
    lead = [Paragraph(f"Of {models}.", "soft"), Paragraph(of_several([run.report.made for run in runs]), "soft")]
    sections = [*top.tables]
    for on, count in texts.most_common():
        said = f"Sequence length {on[2]}, {count} of {len(runs)} runs; lower is better."
        sections += fronts(f"Perplexity on {on[0]}", said, _of_text(runs, on))
    for images, count in sets.most_common():
        said = f"{images[2]:,} images, {count} of {len(runs)} runs; higher is better."
        sections += fronts(f"Top-1 accuracy on {images[0]}", said, _of_images(runs, images), less=False)
    sections += [_table(runs, sorted(texts), list(sets), beside), *_commands(runs)]
    return Page(top.kind, top.title, [*lead, *([top.command] if top.command else [])], sections).html()


def _text_of(facts: PerplexityFacts) -> _Text:
    return facts.data, facts.fingerprint, facts.seqlen


def _images_of(facts: AccuracyFacts) -> _Images:
    return facts.data, facts.source, facts.images


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
    """Return a run's point and its dense model's."""
    before = [] if dense is None else [Reached(f"dense {name_of(run.report.model.source)}", "dense", dense, 0.0, None)]
    # Rounded, so that a few weights more or less make no run better than another.
    zeros = round(run.report.sparsity.model, 4)
    return [*before, Reached(run.name, run.report.recipe.way, value, zeros, run.size, str(number_))]


def _table(runs: Sequence[Run], texts: Sequence[_Text], sets: Sequence[_Images], beside: Path | None) -> Section:
    numbers = {id(run): number_ for number_, run in enumerate(runs, 1)}

    def name(run: Run) -> Cell:
        page = None if run.folder is None or beside is None else target(run.folder / PAGE_FILE, beside)
        return Cell(f"{numbers[id(run)]} {run.name}", link=page)

    columns: dict[str, Callable[[Run], str | Cell]] = {
        "run": name,
        "method": lambda run: run.report.recipe.way,
        "pattern": lambda run: run.report.recipe.shape,
        "zeros": lambda run: per_cent(run.report.sparsity.matrices),
        "of all": lambda run: per_cent(run.report.sparsity.model),
    }
    columns |= {f"perplexity {on[0]} ({on[2]})": partial(_perplexity, on=on) for on in texts}
    columns |= {f"top-1 % {on[0]} ({on[2]:,})": partial(_top1, on=on) for on in sets}
    tasks = (task.task for run in runs if run.report.zero_shot for task in run.report.zero_shot.tasks)
    columns |= {task: partial(_score, task=task) for task in tasks}
    columns |= {
        "mean accuracy": lambda run: shown(MAIN_METRIC, facts.mean_pruned if (facts := run.report.zero_shot) else None),
        "difference to dense": lambda run: shown(
            MAIN_METRIC, facts.mean_delta if (facts := run.report.zero_shot) else None, "+"
        ),
        "prune time": lambda run: f"{run.report.prune_seconds:.1f} s",
        "size": lambda run: "–" if run.size is None else f"{run.size / 2**20:,.1f} MiB",
    }
    told = {title: show for title, show in columns.items() if any(show(run) != "–" for run in runs)}
    note = "Charts use these numbers where names do not fit."
    return Section("Runs", [Sheet.of(runs, told)], note)


def _score(run: Run, task: str) -> str:
    """Return the run's result in a task, by its main metric."""
    tasks = () if run.report.zero_shot is None else run.report.zero_shot.tasks
    found = next((one.pruned for one in tasks if one.task == task), None)
    return "–" if found is None else shown(main_of(found), found[main_of(found)])


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


def _commands(runs: Sequence[Run]) -> list[Section]:
    """Return the command of every run, except those that used Python objects."""
    lines = [f"# {run.name}\n{command_of(run.report.recipe)}" for run in runs if not run.report.recipe.given]
    return [Section("Commands", [Copyable("commands", "\n\n".join(lines))], "Each repeats one run.")] if lines else []
