"""How the CPU time of pruning grows with calibration tokens, width and depth: fitted exponents, and a plot.

Synthetic LLaMAs of equal blocks, of which one size is varied at a time. Every run is a process of its own, and only pruning
is timed, so that loading and imports do not flatten the curves. A forward pass of the same tokens is shown beside them.

    python benchmarks/growth.py                                    # an hour on one core
    python benchmarks/growth.py --tokens 512,1024 --widths 256,512 --depths 2,4 --base 512,256,2    # minutes
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import altair as alt
from speed import inside
from synthetic import write_llama, write_words

SEQLEN = 128
AXES = ("tokens", "width", "depth")
FLOOR = "forward pass"


def main() -> None:
    arguments = read_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base = dict(zip(AXES, numbers(arguments.base), strict=True))
    rows: list[dict[str, Any]] = []
    for axis, values in zip(AXES, (arguments.tokens, arguments.widths, arguments.depths), strict=True):
        for value in numbers(values):
            size = base | {axis: value}
            for series, seconds in measure(arguments, size).items():
                rows.append({"axis": axis, "size": value, "method": series, "seconds": seconds})
                print(f"{axis:<6} {value:>6}  {series:<20} {seconds:>8.2f} s", file=sys.stderr, flush=True)
    print("| CPU time grows with |", " | ".join(series_of(arguments)), "|")
    print("| --- |", " | ".join("---:" for _ in series_of(arguments)), "|")
    for axis in AXES:
        exponents = [f"{axis}^{exponent(rows, axis, series):.2f}" for series in series_of(arguments)]
        print(f"| {axis} |", " | ".join(exponents), "|")
    plot(rows).save(arguments.folder / "growth.svg")
    print(f"plot: {arguments.folder / 'growth.svg'}")


def series_of(arguments: argparse.Namespace) -> list[str]:
    return [FLOOR, *(f"{m} {p}" for m in arguments.methods.split(",") for p in arguments.propagations.split(","))]


def measure(arguments: argparse.Namespace, size: dict[str, int]) -> dict[str, float]:
    """CPU seconds of every series for one size."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from coprune.data.windows import calibration_windows

    model = arguments.folder / f"llama-{size['width']}-{size['depth']}"
    write_llama(model, size["depth"], size["width"])
    words = write_words(arguments.folder / "words.txt")
    tokens = arguments.folder / "tokens.safetensors"
    nsamples = size["tokens"] // SEQLEN
    windows = calibration_windows(str(words), AutoTokenizer.from_pretrained(model), nsamples, SEQLEN, seed=0)
    save_file({"tokens": windows.tokens}, tokens)
    settings = {
        "model": str(model),
        "tokens": str(tokens),
        "fingerprint": windows.fingerprint,
        "dataset": str(words),
        "nsamples": nsamples,
        "seqlen": SEQLEN,
        "pattern": "2:4",
        "out": str(arguments.folder / "pruned"),
    }
    found = {}
    for series in series_of(arguments):
        method, _, propagation = series.partition(" ")
        run = {"run": FLOOR} if series == FLOOR else {"run": f"coprune {propagation}", "method": method}
        # The smallest of two, since other work on the machine only ever adds.
        found[series] = min(inside(settings | run, sys.executable, 1)["cpu"] for _ in range(arguments.repeats))
    return found


def exponent(rows: list[dict[str, Any]], axis: str, series: str) -> float:
    """Slope of log(time) over log(size), by least squares."""
    points = [
        (math.log(r["size"]), math.log(r["seconds"])) for r in rows if r["axis"] == axis and r["method"] == series
    ]
    x, y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def plot(rows: list[dict[str, Any]]) -> alt.VConcatChart:
    """CPU time over size, both logarithmic, one panel per varied size."""
    panels = []
    for axis in AXES:
        data = alt.Data(values=[row for row in rows if row["axis"] == axis])
        panels.append(
            alt.Chart(data, title=f"growth with {axis}", width=420, height=220)
            .mark_line(point=True)
            .encode(
                x=alt.X("size:Q", scale=alt.Scale(type="log"), title=axis),
                y=alt.Y("seconds:Q", scale=alt.Scale(type="log"), title="CPU seconds"),
                color=alt.Color("method:N", title=None),
            )
        )
    return alt.vconcat(*panels)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--propagations", default="sequential,block")
    parser.add_argument("--tokens", default="2048,4096,8192,16384")
    parser.add_argument("--widths", default="256,512,1024,2048")
    parser.add_argument("--depths", default="2,4,8,16")
    parser.add_argument(
        "--base", default="4096,512,4", help="tokens, width and depth that are kept while another varies"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/growth"), help="models and the plot")
    return parser.parse_args()


if __name__ == "__main__":
    main()
