"""Quality of methods × patterns on a real model: perplexity on two texts, closeness to dense, layer error, cost.

Every cell runs in a process of its own, so that its peak memory is its own, and leaves one JSON file. An interrupted table
resumes where it stopped, and every row says when, where and from which commit it was measured. Calibration (and the
training of a preset) uses one part of the embedded Wikipedia text; perplexity is on another part of it and on novels,
neither of which calibration, training or the choice of presets used. The weights of smollm2-135m were 4-bit before they
were dequantised, so the figures compare methods, not models.

    python benchmarks/quality.py                                  # the README's table: the Wanda repository's methods
    python benchmarks/quality.py --nsamples 16 --methods wanda    # a subset in minutes
    python benchmarks/quality.py --methods sparsegpt,balanced,best --patterns 2:4,0.6 --nsamples 32    # presets
    python benchmarks/quality.py --methods sparsegpt,alps+owl,balanced --patterns 0.7,0.8 --nsamples 32 --answers 16
    python benchmarks/quality.py --methods sparsegpt,balanced,parts --patterns 2:4 --nsamples 32    # what each part is worth
    python benchmarks/quality.py --methods sparsegpt,balanced --nsamples 32 --seeds 0,1,2 --picture quality.svg
    python benchmarks/quality.py --methods all --patterns 0.5,0.6,0.7,2:4,4:8 --seeds 0,1,2    # everything: hours
    TASK_DATA=my-data python benchmarks/quality.py --methods wanda,sparsegpt,balanced --patterns 2:4 --tasks 100    # zero-shot
    TASK_DATA=my-data python benchmarks/quality.py --model FOLDER --methods wanda --tasks 100 --task-names arc_easy    # one task
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from processor import processor_name
from quality_table import COLUMNS, draw, facts, markdown, rows_of, write_csv

from coprune.recipe.presets import PRESETS, preset_settings

DENSE = "dense"
BY_BLOCKS = " by blocks"
_WHOLE: dict[str, Any] = {"preset": "balanced", "train": "whole"}
_PRUNED = {
    name: value
    for name, value in preset_settings("balanced", {"pattern": "2:4"}, "whole").items()
    if "finetune" not in name
}
PARTS: dict[str, dict[str, Any]] = {
    "balanced without distillation": _PRUNED,
    "balanced without refit": {**_WHOLE, "refine": ()},
    "balanced without rotate": {**_WHOLE, "rotate": False},
    "balanced without permute": {**_WHOLE, "permute": False},
    "balanced without sparsegpt": {**_WHOLE, "method": "wanda"},
    "balanced without sequential": {**_WHOLE, "propagation": "block"},
    "balanced with embeddings": {**_WHOLE, "finetune_only": ()},
    "balanced by adapters": {**_WHOLE, "finetune": "lora-distill"},
}
"""Preset `balanced` with one part left out or done otherwise. `without distillation` and `without permute` are for N:M."""
_TRAINED = {
    name: value
    for name, value in preset_settings("balanced", {"pattern": "2:4"}, "whole").items()
    if "finetune" in name
}
WAYS: dict[str, dict[str, Any]] = PARTS | {
    "balanced, uniform sparsity": {**_WHOLE, "allocation": "uniform"},
    "alps+owl": {"method": "alps", "allocation": "owl", "propagation": "sequential"},
    "sparsegpt+distill": {"method": "sparsegpt", **_TRAINED},
    "alps+distill": {"method": "alps", **_TRAINED},
    "wanda+lora": {"method": "wanda", "finetune": "lora"},
}
"""Beside methods and presets: ways that published tables have, and parts of our own. `uniform sparsity` is not for N:M."""
TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "rte", "winogrande")
"""Zero-shot tasks, by their definitions in docs/tasks; `TASK_DATA` names the folder with their items."""


def main() -> None:
    arguments = read_arguments()
    if arguments.cell:
        measure(json.loads(arguments.cell))
        return
    methods = [name for asked in arguments.methods.split(",") for name in meant(asked)]
    cells = [cell(arguments, DENSE, "0", 0)] + [
        cell(arguments, method, pattern, seed)
        for pattern in arguments.patterns.split(",")
        for method in methods
        for seed in map(int, arguments.seeds.split(","))
    ]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for position, settings in enumerate(cells, 1):
        if not Path(settings["file"]).exists() and not arguments.as_it_is:
            print(
                f"[{position}/{len(cells)}] {settings['method']} {settings['pattern']} seed {settings['seed']}",
                file=sys.stderr,
            )
            subprocess.run([sys.executable, __file__, "--cell", json.dumps(settings)], check=True)
    there = [file for settings in cells if (file := Path(settings["file"])).exists()]
    dense, *found = [json.loads(file.read_text(encoding="utf-8")) for file in there]
    rows = rows_of(dense, found)
    print(facts(dense) + "\n\n" + markdown(rows))
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.picture:
        draw(dense, found).save(arguments.picture)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt", help="names, presets, alps+owl, parts or all")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--answers", type=int, default=0, help="prompts whose dense answers KL is measured along, too")
    parser.add_argument("--tasks", type=int, default=0, help="items of each zero-shot task [no tasks]")
    parser.add_argument("--task-names", default=",".join(TASKS), help="zero-shot tasks, comma-separated")
    parser.add_argument("--minutes", type=float, default=2.0, help="of the training of `wanda+lora`")
    parser.add_argument("--propagation", help="block, sequential or dense [the methods' default: block]")
    parser.add_argument("--folder", type=Path, default=Path("out/quality"), help="where the cells' results are kept")
    parser.add_argument("--as-it-is", action="store_true", help="measure nothing: print and draw what is there")
    parser.add_argument("--csv", type=Path, help="also write the table to this file, as benchmarks/tables.py reads it")
    parser.add_argument("--picture", type=Path, help="also draw perplexity against seconds to this file (.svg)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def meant(asked: str) -> list[str]:
    """The methods that one word of --methods stands for."""
    from coprune.pruning.methods import METHODS

    return {"all": [*METHODS, *PRESETS], "parts": [*PARTS]}.get(asked, [asked])


def cell(arguments: argparse.Namespace, method: str, pattern: str, seed: int) -> dict[str, Any]:
    """Everything that decides one cell, and the file that its result goes to."""
    how = {} if method == DENSE else how_to(method, pattern)
    if how.get("finetune") == "lora":
        how["finetune_minutes"] = arguments.minutes
    settings = {
        "model": arguments.model,
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "nsamples": arguments.nsamples,
        "seqlen": arguments.seqlen,
        "eval_tokens": arguments.eval_tokens,
        "answers": arguments.answers,
        **({"tasks": arguments.tasks, "task_names": arguments.task_names} if arguments.tasks else {}),
        "propagation": arguments.propagation,
        # A changed preset or changed defaults are measured again.
        "how": how,
        "defaults": defaults_of(how) if how else [],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return settings | {"file": str(arguments.folder / f"{method}-{pattern.replace(':', '-')}-{seed}-{digest}.json")}


def measure(settings: dict[str, Any]) -> None:
    """Prune, evaluate and write one cell."""
    if settings["method"] == DENSE:
        found = figures_of(settings, settings["model"])
    else:
        found = prune(settings)
    found["measured"] = measured_here()
    partial = Path(settings["file"]).with_suffix(".partial")
    partial.write_text(json.dumps(settings | found, indent=2), encoding="utf-8")
    partial.replace(settings["file"])


def prune(settings: dict[str, Any]) -> dict[str, Any]:
    """Prune (and train, where a preset does), then measure the result beside the dense model."""
    import coprune
    from coprune.base.memory import peak_memory

    how: dict[str, Any] = dict(settings["how"])
    how |= {"pattern": settings["pattern"]} if ":" in settings["pattern"] else {"sparsity": float(settings["pattern"])}
    if settings["propagation"]:
        how["propagation"] = settings["propagation"]
    folder = Path(settings["file"]).with_suffix("")
    if "finetune" in how:
        how |= {"save": folder, "save_model": folder / "model"}
    same = {name: settings[name] for name in ("nsamples", "seqlen", "seed")}
    report: Any = finished(folder)
    model: Any = folder / "model"
    processor, here = None, report is None
    if here:
        result = coprune.prune(
            settings["model"], dataset=COLUMNS[0], evaluate=False, gate=False, prompt="", **how, **same
        )
        report, model, processor = result.report, result.model, result.processor
    tuned = report.finetuned
    trained, peak = (0.0, report.peak_memory_bytes) if tuned is None else (60 * tuned.minutes, peak_memory())
    peak = peak if here else None  # unknown: the process that trained has ended
    errors = [m.relative_layer_error for m in report.matrices if m.relative_layer_error is not None]
    found = figures_of(settings, model, processor) | {
        "layer_error": statistics.fmean(errors) if errors else None,
        "seconds": report.prune_seconds + trained,
        "training_seconds": trained,
        "memory": peak,
        "sparsity": report.sparsity.matrices,
        "versions": report.versions,
    }
    shutil.rmtree(folder, ignore_errors=True)
    return found


def finished(folder: Path) -> Any:
    """The report of a run that was killed after its end, before its figures were written; None if it was killed before."""
    from coprune.report.schema import Report

    if not (folder / "report.json").exists():
        return None
    report = Report.read(folder / "report.json")
    return None if report.finetuned is None else report


def how_to(method: str, pattern: str) -> dict[str, Any]:
    """Return the settings of a method, a preset (also `by blocks`), or a variant defined in this file, for a pattern."""
    preset = method.removesuffix(BY_BLOCKS)
    train = "blocks" if method.endswith(BY_BLOCKS) else "whole"
    named = {"preset": preset, "train": train} if preset in PRESETS else WAYS.get(method, {"method": method})
    how: dict[str, Any] = dict(named)
    preset, train = how.pop("preset", None), how.pop("train", None)
    if preset is None:
        return how
    return preset_settings(preset, how | ({"pattern": pattern} if ":" in pattern else {}), train) | how


def defaults_of(how: dict[str, Any]) -> list[str]:
    """The method, the allocation and the training of settings with all of their options."""
    from coprune.pruning.allocation import allocation_named
    from coprune.pruning.methods import METHODS
    from coprune.recipe.tree import FIELDS
    from coprune.recipe.views import TRAINING

    found = [repr(METHODS[how["method"]]), repr(allocation_named(how.get("allocation", "uniform")))]
    if "finetune" in how:
        found.append(repr({name: FIELDS[setting.word].default for name, setting in TRAINING.items()}))
    return found


def figures_of(settings: dict[str, Any], model: Any, processor: Any = None) -> dict[str, Any]:
    """Perplexity and divergence from the dense model on both texts, and along the dense model's own answers.

    model: the dense one's name, a folder, or a model in memory with its processor.
    """
    import torch
    from one_pass import in_one_pass, said_by

    from coprune.model.checkpoint.load import load_model
    from coprune.model.checkpoint.locate import locate

    name, length, tokens = settings["model"], settings["seqlen"], settings["eval_tokens"]
    dense = cache(partial(load_model, locate(name), "auto"))
    if settings["method"] == DENSE:
        loaded = dense()[0]
    else:
        loaded = load_model(locate(str(model)), "auto")[0] if processor is None else model
    perplexity, kl = {}, []
    with torch.inference_mode():
        for text in COLUMNS:
            digest = hashlib.sha256(f"{name} {length} {tokens} {text}".encode()).hexdigest()[:12]
            file = Path(settings["file"]).with_name(f"said-{digest}.safetensors")
            said = said_by(dense, text, length, tokens, file)
            perplexity[text], divergences = in_one_pass(lambda window: loaded(window).logits, said)
            kl.append(statistics.fmean(divergences))
    answers = own_answers(settings, model, processor) if settings["answers"] and settings["method"] != DENSE else None
    found = {"perplexity": perplexity, "kl": kl, "own_kl": answers}
    return found | ({"accuracy": accuracies(settings, model, processor)} if settings.get("tasks") else {})


def accuracies(settings: dict[str, Any], model: Any, processor: Any) -> dict[str, list[float]]:
    """Zero-shot accuracy of each task, with its standard error."""
    import coprune
    from coprune.evaluation.zero_shot import MAIN_METRIC

    asked: Any = {"tasks": settings["task_names"].split(","), "include_path": "docs/tasks", "limit": settings["tasks"]}
    measured = coprune.evaluate(model, processor=processor, **asked).zero_shot
    assert measured is not None
    scores = {one.task: one.metrics[MAIN_METRIC] for one in measured.tasks}
    return {task: [score.value, score.stderr or 0.0] for task, score in scores.items()}


def own_answers(settings: dict[str, Any], model: Any, processor: Any) -> float | None:
    """Divergence from the dense model along that model's own answers."""
    import coprune

    asked: Any = {"generate": "builtin", "generate_prompts": settings["answers"], "generate_tokens": 64}
    answers = coprune.evaluate(model, against=settings["model"], processor=processor, **asked).answers
    return None if answers is None or answers.along is None else answers.along.kl


def measured_here() -> str:
    """Date, commit and processor of this measurement."""
    from coprune.report.provenance import MadeFacts

    made = MadeFacts.here()
    return f"{made.date:%Y-%m-%d}, {made.commit}, {_processor()}"


def _processor() -> str:
    """The processor's name, and the number of threads."""
    import torch

    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    main()
