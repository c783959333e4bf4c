"""The last lines of a run: a verdict on its model, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coprune.base.words import Command, Set, Words, say

if TYPE_CHECKING:
    from coprune.evaluation.answers.answer_facts import AnswerFacts
    from coprune.training.finetune_report import FinetuneReport


def verdict_on(answers: AnswerFacts) -> str:
    """Return a verdict on a model's text, compared with the dense model or with itself before training."""
    other = "it did before" if answers.reference == "before" else "the dense model does"
    said = (
        f"worse than {other}" if answers.degenerates else f"no worse than {other.removesuffix(' does')} by this check"
    )
    return f"it writes {said} ({answers.verdict()})"


def closing_of_training(report: FinetuneReport) -> list[tuple[str, str]]:
    """Return the last lines of a fine-tuning."""
    verdict = [f"perplexity {one.line()}" for one in report.perplexity[:1]]
    verdict += [one.line() for one in report.accuracy[:1]] + [one.line() for one in report.embeddings[:1]]
    verdict += [one.line("before") for one in report.transcripts[:1]]
    verdict += [] if report.answers is None else [verdict_on(report.answers)]
    lines = [("verdict", "; ".join(verdict))] if verdict else []
    return [*lines, ("next", say(_after_training(report)))]


def _after_training(report: FinetuneReport) -> Words:
    saved, asked = report.saved_model, report.settings
    if saved is None:
        assert report.adapter is not None
        return (
            "merge the adapters into the model: ",
            Command("merge", Path(asked.model.name), report.adapter, "OUTPUT"),
        )
    if report.answers is None:
        return ("measure it on other data: ", Command("evaluate", saved, Set("eval_data", ...)))
    if report.answers.degenerates:
        return ("train longer with ", Set("minutes", ...), ", or prune less")
    return ("for llama.cpp and Ollama: ", Command("export", saved, f"{saved.name}.gguf", Set("type", "q8_0")))
