"""How long presets take beside SparseGPT, on a model of random weights whose blocks are as wide as those of a billion.

    python benchmarks/preset_times.py                                     # two blocks of width 2048, minutes
    python benchmarks/preset_times.py --width 1024 --presets balanced,best

Only the times mean anything. Calibration is on 32 × 512 random words; a training takes what the preset asks for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from synthetic import write_llama, write_words

import coprune
from coprune.recipe.presets import preset_settings


def main() -> None:
    """Print a line as soon as it is measured; the ratio is that to SparseGPT's time in the same run."""
    asked = _options()
    torch.set_num_threads(asked.threads)
    print(f"{asked.blocks} blocks of width {asked.width}, {asked.samples} × 512 tokens, 2:4, {asked.threads} threads")
    print(f"{'way':12} {'seconds':>8} {'of them training':>17} {'of SparseGPT':>13}", flush=True)
    base: float | None = None
    with tempfile.TemporaryDirectory() as place:
        write_llama(model := Path(place) / "model", asked.blocks, asked.width)
        words = write_words(Path(place) / "words.txt", 2 * 512 * asked.samples)
        for way in ["sparsegpt", *asked.presets.split(",")]:
            pruning, training = seconds_of(way, model, words, asked.samples, Path(place) / way)
            base = pruning if base is None else base
            print(
                f"{way:12} {pruning + training:8.0f} {training:17.0f} {(pruning + training) / base:13.2f}", flush=True
            )


def seconds_of(way: str, model: Path, words: Path, samples: int, place: Path) -> tuple[float, float]:
    """Seconds of pruning (with reconstruction) and of training."""
    target: dict[str, Any] = {"pattern": "2:4"}
    how: dict[str, Any] = {"method": way} if way == "sparsegpt" else preset_settings(way, target, "whole")
    data: dict[str, Any] = {"dataset": str(words), "nsamples": samples, "seqlen": 512}
    without: dict[str, Any] = {"evaluate": False, "gate": False, "prompt": "", "stream": False, "quiet": True}
    report = coprune.prune(model, save=place, **target, **data, **without, **how).report
    return report.prune_seconds, 0.0 if report.finetuned is None else 60 * report.finetuned.minutes


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--presets", default="balanced")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
