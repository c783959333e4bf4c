"""Answers on pages and model cards: figures next to the dense model's, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coprune.base.templating import render
from coprune.base.words import Sheet
from coprune.evaluation.answers.answer_facts import AnswerFacts, Requirement
from coprune.evaluation.answers.answer_records import Figures
from coprune.report.view import Folded, Kind, Paragraph, Part, Quote, Quotes, Section

_SHOWN = 2
_MOST_LETTERS = 600
# Name and format of each figure.
_FIGURES: dict[str, Callable[[Figures], str]] = {
    "answers that loop": lambda found: f"{found.loops} of {found.answers}",
    "answers that are empty": lambda found: f"{found.empty} of {found.answers}",
    "answers that end by themselves": lambda found: f"{found.ended} of {found.answers}",
    "tokens of an answer": lambda found: f"{found.tokens:.1f}",
}


def answer_table(facts: AnswerFacts, who: str = "this model") -> Sheet:
    """Return the figures of the dense model and this one, for greedy and sampled answers.

    who: the name of this model.
    """
    ways = [("greedy", facts.greedy)]
    ways += [(f"sampled at {facts.temperature:g}", facts.sampled)] if facts.sampled is not None else []
    two = facts.greedy.dense is not None
    header = ["figure", *(f"{of}, {name}" for name, _ in ways for of in ([facts.reference] if two else []) + [who])]
    rows = []
    for name, show in _FIGURES.items():
        cells = [show(found) for _, way in ways for found in ([way.dense] if way.dense else []) + [way.figures]]
        rows.append([name, *cells])
    if facts.along is not None:
        rest = [""] * (len(header) - 3)
        kl = f"{facts.along.kl:.4f}"
        rows.append(["KL along the dense model's answers (nats a token)", "", kl, *rest])
        rows.append(["acceptance along the dense model's answers", "", f"{facts.along.acceptance:.4f}", *rest])
    return Sheet("", rows, header)


def note(facts: AnswerFacts) -> str:
    """Return a sentence about the prompts and the template."""
    how = "in the tokenizer's chat template" if facts.chat else "continued as plain text"
    return f"Prompts: {facts.prompts} ({len(facts.samples)}), {how}; at most {facts.new_tokens} tokens an answer."


def answers_markdown(facts: AnswerFacts, required: Sequence[Requirement]) -> str:
    """Return the section of a card."""
    samples = [
        (sample.prompt, None if sample.dense is None else shortened(sample.dense), shortened(sample.answer))
        for sample in facts.samples[:_SHOWN]
    ]
    shown: dict[str, Any] = {"facts": facts, "note": note(facts), "table": answer_table(facts)}
    return render("report/templates/answers.md.j2", **shown, required=required, samples=samples)


def shortened(answer: str) -> str:
    """Return an answer, cut if very long; mark an empty one."""
    if not answer.strip():
        return "(no text)"
    return answer if len(answer) <= _MOST_LETTERS else f"{answer[:_MOST_LETTERS]} …"


_OPEN = 4  # answers shown without unfolding
# A model before fine-tuning has the pruned one's colour.
_KINDS: dict[str, Kind] = {"dense": "dense", "before": "pruned", "pruned": "pruned", "fine-tuned": "tuned"}


def answers_section(facts: AnswerFacts, required: Sequence[Requirement], who: str = "pruned") -> Section:
    """Return the section of a run's page. who: the model's title, `pruned` or `fine-tuned`."""
    verdict = Paragraph(f"{facts.verdict()}.", "warn" if facts.degenerates else "")
    # Looping and empty answers first, since they matter most.
    shown = sorted(facts.samples, key=lambda sample: not (sample.loops or sample.empty))
    samples = [
        Quotes(
            [
                *_answer(facts.reference, sample.dense, _faults(bool(sample.dense_loops), sample.dense_empty)),
                *_answer(who, sample.answer, _faults(sample.loops, sample.empty)),
            ],
            asked=sample.prompt,
        )
        for sample in shown
    ]
    rest = [Folded(f"{len(samples) - _OPEN} more", samples[_OPEN:])] if len(samples) > _OPEN else []
    conditions = [Paragraph(f"Required: {one.line()}.") for one in required]
    parts: list[Part] = [verdict, *conditions, answer_table(facts, who), *samples[:_OPEN], *rest]
    return Section("What it writes", parts, note(facts))


def _faults(loops: bool, empty: bool) -> str:
    """Return the faults of an answer, appended to its model's name."""
    return ", loops" * loops + ", empty" * empty


def _answer(who: str, answer: str | None, ill: str) -> list[Quote]:
    return [] if answer is None else [Quote(_KINDS[who], who + ill, shortened(answer))]
