"""What fine-tuning recovers: perplexity before and after each mode, in a given number of minutes, with every zero kept.

A model is pruned by wanda, fine-tuned on one part of the embedded Wikipedia text, and measured on another part of it
and on novels, which neither calibration nor training saw. Pruned models and finished cells are kept in a folder, so an
interrupted table resumes where it stopped, and an interrupted cell from its last state. The weights of
smollm2-135m were 4-bit before they were dequantised, so the figures compare modes, not models.

    python benchmarks/recovery.py                  # the README's table: 20 minutes per cell
    python benchmarks/recovery.py --patterns wanda_sp,influence,obs,uneven --modes distill --minutes 10    # parts removed
    python benchmarks/recovery.py --patterns influence,map,obs --blocks 0.2 --channels 0.27 --align 32 --modes distill
    python benchmarks/recovery.py --minutes 1      # a smoke run
    python benchmarks/recovery.py --cost           # what a masked update costs beside plain LoRA and dense training
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from removal import settings_of

TEXTS = ("embedded", "embedded-lambada")
# Only a few hundred small steps fit into the time, so learning rates are above the defaults, which are meant for hours.
RATES = {"lora": 1e-3, "dense": 1e-4, "distill": 1e-4}
REMOVALS = {
    "influence": "blocks by influence (ShortGPT)",
    "kl": "blocks by KL",
    "map": "blocks mapped",
    "wanda_sp": "channels by Wanda-sp",
    "flap": "channels by FLAP, no bias",
    "obs": "channels by OBS, refit",
    "uneven": "channels by OBS, spread by error",
    "reconstructed": "channels by OBS, reconstructed",
}
"""In place of a pattern: parts removed, by the name of the way in removal.py; by default a quarter of the blocks' parameters."""


def main() -> None:
    arguments = read_arguments()
    if arguments.cell:
        settings = json.loads(arguments.cell)
        prune(settings) if "pattern" in settings else finetune(settings)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    patterns = arguments.patterns.split(",")
    for pattern in patterns[:1] if arguments.cost else patterns:
        run_cell(pruning_cell(arguments, pattern), "perplexity.json")
    if arguments.cost:
        print(
            cost_table(
                pruned_folder(arguments, patterns[0]), list(map(int, arguments.tokens.split(","))), arguments.steps
            )
        )
        return
    for pattern in patterns:
        for mode in arguments.modes.split(","):
            run_cell(finetuning_cell(arguments, pattern, mode), "finetune.json")
    table = markdown(arguments, patterns)
    print(table)
    if arguments.output:
        arguments.output.write_text(table + "\n", encoding="utf-8")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--patterns", default="2:4,0.6", help=f"also {', '.join(REMOVALS)}")
    parser.add_argument("--channels", default="0.33", help="share that is removed")
    parser.add_argument("--blocks", default="0.2334", help="likewise")
    parser.add_argument("--align", type=int, default=64, help="channels are kept in multiples of this")
    parser.add_argument("--modes", default="lora,dense,distill")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training per cell")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples of the pruning")
    parser.add_argument("--block-size", type=int, default=512, help="also of calibration and perplexity")
    parser.add_argument("--accumulate", type=int, default=2, help="windows per optimiser step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", default="", help="such as lora=2e-3,dense=5e-5")
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("out/recovery"), help="where models and cells are kept")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--cost", action="store_true", help="time steps instead")
    parser.add_argument("--tokens", default="512,1024", help="of --cost, per step")
    parser.add_argument("--steps", type=int, default=9, help="of --cost, of each kind")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def pruned_folder(arguments: argparse.Namespace, pattern: str) -> Path:
    name = f"{arguments.model}-{pattern.replace(':', '-')}-{arguments.nsamples}x{arguments.block_size}"
    shares = f"{arguments.blocks}-{arguments.channels}-{arguments.align}"
    folder: Path = arguments.folder / f"{name}-{shares}-{arguments.eval_tokens}-{arguments.seed}"
    return folder


def pruning_cell(arguments: argparse.Namespace, pattern: str) -> dict[str, Any]:
    """All settings that a pruned model depends on."""
    return {
        "model": arguments.model,
        "pattern": pattern,
        "shares": [arguments.channels, arguments.blocks],
        "align": arguments.align,
        "nsamples": arguments.nsamples,
        "seqlen": arguments.block_size,
        "eval_tokens": arguments.eval_tokens,
        "seed": arguments.seed,
        "save": str(pruned_folder(arguments, pattern)),
    }


def finetuning_cell(arguments: argparse.Namespace, pattern: str, mode: str) -> dict[str, Any]:
    """All settings that a fine-tuned one depends on: those of `coprune finetune`."""
    rates = RATES | {name: float(rate) for name, _, rate in (r.partition("=") for r in arguments.rates.split(",") if r)}
    pruned = pruned_folder(arguments, pattern)
    name = f"{mode}-{arguments.minutes:g}min-{rates[mode]:g}-{arguments.accumulate}"
    name += f"-rank{arguments.rank}" if mode == "lora" else ""
    return {
        "model": str(pruned / "model"),
        "mode": mode,
        "teacher": arguments.model if mode == "distill" else None,
        "dataset": TEXTS[0],
        "seqlen": arguments.block_size,
        "accumulate": arguments.accumulate,
        "minutes": arguments.minutes,
        "learning_rate": rates[mode],
        **({"rank": arguments.rank, "alpha": 2.0 * arguments.rank} if mode == "lora" else {}),
        "held_out": 0.0,
        "eval_data": ",".join(TEXTS),
        "eval_tokens": arguments.eval_tokens,
        "save_every": 50,
        "seed": arguments.seed,
        "save": str(pruned / name),
    }


def run_cell(settings: dict[str, Any], result: str) -> None:
    """Run a cell in a process of its own unless its result is there."""
    folder = Path(settings["save"])
    if not (folder / result).exists():
        print(f"{folder}", file=sys.stderr)
        subprocess.run([sys.executable, __file__, "--cell", json.dumps(settings)], check=True)


def prune(settings: dict[str, Any]) -> None:
    """Prune, measure, save the model and what was measured."""
    import coprune

    folder, pattern, shares = Path(settings.pop("save")), settings.pop("pattern"), settings.pop("shares")
    if pattern in REMOVALS:
        how = settings_of(REMOVALS[pattern], *shares)
    else:
        del settings["align"]
        how = {"method": "wanda"} | ({"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)})
    texts = ",".join(TEXTS)
    report = coprune.prune(
        settings.pop("model"),
        dataset=TEXTS[0],
        eval_data=texts,
        save_model=folder / "model",
        **how,
        **settings,
    ).report
    found = {entry.data: {"dense": entry.dense, "pruned": entry.pruned} for entry in report.perplexity}
    (folder / "perplexity.json").write_text(json.dumps(found), encoding="utf-8")


def finetune(settings: dict[str, Any]) -> None:
    """Fine-tune and measure; the result is the run's own report."""
    from coprune.recipe.views import training_recipe
    from coprune.training.finetuning import run_finetuning as run

    run(training_recipe(settings))


def markdown(arguments: argparse.Namespace, patterns: list[str]) -> str:
    """One row per pattern and mode: perplexities, the share of the loss recovered, and that relative to dense training.

    The share recovered is (before − after) / (before − dense) of perplexity on the first text.
    """
    lines = [
        f"{arguments.model}, zeros by wanda, {arguments.minutes:g} minutes of training on {TEXTS[0]} (windows of "
        f"{arguments.block_size} tokens), perplexity on {arguments.eval_tokens:,} tokens that training never saw.",
        "",
        "| pattern | mode | Wikipedia | novels (unseen domain) | recovered | of what dense recovers | sparsity | steps |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for pattern in patterns:
        found = json.loads((pruned_folder(arguments, pattern) / "perplexity.json").read_text(encoding="utf-8"))
        name = pattern if ":" in pattern or pattern in REMOVALS else f"{100 * float(pattern):.0f} %"
        for which in ("dense", "pruned"):
            values = " | ".join(f"{found[text][which]:.2f}" for text in TEXTS)
            lines.append(f"| {name} | ({which}) | {values} | – | – | – | – |")
        results = {}
        for mode in arguments.modes.split(","):
            path = Path(finetuning_cell(arguments, pattern, mode)["save"]) / "finetune.json"
            results[mode] = json.loads(path.read_text(encoding="utf-8"))
        shares = {mode: recovered(result, found) for mode, result in results.items()}
        for mode, result in results.items():
            after = {entry["data"]: entry["after"] for entry in result["perplexity"]}
            relative = f"{100 * shares[mode] / shares['dense']:.0f} %" if "dense" in shares else "–"
            lines.append(
                f"| {name} | {mode} | {' | '.join(f'{after[t]:.2f}' for t in TEXTS)} | {100 * shares[mode]:.0f} % | {relative} | "
                f"{100 * result['sparsity_after']:.2f} % | {result['steps']} |"
            )
    return "\n".join(lines)


def recovered(result: dict[str, Any], found: dict[str, dict[str, float]]) -> float:
    entry = next(entry for entry in result["perplexity"] if entry["data"] == TEXTS[0])
    return float((entry["before"] - entry["after"]) / (entry["before"] - found[TEXTS[0]]["dense"]))


def cost_table(pruned: Path, sizes: list[int], steps: int) -> str:
    """Seconds of one forward and backward of plain LoRA, masked LoRA and dense training, as ratios to plain LoRA.

    Medians; the kinds take turns, so that other work on the machine disturbs all alike.
    """
    lines = ["| tokens | plain LoRA | masked LoRA | dense |", "| ---: | ---: | ---: | ---: |"]
    kinds = {name: step_of(pruned / "model", name) for name in ("plain", "masked", "dense")}
    for tokens in sizes:
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(steps + 1):
            for name, step in kinds.items():
                started = time.perf_counter()
                step(tokens)
                if number:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = " | ".join(f"{middle[name] / middle['plain']:.2f}" for name in ("masked", "dense"))
        lines.append(f"| {tokens} | 1 ({middle['plain']:.2f} s) | {ratios} |")
    return "\n".join(lines)


def step_of(folder: Path, kind: str) -> Callable[[int], None]:
    """One forward and backward pass on random tokens."""
    import torch

    from coprune.model.checkpoint.load import load_model
    from coprune.model.checkpoint.locate import locate
    from coprune.training.adapters import add_adapter, choose_targets
    from coprune.training.masks import find_masks

    loaded, _ = load_model(locate(folder))
    masks = find_masks(loaded)
    model: Any = loaded
    if kind == "dense":
        model.requires_grad_(True)
    else:
        model = add_adapter(loaded, masks, choose_targets(masks, (), 8), 8, 16.0, masked=kind == "masked")
    model.train()

    def step(tokens: int) -> None:
        ids = torch.randint(loaded.config.vocab_size, (1, tokens))
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


if __name__ == "__main__":
    main()
