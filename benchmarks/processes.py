"""Time of one run with 1, 2 and 4 processes, split into work, communication and waiting.

Masks differ a little where sums are added in another order. One process with smaller batches differs from its usual result
for the same reason, so that is shown as well. The first blocks are equal; SparseGPT's updates then carry rounding
differences on from column to column and from block to block.

The runs are interleaved and the times are given as ratios to one process with one thread, since other work on the
machine disturbs all of them alike. Every process computes with one thread. Before each exchange the processes wait for
each other (counted as idle), so that the exchange itself is timed alone.

    python benchmarks/processes.py                                            # SmolLM2-135M, Wanda and SparseGPT
    python benchmarks/processes.py --methods sparsegpt --propagations block,sequential --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Times = dict[str, float]


def main() -> None:
    arguments = read_arguments()
    if arguments.inside:
        inside(json.loads(arguments.inside))
        return
    counts = [int(count) for count in arguments.processes.split(",")]
    print("method     propagation  processes  time to one process  communication   idle   differing mask entries")
    for method in arguments.methods.split(","):
        for propagation in arguments.propagations.split(","):
            runs: dict[int, list[Times]] = defaultdict(list)
            with tempfile.TemporaryDirectory(prefix="coprune-processes-") as folder:
                for repeat in range(arguments.repeats):
                    for count in counts:
                        out = Path(folder) / f"{count}-{repeat}"
                        runs[count].append(measure(arguments, method, propagation, count, out))
                measure(arguments, method, propagation, 1, Path(folder) / "control", -(-arguments.nsamples // 2))
                for count in counts:
                    different = differing(Path(folder) / f"{counts[0]}-0", Path(folder) / f"{count}-0")
                    print_line(method, propagation, count, runs[count], runs[counts[0]], different)
                different = differing(Path(folder) / f"{counts[0]}-0", Path(folder) / "control")
                print(
                    f"{method:<10} {propagation:<11} one process, smaller batches: {different[0]:,} of {different[1]:,} differ"
                )


def measure(
    arguments: argparse.Namespace, method: str, propagation: str, count: int, out: Path, batch: int | None = None
) -> Times:
    """Time one run in its own processes; returns mean seconds of the walk, and of communication and idling within it."""
    settings = dict(
        model=arguments.model,
        method=method,
        propagation=propagation,
        dataset=arguments.dataset,
        nsamples=arguments.nsamples,
        seqlen=arguments.seqlen,
        batch_size=batch,
        device="cpu",
        evaluate=False,
        save=str(out / "run"),
        save_model=str(out / "model"),
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--inside", json.dumps(settings)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {key: statistics.fmean(rank[key] for rank in ranks) for key in ranks[0]}


def inside(settings: dict[str, Any]) -> None:
    """Run in every process: time the exchanges, and print the sums."""
    import torch.distributed as dist

    from coprune.base import processes as distributed
    from coprune.base.progress import Reporter
    from coprune.recipe.recipe import make_recipe
    from coprune.runner.run_recipe import run_recipe

    times: Times = {"idle": 0.0, "communication": 0.0}
    heard = distributed._heard

    @contextmanager
    def timed() -> Iterator[None]:
        started = time.perf_counter()
        if dist.is_initialized():
            dist.barrier()
        met = time.perf_counter()
        with heard():
            yield
        times["idle"] += met - started
        times["communication"] += time.perf_counter() - met

    with distributed.joined_processes() as processes:
        distributed._heard = timed
        report = run_recipe(make_recipe(settings), reporter=Reporter(quiet=True), processes=processes).report
        distributed._heard = heard
    print(json.dumps(times | {"total": report.prune_seconds}), flush=True)


def print_line(
    method: str, propagation: str, count: int, runs: list[Times], base: list[Times], different: tuple[int, int]
) -> None:
    ratios = [run["total"] / one["total"] for run, one in zip(runs, base, strict=True)]
    shares = {key: statistics.median(run[key] / run["total"] for run in runs) for key in ("communication", "idle")}
    print(
        f"{method:<10} {propagation:<11} {count:>10}  {statistics.median(ratios):>19.2f}  {shares['communication']:>13.1%}"
        f"  {shares['idle']:>5.1%}   {different[0]:,} of {different[1]:,}",
        flush=True,
    )


def differing(one: Path, other: Path) -> tuple[int, int]:
    """Number of entries that are zero in only one of two checkpoints, and of all entries."""
    from safetensors.torch import load_file

    a, b = load_file(one / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    names = [name for name, tensor in a.items() if tensor.ndim == 2 and ".layers." in name]
    return sum(int(((a[n] != 0) != (b[n] != 0)).sum()) for n in names), sum(a[n].numel() for n in names)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--propagations", default="block")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
