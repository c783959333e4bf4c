"""The cost of a smaller vocabulary, as a section of the page and of the model card."""

from __future__ import annotations

from coprune.report.html import panel, section, table, text
from coprune.report.markdown import inline
from coprune.vocabulary.facts import TextCost, VocabularyFacts

_HEAD = ("text", "bytes", "tokens per byte", "change", "bits per byte", "change")


def vocabulary_section(facts: VocabularyFacts) -> str:
    """Return tokens and bits per byte before and after, with the rest of the facts, as HTML."""
    loud = facts.loud()
    warn = "" if loud is None else f'<p class="warn">{text(loud)}</p>'
    others = [line for line in facts.lines() if line not in {one.line() for one in facts.texts} and line != loud]
    notes = panel("".join(f"<p>{text(line)}</p>" for line in others), whole=False)
    return section("Vocabulary", warn, table(_HEAD, [_row(one) for one in facts.texts]), notes)


def vocabulary_markdown(facts: VocabularyFacts) -> str:
    """Return the section as Markdown."""
    rows = [f"| {' | '.join([inline(first), *rest])} |" for first, *rest in map(_row, facts.texts)]
    loud = facts.loud()
    others = [line for line in facts.lines() if line not in {one.line() for one in facts.texts} and line != loud]
    lines = [
        *([f"**{inline(loud)}**", ""] if loud else []),
        f"| {' | '.join(_HEAD)} |",
        "| --- " * len(_HEAD) + "|",
        *rows,
    ]
    return "\n".join([*lines, "", *(f"- {inline(line)}" for line in others)])


def _row(cost: TextCost) -> list[str]:
    tokens = " → ".join(f"{count / cost.bytes:.3f}" for count in cost.tokens)
    bits = "not measured" if cost.bits is None else " → ".join(f"{bits:.4f}" for bits in cost.bits)
    more = "" if cost.more_bits is None else f"{cost.more_bits:+.2%}"
    return [cost.text, f"{cost.bytes:,}", tokens, f"{cost.more_tokens:+.1%}", bits, more]
