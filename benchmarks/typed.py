"""How long a user waits: whole commands as they are typed, with every default on.

Each is compared with the fastest plain forward pass of its calibration tokens, as `speed.py` times it: in batches of the best
size from 1 to 16, in a process of its own, on the same threads, without imports and loading. Commands and the pass take
turns, and rows are medians; each turn adds or replaces them in the CSV.
`first` is a run on a model that was never measured here; `again` is another run on it, which finds the dense model's figures
in the cache. llm-compressor reads the same weights from a folder, and the same tokens.

    python benchmarks/typed.py                        # 64 × 256 tokens, three times: an hour of two cores
    python benchmarks/typed.py --nsamples 128 --seqlen 512 --only wanda,sparsegpt --no-again
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from processor import processor_name
from speed import FLOOR, HERE, Found, inside, make_environment, prepare

PRUNING = "wanda", "sparsegpt", "balanced", "channels"
OTHERS = "llm-compressor wanda", "llm-compressor sparsegpt"


class Typed(NamedTuple):
    """A command and its name in the table."""

    name: str
    words: list[str]


class Timed(NamedTuple):
    """The time of a command."""

    seconds: float
    cpu: float
    peak: int
    """Bytes."""


def main() -> None:
    asked = _options()
    # In a process of its own, since a child's peak memory is at least what its parent has in memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        tokens = pool.submit(prepare, asked).result()
    commands = _commands(asked, tokens)
    times: dict[tuple[str, str], list[Timed]] = {}
    floors: list[float] = []
    for turn in range(asked.repeats):
        floors.append(float(inside(tokens | {"run": FLOOR}, sys.executable, asked.threads)["seconds"]))
        print(f"turn {turn + 1}: the pass takes {floors[-1]:.1f} s", file=sys.stderr, flush=True)
        for short in asked.only:
            command = commands[short]
            shutil.rmtree(asked.folder / "cache", ignore_errors=True)
            for which in ("first", "again") if short in PRUNING and asked.again else ("first",):
                for written in ("run", "model", "file.gguf"):
                    _remove(asked.folder / written)
                    _remove(asked.folder / f".{written}.partial")  # of a benchmark that was stopped
                times.setdefault((command.name, which), []).append(_timed(command.words, asked))
                print(
                    f"  {short}, {which}: {times[command.name, which][-1].seconds:.1f} s", file=sys.stderr, flush=True
                )
                _write(_rows(times, floors, asked), asked.csv)


def _commands(asked: argparse.Namespace, found: Found) -> dict[str, Typed]:
    folder, installed = asked.folder, shutil.which("coprune")
    coprune = [installed or str(Path(sys.executable).with_name("coprune"))]
    data = ["--dataset", asked.dataset, "--nsamples", str(asked.nsamples), "--seqlen", str(asked.seqlen)]
    written = ["--save", str(folder / "run"), "--save-model", str(folder / "model")]
    prune = [*coprune, "prune", asked.model, *data, *written, "--dtype", asked.dtype, "--no-eval"]
    sparse = str(folder / "sparse")
    train = ["finetune", sparse, "--dataset", asked.dataset, "--minutes", "1", "--save", str(folder / "run")]
    task = str(HERE.parent / "examples" / "fit" / "choice.jsonl")
    fit = ["fit", asked.model, "--task", task, "--require", "accuracy>=dense-0.25", "--budget", asked.budget]
    commands = {
        f"{method}": Typed(
            f"prune -m {method} -p 2:4", [*prune, "-m", method, "--propagation", "sequential", "-p", "2:4"]
        )
        for method in ("wanda", "sparsegpt")
    } | {
        "balanced": Typed("prune -p 2:4", [*prune, "-p", "2:4"]),
        "channels": Typed("prune --remove channels=0.25", [*prune, "--remove", "channels=0.25"]),
        "eval": Typed(
            "eval --eval-tokens 16384",
            [*coprune, "eval", asked.model, "--data", asked.dataset, "--seqlen", "512", "--eval-tokens", "16384"],
        ),
        "export": Typed(
            "export --type q8_0", [*coprune, "export", sparse, str(folder / "file.gguf"), "--type", "q8_0"]
        ),
        "finetune": Typed("finetune --minutes 1", [*coprune, *train]),
        "fit": Typed(f"fit --budget {asked.budget}", [*coprune, *fit, "-o", str(folder / "run")]),
    }
    if any(short in OTHERS for short in asked.only):
        python = make_environment(asked.environment or folder / "llm-compressor")
        for short in OTHERS:
            given = [found["model"], found["tokens"], short.split()[1], "2:4", str(folder / "model")]
            commands[short] = Typed(short, [python, str(HERE / "speed_llm_compressor.py"), *given])
    return commands


def _timed(command: list[str], asked: argparse.Namespace) -> Timed:
    env = os.environ | {"XDG_CACHE_HOME": str(asked.folder / "cache"), "OMP_NUM_THREADS": str(asked.threads)}
    with (asked.folder / "log").open("w", encoding="utf-8") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1: the run's own verdict on the model
        raise SystemExit((asked.folder / "log").read_text(encoding="utf-8"))
    return Timed(took, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def _rows(
    times: dict[tuple[str, str], list[Timed]], floors: list[float], asked: argparse.Namespace
) -> list[dict[str, str]]:
    rows = []
    for (name, run), own in times.items():
        seconds, cpu, peak = (statistics.median(figures) for figures in zip(*own, strict=True))
        passes = statistics.median(one.seconds / there for one, there in zip(own, floors, strict=False))
        rows.append(
            {
                "command": name,
                "run": run,
                "tokens": f"{asked.nsamples} × {asked.seqlen}",
                "seconds": f"{seconds:.1f}",
                "of a forward pass": f"{passes:.2f}",
                "CPU s": f"{cpu:.1f}",
                "peak GiB": f"{peak / 2**30:.2f}",
                "the pass s": f"{statistics.median(floors):.1f}",
                "model": asked.model,
                "dtype": asked.dtype,
                "threads": str(asked.threads),
                "repeats": str(len(own)),
                "processor": processor_name(),
            }
        )
    return rows


def _write(rows: list[dict[str, str]], file: Path) -> None:
    """Add rows to the table, or replace those of the same command, tokens and threads."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[column] for column in ("command", "run", "tokens", "threads", "model", "dtype"))

    known = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.exists() else []
    found = {key(row): row for row in known} | {key(row): row for row in rows}
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found.values())


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
        "--only",
        type=lambda text: text.split(","),
        default=[*PRUNING, "eval", "export", "finetune", "fit", *OTHERS],
        help="Some of the commands, comma-separated. [%(default)s]",
    )
    parser.add_argument("--again", action=argparse.BooleanOptionalAction, default=True, help="also the second runs")
    parser.add_argument("--budget", default="5m", help="of fit")
    parser.add_argument("--environment", type=Path, help="with llm-compressor [made in the folder]")
    parser.add_argument("--folder", type=Path, default=Path("out/typed"))
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "typed.csv")
    parser.set_defaults(
        dtype="float32", seed=0, blocks=None, pattern="2:4", eval_tokens=0
    )  # as `speed.py` prepares them
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not (sparse := asked.folder / "sparse").exists() and {"export", "finetune"} & set(asked.only):
        made = ["prune", asked.model, "-m", "magnitude", "-p", "2:4", "--dataset", asked.dataset, "--no-eval"]
        folders = ["--save", str(asked.folder / "made"), "--save-model", str(sparse)]
        subprocess.run([sys.executable, "-m", "coprune", *made, *folders], check=True)
    return asked


if __name__ == "__main__":
    main()
