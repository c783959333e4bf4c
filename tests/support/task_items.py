"""Items of zero-shot tasks in the Hub's formats, made of the pico tokenizer's words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from coprune.fitting.tasks import Task, read_tasks

DEFINITIONS = Path(__file__).parents[2] / "docs" / "tasks"
TASKS = ("arc_easy", "winogrande", "piqa", "hellaswag")


def read_task(name: str, seed: int = 0, trusted: bool = False) -> Task:
    """Read the items of one task of a fit."""
    return read_tasks([name], seed, trusted=trusted)[0]


def word_items(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Write items of four tasks in the Hub's formats, made of the pico tokenizer's words."""
    generator = random.Random(seed)

    def words(length: int) -> str:
        return " ".join(f"w{generator.randrange(3, 256)}" for _ in range(length))

    items: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for index in range(count):
        letters = ["A", "B", "C", "D"]
        items["arc_easy"].append(
            {
                "id": str(index),
                "question": words(5),
                "choices": {"text": [words(3) for _ in letters], "label": letters},
                "answerKey": generator.choice(letters),
            }
        )
        items["winogrande"].append(
            {
                "sentence": f"{words(4)} _ {words(3)}",
                "option1": words(1),
                "option2": words(1),
                "answer": generator.choice("12"),
            }
        )
        items["piqa"].append({"goal": words(6), "sol1": words(4), "sol2": words(5), "label": generator.randrange(2)})
        items["hellaswag"].append(
            {
                "ind": index,
                "activity_label": words(2),
                "ctx_a": words(4),
                "ctx_b": words(2),
                "endings": [words(5) for _ in letters],
                "label": str(generator.randrange(4)),
            }
        )
    folder.mkdir(exist_ok=True)
    for task, rows in items.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
