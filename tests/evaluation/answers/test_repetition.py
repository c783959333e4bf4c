"""The loop detector on constructed texts."""

from __future__ import annotations

import random

import pytest

from coprune.evaluation.answers.answer_records import (
    LEAST_TIMES,
    LEAST_TOKENS,
    Loop,
    find_loop,
)


def words(text: str) -> list[int]:
    """Return ids of a text's words, punctuation and line breaks, with separate digits, as tokenizers do."""
    pieces = "".join(f" {c} " if not c.isalpha() and c != " " else c for c in text.replace("\n", " ¶ ")).split(" ")
    return [hash(piece) for piece in pieces if piece]


def noise(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(10_000, 90_000), count)


@pytest.mark.parametrize("period", range(1, 43))
def test_a_loop_of_any_period_is_found_at_any_position(period: int) -> None:
    once = noise(period, seed=1)
    times = max(LEAST_TIMES, -(-LEAST_TOKENS // period))
    for begun in (0, 5):
        for cut in (0, period // 2):
            tokens = noise(begun) + once * times + once[:cut]
            assert find_loop(tokens) == Loop(period, period * times + cut)
    assert find_loop(noise(9) + once * times)
    assert find_loop(once * times, ended=True) is None


@pytest.mark.parametrize("period", range(1, 43))
def test_few_or_short_repetitions_are_not_a_loop(period: int) -> None:
    once = noise(period, seed=1)
    assert find_loop(noise(60) + once * (LEAST_TIMES - 1)) is None
    assert find_loop(noise(60) + (once * LEAST_TOKENS)[: LEAST_TOKENS - 1 if period < 7 else 2 * period]) is None


def test_a_loop_that_ended_is_not_reported() -> None:
    assert find_loop(noise(6) * 10 + noise(40, seed=2)) is None
    assert find_loop(noise(6) * 10 + noise(1, seed=2)) is not None


def test_a_loop_with_a_running_number_is_found() -> None:
    counting = "".join(f"{number}. The capital of France is Paris.\n" for number in range(1, 8))
    assert find_loop(words(counting)) is not None
    changing = noise(12) * 4
    changing[17] = changing[30] = 1
    assert find_loop(changing) is not None


@pytest.mark.parametrize(
    "text",
    [
        "".join(
            f"- {name}\n"
            for name in [
                "oak",
                "ash",
                "elm",
                "yew",
                "fir",
                "birch",
                "beech",
                "maple",
                "cedar",
                "larch",
                "alder",
                "rowan",
            ]
        ),
        "".join(
            f"{n}. {name}\n"
            for n, name in enumerate(
                ["red", "orange", "yellow", "green", "blue", "indigo", "violet", "pink", "grey"], 1
            )
        ),
        "| name | age |\n| --- | --- |\n| Ann | 31 |\n| Bob | 47 |\n| Cid | 29 |\n| Dora | 83 |\n| Emil | 52 |\n",
        "| a | b | c |\n| --- | --- | --- |",
        "".join(f"7 x {n} = {7 * n}\n" for n in range(1, 11)),
        "".join(f"{n}, " for n in range(80, 140)),
        "".join(f"    self.{name} = {name}\n" for name in ["model", "data", "seed", "steps", "rate", "width", "depth"]),
        "".join(
            f'{{"name": "{name}", "age": {len(name)}}},\n'
            for name in ["ann", "bob", "carla", "dieter", "eva", "franz", "gerd"]
        ),
        "No, no, no!",
        "ha ha ha ha ha",
        "",
        "w",
    ],
)
def test_lists_tables_and_short_answers_are_not_loops(text: str) -> None:
    assert find_loop(words(text)) is None
