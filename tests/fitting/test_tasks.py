"""Items of every kind, their two halves, and refusals in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.fitting.require import wanted
from coprune.fitting.score import is_right
from coprune.fitting.tasks import Item, shared_out
from support.task_items import read_task

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


@pytest.mark.parametrize("file", ["prompts.jsonl", "text.txt"])
def test_the_examples_have_enough_items_for_the_default_conditions(file: str) -> None:
    (task,), _ = wanted([str(EXAMPLES / file)], None)
    assert len(task.apart(task.unseen)) >= 50  # enough even if half of the allowed loss is used up


def rows(*given: Any, times: int = 20) -> list[dict[str, Any]]:
    return [{**row, "prompt": f"{row.get('prompt', 'q')} {number}"} for number in range(times) for row in given]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no items"),
        (rows({"choices": ["yes", "no"], "answer": "yes"}, {"choices": ["no", "yes"], "answer": "yes"}), "one right"),
        (rows({"answer": "yes"}), "one right answer"),
        (rows({"choices": ["yes", "no"], "answer": "maybe"}), "not among its choices"),
        (rows({"choices": ["yes"], "answer": 0}), "at least two texts"),
        (rows({"regex": "("}), "regular expression"),
        (rows({"answer": ""}), "empty answer"),
        (rows({"answer": "a"}, {}), "several kinds"),
        (rows({"answer": "a"}, {"answer": "b"}, times=3), "3 different items"),
        ([{"prompt": "the same", "regex": "a"}] * 100, "1 different items"),
        (
            [{"question": "q", "options": ["a", "b"]}],
            "no prompt; its columns are 'question', 'options'; name them as in",
        ),
        (["text"], "no object"),
    ],
)
def test_malformed_items_are_refused(given: list[Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    with pytest.raises(BadInput, match=said):
        read_task(str(file))


@pytest.mark.parametrize(
    ("answer", "right"), [("blue", "blue"), (1, "blue"), ("1", "blue"), ("B", "blue"), (" c ", "A"), ("A", "A")]
)
def test_an_answer_may_be_a_text_an_index_or_a_letter(answer: Any, right: str, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    others = rows({"choices": ["red", "blue", "A"], "answer": "red"})
    said = [*others, {"prompt": "last", "choices": ["red", "blue", "A"], "answer": answer}]
    file.write_text("".join(json.dumps(row) + "\n" for row in said))
    assert read_task(str(file)).items[-1].answer == right


def test_the_rows_of_a_table_are_items(tmp_path: Path) -> None:
    rows = [{"prompt": f"What, is\n{number}?", "answer": str(number)} for number in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ending, between in (".csv", ","), (".tsv", "\t"):
        with (tmp_path / f"mine{ending}").open("w", newline="") as stream:
            csv.DictWriter(stream, ["prompt", "answer"], delimiter=between).writerows(
                [{"prompt": "prompt", "answer": "answer"}, *rows]
            )
    lines, *tables = (read_task(str(tmp_path / f"mine{ending}")) for ending in (".jsonl", ".csv", ".tsv"))
    assert lines.kind == "answer"
    assert [table.items for table in tables] == [lines.items] * 2
    (tmp_path / "tickets.csv").write_text("question,label\n" + "".join(f"why {number}?,yes\n" for number in range(40)))
    with pytest.raises(BadInput, match="has no prompt; its columns are 'question', 'label'"):
        read_task(str(tmp_path / "tickets.csv"))
    (tmp_path / "tickets.csv").write_text("prompt,answer\nwhy,yes,no\n")
    with pytest.raises(BadInput, match="line 2 has more cells than the first line"):
        read_task(str(tmp_path / "tickets.csv"))


def _definition(place: Path, name: str, kind: str = "multiple_choice") -> str:
    items = [{"q": f"what is {number}?", "c": ["a", "b"], "right": number % 2} for number in range(20)]
    (file := place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
        f'output_type: {kind}\ndoc_to_text: "Q: {{{{q}}}}\\nA:"\ndoc_to_choice: "{{{{c}}}}"\ndoc_to_target: right\n'
    )


def test_a_task_of_lm_eval_may_have_a_share(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for name, kind in (("own", "multiple_choice"), ("writes", "generate_until")):
        (tmp_path / f"{name}.yaml").write_text(_definition(tmp_path, name, kind))
    task = read_task(f"{tmp_path}/own.yaml:0.25")
    assert (task.kind, task.share, len(task.items)) == ("choice", 0.25, 20)
    assert Item("Q: what is 3?\nA:", ("a", "b"), "b") in task.items
    with pytest.raises(BadInput, match="not a multiple-choice task of lm-eval with one prompt"):
        read_task(str(tmp_path / "writes.yaml"))
    with pytest.raises(BadInput, match="share of 0"):
        read_task("own.jsonl:0")


def test_a_definition_is_taken_from_its_file_whatever_its_task_is_called(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "arc_easy.yaml").write_text(_definition(tmp_path, "own"))
    (tmp_path / "other.yaml").write_text(_definition(tmp_path, "arc_easy").replace("Q: ", "other: "))
    task = read_task(str(tmp_path / "arc_easy.yaml"))
    assert Item("Q: what is 3?\nA:", ("a", "b"), "b") in task.items
    with pytest.raises(BadInput, match=r"missing\.yaml does not exist"):
        read_task(str(tmp_path / "missing.yaml"))


def test_texts_are_selected_by_share_up_to_their_number() -> None:
    texts = [["a" * 10] * 30, ["b" * 10] * 10]
    found = shared_out(texts, [0.5, 0.5])
    assert len(found) == 40
    found = shared_out(texts, [0.3, 0.7])
    assert (found.count("a" * 10), found.count("b" * 10)) == (4, 10)


def test_is_right_compares_normalised_answers() -> None:
    item = Item("The capital of Italy is", answer="Rome")
    assert is_right(item, "  rome.\nThe capital of Spain is Madrid")
    assert not is_right(item, "Rome, of course")
    assert not is_right(item, "")
    assert is_right(Item("q", regex=r"\b4\b"), "It is 4.")


def test_chance_is_the_most_frequent_class(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    given = rows({"choices": ["yes", "no"], "answer": "yes"}, *[{"choices": ["no", "yes"], "answer": "no"}] * 3)
    given = [row | {"prompt": f"{row['prompt']} {place}"} for place, row in enumerate(given)]
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    assert read_task(str(file)).chance == 0.75
    assert read_task(str(EXAMPLES / "choice.jsonl")).chance == 0.25
