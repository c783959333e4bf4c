"""Answers on the page of a run: figures beside the dense model's, and samples side by side."""

from __future__ import annotations

from collections.abc import Sequence

from coprune.evaluation.answers.facts import AnswerFacts, Requirement
from coprune.report.answers import answer_table, note, shortened
from coprune.report.html import quote, section, table, text

_OPEN = 4  # answers to be seen at once
# The model before a fine-tuning has the pruned one's colour.
_KINDS = {"dense": "dense", "before": "pruned", "pruned": "pruned", "fine-tuned": "tuned"}


def answers_section(facts: AnswerFacts, required: Sequence[Requirement], who: str = "pruned") -> str:
    """Return the section of a run's page, as HTML. who: the model's title, `pruned` or `fine-tuned`."""
    warn = ' class="warn"' if facts.degenerates else ""
    lines = f"<p{warn}>{text(facts.verdict())}.</p>"
    lines += "".join(f"<p>Required: {text(one.line())}.</p>" for one in required)
    # Looping and empty answers first, since they matter most.
    shown = sorted(facts.samples, key=lambda sample: not (sample.loops or sample.empty))
    samples = [
        f'<p class="asked">{text(sample.prompt)}</p><div class="two">'
        f"{_answer(facts.reference, sample.dense, _ill(bool(sample.dense_loops), sample.dense_empty))}"
        f"{_answer(who, sample.answer, _ill(sample.loops, sample.empty))}</div>"
        for sample in shown
    ]
    first, rest = "".join(samples[:_OPEN]), "".join(samples[_OPEN:])
    rest = f"<details><summary>{len(samples) - _OPEN} more</summary>{rest}</details>" if rest else ""
    return section("What it writes", lines, table(*answer_table(facts, who)), first, rest, note=note(facts))


def _ill(loops: bool, empty: bool) -> str:
    """Return the faults of an answer, to follow its model's name."""
    return ", loops" * loops + ", empty" * empty


def _answer(who: str, answer: str | None, ill: str) -> str:
    return "" if answer is None else quote(_KINDS[who], who + ill, shortened(answer))
