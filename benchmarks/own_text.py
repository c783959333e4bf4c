"""What calibration on a model's own text changes: perplexity, written answers, and divergence along the dense model's answers.

    python benchmarks/own_text.py smollm2-135m --nsamples 32 --seqlen 256 --pattern 2:4 --seeds 0 1 2

Prunes, calibrated on Wikipedia (`embedded`), on what the model writes from BOS, on its answers to prompts, on half of either
and half of Wikipedia's, and on either added to as many tokens of Wikipedia's. Of the English prompts that ship with the
package every other one is answered for calibration; the others are what is measured on. One line a run, in Markdown.
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
from torch import Tensor
from torch.nn import functional

import coprune

TEXTS = ("embedded", "embedded-lambada")
WAYS: dict[str, dict[str, str]] = {
    "sparsegpt": {"method": "sparsegpt", "propagation": "sequential"},
    "balanced": {"preset": "balanced"},
}
PROMPTS = files("coprune.evaluation.answers") / "prompts.jsonl"


def write_halves(folder: Path) -> tuple[str, str]:
    """The prompts to calibrate on, and those to measure on."""
    rows = [
        line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if json.loads(line)["language"] == "English"
    ]
    halves = folder / "calibration.jsonl", folder / "measured.jsonl"
    for place, file in enumerate(halves):
        file.write_text("\n".join(rows[place::2]) + "\n", encoding="utf-8")
    return str(halves[0]), str(halves[1])


def kinds(nsamples: int, prompts: str = "PROMPTS") -> dict[str, tuple[str, int]]:
    """The kinds of calibration data by name, with the number of samples of each part."""
    return {
        "Wikipedia": ("embedded", nsamples),
        "own text": ("self", nsamples),
        "own answers": (f"self:{prompts}:length=128", nsamples),
        "half and half": ("self=0.5,embedded=0.5", nsamples),
        "quarter answers": (f"self:{prompts}:length=128=0.25,embedded=0.75", nsamples),
        "half answers": (f"self:{prompts}:length=128=0.5,embedded=0.5", nsamples),
        "own text added": ("self=0.5,embedded=0.5", 2 * nsamples),
        "answers added": (f"self:{prompts}:length=128=0.5,embedded=0.5", 2 * nsamples),
    }


@torch.no_grad()
def along(model: Any, answer: tuple[list[int], list[int]]) -> Tensor:
    """A model's log-probabilities at each token of an answer: a row per token."""
    prompt, written = answer
    found: Tensor = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    return found.float().log_softmax(-1)


def along_dense(model: str, pairs: list[tuple[list[int], list[int]]]) -> list[Tensor]:
    """The dense model's log-probabilities for every answer; the model is freed afterwards."""
    dense: Any = coprune.prune(model, sparsity=0.0, method="magnitude", evaluate=False, layer_error=False).model
    return [along(dense, pair) for pair in pairs]


def divergence(expected: list[Tensor], pruned: Any, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Mean of KL(dense ‖ pruned) in nats over the tokens of the dense model's answers."""
    found: list[float] = []
    for dense, pair in zip(expected, pairs, strict=True):
        apart = functional.kl_div(along(pruned, pair), dense, log_target=True, reduction="none")
        found += apart.sum(-1).tolist()
    return statistics.fmean(found)


def answers_of(arguments: argparse.Namespace, prompts: str, folder: Path) -> list[tuple[list[int], list[int]]]:
    """The dense model's own answers, sampled with a seed that no calibration has."""
    target = folder / "answers.jsonl"
    settings: Any = dict(samples=arguments.answers, seqlen=64, seed=12345)
    coprune.generate(arguments.model, target, prompts, **settings)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt_ids"], row["answer_ids"]) for row in rows if row["answer_ids"]]


def written(way: Any, is_dense: bool = False) -> list[str]:
    """How many answers loop, how many end, and their mean length."""
    found = way.dense if is_dense else way.figures
    return [f"{found.loops} of {found.answers}", f"{found.ended}", f"{found.tokens:.1f}"]


def main() -> None:
    """Run everything that is asked for and print a table."""
    arguments = _options()
    with tempfile.TemporaryDirectory() as name:
        _measure(arguments, Path(name))


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    calibrated, measured = write_halves(folder)
    pairs = answers_of(arguments, measured, folder)
    expected = along_dense(arguments.model, pairs)
    columns = (*TEXTS, "KL", "loops", "ended", "tokens", "loops at 0.8", "ended", "tokens")
    print("| by | pattern | calibrated on | seed | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 4) + "|", flush=True)
    common: Any = dict(eval_data=",".join(TEXTS), eval_tokens=arguments.tokens, generate=measured, generate_tokens=64)
    known = False
    for pattern in arguments.pattern or ["2:4", "unstructured"]:
        for seed in arguments.seeds:
            for kind, (data, samples) in kinds(arguments.nsamples, calibrated).items():
                if kind not in (arguments.only or [kind]):
                    continue
                settings = common | dict(dataset=data, nsamples=samples, seqlen=arguments.seqlen, seed=seed)
                settings |= WAYS[arguments.by] | dict(pattern=pattern, evaluate_dense=not known)
                result = coprune.prune(arguments.model, **settings)
                report, facts = result.report, result.report.answers
                assert facts is not None
                assert facts.sampled is not None
                ways = facts.greedy, facts.sampled
                if not known:
                    known = True
                    figures = [f"{one.dense:.2f}" for one in report.perplexity] + ["0"]
                    figures += [figure for way in ways for figure in written(way, is_dense=True)]
                    print("| dense | | | | " + " | ".join(figures) + " |", flush=True)
                figures = [f"{one.pruned:.2f}" for one in report.perplexity]
                figures.append(f"{divergence(expected, result.model, pairs):.3f}")
                figures += [figure for way in ways for figure in written(way)]
                print(f"| {arguments.by} | {pattern} | {kind} | {seed} | " + " | ".join(figures) + " |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--by", choices=list(WAYS), default="sparsegpt")
    parser.add_argument("--pattern", action="append", help="repeatable; unstructured means 50 %% [2:4, unstructured]")
    parser.add_argument("--only", action="append", help=f"repeatable, of: {', '.join(kinds(1))}")
    for name, default in dict(nsamples=32, seqlen=256, answers=48, tokens=8192).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
