"""Choice of the kept tokens: required ones, then those with the largest weights, each with its merge parts."""

from __future__ import annotations

import numpy as np
import pytest

from coprune.vocabulary.choose import choose
from coprune.vocabulary.counts import has_words, sources_of
from coprune.vocabulary.samples import LANGUAGES, SOURCES

MADE_BY = {300: (200, 201), 450: (440,)}


def test_required_and_heavy_tokens_are_kept_with_their_merge_parts() -> None:
    weights = np.zeros(512)
    weights[[450, 499, 498]] = 3, 2, 1
    kept = choose(64, weights, [300], lambda token: None if token == 498 else MADE_BY.get(token, ()))
    named = {300, 200, 201, 450, 440, 499}
    assert kept.old == (*range(64 - len(named)), *sorted(named))  # 498 occurs in no text; small ids fill up
    assert [kept.new[token] for token in kept.old] == list(range(64))
    assert kept.below(201) == 64 - len(named) + 1


@pytest.mark.skipif(not has_words(), reason="wordfreq is not installed")
@pytest.mark.parametrize("name", ["en", "de", "fr", "ru"])
def test_languages_and_code_are_detected(name: str) -> None:
    assert sources_of(LANGUAGES[name]) == [name]
    assert sources_of("") == []
    assert "code" in sources_of(SOURCES["javascript"])
