"""What packing does to a real model: sizes, reload, loading time, memory of the process, tokens per second.

SmolLM2-135M is pruned by magnitude (once; kept in a folder), saved in both dtypes, packed, unpacked and compared byte by
byte. Each load is a process of its own that generates one token; memory is what its resident set grew by. Speed is
`coprune bench` of SmolLM2 and of a random model of 1B width, four blocks deep, both at 50 %.

    python benchmarks/packed.py                  # everything, minutes
    python benchmarks/packed.py --only sizes     # or load, or speed
    python benchmarks/packed.py --only speed --threads 1
"""

from __future__ import annotations

import argparse
import copy
import filecmp
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import coprune
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.matrices import find_matrices
from coprune.packed.bench import bench_model
from coprune.packed.folder import Sizes, pack, unpack
from coprune.packed.runtimes import Work
from coprune.recipe.pattern import NM, Target, Unstructured

PATTERNS = {
    "50 %": Target(Unstructured(), 0.5),
    "60 %": Target(Unstructured(), 0.6),
    "80 %": Target(Unstructured(), 0.8),
    "2:4": Target(NM(2, 4), 0.5),
}
DTYPES = ("float32", "bfloat16")
FORMS = ("dense", "unpacked on load", "kept packed")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/packed"), help="where the models are kept")
    parser.add_argument("--only", choices=["sizes", "load", "speed"])
    parser.add_argument("--repeats", type=int, default=3, help="of every load")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--tokens", type=int, default=48, help="decoding steps of every form")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="speed: for one thread on a machine that others use too"
    )
    parser.add_argument("--child", nargs=2, metavar=("FORM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(load(options.child[0], Path(options.child[1]))))
        return
    if options.only in (None, "sizes"):
        print_sizes(options.folder)
    if options.only in (None, "load"):
        print_loads(options.folder, options.repeats, options.threads)
    if options.only in (None, "speed"):
        batches = tuple(map(int, options.batches.split(",")))
        print_speed(options.folder, batches, options.prompt, options.tokens, options.cpu_time)


def pruned(folder: Path, pattern: str, dtype: str) -> Path:
    """The folder of SmolLM2 with its blocks' matrices pruned by magnitude, made where it is not there yet."""
    path = folder / f"{pattern.replace(' %', '').replace(':', 'of')}-{dtype}"
    if not path.exists():
        model = copy.deepcopy(smollm2())
        for block in find_blocks(model):
            for matrix in find_matrices(block.module):
                weight = matrix.read()
                matrix.write(torch.where(PATTERNS[pattern].keep(weight.abs()), weight, 0.0))
        model.to(getattr(torch, dtype)).save_pretrained(path)
    return path


@functools.cache
def smollm2() -> PreTrainedModel:
    """The dense model, in float32."""
    return load_model(locate("smollm2-135m"))[0]


def packed_copy(dense: Path) -> tuple[Path, Sizes]:
    """Pack afresh; returns the folder and what was packed."""
    path = dense.with_name(dense.name + "-packed")
    with tempfile.TemporaryDirectory(dir=dense.parent) as scratch:
        sizes = pack(dense, Path(scratch) / "packed")
        if not path.exists():
            (Path(scratch) / "packed").rename(path)
    return path, sizes


def print_sizes(folder: Path) -> None:
    """Bytes dense and packed, and whether unpacking gives back every file."""
    print("| SmolLM2-135M | dtype | model MB | packed | ratio | pruned matrices | after unpacking |")
    print("|---|---|--:|--:|--:|--:|---|")
    for pattern in PATTERNS:
        for dtype in DTYPES:
            dense = pruned(folder, pattern, dtype)
            packed, sizes = packed_copy(dense)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                unpack(packed, Path(scratch) / "again")
                same = same_files(dense, Path(scratch) / "again")
            print(
                f"| {pattern} | {dtype} | {sizes.dense / 1e6:.1f} | {sizes.packed / 1e6:.1f} "
                f"| {sizes.packed / sizes.dense:.3f} | {sizes.bytes_after / sizes.bytes_before:.4f} "
                f"| {'every file the same' if same else 'DIFFERENT'} |",
                flush=True,
            )


def same_files(first: Path, second: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = sorted(path.name for path in first.iterdir())
    if names != sorted(path.name for path in second.iterdir()):
        return False
    return not any(filecmp.cmpfiles(first, second, names, shallow=False)[1:])


def print_loads(folder: Path, repeats: int, threads: int) -> None:
    """What loading takes and leaves in memory, forms in turns."""
    print("| SmolLM2-135M, 50 % | form | CPU s to load | CPU s to the first token | MB of weights | MB resident |")
    print("|---|---|--:|--:|--:|--:|", flush=True)
    for dtype in DTYPES:
        dense = pruned(folder, "50 %", dtype)
        packed, _ = packed_copy(dense)
        found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(repeats):
            for form in FORMS:
                child = ["--child", form, str(dense if form == "dense" else packed), "--threads", str(threads)]
                command = [sys.executable, __file__, *child]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[form].append(json.loads(output.splitlines()[-1]))
        for form, results in found.items():
            load, token, weights, resident = (
                statistics.median(result[key] for result in results)
                for key in ("seconds", "token", "weights", "resident")
            )
            print(
                f"| {dtype} | {form} | {load:.2f} | {token:.2f} | {weights / 1e6:.0f} | {resident / 1e6:.0f} |",
                flush=True,
            )


@torch.no_grad()
def load(form: str, folder: Path) -> dict[str, float]:
    """Load one form, make a token, and say what it took: CPU time, since a busy machine stretches the clock's."""
    process = psutil.Process()
    # What every form needs once, the model's code above all, is not what is measured.
    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModelForCausalLM.from_config(tiny)(torch.tensor([[1]]))
    before, start = process.memory_info().rss, time.process_time()
    model = coprune.load_packed(folder) if form == "kept packed" else AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.process_time() - start
    model(torch.tensor([[1]]))
    token = time.process_time() - start - seconds
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    weights = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    return {
        "seconds": seconds,
        "token": token,
        "weights": weights,
        "resident": process.memory_info().rss - before,
    }


def print_speed(folder: Path, batches: tuple[int, ...], prompt: int, tokens: int, cpu_time: bool) -> None:
    """Prefill and decoding of whole models."""
    clock = time.process_time if cpu_time else time.perf_counter
    print(clock.__name__)
    for dtype in DTYPES:
        small = AutoModelForCausalLM.from_pretrained(pruned(folder, "50 %", dtype))
        for name, model in (("SmolLM2-135M", small), ("1B width, 4 blocks", wide_model(getattr(torch, dtype)))):
            print(bench_model(model, name, Work(batches, prompt, tokens), clock=clock), flush=True)


def wide_model(dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama with the widths of one with a billion parameters, half of every matrix of its blocks zero."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.5, 0.0)
    return model


if __name__ == "__main__":
    main()
