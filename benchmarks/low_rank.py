"""Zeros with a matrix of low rank beside them, and at the same bytes fewer zeros without: perplexity of both.

    python benchmarks/low_rank.py [--model smollm2-135m] [--samples 32] [--seqlen 512] [--ranks 0,32] [--rounds 8] [--only "2:4"]

Prints a line as soon as it is measured. The third column is the share of zeros with what is added counted as if it were
kept, so rows in which it is the same take the same bytes in half precision (both patterns need a bit a weight for places).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import coprune

PATTERNS: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "50 %": {"sparsity": 0.5}}


def main() -> None:
    """Measure every row, and for every rank one without it that takes the same bytes."""
    asked = _options()
    print(f"{asked.model}, {asked.method}, sequential, {asked.samples} × {asked.seqlen} tokens of {asked.dataset}")
    print(f"{'way':24} {'zeros':>7} {'effective':>9}  perplexity on {asked.data} (without what is added)  seconds")
    budgets: dict[int, float] = {}
    for rank in map(int, asked.ranks.split(",")):
        for name, pattern in PATTERNS.items():
            if asked.only in name:
                added = {"low_rank": rank} if rank else {}
                settings = {**pattern, **added}
                budgets[rank] = measure(f"{name}, rank {rank}", settings, asked)
        if rank:
            measure(f"bytes of rank {rank}", {"sparsity": budgets[rank]}, asked)


def measure(name: str, settings: dict[str, Any], asked: argparse.Namespace) -> float:
    """Print a row; returns the effective share of zeros."""
    started = time.perf_counter()
    report = coprune.prune(
        asked.model,
        asked.method,
        propagation="sequential",
        dataset=asked.dataset,
        nsamples=asked.samples,
        seqlen=asked.seqlen,
        eval_data=asked.data,
        eval_tokens=asked.tokens,
        evaluate_dense=False,
        prompt="",
        quiet=True,
        **settings,
    ).report
    added, zeros = report.low_rank, report.sparsity.matrices
    effective = zeros if added is None else added.effective_sparsity
    figures = " ".join(
        f"{entry.pruned:8.2f}" + ("" if added is None else f" ({added.alone[entry.data]:.2f})")
        for entry in report.perplexity
    )
    print(f"{name:24} {zeros:7.4f} {effective:9.4f} {figures} {time.perf_counter() - started:8.0f}", flush=True)
    return effective


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--data", default="embedded,embedded-lambada", help="texts, comma-separated")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=5120, help="of each text")
    parser.add_argument("--ranks", default="0,16,32,64", help="comma-separated")
    parser.add_argument("--only", default="", help="patterns whose name holds this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
