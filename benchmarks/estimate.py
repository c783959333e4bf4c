"""What `coprune estimate` says against what the run then takes: peak memory and time, on SmolLM2 and a larger LLaMA.

Each estimate and each run is a process of its own, one right after the other, so that both see the same machine. The
larger model is synthetic (float32, random weights): its size can be chosen, and nothing is downloaded.

    python benchmarks/estimate.py                              # some minutes
    python benchmarks/estimate.py --width 2048 --blocks 16     # a model of 3.2 GB
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from synthetic import write_llama, write_words

MIB = 1 << 20


def main() -> None:
    arguments = read_arguments()
    folder = Path(tempfile.mkdtemp(prefix="coprune-estimate-", dir=arguments.folder))
    try:
        measure(arguments, folder)
    finally:
        shutil.rmtree(folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    print(
        "model      method     propagation  peak MiB: estimated  measured  ratio   seconds: estimated  measured  ratio"
    )
    for model in arguments.models.split(","):
        options = options_of(model, arguments, folder)
        for method in arguments.methods.split(","):
            for propagation in arguments.propagations.split(","):
                one = [*options, "--method", method, "--propagation", propagation, "--quiet", "--device", "cpu"]
                said, took = estimate_and_run(one, folder)
                print(
                    f"{model:<10} {method:<10} {propagation:<11}  {said['peak_bytes'] / MIB:>19.0f}"
                    f"  {took['peak_memory_bytes'] / MIB:>8.0f}  {said['peak_bytes'] / took['peak_memory_bytes']:>5.2f}"
                    f"  {said['seconds']:>19.1f}  {took['total_seconds']:>8.1f}"
                    f"  {said['seconds'] / took['total_seconds']:>5.2f}",
                    flush=True,
                )


def options_of(model: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The model and data as options."""
    sizes = ["--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)]
    sizes += ["--eval-tokens", str(arguments.eval_tokens)]
    if model == "smollm2":
        return ["smollm2-135m", "--dataset", "embedded", *sizes]
    write_llama(folder / "llama", arguments.blocks, arguments.width, torch.float32, vocabulary=32_000)
    words = str(write_words(folder / "words.txt", 200_000, vocabulary=32_000))
    return [str(folder / "llama"), "--dataset", words, "--eval-data", words, *sizes]


def estimate_and_run(options: list[str], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The estimate, and the report of the run."""
    run, out = folder / "run", folder / "out"
    options = [*options, "--save", str(run), "--save-model", str(out)]
    command = [sys.executable, "-m", "coprune"]
    said = subprocess.run([*command, "estimate", *options, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    subprocess.run([*command, "prune", *options], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(run)
    shutil.rmtree(out)
    return json.loads(said.stdout), report


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2,llama")
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--propagations", default="block,sequential")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where the model goes [the folder for temporary files]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
