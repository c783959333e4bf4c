"""What `coprune fit` finds, beside the best plain quant that meets the same limit, on items that the search has not seen.

    TASK_DATA=my-data python benchmarks/fit.py --folder out/fit --task text --budget 15m [--model gemma-3-270m.gguf]

Tasks: `choice` (ARC-Easy by its definition in docs/tasks, whose items TASK_DATA holds), `text` (Wikipedia, the embedded test
text), `prompts` (how paragraphs of the same text begin). Each call adds or replaces one row of benchmarks/results/fit.csv.
Tokens per second are medians over single steps of the found model and the best plain quant, which take turns in one process
(`coprune bench`). They count CPU time of one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

import coprune
from coprune.base.files import write_text
from coprune.base.progress import Reporter
from coprune.data.corpora import evaluation_text
from coprune.data.text import JoinedText
from coprune.fitting.candidates import DENSE, TYPES, Candidate
from coprune.fitting.fit_call import FACTS_FILE
from coprune.fitting.fit_notes import Asked
from coprune.fitting.looking import WORK_FOLDER
from coprune.fitting.tasks import read_tasks
from coprune.fitting.workshop import Workshop
from coprune.model.checkpoint.locate import locate
from coprune.sweeps.generation_speed import bench

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fit.csv"
REQUIRED = {"choice": "accuracy>=dense-0.08", "text": "bits<=dense*1.02", "prompts": "acceptance>=0.9"}
_KEY = ("model", "task", "seed")
_TEXT = "embedded"
_PROMPT, _STEPS = 128, 256
"""Tokens that are read, and those after them whose time is measured."""


def main() -> None:
    """Fit one model to one task, and write its row."""
    asked = options()
    torch.set_num_threads(asked.threads)
    folder = asked.folder / f"{Path(asked.model).stem}-{asked.task}-{asked.seed}"
    model, task = str(locate(asked.model).path), items(asked)
    found = coprune.fit(
        model,
        task,
        asked.require or REQUIRED[asked.task],
        output=folder,
        budget=asked.budget,
        items=asked.items,
        seed=asked.seed,
        without=asked.without,
        types=asked.types,
        text=_TEXT,
    )
    tasks = read_tasks([task], asked.seed, asked.items)
    workshop = Workshop(folder / WORK_FOLDER, Asked(model, tasks, asked.seed, _TEXT), Reporter(quiet=False))
    keep(row_of(asked, found, json.loads((folder / FACTS_FILE).read_text()), speeds(found, workshop)))
    print(found)


def items(asked: argparse.Namespace) -> str:
    """The file of a task's items."""
    if asked.task == "choice":
        return str(ROOT / "docs" / "tasks" / "arc_easy.yaml")
    read = evaluation_text("embedded")
    assert isinstance(read, JoinedText)
    text = read.text
    if asked.task == "text":
        write_text(file := asked.folder / "wikipedia.txt", text[: asked.characters])
        return str(file)
    starts = [line.strip()[:80].rsplit(" ", 1)[0] for line in text.splitlines() if len(line) > 300]
    write_text(file := asked.folder / "prompts.jsonl", "".join(json.dumps({"prompt": one}) + "\n" for one in starts))
    return str(file)


def speeds(found: coprune.Fitted, workshop: Workshop) -> dict[str, float]:
    """Tokens per second of the found model and of the best plain quant (made again here), by name."""
    files = {found.chosen: found.file}
    if found.plain is not None and found.plain != found.chosen:
        files[found.plain] = workshop.making.file(Candidate(DENSE, found.plain))
    busy = torch.get_num_threads() == 1
    measured = bench([*files.values()], prompt=_PROMPT, tokens=_STEPS, repeats=1, busy=busy)
    workshop.making.clear()
    return dict(zip(files, (row.decode.median for row in measured.rows), strict=True))


def row_of(
    asked: argparse.Namespace, found: coprune.Fitted, facts: dict[str, Any], speed: dict[str, float]
) -> dict[str, str]:
    """The row: the found model and the best plain quant, each as measured on the unseen half."""
    rows = facts["rows"]
    chosen = next(row for row in rows if row["chosen"])
    plain = next((row for row in rows if row["name"] == found.plain), None)

    return {
        "model": Path(asked.model).stem,
        "task": asked.task,
        "seed": str(asked.seed),
        "required": asked.require or REQUIRED[asked.task],
        "verdict": "kept" if found.kept else "not kept",
        "found": found.chosen,
        "MB": f"{chosen['bytes'] / 1e6:.1f}",
        "tokens/s": f"{speed[found.chosen]:.0f}",
        "of the best plain": "" if plain is None else f"{chosen['bytes'] / plain['bytes']:.2f}",
        **{
            name: f"{chosen[key]:+.4f}" if found.kept else ""
            for name, key in (("above required", "mean"), ("at least", "low"))
        },
        "best plain": "" if plain is None else plain["name"],
        "plain tokens/s": "" if plain is None else f"{speed[plain['name']]:.0f}",
        "plain MB": "" if plain is None else f"{plain['bytes'] / 1e6:.1f}",
        "dense MB": f"{rows[0]['bytes'] / 1e6:.1f}",
        "items": str(facts["tasks"][0]["unseen items"]),
        "tried": str(len(rows) - 1),
        "budget": asked.budget,
        "minutes": f"{facts['seconds'] / 60:.1f}",
        "date": facts["date"][:10],
    }


def keep(row: dict[str, str]) -> None:
    """Add a row to the table, or replace the one of the same model, task and seed."""
    known = list(csv.DictReader(RESULT.read_text().splitlines())) if RESULT.exists() else []
    rows = [one for one in known if any(one[name] != row[name] for name in _KEY)] + [row]
    with RESULT.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*row], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda one: tuple(one[name] for name in _KEY)))


def options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", choices=[*REQUIRED], required=True)
    parser.add_argument("--require")
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--items", type=int, help="of the task at most")
    parser.add_argument("--characters", type=int, default=60_000, help="of the text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", default="")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("out/fit"))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    return asked


if __name__ == "__main__":
    main()
