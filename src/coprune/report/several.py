"""One page for several runs: what each reached, and which of them no other beats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprune.base.errors import BadInput
from coprune.base.shown import per_cent
from coprune.base.words import Command
from coprune.evaluation.cache import bytes_of_weights
from coprune.report.card import percent
from coprune.report.charts import pareto
from coprune.report.figures import AccuracyFacts, PerplexityFacts
from coprune.report.html import chart, page, section, table, text
from coprune.report.page import run_page
from coprune.report.perplexity import number
from coprune.report.schema import Report
from coprune.report.speed import speed_sections

_Text = tuple[str, str, int]
_Images = tuple[str, str, int]


@dataclass(frozen=True)
class Run:
    """A finished run: its name on the page, its report, and the size of its saved model if that is there."""

    name: str
    report: Report
    size: int | None

    @classmethod
    def read(cls, path: Path, name: str = "") -> Run:
        """Read a run folder or a report.json. name: by default the folder's. Raises BadInput if there is no report."""
        file = path if path.is_file() else path / "report.json"
        report = Report.read(file)
        saved = report.saved_model
        size = bytes_of_weights(saved) if saved is not None and saved.is_dir() else None
        return cls(name or file.parent.name or str(path), report, size)

    def perplexity(self, on: _Text) -> PerplexityFacts | None:
        """Its perplexity on a text, if that was measured."""
        return next((facts for facts in self.report.perplexity if _text_of(facts) == on), None)

    def accuracy(self, on: _Images) -> AccuracyFacts | None:
        """Its accuracy on a set of images, if that was measured."""
        return next((facts for facts in self.report.accuracy if _images_of(facts) == on), None)


def report_page(paths: Sequence[Path]) -> str:
    """The page of one run, or one page for several. Raises BadInput if a report is missing or cannot be read."""
    if not paths:
        raise BadInput("no run is named", fix=("for example: ", Command("report", Path("out/MODEL/2-4/wanda"))))
    runs = [Run.read(path, name) for path, name in zip(paths, names_apart(paths), strict=True)]
    if len(runs) > 1:
        return runs_page(runs)
    return run_page(runs[0].report, speed_sections(paths[0] if paths[0].is_dir() else paths[0].parent))


def names_apart(paths: Sequence[Path]) -> list[str]:
    """A name for every run: its folder's, with as many of those above it as tell all of them apart."""
    folders = [(path.parent if path.is_file() else path).absolute().parts for path in paths]
    for depth in range(1, max(map(len, folders))):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(set(folders)):
            return names
    return [str(path) for path in paths]


def runs_page(runs: Sequence[Run], tables: Sequence[str] = ()) -> str:
    """Build the page for several runs. tables: sections that come first, HTML."""
    texts = Counter(_text_of(facts) for run in runs for facts in run.report.perplexity)
    charts: dict[str, Any] = {}
    parts = [f"<header><h1>{len(runs)} runs</h1><p class='soft'>{text(_models(runs))}</p></header>", *tables]
    for place, (shown, count) in enumerate(texts.most_common()):
        said = f"Perplexity on {shown[0]} (sequence length {shown[2]}, {count} of {len(runs)} runs); lower is better."
        parts += _charts_of(_points(runs, shown), f"-{place}" if place else "", said, charts)
    parts.append(_table(runs, sorted(texts)))
    return page(f"{len(runs)} pruning runs", "\n".join(parts), {"charts": charts, "matrices": [], "distributions": {}})


def _charts_of(points: list[dict[str, Any]], mark: str, note: str, charts: dict[str, Any]) -> list[str]:
    """Perplexity on one text against sparsity, and against size where sizes differ. charts: gets them, by their names."""
    name, zeros = f"by-sparsity{mark}", "zeros among all parameters"
    charts[name] = pareto(_with_front(points, "sparsity"), "sparsity", zeros, ".2~%")
    parts = [section("Perplexity against sparsity", chart(name), note=f"{note} The line joins the front.")]
    sized = [point for point in points if point["size"] is not None]
    if len({point["size"] for point in sized}) > 1:
        name = f"by-size{mark}"
        charts[name] = pareto(_with_front(sized, "size", less_is_better=True), "size", "bytes on disk", "~s")
        parts.append(section("Perplexity against size", chart(name), note=note))
    return parts


def _text_of(facts: PerplexityFacts) -> _Text:
    return facts.data, facts.fingerprint, facts.seqlen


def _images_of(facts: AccuracyFacts) -> _Images:
    return facts.data, facts.source, facts.images


def _models(runs: Sequence[Run]) -> str:
    return "Of " + ", ".join(dict.fromkeys(run.report.model.source for run in runs)) + "."


def _points(runs: Sequence[Run], on: _Text) -> list[dict[str, Any]]:
    """The runs' points, and one for every dense model among them."""
    points: list[dict[str, Any]] = []
    for run in runs:
        facts = run.perplexity(on)
        if facts is None:
            continue
        source = run.report.model.source
        method = run.report.recipe.way
        point = {"name": run.name, "method": method, "perplexity": facts.pruned, "size": run.size}
        # A few weights more or less, as rounding gives them, make no run better than another.
        points.append(point | {"sparsity": round(run.report.sparsity.model, 4)})
        if facts.dense is not None and all(other.get("source") != source for other in points):
            dense = {"name": "dense", "method": "dense", "perplexity": facts.dense, "size": None, "source": source}
            points.append(dense | {"sparsity": 0.0})
    return points


def _with_front(points: list[dict[str, Any]], field: str, less_is_better: bool = False) -> list[dict[str, Any]]:
    """Mark the points that no other beats: none is as good in both and better in one."""
    sign = 1 if less_is_better else -1

    def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        ours = (one["perplexity"], sign * one[field])
        theirs = (other["perplexity"], sign * other[field])
        return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]

    return [point | {"front": not any(beats(other, point) for other in points)} for point in points]


def _table(runs: Sequence[Run], texts: Sequence[_Text]) -> str:
    sets = dict.fromkeys(_images_of(facts) for run in runs for facts in run.report.accuracy)
    header = [
        "run",
        "method",
        "pattern",
        "zeros",
        "of all",
        *(f"perplexity {name} ({length})" for name, _, length in texts),
        *(f"top-1 % {name} ({count:,})" for name, _, count in sets),
    ]
    header += ["mean accuracy %", "difference to dense", "prune time", "size"]
    rows = []
    for run in runs:
        report, facts = run.report, run.report.zero_shot
        seen = [run.accuracy(on) for on in sets]
        found = [run.perplexity(on) for on in texts]
        rows.append(
            [
                run.name,
                report.recipe.way,
                report.recipe.shape,
                per_cent(report.sparsity.matrices),
                per_cent(report.sparsity.model),
                *("–" if facts is None else number(facts.pruned) for facts in found),
                *("–" if facts is None else f"{100 * facts.pruned_top1:.2f}" for facts in seen),
                percent(None if facts is None else facts.mean_pruned),
                percent(None if facts is None else facts.mean_delta, "+"),
                f"{report.prune_seconds:.1f} s",
                "–" if run.size is None else f"{run.size / 2**20:,.1f} MiB",
            ]
        )
    told = [column for column in range(len(header)) if any(row[column] != "–" for row in rows)]
    return section("Runs", table([header[c] for c in told], [[row[c] for c in told] for row in rows]))
