"""Peak memory against depth: LLaMAs of equal blocks are streamed through `coprune prune`, each in a fresh process.

Shows that the peak hardly grows from 8 to 128 blocks, and that a checkpoint larger than a limit on the process's memory
is pruned to the end. The checkpoints are written beforehand, shard by shard (width 1024 in bfloat16: 24 MB a block).

    python benchmarks/depth.py                                          # 8, 32 and 128 blocks; minutes, 10 GB of disk
    python benchmarks/depth.py --methods wanda,sparsegpt --width 2048   # blocks of 94 MB, 40 GB of disk
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import write_llama, write_words

MIB = 1 << 20
LEAST_LIMIT = 1800 * MIB


def main() -> None:
    arguments = read_arguments()
    folder = Path(tempfile.mkdtemp(prefix="coprune-depth-", dir=arguments.folder))
    try:
        measure(arguments, folder)
    finally:
        shutil.rmtree(folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    words = write_words(folder / "words.txt")
    depths = [int(depth) for depth in arguments.depths.split(",")]
    print("method     blocks  checkpoint MiB  peak MiB  growth  seconds per block", flush=True)
    for method in arguments.methods.split(","):
        first = 0
        for depth in depths:
            model = folder / f"llama-{depth}"
            size = write_llama(model, depth, arguments.width)
            report = prune(arguments, model, words, method)
            peak = report["peak_memory_bytes"]
            first = first or peak
            print(
                f"{method:<10} {depth:>6}  {size / MIB:>14.0f}  {peak / MIB:>8.0f}  {peak / first - 1:>+6.1%}"
                f"  {report['prune_seconds'] / depth:>6.2f}",
                flush=True,
            )
    limited(arguments, folder / f"llama-{depths[-1]}", words)


def limited(arguments: argparse.Namespace, model: Path, words: Path) -> None:
    """Prune a checkpoint under a limit on the address space that is smaller than the checkpoint."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    limit = int(size * arguments.limit)
    if limit < LEAST_LIMIT:
        print(f"\nno run under a limit: {limit / MIB:.0f} MiB of address space would not even hold Python with torch")
        return
    report = prune(arguments, model, words, arguments.methods.split(",")[0], limits={resource.RLIMIT_AS: limit})
    print(
        f"\nwith a limit of {limit / MIB:.0f} MiB on the address space (ulimit -v), a checkpoint of {size / MIB:.0f} MiB: "
        f"pruned, peak {report['peak_memory_bytes'] / MIB:.0f} MiB, sparsity {report['sparsity']['matrices']:.4%}"
    )


def prune(
    arguments: argparse.Namespace, model: Path, words: Path, method: str, limits: dict[int, int] | None = None
) -> dict[str, Any]:
    """Run the command in a process of its own, under limits (resource → bytes); returns its report."""
    run, out = model.with_name("run"), model.with_name("pruned")
    command = [sys.executable, "-m", "coprune", "prune", str(model), "--method", method, "--dataset", str(words)]
    command += ["--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen), "--device", "cpu", "--quiet"]
    command += (
        ["--eval-data", str(words), "--eval-tokens", str(arguments.eval_tokens)]
        if arguments.eval_tokens
        else ["--no-eval"]
    )
    command += ["--save", str(run), "--save-model", str(out)]

    def set_limits() -> None:
        for kind, limit in (limits or {}).items():
            resource.setrlimit(kind, (limit, limit))

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=set_limits)
    report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(run)
    shutil.rmtree(out)
    return report


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="8,32,128")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--methods", default="wanda")
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=1024, help="0 for no perplexity")
    parser.add_argument("--limit", type=float, default=0.8, help="share of the last checkpoint's size")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go [the folder for temporary files]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
