"""What it brings that a streamed run reads the next block and secures the last one while it computes.

A synthetic LLaMA, out of the system's cache before every run, is pruned and saved with and without that, in turns, each
in a process of its own. Without: nothing is read ahead, and every block is on the disk before the next is begun.

    python benchmarks/overlap.py                       # 12 blocks of 94 MB; minutes, 4 GB of disk
    python benchmarks/overlap.py --methods magnitude   # no data: reading, choosing and writing alone
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic import write_llama, write_words

WAYS = ("one after the other", "overlapping")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="magnitude,wanda")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the model goes [the folder for temporary files]")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        way, method, model, words = arguments.inside
        prune(way, method, model, words, tokens=arguments.tokens)
        return
    folder = Path(tempfile.mkdtemp(prefix="coprune-overlap-", dir=arguments.folder))
    try:
        compare(arguments, folder)
    finally:
        shutil.rmtree(folder)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    model, words = folder / "model", write_words(folder / "words.txt")
    size = write_llama(model, arguments.blocks, arguments.width)
    print(f"{arguments.blocks} blocks, {size / 2**20:.0f} MiB, {os.cpu_count()} cores, medians of {arguments.repeats}")
    print("| method | one after the other, s | overlapping, s | ratio | smallest and largest |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for method in arguments.methods.split(","):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats):
            for way in WAYS if repeat % 2 == 0 else reversed(WAYS):
                forget(model)
                command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--inside"]
                found = subprocess.check_output([*command, way, method, str(model), str(words)], text=True)
                seconds[way].append(float(found.splitlines()[-1]))
        before, after = (statistics.median(seconds[way]) for way in WAYS)
        ratios = [b / a for b, a in zip(seconds[WAYS[1]], seconds[WAYS[0]], strict=True)]
        print(
            f"| {method} | {before:.2f} | {after:.2f} | {after / before:.2f} | {min(ratios):.2f}–{max(ratios):.2f} |",
            flush=True,
        )


def forget(folder: Path) -> None:
    """Take a folder's files out of the system's cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prune(way: str, method: str, model: str, words: str, tokens: int) -> None:
    """Prune and save; prints the seconds of pruning, the last block's way to the disk included."""
    import coprune
    from coprune.model.checkpoint.lazy import LazyCheckpoint
    from coprune.model.checkpoint.writer import REST, CheckpointWriter

    write, last_wait = CheckpointWriter.write, []

    def watched_write(self: CheckpointWriter, part: str, *what: Any) -> None:
        if part == REST:
            start = time.perf_counter()
            self.settle()
            last_wait.append(time.perf_counter() - start)
        write(self, part, *what)
        if way == WAYS[0]:
            self.settle()

    CheckpointWriter.write = watched_write  # type: ignore[method-assign, assignment]
    if way == WAYS[0]:
        LazyCheckpoint.expect = lambda self, prefix: None  # type: ignore[method-assign]
    settings: dict[str, Any] = {
        "dataset": words,
        "nsamples": tokens // 128,
        "seqlen": 128,
        "evaluate": False,
        "stream": True,
    }
    out = Path(model).with_name("out")
    result = coprune.prune(model, method, save_model=out, prompt="", check_memory=False, quiet=True, **settings)
    print(result.report.prune_seconds + sum(last_wait))
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
