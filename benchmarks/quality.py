"""Quality of methods × patterns on a real model: perplexity on two texts, closeness to dense, layer error, cost.

Every cell is a process of its own, so that its peak memory is its own, and leaves one JSON file; a table that was
interrupted goes on where it stopped, and every row says when, where and from which commit it was measured. Calibration
(and the training of a preset) is on one part of the embedded Wikipedia text; perplexity on another part of it and on
novels, which nothing saw before. Presets were chosen on neither of the two. The weights of smollm2-135m were 4-bit before
they were dequantised, so the figures compare methods, not models.

    python benchmarks/quality.py                                  # the README's table: the Wanda repository's methods
    python benchmarks/quality.py --nsamples 16 --methods wanda    # a subset in minutes
    python benchmarks/quality.py --methods sparsegpt,balanced,best,max --patterns 2:4,0.6 --nsamples 32    # the presets
    python benchmarks/quality.py --methods sparsegpt,alps+owl,max --patterns 0.7,0.8 --nsamples 32 --answers 16
    python benchmarks/quality.py --methods all --patterns 0.5,0.6,0.7,2:4,4:8 --seeds 0,1,2    # all of it, in hours
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("embedded", "embedded-lambada")
DENSE = "dense"
WAYS: dict[str, dict[str, Any]] = {
    "alps+owl": {"method": "alps", "allocation": "owl", "propagation": "sequential"},
}
"""Beside methods and presets: ways that published tables have."""


def main() -> None:
    arguments = read_arguments()
    if arguments.cell:
        measure(json.loads(arguments.cell))
        return
    methods = all_methods() if arguments.methods == "all" else arguments.methods.split(",")
    cells = [cell(arguments, DENSE, "0", 0)] + [
        cell(arguments, method, pattern, seed)
        for pattern in arguments.patterns.split(",")
        for method in methods
        for seed in map(int, arguments.seeds.split(","))
    ]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for position, settings in enumerate(cells, 1):
        if not Path(settings["file"]).exists():
            print(
                f"[{position}/{len(cells)}] {settings['method']} {settings['pattern']} seed {settings['seed']}",
                file=sys.stderr,
            )
            subprocess.run([sys.executable, __file__, "--cell", json.dumps(settings)], check=True)
    table = markdown(cells)
    print(table)
    if arguments.output:
        arguments.output.write_text(table + "\n", encoding="utf-8")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt", help="names, presets, alps+owl, or all")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--answers", type=int, default=0, help="prompts whose dense answers KL is measured along, too")
    parser.add_argument("--propagation", help="block, sequential or dense [the methods' default: block]")
    parser.add_argument("--folder", type=Path, default=Path("out/quality"), help="where the cells' results are kept")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def all_methods() -> list[str]:
    from coprune.pruning.methods import METHODS
    from coprune.recipe.presets import PRESETS

    return [*METHODS, *PRESETS]


def cell(arguments: argparse.Namespace, method: str, pattern: str, seed: int) -> dict[str, Any]:
    """Everything that decides one cell, and the file that its result goes to."""
    settings = {
        "model": arguments.model,
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "nsamples": arguments.nsamples,
        "seqlen": arguments.seqlen,
        "eval_tokens": arguments.eval_tokens,
        "answers": arguments.answers,
        "propagation": arguments.propagation,
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

    how = how_to(settings["method"])
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
    peak = peak if here else None  # the process that trained is gone
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
    """The report of a run that was killed after its end, before its figures were written; None if there is none."""
    from coprune.report.schema import Report

    return Report.read(folder / "report.json") if (folder / "report.json").exists() else None


def how_to(method: str) -> dict[str, Any]:
    """The settings of a method, a preset, or a way that published tables have."""
    from coprune.recipe.presets import PRESETS, preset_settings

    if method in PRESETS:
        return preset_settings(method)
    return dict(WAYS.get(method, {"method": method}))


def figures_of(settings: dict[str, Any], model: Any, processor: Any = None) -> dict[str, Any]:
    """Perplexity and divergence from the dense model on both texts, and along the dense model's own answers."""
    import coprune

    pruned = settings["method"] != DENSE
    asked: Any = {"tokens": settings["eval_tokens"], "seqlen": settings["seqlen"]}
    if pruned and settings["answers"]:
        asked |= {"generate": "builtin", "generate_prompts": settings["answers"], "generate_tokens": 64}
    against = settings["model"] if pruned else None
    found = coprune.evaluate(model, ",".join(COLUMNS), against=against, processor=processor, **asked)
    answers = found.answers
    return {
        "perplexity": {entry.data: entry.value for entry in found.perplexity},
        "kl": [entry.kl for entry in found.closeness],
        "own_kl": None if answers is None or answers.along is None else answers.along.kl,
    }


def measured_here() -> str:
    """Date, commit and processor of what is measured now."""
    from coprune.report.made import MadeFacts

    made = MadeFacts.here()
    return f"{made.date:%Y-%m-%d}, {made.commit}, {processor_name()}"


def processor_name() -> str:
    """The processor's name, as Linux tells it, and how many threads compute."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def markdown(cells: list[dict[str, Any]]) -> str:
    """One row per method and pattern; mean ± standard deviation over the seeds."""
    first = cells[0]
    names = ["pattern", "method", "Wikipedia", "novels", "loss left", "KL to dense", "KL along own answers"]
    names += ["layer error", "seconds (of them training)", "peak GiB", "measured"]
    lines = [
        f"{first['model']}, {first['nsamples']} × {first['seqlen']} calibration tokens, perplexity at sequence length "
        f"{first['seqlen']} on {first['eval_tokens']:,} tokens of each text. Loss left: (perplexity − dense) ÷ "
        "(SparseGPT's − dense), on Wikipedia / on novels.",
        "",
        f"| {' | '.join(names)} |",
        "| --- | --- |" + " ---: |" * (len(names) - 3) + " --- |",
    ]
    dense, *results = [json.loads(Path(settings["file"]).read_text(encoding="utf-8")) for settings in cells]
    values = [f"{dense['perplexity'][text]:.2f}" for text in COLUMNS]
    lines.append(f"| – | dense | {' | '.join(values)} | 0 | 0 | 0 | 0 | – | – | {dense['measured']} |")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["pattern"], result["method"]), []).append(result)
    for (pattern, method), group in groups.items():
        name = pattern if ":" in pattern else f"{100 * float(pattern):.0f} %"
        lines.append(f"| {name} | {method} | {' | '.join(row(group, groups.get((pattern, 'sparsegpt'), []), dense))} |")
    return "\n".join(lines)


def row(group: list[dict[str, Any]], sparsegpt: list[dict[str, Any]], dense: dict[str, Any]) -> list[str]:
    """The figures of one method at one pattern, over its seeds."""
    left = []
    for text in COLUMNS:
        base = {one["seed"]: one["perplexity"][text] - dense["perplexity"][text] for one in sparsegpt}
        losses = [(one["seed"], one["perplexity"][text] - dense["perplexity"][text]) for one in group]
        left.append(spread([100 * loss / base[seed] for seed, loss in losses if seed in base], ".0f"))
    return [
        *(spread([one["perplexity"][text] for one in group], ".2f") for text in COLUMNS),
        f"{left[0]} / {left[1]} %" if left[0] != "–" else "–",
        spread([one["kl"][0] for one in group], ".3f"),
        spread([one["own_kl"] for one in group if one["own_kl"] is not None], ".3f"),
        spread([one["layer_error"] for one in group if one["layer_error"] is not None], ".4f"),
        f"{spread([one['seconds'] for one in group], '.0f')} ({statistics.fmean(one['training_seconds'] for one in group):.0f})",
        spread([one["memory"] / 2**30 for one in group if one["memory"] is not None], ".2f"),
        "; ".join(dict.fromkeys(one["measured"] for one in group)),
    ]


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation; the value alone where there is one."""
    if not values:
        return "–"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


if __name__ == "__main__":
    main()
