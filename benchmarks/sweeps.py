"""What a sweep saves: the same runs once as a sweep with one worker, and once as separate commands.

Both have the same number of threads; the sweep goes first in one round and last in the next. Prints
whether their perplexities are equal to the last bit. On a busy machine, compare CPU time rather than wall time.

    python benchmarks/sweeps.py                     # 2 methods × 3 patterns on SmolLM2; minutes
    python benchmarks/sweeps.py --methods wanda,sparsegpt,magnitude --seeds 2 --rounds 2
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from coprune.recipe.command import command_of
from coprune.report.schema import Report
from coprune.sweeps.expand import Run, expand
from coprune.sweeps.file import Sweep
from coprune.sweeps.finished import Ledger


def main() -> None:
    arguments = read_arguments()
    folder = Path(tempfile.mkdtemp(prefix="coprune-sweeps-", dir=arguments.folder))
    try:
        print("round  runs  way       seconds  processor seconds", flush=True)
        for number in range(arguments.rounds):
            compare(arguments, folder / str(number), number)
    finally:
        shutil.rmtree(folder)


def compare(arguments: argparse.Namespace, folder: Path, number: int) -> None:
    """One round: both ways, the sweep first in even rounds."""
    folder.mkdir()
    sweep, separate = sweep_of(arguments, folder / "sweep"), sweep_of(arguments, folder / "separate")
    file = folder / "sweep.yaml"
    file.write_text(sweep.to_yaml(), encoding="utf-8")
    together = [f"sweep {file} --quiet --workers 1 --threads {arguments.threads}"]
    singly = [command_of(run.recipe).partition(" ")[2] + " --quiet" for run in expand(separate)]
    ways = {"sweep": together, "separate": singly}
    taken = {}
    for way in sorted(ways, reverse=number % 2 == 0):
        taken[way] = timed(ways[way], arguments.threads)
        wall, cpu = taken[way]
        print(f"{number + 1:>5}  {len(singly):>4}  {way:<8}  {wall:>7.0f}  {cpu:>17.0f}", flush=True)
    (wall, cpu), (wall_alone, cpu_alone) = taken["sweep"], taken["separate"]
    same = perplexities(expand(sweep)) == perplexities(expand(separate))
    print(f"       sweep / separate: time × {wall / wall_alone:.2f}, processor time × {cpu / cpu_alone:.2f}")
    print(
        f"       perplexities {'equal to the last bit' if same else 'DIFFER'}. {Ledger.read(sweep.folder).line()}",
        flush=True,
    )


def timed(commands: list[str], threads: int) -> tuple[float, float]:
    """Run commands of coprune one after another; returns wall time and the CPU time of all their processes, in seconds."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        words = [sys.executable, "-m", "coprune", *shlex.split(command)]
        subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def perplexities(runs: list[Run]) -> list[tuple[float | None, float]]:
    reports = [Report.read(run.recipe.run_folder / "report.json") for run in runs]
    return [(facts.dense, facts.pruned) for report in reports for facts in report.perplexity]


def sweep_of(arguments: argparse.Namespace, folder: Path) -> Sweep:
    data = {"model": arguments.model, "dataset": "embedded", "save": str(folder)}
    data |= {"nsamples": arguments.nsamples, "seqlen": arguments.seqlen, "eval_tokens": arguments.eval_tokens}
    data |= {"method": arguments.methods.split(","), "pattern": ["unstructured", "2:4", "4:8"]}
    data |= {"propagation": arguments.propagation}
    return Sweep.make(data | {"seed": list(range(arguments.seeds))})


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="wanda,magnitude")
    parser.add_argument("--propagation", default="block", choices=("block", "sequential", "dense"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for what the runs leave [the folder for temporary files]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
