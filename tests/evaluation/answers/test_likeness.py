"""How like another answer is: tokens up to the first difference, and scripts."""

from __future__ import annotations

import pytest

from coprune.evaluation.answers.answer_records import agreed_share, script_agreement, scripts


def test_tokens_agree_until_the_first_difference() -> None:
    assert agreed_share([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert agreed_share([1, 2, 3, 4], [1, 2, 3, 4, 5]) == 1
    assert agreed_share([1, 2, 3, 4], [1]) == 0.25
    assert agreed_share([1], [2, 1]) == agreed_share([1], []) == agreed_share([], [1]) == 0
    assert agreed_share([], []) == 1


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Häuser, naïve: 12 %", "LATIN"),
        ("Ｆｕｌｌ", "LATIN"),
        ("Привет", "CYRILLIC"),
        ("你好", "CJK"),
        ("ひらがな", "HIRAGANA"),
        ("カタカナー", "KATAKANA"),
        ("مرحبا", "ARABIC"),
        ("नमस्ते", "DEVANAGARI"),
        ("안녕", "HANGUL"),
        ("Ελλάδα", "GREEK"),
        ("שלום", "HEBREW"),
    ],
)
def test_letters_tell_their_script(text: str, script: str) -> None:
    assert {name for name, count in scripts(text).items() if count > 1 or name == script} == {script}


def test_scripts_agree_as_far_as_their_shares_do() -> None:
    assert script_agreement("abcd", "wxyz 你"[:4]) == 1
    assert script_agreement("Привет", "hello") == 0
    assert script_agreement("ab你好", "abcd") == 0.5
    assert script_agreement("ab", "12") == 0
    assert script_agreement("12 + 3 �", "hello") is None
