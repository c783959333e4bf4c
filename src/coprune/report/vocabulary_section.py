"""The cost of a smaller vocabulary, as a section of the page and of the model card."""

from __future__ import annotations

from coprune.base.templating import render
from coprune.base.words import Sheet
from coprune.report.view import Paragraph, Section
from coprune.vocabulary.cut_facts import TextCost, VocabularyFacts

_HEAD = ("text", "bytes", "tokens per byte", "change", "bits per byte", "change")


def vocabulary_section(facts: VocabularyFacts) -> Section:
    """Return tokens and bits per byte before and after, with the rest of the facts."""
    warning = facts.warning()
    warn = [] if warning is None else [Paragraph(warning, "warn")]
    return Section("Vocabulary", [*warn, _table(facts), *map(Paragraph, _others(facts))])


def vocabulary_markdown(facts: VocabularyFacts) -> str:
    """Return the section as Markdown."""
    template = "report/templates/vocabulary.md.j2"
    return render(template, warning=facts.warning(), table=_table(facts), others=_others(facts))


def _others(facts: VocabularyFacts) -> list[str]:
    """Return the facts that are neither in the table nor in the warning."""
    told = {facts.warning(), *(one.line() for one in facts.texts)}
    return [line for line in facts.lines() if line not in told]


def _table(facts: VocabularyFacts) -> Sheet:
    return Sheet("", [_row(one) for one in facts.texts], _HEAD)


def _row(cost: TextCost) -> list[str]:
    tokens = " → ".join(f"{count / cost.bytes:.3f}" for count in cost.tokens)
    bits = "not measured" if cost.bits is None else " → ".join(f"{bits:.4f}" for bits in cost.bits)
    more = "" if cost.more_bits is None else f"{cost.more_bits:+.2%}"
    return [cost.text, f"{cost.bytes:,}", tokens, f"{cost.more_tokens:+.1%}", bits, more]
