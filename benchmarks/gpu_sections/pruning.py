"""Pruning's time and memory, beside the estimates."""

from __future__ import annotations

import shutil
from typing import Any

from gpu_estimate import Machine, Shape, counted, seconds_of_block, ways

import coprune
from gpu_sections.models import BLOCKS, SMOLLM2, real
from gpu_sections.models import wide as wide_model
from gpu_sections.section import Asked, Result, head, mib, row

WAYS: dict[str, dict[str, Any]] = {
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    "balanced 2:4": {"preset": "balanced", "pattern": "2:4"},
}
OF_PAPER = {"wanda 2:4": "Wanda 2:4", "sparsegpt 2:4": "SparseGPT 2:4"}
MEMORY = ("MiB there: estimated", "measured", "of the process: estimated", "so far measured")
LLAMA3_BLOCKS = 32


def memory_of(found: coprune.Estimate, report: coprune.Report) -> tuple[str, ...]:
    """Estimated and measured memory, of the device and of the process."""
    there = None if found.device is None else found.device.peak_bytes
    return (
        mib(there),
        mib(report.peak_device_memory_bytes),
        mib(found.peak_bytes),
        mib(report.peak_memory_bytes),
    )


def tried(model: Any, **settings: Any) -> tuple[coprune.Estimate, coprune.Report]:
    """Estimate a run, then run it."""
    settings = {"quiet": True, "check_memory": False, "prompt": "", **settings}
    found = coprune.estimate(model, **{name: value for name, value in settings.items() if name != "save_model"})
    report = coprune.prune(model, **settings).report
    if (target := settings.get("save_model")) is not None:
        shutil.rmtree(target)
    return found, report


def smollm2(asked: Asked) -> Result:
    """A small model in memory, whose time is mostly launches."""
    found = real(asked)
    if found is None:
        return None, SMOLLM2.missing
    sizes = {"nsamples": 8 if asked.tiny else 128, "seqlen": 32 if asked.tiny else 1024}
    print(f"{sizes['nsamples']} × {sizes['seqlen']} tokens.\n")
    head(" ", "s to prune", "s in all", "perplexity", "pruned", *MEMORY)
    for name, way in WAYS.items():
        known, report = tried(
            found.model, **found.data, **sizes, **way, eval_tokens=256 if asked.tiny else 16384, device=asked.device
        )
        text = report.perplexity[0]
        times = f"{report.prune_seconds:.1f}", f"{report.total_seconds:.1f}"
        row(name, *times, f"{text.dense:.2f}", f"{text.pruned:.2f}", *memory_of(known, report))
    return True, f"{len(WAYS)} ways"


def wide(asked: Asked) -> Result:
    """Blocks of Llama-3-8B's shapes, streamed from folder to folder with 128 × 2048 tokens."""
    folder, words = wide_model(asked)
    shape = Shape(samples=8, seqlen=32) if asked.tiny else Shape()
    print(f"{BLOCKS} blocks, {shape.samples} × {shape.seqlen} tokens, bfloat16, random weights, streamed.\n")
    head(" ", "s a block", "of it in matrices", f"× {LLAMA3_BLOCKS}", "on paper", *MEMORY)
    paper = {way.name: seconds_of_block(way, shape, Machine())["all"] for way in ways(counted())}
    for name, way in WAYS.items():
        data: dict[str, Any] = {"dataset": str(words), "nsamples": shape.samples, "seqlen": shape.seqlen}
        more: dict[str, Any] = {"evaluate": False, "stream": True, "save_model": asked.folder / "pruned"}
        known, report = tried(str(folder), **data, **more, **way, device=asked.device)
        block, matrices = (s / BLOCKS for s in (report.prune_seconds, sum(m.seconds for m in report.matrices)))
        guess = f"{LLAMA3_BLOCKS * paper[OF_PAPER[name]]:.0f}" if name in OF_PAPER else "–"
        cells = f"{block:.2f}", f"{matrices:.2f}", f"{LLAMA3_BLOCKS * block:.0f}", guess
        row(name, *cells, *memory_of(known, report))
    return True, f"{len(WAYS)} ways"


def traffic(asked: Asked) -> Result:
    """The same run with activations and blocks kept in other places."""
    folder, words = wide_model(asked)
    samples, seqlen = (8, 32) if asked.tiny else (32, 2048)
    places: dict[str, dict[str, Any]] = {
        "blocks streamed, activations on the device": {},
        "blocks streamed, activations in host memory": {"device_activation_memory": 0.0},
        "blocks streamed, activations in a file": {"device_activation_memory": 0.0, "activation_memory": 0.0},
        "all on the device": {"stream": False},
    }
    print(f"Wanda 2:4, {samples} × {seqlen} tokens.\n")
    head(" ", "s a block", *MEMORY)
    for name, place in places.items():
        data: dict[str, Any] = {"dataset": str(words), "nsamples": samples, "seqlen": seqlen, "evaluate": False}
        given = {"stream": True, **data, **WAYS["wanda 2:4"], **place, "save_model": asked.folder / "moved"}
        known, report = tried(str(folder), **given, device=asked.device)
        row(name, f"{report.prune_seconds / BLOCKS:.2f}", *memory_of(known, report))
    return True, f"{len(places)} places"
