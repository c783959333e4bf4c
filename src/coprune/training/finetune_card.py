"""The model card of a fine-tuned model, or of its adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.markdown import front_matter, hub_id, without_places
from coprune.base.templating import render
from coprune.base.words import Sheet, per_cent
from coprune.model.edits import source_of
from coprune.report.answers_section import answers_markdown
from coprune.report.card import versions_used
from coprune.report.wording import versions_line
from coprune.training.finetune_report import AccuracyChange, EmbeddingsChange, FinetuneReport, PerplexityChange


def finetune_card(report: FinetuneReport) -> str:
    """Return Markdown with the Hub's metadata header for the fine-tuned model."""
    return _card(report, "transformers")


def adapter_card(report: FinetuneReport, warning: str) -> str:
    """Return the card of adapters. warning: of the effect of merging plain ones."""
    return _card(report, "peft", warning)


def _card(report: FinetuneReport, library: str, warning: str = "") -> str:
    settings = report.settings
    base = hub_id(settings.model.name) or hub_id(_source(settings.model.name))
    metadata: dict[str, Any] = {"library_name": library, "tags": ["coprune", "pruning"]}
    title, results = _results(report)
    card = render(
        "training/templates/finetune_card.md.j2",
        report=report,
        metadata=front_matter(metadata | ({"base_model": base} if base else {})),
        title=Path(settings.model.name).name,
        patterns=", ".join(f"{count} × {name}" for name, count in report.patterns.items()),
        zeros=per_cent(report.sparsity_after),
        adapters=library == "peft",
        warning=warning,
        measured=title,
        results=results,
        answers=None if report.answers is None else answers_markdown(report.answers, report.required),
        versions=versions_line(versions_used(report.versions, of_images=report.block_size is None)),
    )
    return without_places(card, settings.model_dump(mode="json"))


def _source(model: str) -> str:
    """Return the source model recorded in the model's folder; empty if unknown."""
    try:
        return source_of(expand_home(model)) or ""
    except BadInput:
        return ""


def _results(report: FinetuneReport) -> tuple[str, Sheet]:
    """Return the measurements: a title and a table."""
    if report.embeddings:
        of_vectors: dict[str, Callable[[EmbeddingsChange], str]] = {
            "text": lambda one: one.data,
            "passages": lambda one: str(one.after.passages),
            "closeness with the dense model before": lambda one: one.before.headline(),
            "after": lambda one: one.after.headline(),
        }
        return "Embeddings", Sheet.of(report.embeddings, of_vectors)
    if report.transcripts:
        rows = [[one.data, one.line(None)] for one in report.transcripts]
        return "Transcripts", Sheet("", rows, ["recordings", "before → after"])
    if report.accuracy or report.block_size is None:
        of_images: dict[str, Callable[[AccuracyChange], str]] = {
            "images": lambda one: one.data,
            "number": lambda one: str(one.images),
            "top-1 before": lambda one: per_cent(one.before_top1),
            "top-1 after": lambda one: per_cent(one.after_top1),
            "top-5 before": lambda one: per_cent(one.before_top5),
            "top-5 after": lambda one: per_cent(one.after_top5),
        }
        return "Accuracy", Sheet.of(report.accuracy, of_images)
    of_texts: dict[str, Callable[[PerplexityChange], str]] = {
        "text": lambda one: one.data,
        "sequence length": lambda one: str(one.seqlen),
        "before": lambda one: f"{one.before:.2f}",
        "after": lambda one: f"{one.after:.2f}",
    }
    return "Perplexity", Sheet.of(report.perplexity, of_texts)
