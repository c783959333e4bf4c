"""Which model is best at a given size: pruned ones beside llama.cpp's own quants of the dense model.

    python benchmarks/frontier.py                              # all rows: hours; resumes where it stopped
    python benchmarks/frontier.py --only 'dense,sparsegpt 50%' # rows whose names contain one of these
    python benchmarks/frontier.py --without-speed --threads 1  # several at once; a later run adds the speeds

The dense model's weights may come from a 4-bit GGUF file, and rounding them to 4 bits would then cost nothing. So every
weight is first moved by a random part of a 4-bit step, and some minutes of training repair the damage. Every row runs in a
process of its own that leaves one JSON file. GGUF files are run by llama.cpp, for quality and speed; all others by
transformers, untimed. A sparse matrix counts one bit per weight for the positions of its zeros.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from frontier_models import TEXTS, kept, make_row, moved
from one_pass import LogitsOf, in_one_pass, said_by
from quality import measured_here

import coprune
from coprune.base.files import write_text
from coprune.base.memory import peak_memory
from coprune.gguf_files.llama_cpp import LlamaCpp
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate

FILES = ("f16", "q8_0", "q4_k_m", "q3_k_m", "q2_k")
"""Types of GGUF files: of the dense model all, without a quarter of its channels the first three."""
PATTERNS = ("50%", "60%", "70%", "80%", "2:4")
WAYS = ("sparsegpt", "balanced by blocks", "balanced", "best by blocks", "best")
SPEEDS = {"decode": ".0f", "prefill": ".0f", "peak": ".2f"}
"""Tokens per second and GiB."""
COLUMNS = ("row", "MB", "bits/weight", "Wikipedia", "novels", "KL", *SPEEDS, "smaller and better", "measured")


def main() -> None:
    """Measure the rows that are asked for and missing, then print all there are."""
    asked = options()
    if asked.row or asked.run:
        measure_row(asked, asked.row) if asked.row else measure_speed(asked.run, asked.threads)
        return
    asked_for = [name for name in rows() if any(part in name for part in asked.only.split(","))]
    for name in asked_for if not asked.as_it_is else ():
        if not kept(asked, name).exists():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", name], check=True, stdout=sys.stderr)
        row = json.loads(kept(asked, name).read_text())
        if row["run"] and "decode" not in row and not asked.without_speed:
            row |= speed_of(Path(row["run"]), asked.threads)
            write_text(kept(asked, name), json.dumps(row, indent=1))
    known = {name: json.loads(kept(asked, name).read_text()) for name in rows() if kept(asked, name).exists()}
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 3)} --- | --- |")
    for name in filter(known.__contains__, asked_for):
        print(line(known[name], [*known.values()]))


def rows() -> list[str]:
    """Names of all rows, cheap ones first; the last word says how the weights are stored."""
    pruned = [f"{way} {pattern} bf16" for way in WAYS for pattern in PATTERNS]
    return [*(f"dense {kind}" for kind in FILES), *(f"channels-25 {kind}" for kind in FILES[:3]), *pruned]


def measure_row(asked: argparse.Namespace, name: str) -> None:
    """Make a row's model, measure it, and keep the figures."""
    torch.set_num_threads(asked.threads)
    row, runs = make_row(asked, name)
    with torch.inference_mode():
        row |= quality(asked, Path(row.pop("model")))
    row |= {"run": runs and str(runs), "measured": measured_here()}
    write_text(kept(asked, name), json.dumps({"row": name} | row, indent=1))


def quality(asked: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Perplexity on both texts, and KL to the dense model over all windows of the same tokens."""
    logits_of, found, divergences = logits_by(model, asked), {}, []
    dense = cache(partial(load_model, locate(str(moved(asked))), "float32"))  # loaded where a text is new
    for text in TEXTS:
        file = asked.folder / f"said-{text}-{asked.tokens}-{asked.seqlen}.safetensors"
        said = said_by(dense, text, asked.seqlen, asked.tokens, file)
        found[text], new = in_one_pass(logits_of, said)
        divergences += new
    return found | {"kl": sum(divergences) / len(divergences)}


def logits_by(model: Path, asked: argparse.Namespace) -> LogitsOf:
    """The function that computes logits: by llama.cpp, or by transformers in float32."""
    if model.suffix == ".gguf":
        llama = LlamaCpp(model, asked.seqlen, asked.threads)
        return lambda window: llama.logits(window[0].tolist())[None]
    loaded, _ = load_model(locate(str(model)), "float32")
    return lambda window: loaded(window).logits


def speed_of(model: Path, threads: int) -> dict[str, Any]:
    """Run `measure_speed` in a process of its own, so that the peak memory is the model's."""
    command = [sys.executable, __file__, "--run", str(model), "--threads", str(threads)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def measure_speed(model: Path, threads: int) -> None:
    """Decoding and prefill speed of one sequence in the model's own runtime, and this process's peak memory, as JSON."""
    torch.set_num_threads(threads)
    (row,) = coprune.bench(model, prompt=128, tokens=48).rows
    print(json.dumps({"decode": row.decode.median, "prefill": row.prefill.median, "peak": peak_memory() / 2**30}))


def line(row: dict[str, Any], known: list[dict[str, Any]]) -> str:
    """A row of the table."""
    size = f"{row['bytes'] / 1e6:.1f}"
    measured = [f"{row[text]:.2f}" for text in TEXTS] + [f"{row['kl']:.3f}"]
    speed = [format(row[key], digits) if key in row else "–" for key, digits in SPEEDS.items()]
    last = [beaten_by(row, known), row["measured"]]
    return f"| {' | '.join([row['row'], size, format(row['bits'], '.2f'), *measured, *speed, *last])} |"


def beaten_by(row: dict[str, Any], known: list[dict[str, Any]]) -> str:
    """The best of the rows that are no larger and better on both texts; a dash if there is none."""
    better = [
        other for other in known if other["bytes"] <= row["bytes"] and all(other[text] < row[text] for text in TEXTS)
    ]
    return str(min(better, key=lambda other: other[TEXTS[0]])["row"]) if better else "–"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--like", type=Path, help="a GGUF file of the model, where it does not come from one")
    parser.add_argument("--only", default="", help="parts of rows' names, with commas between them [all rows]")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training that moves the dense weights")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of that")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=10_240, help="of each text that is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/frontier"))
    parser.add_argument("--as-it-is", action="store_true", help="measure nothing: print what is there")
    parser.add_argument("--without-speed", action="store_true", help="leave speed and peak memory to a later run")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
