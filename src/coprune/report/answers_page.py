"""What a model writes, on the page of a run: figures of its answers beside the dense model's, and samples side by side."""

from __future__ import annotations

from collections.abc import Sequence

from coprune.evaluation.answers.facts import AnswerFacts
from coprune.evaluation.answers.requirements import Requirement
from coprune.report.answers import answer_table, note, shortened
from coprune.report.html import section, table, text

_SHOWN = 12


def answers_section(facts: AnswerFacts, required: Sequence[Requirement], tuned: bool = False) -> str:
    """The section of a run's page, as HTML. tuned: whether the model was fine-tuned after it was pruned."""
    which = "fine-tuned" if tuned else "pruned"
    warn = ' class="warn"' if facts.degenerates else ""
    lines = f"<p{warn}>{text(facts.verdict())}.</p>"
    lines += "".join(f"<p>Required: {text(one.line())}.</p>" for one in required)
    # Those that loop or are empty come first, since they are what to look at.
    shown = sorted(facts.samples, key=lambda sample: not (sample.loops or sample.empty))[:_SHOWN]
    samples = "".join(
        f'<p class="soft">{text(sample.prompt)}</p><div class="two">'
        f"{_quote(facts.reference, sample.dense, _ill(bool(sample.dense_loops), sample.dense_empty))}"
        f"{_quote(which, sample.answer, _ill(sample.loops, sample.empty))}</div>"
        for sample in shown
    )
    return section("What it writes", lines, table(*answer_table(facts)), samples, note=note(facts))


def _ill(loops: bool, empty: bool) -> str:
    """What is wrong with an answer, to stand behind its model's name."""
    return ", loops" * loops + ", empty" * empty


def _quote(which: str, answer: str | None, ill: str) -> str:
    if answer is None:
        return ""
    said = f"<blockquote>{text(shortened(answer))}</blockquote>"
    return f'<div class="panel"><div class="tag {which.replace("fine-tuned", "pruned")}">{text(which + ill)}</div>{said}</div>'
