"""Removal from every pico family as its page says; all families in the slow tests, a few in the quick ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from families.removal import ALL, PAGE, Row, kill_and_resume, page, read_page, tried


def test_the_page_has_every_family_and_round_trips() -> None:
    rows = read_page()
    assert [row.family for row in rows] == ALL
    assert page(rows) == PAGE.read_text(encoding="utf-8")
    refused = {(row.family, part) for row in rows for part in row.refused}
    assert ("mixtral", "experts") not in refused
    assert {("gpt2", "heads"), ("llama", "experts"), ("llama4_text", "experts")} <= refused


@pytest.mark.parametrize(
    ("family", "remove"),
    [
        pytest.param("deepseek_v3", "experts=0.25,channels=0.4", marks=pytest.mark.slow),
        pytest.param("jamba", "blocks=0.34", marks=pytest.mark.slow),
    ],
)
def test_a_killed_removal_resumes_to_the_same_bytes(family: str, remove: str, tmp_path: Path) -> None:
    kill_and_resume(family, remove, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", read_page(), ids=lambda row: row.family)
def test_removal_from_a_family_matches_its_page(row: Row, tmp_path: Path) -> None:
    assert tried(row.family, tmp_path) == row
