"""Read a task's items from a local file, for the task definitions beside this file.

lm-eval calls `read` with what a definition says under `dataset_kwargs`. The files lie in the folder that the
environment variable TASK_DATA names, or in `data/` beside this file:

    NAME.jsonl, NAME.json or NAME.parquet    the items that are evaluated
    NAME.train.jsonl, .json or .parquet      examples for few-shot prompts, if you want any
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import parquet


def read(name: str, **_: Any) -> dict[str, Dataset]:
    """Return the splits `evaluation` and `train` (empty if there is no file for it) of the task called name."""
    folder = Path(os.environ.get("TASK_DATA", Path(__file__).parent / "data"))
    items = _read(folder, name)
    if items is None:
        raise FileNotFoundError(
            f"there is no {name}.jsonl, {name}.json or {name}.parquet in {folder}; put it there, or name another "
            "folder in the environment variable TASK_DATA"
        )
    examples = _read(folder, f"{name}.train")
    return {"evaluation": items, "train": items.select([]) if examples is None else examples}


def _read(folder: Path, stem: str) -> Dataset | None:
    lines, whole, table = (folder / f"{stem}{suffix}" for suffix in (".jsonl", ".json", ".parquet"))
    if lines.is_file():
        return Dataset.from_list([json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line])
    if whole.is_file():
        return Dataset.from_list(json.loads(whole.read_text(encoding="utf-8")))
    return Dataset(parquet.read_table(table)) if table.is_file() else None
