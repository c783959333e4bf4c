"""What calibration on a model's own text changes: perplexity, and closeness to the dense model along its own answers.

    python benchmarks/own_text.py smollm2-135m --nsamples 32 --seqlen 256 --pattern 2:4 --seeds 0

Prunes with sparsegpt, calibrated on Wikipedia (`embedded`), on what the model writes from BOS, on its answers to the prompts
that ship with the package, half and half, and on its own tokens added to as many of Wikipedia's. One line a run, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import coprune

TEXTS = ("embedded", "embedded-lambada")
PROMPTS = str(files("coprune.evaluation.answers") / "prompts.jsonl")


def kinds(nsamples: int) -> dict[str, tuple[str, int]]:
    """By name, what is calibrated on, and how many samples of it."""
    return {
        "Wikipedia": ("embedded", nsamples),
        "own text": ("self", nsamples),
        "own answers": (f"self:{PROMPTS}:length=128", nsamples),
        "half and half": ("self=0.5,embedded=0.5", nsamples),
        "own text added": ("self=0.5,embedded=0.5", 2 * nsamples),
    }


@torch.no_grad()
def divergence(dense: Any, pruned: Any, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Mean of KL(dense ‖ pruned) in nats over the tokens of the dense model's answers."""
    found = []
    for prompt, answer in pairs:
        tokens, first = torch.tensor([prompt + answer]), len(prompt) - 1
        expected, other = (model(tokens).logits[0, first:-1].float().log_softmax(-1) for model in (dense, pruned))
        found += functional.kl_div(other, expected, log_target=True, reduction="none").sum(-1).tolist()
    return statistics.fmean(found)


def answers_of(arguments: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """The dense model's own answers to some of the prompts, drawn by another seed than any calibration."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "answers.jsonl"
        settings: Any = dict(samples=arguments.answers, seqlen=64, seed=12345)
        coprune.generate(arguments.model, target, PROMPTS, **settings)
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt_ids"], row["answer_ids"]) for row in rows if row["answer_ids"]]


def main() -> None:
    """Run what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pattern", action="append", help="repeatable; unstructured means 50 %% [2:4, unstructured]")
    parser.add_argument("--only", action="append", help=f"repeatable, of: {', '.join(kinds(1))}")
    for name, default in dict(nsamples=32, seqlen=256, answers=16, tokens=16384).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    pairs = answers_of(arguments)
    dense: Any = coprune.prune(
        arguments.model, sparsity=0.0, method="magnitude", evaluate=False, layer_error=False
    ).model
    print("| pattern | calibrated on | seed | " + " | ".join(TEXTS) + " | KL |\n|---|---|---|---|---|---|", flush=True)
    for pattern in arguments.pattern or ["2:4", "unstructured"]:
        for name, (data, samples) in kinds(arguments.nsamples).items():
            for seed in arguments.seeds if name in (arguments.only or [name]) else []:
                settings: Any = dict(
                    dataset=data, nsamples=samples, seqlen=arguments.seqlen, seed=seed, pattern=pattern
                )
                settings |= dict(propagation="sequential", eval_data=",".join(TEXTS), eval_tokens=arguments.tokens)
                result = coprune.prune(arguments.model, "sparsegpt", evaluate_dense=False, **settings)
                figures = [f"{one.pruned:.2f}" for one in result.report.perplexity]
                figures.append(f"{divergence(dense, result.model, pairs):.3f}")
                print(f"| {pattern} | {name} | {seed} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
