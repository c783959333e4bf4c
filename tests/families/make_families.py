"""Try every model of text, images or speech in transformers: python tests/families/make_families.py [TYPE …].

Without types, all of them (or all of some kinds) are tried, resuming a stopped run, and the table in docs/models.md is
rewritten at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing.connection
import os
import pkgutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import coprune
from families.build_models import AUTO, Kind, all_types
from families.family_table import PAGE, RESULTS, Results, page
from families.judge import Verdict, judge

RUNNING = RESULTS.with_suffix(".running.jsonl")
"""File of verdicts so far, which becomes the results once complete."""
LIMIT = 900
"""Time limit per type in seconds."""


def main() -> int:
    """Try the types; return 1 if a model is wrong."""
    options = _options()
    if options.types:
        chosen = [task for task in _tasks() if task[0] in options.types and task[2] in (options.kind or AUTO)]
        verdicts = _judge_all(chosen, options.processes, None)
        return 1 if any(verdict.result == "wrong" for verdict in verdicts) else 0
    kinds, done = options.kind or list(AUTO), {(v.model_type, v.kind) for v in _so_far()}
    left = [task for task in _tasks() if task[2] in kinds and (task[0], task[2]) not in done]
    _judge_all(left, options.processes, RUNNING)
    # Keep the verdicts of other kinds.
    results = Results.now([*_so_far(), *(v for v in Results.read().verdicts if v.kind not in kinds)])
    results.write()
    RUNNING.unlink()
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"{results.counts()}; written to {PAGE.name}")
    return 1 if any(verdict.result == "wrong" for verdict in results.verdicts) else 0


Task = tuple[str, str, Kind]


def _tasks() -> list[Task]:
    return [(name, model_class, kind) for kind in AUTO for name, model_class in all_types(kind).items()]


def _so_far() -> list[Verdict]:
    if not RUNNING.exists():
        return []
    return [Verdict(**json.loads(line)) for line in RUNNING.read_text(encoding="utf-8").splitlines()]


def _judge_all(tasks: Sequence[Task], processes: int, file: Path | None) -> list[Verdict]:
    """Judge types in parallel, each in its own process; append the verdicts to a file."""
    for module in pkgutil.walk_packages(coprune.__path__, "coprune."):
        if not module.name.endswith(("__main__", "triton", "on_ray", "triton_kernel")):
            importlib.import_module(module.name)  # now, so that later changes on disk have no effect
    get_checkpoint_conversion_mapping("bert")  # builds the table of all types once instead of in every process
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(processes) as pool:
        for number, verdict in enumerate(pool.map(_judge_apart, tasks), 1):
            verdicts.append(verdict)
            print(f"[{number}/{len(tasks)}] {verdict.model_type}: {verdict.result} {verdict.reason}", flush=True)
            if file is not None:
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(verdict.line(), ensure_ascii=False) + "\n")
    return verdicts


def _judge_apart(task: Task) -> Verdict:
    """Judge a type in a forked process, which may crash or hang without harm to the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, sender))
    process.start()
    sender.close()
    found = Verdict(*task, result="wrong", reason=f"no answer after {LIMIT} seconds")
    if receiver.poll(LIMIT):
        try:
            found = Verdict(**receiver.recv())
        except EOFError:
            found.reason = "the process died"
    process.kill()
    process.join()
    return found


def _child(task: Task, sender: multiprocessing.connection.Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libraries' output about models that do not work
        sender.send(judge(*task, Path(folder)).line())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="only these, as configurations call them; these write nothing")
    parser.add_argument("--kind", choices=AUTO, action="append", help="only of this kind; may be repeated")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
