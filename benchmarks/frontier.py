"""What to take at a given size: pruned and rounded models beside llama.cpp's own quants of the dense model.

    python benchmarks/frontier.py                              # all rows, in hours; goes on where it stopped
    python benchmarks/frontier.py --only 'dense,sparsegpt 50%' # the rows whose names have one of these in them
    python benchmarks/frontier.py --without-speed --threads 1  # several at once; a later run adds how fast they are

The dense model of the table is moved off the grid of 4 bits that a GGUF file may have held its weights on, where 4 bits
would be free: every weight by a random part of what rounding to 4 bits would move it, and then some minutes of training
that mend this. Every row is a process of its own that leaves one JSON file. GGUF files are run by llama.cpp, for quality
and speed; all else by transformers, packed where it has zeros. What is rounded has no runtime yet: its bytes are counted,
not those of a file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import torch
from gguf import GGUFReader
from quality import measured_here
from safetensors.torch import load_file, save_file
from torch import Tensor

import coprune
from coprune.base.files import path_of, write_text
from coprune.base.memory import peak_memory
from coprune.data import calibration_windows, evaluation_tokens
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.closeness import compare_logits
from coprune.evaluation.perplexity import window_nll
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.gguf.llama_cpp import LlamaCpp

FILES = ("f16", "q8_0", "q4_k_m", "q3_k_m", "q2_k")
"""Types of GGUF files: of the dense model all, without a quarter of its channels the first three."""
PATTERNS = ("50%", "60%", "70%", "80%", "2:4")
WAYS, GRIDS = ("sparsegpt", "balanced", "best"), ("bf16", "int8", "int4")
TEXTS = ("embedded", "embedded-lambada")
SPEEDS = {"decode": ".0f", "prefill": ".0f", "peak": ".2f"}
COLUMNS = ("row", "MB", "bits/weight", "Wikipedia", "novels", "KL", "decode", "prefill", "peak GiB", "measured")


def main() -> None:
    """Measure the rows that are asked for and not there yet, then print and draw all that are."""
    asked = options()
    if asked.row or asked.run:
        measure_row(asked, asked.row) if asked.row else measure_speed(asked.run, asked.threads)
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    for name in (name for name in rows() if any(part in name for part in asked.only.split(","))):
        if not kept(asked, name).exists():
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", name], check=True, stdout=sys.stderr)
        row = json.loads(kept(asked, name).read_text())
        if row["run"] and "decode" not in row and not asked.without_speed:
            row |= speed_of(Path(row["run"]), asked.threads)
            write_text(kept(asked, name), json.dumps(row, indent=1))
        print(line(row), flush=True)
    draw([json.loads(file.read_text()) for file in sorted((asked.folder / "rows").glob("*.json"))], asked.folder)


def rows() -> list[str]:
    """Names of all rows, cheap ones first; the last word says how the weights are stored."""
    pruned = [f"{way} {pattern} {grid}" for way in WAYS for pattern in PATTERNS for grid in GRIDS]
    rounded = [f"sparsegpt 0% {grid}" for grid in GRIDS[1:]]
    return [*(f"dense {kind}" for kind in FILES), *rounded, *(f"channels-25 {kind}" for kind in FILES[:3]), *pruned]


def kept(asked: argparse.Namespace, name: str) -> Path:
    """Where a row's figures are."""
    return path_of(asked.folder / "rows", f"{re.sub('[ :%]+', '-', name)}.json")


def measure_row(asked: argparse.Namespace, name: str) -> None:
    """Make a row's model, measure it, and keep the figures."""
    torch.set_num_threads(asked.threads)
    row, runs = make_row(asked, name)
    with torch.inference_mode():
        row |= quality(asked, Path(row.pop("model")))
    row |= {"run": runs and str(runs), "measured": measured_here()}
    write_text(kept(asked, name), json.dumps({"row": name} | row, indent=1))


def make_row(asked: argparse.Namespace, name: str) -> tuple[dict[str, Any], Path | None]:
    """A row's model and size, and what of it can be run for its speed."""
    way, *pattern, stored = name.split()
    if not pattern:
        source = moved(asked) if way == "dense" else pruned(asked, way, {"remove": "channels=0.25"})[0]
        file = exported(asked, source, stored)
        return {"model": str(file), "bytes": file.stat().st_size, "bits": bits_of_file(file)}, file
    folder, report = pruned(asked, name, how_to(way, pattern[0], stored), of=source_of(asked, name))
    if (values := report["quantized"]) is not None:
        size = {"bytes": values["total_bytes"], "bits": 8 * values["matrix_bytes"] / values["weights"]}
        return {"model": str(folder), **size, "counted": True}, None
    return {"model": str(folder), **packed(folder)}, folder.with_name(f"{folder.name}-packed")


def how_to(way: str, pattern: str, stored: str) -> dict[str, Any]:
    """Settings of a row that is pruned or rounded, or both."""
    target = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern.rstrip("%")) / 100}
    grid = {} if stored == "bf16" else {"quantize": "int4:group=64" if stored == "int4" else stored}
    if way == "sparsegpt" or grid:
        # What a preset left is rounded where it is not zero.
        chosen = {"method": "sparsegpt", "propagation": "sequential"}
        return chosen | grid | (target if way == "sparsegpt" else {"sparsity": 0.0})
    return {"preset": way} | target


def source_of(asked: argparse.Namespace, name: str) -> Path:
    """What a row is made of: the dense model, or for a preset that is rounded, what the preset left in bfloat16."""
    way, pattern, stored = name.split()
    if way == "sparsegpt" or stored == "bf16":
        return moved(asked)
    return pruned(asked, f"{way} {pattern} bf16", how_to(way, pattern, "bf16"))[0]


def moved(asked: argparse.Namespace) -> Path:
    """The dense model of the table: off a grid of 4 bits, and trained for some minutes, all of its weights."""
    if (target := Path(asked.folder / "dense")).exists():
        return target
    model, tokenizer = load_model(locate(asked.model), "float32")
    windows = begun(calibration_windows(TEXTS[0], tokenizer, 1024, asked.seqlen, seed=1).tokens, tokenizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    off_the_grid(model)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=asked.lr, weight_decay=0.0)
    begin, steps = time.monotonic(), 0
    while (gone := (time.monotonic() - begin) / (60 * asked.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = asked.lr * (1 - gone)
        batch = windows[2 * steps % len(windows) :][:2]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 10 == 1:
            print(f"{steps} steps, loss {loss.item():.3f}", flush=True)
    far = [
        float(((new - old).abs() / four_bit_steps(old)).mean())
        for old, new in zip(before, model.parameters(), strict=True)
        if old.ndim > 1
    ]
    print(f"weights moved by {sum(far) / len(far):.2f} of a 4-bit step in the mean; at 0.25 they are off that grid")
    model.bfloat16().save_pretrained(target.with_name("dense.partial"))
    tokenizer.save_pretrained(target.with_name("dense.partial"))
    return target.with_name("dense.partial").rename(target)


@torch.no_grad()
def off_the_grid(model: torch.nn.Module) -> None:
    """Move every weight of a matrix by up to half a 4-bit step, as rounding to 4 bits would do."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * four_bit_steps(parameter))


def four_bit_steps(matrix: Tensor) -> Tensor:
    """For every weight a 15th of the range of the 32 neighbours that it would be rounded with."""
    low, high = matrix.detach().reshape(-1, 32).aminmax(dim=1)
    return ((high - low) / 15).clamp_min(1e-9).repeat_interleave(32).reshape(matrix.shape)


def begun(windows: Tensor, tokenizer: Any) -> Tensor:
    """Windows that begin with BOS where the tokenizer begins a text with it, in place."""
    puts = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return windows.index_fill_(1, torch.tensor([0]), tokenizer.bos_token_id) if puts else windows


def pruned(
    asked: argparse.Namespace, name: str, settings: dict[str, Any], of: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """A folder that is pruned as a row says, and its report. What is there is not made again. of: [the dense model]."""
    folder, run = asked.folder / "models" / kept(asked, name).stem, asked.folder / "runs" / kept(asked, name).stem
    if not (run / "report.json").exists():
        data = {"dataset": TEXTS[0], "nsamples": asked.samples, "seqlen": asked.seqlen, "evaluate": False}
        places = {"save": run, "save_model": folder}
        coprune.prune(
            of or moved(asked), dtype="bfloat16", stream=False, prompt="", gate=False, **data, **places, **settings
        )
    return folder, json.loads((run / "report.json").read_text())


def exported(asked: argparse.Namespace, folder: Path, kind: str) -> Path:
    """A GGUF file of a folder."""
    file: Path = asked.folder / f"{folder.name}-{kind}.gguf"
    if not file.exists():
        coprune.export(folder, file, type=kind, like=asked.like or locate(asked.model).path)
    return file


def bits_of_file(file: Path) -> float:
    """Bits per weight of the blocks' matrices."""
    matrices = [t for t in GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return float(8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices))


def packed(folder: Path) -> dict[str, float]:
    """Size of a folder with zeros when it is packed, which it is beside itself."""
    target = folder.with_name(f"{folder.name}-packed")
    shutil.rmtree(target, ignore_errors=True)  # of a row that was interrupted
    sizes = coprune.pack(folder, target)
    return {"bytes": sizes.packed, "bits": 16 * sizes.bytes_after / max(1, sizes.bytes_before)}


def quality(asked: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Perplexity on both texts, and KL to the dense model on all of it, window by window on the same tokens."""
    logits_of, found, divergences = logits_by(model, asked), {}, []
    for text in TEXTS:
        windows, dense = said_by_dense(asked, text)
        losses = []
        for window, expected in zip(windows, dense, strict=True):
            logits = logits_of(window)
            losses.append(float(window_nll(logits, window[None])))
            divergences.append(float(compare_logits(expected[None], logits).kl))
        found[text] = math.exp(sum(losses) / len(losses))
    return found | {"kl": sum(divergences) / len(divergences)}


def said_by_dense(asked: argparse.Namespace, text: str) -> tuple[Tensor, Tensor]:
    """The windows of a text (N × S), and the dense model's logits (N × S × vocabulary, float16), computed once.

    A logit's rounding (0.01 at most) moves a divergence by about a hundred-thousandth; eight bits have a thousandth.
    """
    file: Path = asked.folder / f"said-{text}.safetensors"
    if not file.exists():
        model, tokenizer = load_model(locate(str(moved(asked))), "float32")
        tokens = evaluation_tokens(text, tokenizer, asked.seqlen, limit_tokens=asked.tokens).tokens
        windows = begun(cut_windows(tokens, asked.seqlen), tokenizer)
        logits = torch.cat([model(window[None]).logits.half() for window in windows])
        save_file({"windows": windows, "logits": logits}, partial := file.with_suffix(".partial"))
        partial.replace(file)
    said = load_file(file)
    return said["windows"], said["logits"]


def logits_by(model: Path, asked: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """What gives a model's logits of a window (1 × S × vocabulary): llama.cpp, or transformers in float32."""
    if model.suffix == ".gguf":
        llama = LlamaCpp(model, asked.seqlen, asked.threads)
        return lambda window: llama.logits(window.tolist())[None]
    loaded, _ = load_model(locate(str(model)), "float32")
    return lambda window: loaded(window[None]).logits


def speed_of(model: Path, threads: int) -> dict[str, Any]:
    """What `measure_speed` says in a process of its own, so that its peak memory is the model's."""
    command = [sys.executable, __file__, "--run", str(model), "--threads", str(threads)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def measure_speed(model: Path, threads: int) -> None:
    """Decoding and prefill of one sequence in the model's own runtime, and what this process took at most, as JSON."""
    torch.set_num_threads(threads)
    speeds = {one.phase: one.tokens_per_second for one in coprune.bench([model], prompt=128, tokens=48).rows}
    print(json.dumps({**speeds, "peak": peak_memory() / 2**30}))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    size = f"{row['bytes'] / 1e6:.1f}{' counted' if row.get('counted') else ''}"
    measured = [f"{row[text]:.2f}" for text in TEXTS] + [f"{row['kl']:.3f}"]
    speed = [format(row[key], digits) if key in row else "–" for key, digits in SPEEDS.items()]
    return f"| {' | '.join([row['row'], size, format(row['bits'], '.2f'), *measured, *speed, row['measured']])} |"


def draw(found: list[dict[str, Any]], folder: Path) -> None:
    """Perplexity against bytes, and against tokens per second."""
    for row in found:
        row |= {"kind": row["row"].partition(" ")[0], "stored": row["row"].split()[-1], "MB": row["bytes"] / 1e6}
    sides = []
    for field, title in (("MB", "MB"), ("decode", "tokens per second, decoding one sequence")):
        points = alt.Chart(alt.Data(values=[row for row in found if field in row])).encode(
            x=alt.X(f"{field}:Q", title=title, scale=alt.Scale(zero=False, padding=30)),
            y=alt.Y("embedded:Q", scale=alt.Scale(type="log", nice=False), title="perplexity (lower is better)"),
            color=alt.Color("kind:N", title=None, scale=alt.Scale(scheme="dark2")),
        )
        names = points.mark_text(align="left", dx=7, fontSize=9).encode(text="row:N")
        dots = points.mark_point(filled=True, size=60, opacity=1).encode(shape=alt.Shape("stored:N", title=None))
        sides.append((dots + names).properties(width=460, height=400))
    alt.hconcat(*sides).save(folder / "frontier.svg")


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
    parser.add_argument("--without-speed", action="store_true", help="leave speed and peak memory to a later run")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
