"""How long a user waits: whole commands as they are typed, with every default on.

Each is compared with the fastest plain forward pass of its calibration tokens, as `speed.py` times it: in batches of the best
size from 1 to 16, in a process of its own, on the same threads, without imports and loading. Commands and the pass take
turns; the table has medians.
`first` is a run on a model that was never measured here; `again` is another run on it, which finds the dense model's figures
in the cache.

    python benchmarks/typed.py                        # 64 × 256 tokens, three times: half an hour of two cores
    python benchmarks/typed.py --nsamples 128 --seqlen 512 --only wanda,sparsegpt
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from processor import processor_name
from speed import FLOOR, Found, inside, prepare


class Timed(NamedTuple):
    """The time of a command."""

    seconds: float
    cpu: float
    peak: int
    """Bytes."""


def main() -> None:
    asked = _options()
    coprune = shutil.which("coprune") or str(Path(sys.executable).with_name("coprune"))
    commands = {
        name: [coprune, *command] for name, command in _commands(asked).items() if not asked.only or name in asked.only
    }
    times: dict[str, list[Timed]] = {}
    floors, tokens = [], prepare(asked)
    for turn in range(asked.repeats):
        floors.append(_floor(asked, tokens))
        print(f"turn {turn + 1}: the pass takes {floors[-1]:.1f} s", file=sys.stderr, flush=True)
        for name, command in commands.items():
            shutil.rmtree(asked.folder / "cache", ignore_errors=True)
            for which in ("first", "again") if command[1] == "prune" else ("first",):
                for written in ("run", "model", "file.gguf"):
                    _remove(asked.folder / written)
                    _remove(asked.folder / f".{written}.partial")  # of a benchmark that was stopped
                times.setdefault(f"{name}, {which}", []).append(_timed(command, asked))
                print(f"  {name}, {which}: {times[f'{name}, {which}'][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    _print_table(times, floors, asked)


def _commands(asked: argparse.Namespace) -> dict[str, list[str]]:
    data = ["--dataset", asked.dataset, "--nsamples", str(asked.nsamples), "--seqlen", str(asked.seqlen)]
    written = ["--save", str(asked.folder / "run"), "--save-model", str(asked.folder / "model")]
    prune = ["prune", asked.model, *data, *written, "--dtype", asked.dtype, "--no-eval"]
    sparse = asked.folder / "sparse"
    return {
        "wanda": [*prune, "-m", "wanda", "--propagation", "sequential", "-p", "2:4"],
        "sparsegpt": [*prune, "-m", "sparsegpt", "--propagation", "sequential", "-p", "2:4"],
        "balanced": [*prune, "-p", "2:4"],
        "channels": [*prune, "--remove", "channels=0.25"],
        "eval": ["eval", asked.model, "--data", asked.dataset, "--seqlen", "512", "--eval-tokens", "16384"],
        "export": ["export", str(sparse), str(asked.folder / "file.gguf"), "--type", "q8_0"],
        "finetune": [
            "finetune",
            str(sparse),
            "--dataset",
            asked.dataset,
            "--minutes",
            "1",
            "--save",
            str(asked.folder / "run"),
        ],
    }


def _timed(command: list[str], asked: argparse.Namespace) -> Timed:
    env = os.environ | {"XDG_CACHE_HOME": str(asked.folder / "cache"), "OMP_NUM_THREADS": str(asked.threads)}
    log = (asked.folder / "log").open("w", encoding="utf-8")
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    _, status, used = os.wait4(process.pid, 0)
    took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1: the run's own verdict on the model
        raise SystemExit((asked.folder / "log").read_text(encoding="utf-8"))
    return Timed(took, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def _floor(asked: argparse.Namespace, tokens: Found) -> float:
    return float(inside(tokens | {"run": FLOOR}, sys.executable, asked.threads)["seconds"])


def _print_table(times: dict[str, list[Timed]], floors: list[float], asked: argparse.Namespace) -> None:
    floor = statistics.median(floors)
    print(f"{asked.model}, {asked.nsamples} × {asked.seqlen} tokens, {asked.threads} thread(s), {processor_name()}")
    print(f"fastest plain pass: {floor:.1f} s ({min(floors):.1f}–{max(floors):.1f})\n")
    print("| as typed | seconds | passes | CPU s | peak GiB |\n| --- | ---: | ---: | ---: | ---: |")
    for name, own in times.items():
        passes = statistics.median(one.seconds / there for one, there in zip(own, floors, strict=True))
        middle = [statistics.median(figures) for figures in zip(*own, strict=True)]
        print(f"| {name} | {middle[0]:.1f} | {passes:.2f} | {middle[1]:.1f} | {middle[2] / 2**30:.2f} |")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="Some of the commands, comma-separated. [all]"
    )
    parser.add_argument("--folder", type=Path, default=Path("out/typed"))
    parser.set_defaults(
        dtype="float32", seed=0, blocks=None, pattern="2:4", eval_tokens=0
    )  # as `speed.py` prepares them
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not (sparse := asked.folder / "sparse").exists() and (
        not asked.only or {"export", "finetune"} & set(asked.only)
    ):
        made = ["prune", asked.model, "-m", "magnitude", "-p", "2:4", "--dataset", asked.dataset, "--no-eval"]
        folders = ["--save", str(asked.folder / "made"), "--save-model", str(sparse)]
        subprocess.run([sys.executable, "-m", "coprune", *made, *folders], check=True)
    return asked


if __name__ == "__main__":
    main()
