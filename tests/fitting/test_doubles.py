"""Near-duplicates are found among items, and text of unseen items in calibration text."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.fitting.calibration import calibration_of
from coprune.fitting.doubles import clusters_of, holding
from coprune.fitting.tasks import Task, read_tasks

WORDS = [f"{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}{number * 7919 % 997}" for number in range(900)]


def sentences(count: int, seed: int = 0, words: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.sample(WORDS, words)) for _ in range(count)]


def changed(text: str) -> list[str]:
    first, second, *rest = text.split()
    return [text.upper(), f"{text} ", f"{first}  {second} {' '.join(rest)}", " ".join([first, "another", *rest])]


def test_texts_that_differ_by_a_space_case_or_word_are_duplicates() -> None:
    texts = sentences(20)
    found = clusters_of([*texts, *(other for text in texts for other in changed(text))])
    assert len(set(found)) == 20
    assert found[20:] == [number for number in found[:20] for _ in range(4)]


@pytest.mark.parametrize("templates", [1, 3])
def test_items_that_share_an_instruction_are_not_duplicates(templates: int) -> None:
    texts = [f"Instruction {place % templates}: answer this. " * 20 + text for place, text in enumerate(sentences(60))]
    assert len(set(clusters_of(texts))) == 60
    assert len(set(clusters_of([f"What is {one} plus {one * 3 % 7}?" for one in range(100)]))) == 100


def test_a_text_within_another_is_a_duplicate_of_it() -> None:
    texts = sentences(20, words=30)
    assert len(set(clusters_of([*texts, " ".join(texts[0].split()[:25])]))) == 20


def items_file(folder: Path, name: str, prompts: list[str]) -> str:
    (file := folder / name).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(file)


def prompts_of(task: Task, half: str) -> set[str]:
    return {task.items[place].asked for place in getattr(task, half)}


def test_an_item_in_two_tasks_is_in_the_same_half_of_both(tmp_path: Path) -> None:
    prompts = sentences(60)
    names = [items_file(tmp_path, "a.jsonl", prompts[:40]), items_file(tmp_path, "b.jsonl", prompts[20:])]
    one, other = read_tasks(names)
    assert not prompts_of(one, "seen") & prompts_of(other, "unseen")
    assert not prompts_of(one, "unseen") & prompts_of(other, "seen")
    for task in (one, other):
        assert abs(len(task.seen) - len(task.unseen)) <= 4


def test_near_duplicates_are_in_one_half_and_count_once(tmp_path: Path) -> None:
    prompts = sentences(20)
    (task,) = read_tasks(
        [items_file(tmp_path, "a.jsonl", [*prompts, *(two for one in prompts for two in changed(one))])]
    )
    halves = [{task.clusters[place] for place in half} for half in (task.seen, task.unseen)]
    assert not halves[0] & halves[1]
    assert [len(task.apart(half)) for half in (task.seen, task.unseen)] == [10, 10]
    assert len(task.unseen) == 50


def test_duplicates_do_not_add_items(tmp_path: Path) -> None:
    doubles = [text + end for text in sentences(10) for end in ("", " ", "  ")]
    with pytest.raises(BadInput, match="has 10 different items"):
        read_tasks([items_file(tmp_path, "a.jsonl", doubles)])


def test_a_task_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    name = items_file(tmp_path, "a.jsonl", sentences(20))
    with pytest.raises(BadInput, match="is named twice"):
        read_tasks([name, f"{name}:0.5"])


def text_of(task: Task, place: int) -> str:
    return task.items[place].asked


def test_the_task_as_calibration_text_reveals_no_unseen_item(tmp_path: Path) -> None:
    prompts = sentences(40)
    tasks = read_tasks([items_file(tmp_path, "a.jsonl", prompts)])
    more = [f"{one}\n{other}" for one, other in zip(prompts[::2], prompts[1::2], strict=True)]
    few = [replace(tasks[0], unseen=tasks[0].unseen[:8])]  # a larger budget takes the others later
    passages, line = calibration_of(few, text_of, [*more, "A text of its own."], tasks)
    whole = "\n".join(passage.text for passage in passages)
    assert not [prompt for prompt in prompts_of(tasks[0], "unseen") if prompt in whole]
    assert all(prompt in whole for prompt in prompts_of(tasks[0], "seen"))
    assert "A text of its own." in whole
    assert line.endswith("calibration passages that contain text of unseen items")


def test_pieces_of_an_unseen_item_are_found_in_a_text() -> None:
    unseen, other, shared = sentences(3, words=40)
    assert holding([unseen[60:160].upper(), other, unseen[60:70]], [unseen], []) == {0}
    assert holding([shared + other], [shared + unseen], [shared, f"{shared} more"]) == set()
    assert holding(["A text with the capital of  ITALY is"], ["the capital of Italy"], []) == {0}


def test_calibration_text_of_unseen_items_only_is_refused(tmp_path: Path) -> None:
    (task,) = read_tasks([items_file(tmp_path, "a.jsonl", sentences(40))])
    blind: Any = Task(task.name, task.kind, task.items, (), task.unseen)
    with pytest.raises(BadInput, match="nothing but text of the unseen items"):
        calibration_of([blind], text_of, [*prompts_of(task, "unseen")], [blind])
