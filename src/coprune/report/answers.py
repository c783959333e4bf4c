"""Answers on the model card: figures beside the dense model's, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coprune.evaluation.answers.answer_records import Figures
from coprune.evaluation.answers.facts import AnswerFacts, Requirement
from coprune.report.html import quote, section, table, text
from coprune.report.markdown import inline

_SHOWN = 2
_MOST_LETTERS = 600
# What each figure is called, and how it is written.
_FIGURES: dict[str, Callable[[Figures], str]] = {
    "answers that loop": lambda found: f"{found.loops} of {found.answers}",
    "answers that are empty": lambda found: f"{found.empty} of {found.answers}",
    "answers that end by themselves": lambda found: f"{found.ended} of {found.answers}",
    "tokens of an answer": lambda found: f"{found.tokens:.1f}",
}


def answer_table(facts: AnswerFacts, who: str = "this model") -> tuple[list[str], list[list[str]]]:
    """Return header and rows: each figure of the dense model and of this one, for greedy and for sampled answers.

    who: the name of this one.
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
        kl = f"{facts.along.kl:.4f}"
        rows.append(["KL along the dense model's answers (nats a token)", "", kl, *[""] * (len(header) - 3)])
        accepted = f"{facts.along.acceptance:.4f}"
        rows.append(["acceptance along the dense model's answers", "", accepted, *[""] * (len(header) - 3)])
    return header, rows


def note(facts: AnswerFacts) -> str:
    """Return a sentence on the prompts and the template."""
    how = "in the tokenizer's chat template" if facts.chat else "continued as they stand"
    return f"Prompts: {facts.prompts} ({len(facts.samples)}), {how}; at most {facts.new_tokens} tokens an answer."


def answers_markdown(facts: AnswerFacts, required: Sequence[Requirement]) -> str:
    """Return the section of a card."""
    header, rows = answer_table(facts)
    lines = [f"**{facts.verdict()}** (greedy). {inline(note(facts))}", ""]
    lines += [
        f"| {' | '.join(header)} |",
        "| --- " * len(header) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    lines += [f"- Required: {inline(one.line())}" for one in required]
    for sample in facts.samples[:_SHOWN]:
        lines += ["", f"> {inline(sample.prompt)}", ""]
        lines += [] if sample.dense is None else [f"- {facts.reference}: {inline(shortened(sample.dense))}"]
        lines.append(f"- this model: {inline(shortened(sample.answer))}")
    return "\n".join(lines)


def shortened(answer: str) -> str:
    """Return an answer, cut if very long; an empty one is named so."""
    if not answer.strip():
        return "(no text)"
    return answer if len(answer) <= _MOST_LETTERS else f"{answer[:_MOST_LETTERS]} …"


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
