"""Quality of methods × patterns on a real model: perplexity on two texts, closeness to dense, layer error, cost.

Every cell is a process of its own, so that its peak memory is its own, and leaves one JSON file; a table that was
interrupted goes on where it stopped. Calibration is on one part of the embedded Wikipedia text; perplexity on another
part of it and on novels, which calibration never saw. The weights of smollm2-135m were 4-bit before they were
dequantised, so the figures compare methods, not models.

    python benchmarks/quality.py                                  # the README's table: the Wanda repository's methods
    python benchmarks/quality.py --nsamples 16 --methods wanda    # a subset in minutes
    python benchmarks/quality.py --methods all --patterns 0.5,0.6,0.7,2:4,4:8 --seeds 0,1,2    # all of it, in hours
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("embedded", "embedded-lambada")


def main() -> None:
    arguments = read_arguments()
    if arguments.cell:
        measure(json.loads(arguments.cell))
        return
    methods = all_methods() if arguments.methods == "all" else arguments.methods.split(",")
    cells = [
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
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt", help="names, presets, or all")
    parser.add_argument("--patterns", default="0.5,2:4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=65536)
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
        "propagation": arguments.propagation,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return settings | {"file": str(arguments.folder / f"{method}-{pattern.replace(':', '-')}-{seed}-{digest}.json")}


def measure(settings: dict[str, Any]) -> None:
    """Prune, evaluate and write one cell."""
    import coprune
    from coprune.data import evaluation_tokens
    from coprune.evaluation.closeness import closeness
    from coprune.model.opened import open_model
    from coprune.recipe.presets import PRESETS, preset_settings

    chosen: dict[str, Any] = (
        preset_settings(settings["method"]) if settings["method"] in PRESETS else {"method": settings["method"]}
    )
    ratio = {"pattern": settings["pattern"]} if ":" in settings["pattern"] else {"sparsity": float(settings["pattern"])}
    if settings["propagation"]:
        chosen["propagation"] = settings["propagation"]
    same = {name: settings[name] for name in ("nsamples", "seqlen", "eval_tokens", "seed")}
    result = coprune.prune(
        settings["model"],
        chosen.pop("method"),
        dataset=COLUMNS[0],
        eval_data=",".join(COLUMNS),
        evaluate_dense=settings["method"] == "magnitude",
        **chosen,
        **ratio,
        **same,
    )
    report = result.report
    assert result.model is not None
    assert result.tokenizer is not None
    dense = open_model(report.recipe.model, stream=False).model
    text = evaluation_tokens(
        COLUMNS[0], result.tokenizer, settings["seqlen"], limit_tokens=min(16384, settings["eval_tokens"])
    )
    close = closeness(dense, result.model, text.tokens, settings["seqlen"])
    errors = [m.relative_layer_error for m in report.matrices if m.relative_layer_error is not None]
    found = {
        "perplexity": {entry.data: entry.pruned for entry in report.perplexity},
        "dense": {entry.data: entry.dense for entry in report.perplexity},
        "kl": close.kl,
        "layer_error": statistics.fmean(errors) if errors else None,
        "seconds": report.prune_seconds,
        "memory": report.peak_memory_bytes,
        "sparsity": report.sparsity.matrices,
        "versions": report.versions,
    }
    partial = Path(settings["file"]).with_suffix(".partial")
    partial.write_text(json.dumps(settings | found, indent=2), encoding="utf-8")
    partial.replace(settings["file"])


def markdown(cells: list[dict[str, Any]]) -> str:
    """One row per method and pattern; mean ± standard deviation over the seeds."""
    first = cells[0]
    lines = [
        f"{first['model']}, {first['nsamples']} × {first['seqlen']} calibration tokens, perplexity at sequence length "
        f"{first['seqlen']} on {first['eval_tokens']:,} tokens of each text.",
        "",
        "| pattern | method | sparsity | Wikipedia | novels (unseen domain) | KL to dense | layer error | seconds | peak GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    results = [json.loads(Path(settings["file"]).read_text(encoding="utf-8")) for settings in cells]
    dense = next((r["dense"] for r in results if r["dense"][COLUMNS[0]] is not None), None)
    if dense is not None:
        lines.append(f"| – | dense | 0 % | {dense[COLUMNS[0]]:.2f} | {dense[COLUMNS[1]]:.2f} | 0 | 0 | – | – |")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["pattern"], result["method"]), []).append(result)
    for (pattern, method), group in groups.items():
        name = pattern if ":" in pattern else f"{100 * float(pattern):.0f} %"
        values = [
            spread([r["perplexity"][COLUMNS[0]] for r in group], ".2f"),
            spread([r["perplexity"][COLUMNS[1]] for r in group], ".2f"),
            spread([r["kl"] for r in group], ".3f"),
            spread([r["layer_error"] for r in group if r["layer_error"] is not None], ".4f"),
            spread([r["seconds"] for r in group], ".0f"),
            spread([r["memory"] / 2**30 for r in group], ".2f"),
        ]
        lines.append(f"| {name} | {method} | {100 * group[0]['sparsity']:.2f} % | {' | '.join(values)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    if not values:
        return "–"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


if __name__ == "__main__":
    main()
