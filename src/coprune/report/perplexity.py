"""Perplexity on a run's page: of the dense model, the pruned one, and what fine-tuning made of that."""

from __future__ import annotations

import math

from coprune.report.bars import Bar, bars
from coprune.report.figures import PerplexityFacts
from coprune.report.html import card, from_to, section, table
from coprune.report.schema import Report


def perplexity_card(report: Report, entry: PerplexityFacts) -> str:
    """The figures of one text, the run's result last."""
    tuned = {} if report.finetuned is None else report.finetuned.perplexity
    figures = [*([] if entry.dense is None else [entry.dense]), entry.pruned]
    figures += [tuned[entry.data]] if entry.data in tuned else []
    shown = from_to([number(figure) for figure in figures])
    return card(f"perplexity on {entry.data}", shown, f"sequence length {entry.seqlen}")


def perplexity_section(report: Report) -> str:
    """Bars and a table of all texts."""
    tuned = None if report.finetuned is None else report.finetuned.perplexity
    rows = [_row(entry, tuned) for entry in report.perplexity]
    header = ["text", "dense", "pruned", *([] if tuned is None else ["fine-tuned"])]
    header += ["95 % interval", "bits per byte", "sequence length", "windows"]
    begins = None if report.bos is None else report.bos.line()
    said = "" if begins is None else f" The token that begins a text (BOS): {begins}."
    of = "" if tuned is None else "; it and the bits per byte are of the pruned model"
    note = f"Lower is better. Non-overlapping windows; the interval is a bootstrap over them{of}.{said}"
    charted = bars([(entry.data, _bars(entry, tuned or {})) for entry in report.perplexity])
    return section("Perplexity", charted, table(header, rows), note=note)


def _bars(entry: PerplexityFacts, tuned: dict[str, float]) -> list[Bar]:
    found = [] if entry.dense is None else [Bar("dense", "dense", entry.dense, number(entry.dense))]
    found.append(Bar("pruned", "pruned", entry.pruned, number(entry.pruned), entry.pruned_interval))
    after = tuned.get(entry.data)
    return found if after is None else [*found, Bar("fine-tuned", "tuned", after, number(after))]


def _row(entry: PerplexityFacts, tuned: dict[str, float] | None) -> list[str]:
    interval = entry.pruned_interval
    after = [] if tuned is None else [number(tuned[entry.data]) if entry.data in tuned else "–"]
    return [
        entry.data,
        "–" if entry.dense is None else number(entry.dense),
        number(entry.pruned),
        *after,
        "–" if interval is None else f"{number(interval[0])} – {number(interval[1])}",
        "–" if entry.pruned_bits_per_byte is None else f"{entry.pruned_bits_per_byte:.4f}",
        str(entry.seqlen),
        str(entry.windows),
    ]


def number(value: float) -> str:
    """A perplexity with as many digits as tell something."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"
