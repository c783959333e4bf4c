"""What the page of a classifier shows beside what every page does: its accuracy, and images that it now sees otherwise."""

from __future__ import annotations

from coprune.base.shown import per_cent
from coprune.report.bars import Bar, bars
from coprune.report.figures import AccuracyFacts, ChangedPrediction
from coprune.report.html import card, from_to, section, table, text


def accuracy_card(found: AccuracyFacts) -> str:
    """The headline figure."""
    before = [] if found.dense_top1 is None else [f"{100 * found.dense_top1:.2f}"]
    shown = from_to([*before, per_cent(found.pruned_top1)])
    return card(f"top-1 accuracy on {found.data}", shown, f"of {found.images:,} images")


def accuracy_section(found: list[AccuracyFacts]) -> str:
    """Bars and a table of all sets of images, and the images of each whose predicted class changed."""
    header = ["images", "number", "dense top-1 %", "pruned top-1 %", "dense top-5 %", "pruned top-5 %", "changed class"]
    rows = [
        [
            entry.data,
            f"{entry.images:,}",
            _share(entry.dense_top1, entry.dense_top1_interval),
            _share(entry.pruned_top1, entry.pruned_top1_interval),
            _share(entry.dense_top5, None),
            _share(entry.pruned_top5, entry.pruned_top5_interval),
            "–" if entry.changed is None else f"{entry.changed:,}",
        ]
        for entry in found
    ]
    shown = "".join(_examples(entry) for entry in found)
    charted = bars([(f"{entry.data}, top-1", _bars(entry)) for entry in found], top=1.0)
    return section("Accuracy", charted, table(header, rows), note="Intervals are Wilson's 95 %.") + shown


def _bars(entry: AccuracyFacts) -> list[Bar]:
    sides = (
        ("dense", entry.dense_top1, entry.dense_top1_interval),
        ("pruned", entry.pruned_top1, entry.pruned_top1_interval),
    )
    return [Bar(kind, kind, top1, per_cent(top1), reach) for kind, top1, reach in sides if top1 is not None]


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" + ("" if interval is None else f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]")


def _examples(found: AccuracyFacts) -> str:
    figures = "".join(_figure(example) for example in found.examples if example.thumbnail is not None)
    if not figures:
        return ""
    return section(
        f"Images of {found.data} whose predicted class changed",
        f'<div class="panel"><div class="images">{figures}</div></div>',
        note=f"The first of {found.changed:,}, with the right class and what both models see.",
    )


def _figure(example: ChangedPrediction) -> str:
    label, dense, pruned = example.names or (example.label, example.dense, example.pruned)
    source = text(example.thumbnail)
    tiny = ' class="tiny"' if "image/png" in source else ""
    return (
        f'<figure><img src="{source}" alt="image {example.image}"{tiny}><figcaption><b>{text(label)}</b>'
        f'<span class="tag dense">dense: {text(dense)}</span><span class="tag pruned">pruned: {text(pruned)}</span>'
        "</figcaption></figure>"
    )
