"""Warnings of a report: lost languages, and cuts that do not pay."""

from __future__ import annotations

from typing import Any

from coprune.vocabulary.cut_facts import TextCost, VocabularyFacts


def cost(text: str, tokens: tuple[int, int], bits: tuple[float, float] | None = None) -> TextCost:
    return TextCost(text=text, bytes=1000, tokens=tokens, bits=bits)


def facts(*texts: TextCost, **more: Any) -> VocabularyFacts:
    sizes = {"before": 1000, "after": 640, "essential": 300, "parts": 20, "bytes_before": 100, "bytes_after": 60}
    return VocabularyFacts(kind="BPE", counted=["en 100%"], texts=list(texts), **{**sizes, **more})


def test_only_languages_that_the_full_vocabulary_covered_are_reported_as_lost() -> None:
    german, thai = cost("German", (250, 400), (1.0, 1.4)), cost("Thai", (700, 1000))
    said = facts(cost("mine", (200, 201), (1.0, 1.005)), german, thai).warning()
    assert said is not None
    assert "German +40%" in said
    assert "Thai" not in said
    assert facts(cost("mine", (200, 201))).warning() is None


def test_a_cut_that_costs_more_than_fewer_bits_is_reported() -> None:
    dear = facts(cost("mine", (200, 210), (1.0, 1.053)), bytes_after=93)
    assert any(line.startswith("DOES NOT PAY") for line in dear.lines())
    assert not any(line.startswith("DOES NOT PAY") for line in facts(cost("mine", (200, 201), (1.0, 1.008))).lines())
