"""A quarter of the blocks' parameters removed in every way, without training: perplexity beside that of published methods.

    python benchmarks/removal.py [--model smollm2-135m] [--samples 32] [--seqlen 512] [--tokens 20480] [--seeds 0]
    python benchmarks/removal.py --model gemma-3-270m.gguf --channels 0.36 --blocks 0.2778 --only "by "

Prints each line as soon as it is measured. The loss is perplexity minus the dense model's; the last column divides it by the
loss of the best published way on the first text.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import coprune

WAYS: dict[str, dict[str, str | int]] = {
    "blocks by influence (ShortGPT)": {"remove": "blocks={blocks}", "score": "influence"},
    "channels by norm": {"remove": "channels={channels}", "score": "magnitude"},
    "channels by Wanda-sp": {"remove": "channels={channels}", "score": "wanda_sp"},
    "channels by FLAP, no bias": {"remove": "channels={channels}", "score": "flap"},
    "channels by norm, refit": {"remove": "channels={channels}", "score": "magnitude:refit=true"},
    "channels by Wanda-sp, refit": {"remove": "channels={channels}", "score": "wanda_sp:refit=true"},
    "channels by FLAP, refit": {"remove": "channels={channels}", "score": "flap:refit=true"},
    "channels by OBS, refit": {"remove": "channels={channels}", "score": "obs"},
    "blocks by KL": {"remove": "blocks={blocks}", "score": "kl"},
    "blocks mapped": {"remove": "blocks={blocks}", "score": "map"},
    "channels by OBS, spread by error": {"remove": "channels={channels}", "allocation": "error"},
    "channels by OBS, reconstructed": {"remove": "channels={channels}", "reconstruct": 20},
}
PUBLISHED = 4
"""The first so many ways are the published ones."""


def settings_of(way: str, channels: str = "0.33", blocks: str = "0.2334") -> dict[str, Any]:
    """Settings of one way. channels, blocks: the shares that are a quarter of the blocks' parameters."""
    settings = WAYS[way]
    return settings | {"remove": str(settings["remove"]).format(channels=channels, blocks=blocks)}


def main() -> None:
    """Measure every way and print a row for each."""
    asked = _options()
    texts = asked.data.split(",")
    print(f"{asked.model}, {asked.samples} × {asked.seqlen} tokens of {asked.dataset}, perplexity at {asked.seqlen}")
    print(f"{'way':32} {'seed':>4} {'parameters':>12} " + " ".join(f"{text:>18}" for text in texts) + "  seconds  loss")
    best, dense = float("inf"), dict[str, float]()
    for place, name in enumerate(WAYS):
        if asked.only not in name:
            continue
        for seed in map(int, asked.seeds.split(",")):
            started = time.perf_counter()
            result = coprune.prune(
                asked.model,
                dataset=asked.dataset,
                nsamples=asked.samples,
                seqlen=asked.seqlen,
                seed=seed,
                eval_data=asked.data,
                eval_tokens=asked.tokens,
                evaluate_dense=not dense,  # once is enough
                quiet=True,
                **settings_of(name, asked.channels, asked.blocks),
            )
            found, seconds = result.report.perplexity, time.perf_counter() - started
            dense |= {entry.data: entry.dense for entry in found if entry.dense is not None}
            losses = [entry.pruned - dense[entry.data] for entry in found]
            best = min(best, losses[0]) if place < PUBLISHED else best
            size = result.model.num_parameters() if result.model is not None else 0
            figures = " ".join(f"{dense[entry.data]:7.2f} → {entry.pruned:8.2f}" for entry in found)
            print(f"{name:32} {seed:4} {size:12,} {figures} {seconds:8.0f}  {losses[0] / best:.2f}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--data", default="embedded,embedded-lambada", help="texts, comma-separated")
    parser.add_argument("--channels", default="0.33", help="the share that is a quarter of the blocks' parameters")
    parser.add_argument("--blocks", default="0.2334", help="likewise")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_480, help="of each text")
    parser.add_argument("--only", default="", help="ways whose name holds this")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    return parser.parse_args()


if __name__ == "__main__":
    main()
