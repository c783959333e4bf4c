"""Items of every kind, in two halves; and what is refused of them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.fitting.score import is_right
from coprune.fitting.tasks import Item, read_task

EXAMPLES = Path(__file__).parents[2] / "examples" / "fit"


@pytest.mark.parametrize(
    ("file", "kind"),
    [("choice.jsonl", "choice"), ("answer.jsonl", "answer"), ("prompts.jsonl", "prompts"), ("text.txt", "text")],
)
def test_the_halves_of_the_examples_share_no_item(file: str, kind: str) -> None:
    task = read_task(str(EXAMPLES / file))
    assert task.kind == kind
    assert sorted([*task.seen, *task.unseen]) == [*range(len(task.items))]
    assert abs(len(task.seen) - len(task.unseen)) < 2
    assert read_task(str(EXAMPLES / file)) == task
    assert read_task(str(EXAMPLES / file), seed=1).seen != task.seen


def rows(*given: Any, times: int = 20) -> list[dict[str, Any]]:
    return [{**row, "prompt": f"{row.get('prompt', 'q')} {number}"} for number in range(times) for row in given]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no items"),
        (rows({"choices": ["yes", "no"], "answer": "yes"}), "one right answer"),
        (rows({"choices": ["yes", "no"], "answer": "maybe"}), "none of its choices"),
        (rows({"choices": ["yes"], "answer": 0}), "two texts or more"),
        (rows({"regex": "("}), "regular expression"),
        (rows({"answer": ""}), "empty answer"),
        (rows({"answer": "a"}, {}), "several kinds"),
        (rows({"answer": "a"}, times=3), "3 different items"),
        ([{"prompt": "the same", "answer": "a"}] * 100, "1 different items"),
        ([{"question": "q"}], "no prompt"),
        (["text"], "no object"),
    ],
)
def test_bad_items(given: list[Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    with pytest.raises(BadInput, match=said):
        read_task(str(file))


def test_right_answers() -> None:
    item = Item("The capital of Italy is", answer="Rome")
    assert is_right(item, "  rome.\nThe capital of Spain is Madrid")
    assert not is_right(item, "Rome, of course")
    assert not is_right(item, "")
    assert is_right(Item("q", regex=r"\b4\b"), "It is 4.")
