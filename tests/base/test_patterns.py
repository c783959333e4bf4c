"""Foreign regular expressions run within limits."""

from __future__ import annotations

import time

import pytest

from coprune.base.patterns import is_found, require_pattern


def test_ordinary_regular_expressions_match() -> None:
    require_pattern(r"\b4\b")
    assert is_found(r"\b4\b", "It is 4.")
    assert not is_found(r"\b4\b", "It is 44.")
    assert is_found(r"(?s)^a.*\x00$", "a\n\x00")


def test_a_search_without_end_finds_nothing_within_a_second() -> None:
    pattern = r"^(\w+\s?)*\(never\)$"
    require_pattern(pattern)
    started = time.perf_counter()
    assert not is_found(pattern, "word " * 40 + "!")
    assert time.perf_counter() - started < 5  # generous, for a busy machine


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "missing"),
        ("(" * 50_000 + ")" * 50_000, "100,000 characters"),
        ("(" * 990 + ")" * 990, "nested too deep"),
        (5, "not text"),
    ],
)
def test_invalid_patterns_are_refused(pattern: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_pattern(pattern)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["(?:(?:(?:(?:a?){999}){999}){999}){999}", "a{1000000}" * 100])
def test_a_pattern_that_takes_gigabytes_to_compile_is_refused(pattern: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"second|memory|nested"):
        require_pattern(pattern)
    assert time.perf_counter() - started < 40
