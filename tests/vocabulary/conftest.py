"""Smaller default sources of counts, read once for all tests of this folder."""

from functools import cache

import pytest

from coprune.vocabulary import counts

SOURCE = cache(counts.language_source)


@pytest.fixture(autouse=True)
def less_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_CODE", {("stdlib", ".py"): 200_000})
    monkeypatch.setattr(counts, "_FILLING", {"en": 1_000, counts.CODE: 20})
    monkeypatch.setattr(counts, "language_source", SOURCE)
