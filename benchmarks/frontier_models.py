"""The models of benchmarks/frontier.py: the dense one, and those pruned, rounded or exported from it."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from one_pass import begun
from torch import Tensor

import coprune
from coprune.data.windows import calibration_windows
from coprune.gguf_files.llama_cpp import require_type
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.shards import read_tensor
from coprune.model.checkpoint.source_encoding import checkpoint_entries

TEXTS = ("embedded", "embedded-lambada")
"""Texts that are measured; the first one's calibration part is what is trained and pruned with."""


def kept(asked: argparse.Namespace, name: str) -> Path:
    """The file of a row's figures."""
    folder: Path = asked.folder / "rows"
    return folder / f"{re.sub('[ :%]+', '-', name)}.json"


def make_row(asked: argparse.Namespace, name: str) -> tuple[dict[str, Any], Path | None]:
    """Make a row's model; returns it, its size, and the file that can be timed."""
    way, pattern, stored = parts_of(name)
    if pattern is None:
        source = moved(asked) if way == "dense" else pruned(asked, way, {"remove": "channels=0.25"})
        file = exported(asked, source, stored)
        return {"model": str(file), "bytes": file.stat().st_size, "bits": bits_of_file(file)}, file
    folder = pruned(asked, name, how_to(way, pattern))
    return {"model": str(folder), **counted(folder)}, None


def parts_of(name: str) -> tuple[str, str | None, str]:
    """Return what made a row's model, its pattern (None where nothing is zero), and how it is stored."""
    before, _, stored = name.rpartition(" ")
    way, _, pattern = before.rpartition(" ")
    return (way, pattern, stored) if way else (before, None, stored)


def how_to(way: str, pattern: str) -> dict[str, Any]:
    """Return the settings of a row that is pruned."""
    target = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern.rstrip("%")) / 100}
    if way == "sparsegpt":
        return {"method": way, "propagation": "sequential"} | target
    preset, _, blocks = way.partition(" by ")
    return {"preset": preset, "train": blocks or "whole"} | target


def moved(asked: argparse.Namespace) -> Path:
    """The dense model of the table: moved off a 4-bit grid, then all weights trained for some minutes."""
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
        for old, new in zip(before, map(Tensor.detach, model.parameters()), strict=True)
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
    """For every weight, a 15th of the range of the group of 32 that it would be rounded with."""
    low, high = matrix.detach().reshape(-1, 32).aminmax(dim=1)
    return ((high - low) / 15).clamp_min(1e-9).repeat_interleave(32).reshape(matrix.shape)


def pruned(asked: argparse.Namespace, name: str, settings: dict[str, Any]) -> Path:
    """The folder pruned as a row says; an existing one is reused."""
    folder: Path = asked.folder / "models" / kept(asked, name).stem
    run = asked.folder / "runs" / kept(asked, name).stem
    if not ((run / "report.json").exists() and folder.exists()):  # a preset that trains writes a report before it ends
        data = {"dataset": TEXTS[0], "nsamples": asked.samples, "seqlen": asked.seqlen, "evaluate": False}
        places = {"save": run, "save_model": folder}
        coprune.prune(moved(asked), dtype="bfloat16", stream=False, prompt="", gate=False, **data, **places, **settings)
    return folder


def exported(asked: argparse.Namespace, folder: Path, kind: str) -> Path:
    """A GGUF file of a folder."""
    file: Path = asked.folder / f"{folder.name}-{kind}.gguf"
    if not file.exists():
        coprune.export(folder, file, type=require_type(kind), like=asked.like or locate(asked.model).path)
    return file


def bits_of_file(file: Path) -> float:
    """Bits per weight of the blocks' matrices."""
    matrices = [t for t in GGUFReader(file).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return float(8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices))


def counted(folder: Path) -> dict[str, float]:
    """Size of a folder if each pruned matrix were its kept values and a bit per weight; no format stores it so."""
    whole = blocks = weights = 0.0
    for entry in checkpoint_entries(folder).values():
        tensor = read_tensor(entry)
        size = min(tensor.nbytes, tensor.numel() / 8 + int(tensor.count_nonzero()) * tensor.itemsize)
        whole += size
        if size < tensor.nbytes:
            blocks, weights = blocks + size, weights + tensor.numel()
    return {"bytes": whole, "bits": 8 * blocks / max(1, weights)}
