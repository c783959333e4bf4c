"""What the settings of block reconstruction are worth: perplexity on two texts, and seconds.

    python benchmarks/reconstruction.py smollm2-135m --nsamples 32 --seqlen 512 --pattern 2:4

Prunes by preset `balanced` with other steps or samples, calibrated on Wikipedia (`embedded`); one line a run, in
Markdown. Seconds are of the walk alone, measured one after the other: they compare only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from typing import Any

import coprune

TEXTS = ("embedded", "embedded-lambada")
BALANCED = {"preset": "balanced"}
WAYS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "balanced": BALANCED,
    "no training": BALANCED | {"reconstruct": 0},
    "12 steps": BALANCED | {"reconstruct": 12},
    "12 steps of one sample": BALANCED | {"reconstruct": 12, "batch_size": 1},
    "learning rate 5e-3": BALANCED | {"reconstruct_lr": 5e-3},
}


def main() -> None:
    """Run what is asked for and print a table."""
    arguments = _options()
    print(f"| way | pattern | seed | {' | '.join(TEXTS)} | seconds |")
    print("|---" * (len(TEXTS) + 4) + "|", flush=True)
    for pattern in arguments.pattern or ["2:4"]:
        for name in arguments.only or WAYS:
            for seed in arguments.seeds:
                settings = dict(pattern=pattern, seed=seed, nsamples=arguments.nsamples, seqlen=arguments.seqlen)
                measured = dict(eval_data=",".join(TEXTS), eval_tokens=arguments.tokens, evaluate_dense=False)
                report = coprune.prune(arguments.model, dataset=TEXTS[0], **WAYS[name], **settings, **measured).report
                found = " | ".join(f"{one.pruned:.2f}" for one in report.perplexity)
                print(f"| {name} | {pattern} | {seed} | {found} | {report.prune_seconds:.0f} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pattern", action="append", help="repeatable; unstructured means 50 %% [2:4]")
    parser.add_argument("--only", action="append", choices=list(WAYS), help="repeatable")
    for name, default in dict(nsamples=32, seqlen=512, tokens=5120).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
