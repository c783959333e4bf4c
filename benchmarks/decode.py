"""Products from packed weights against dense ones on this CPU, as ratios in one run.

    python benchmarks/decode.py [--threads 2] [--sizes 2048x2048,4096x4096] [--batches 1,4,16]

For every size, dtype and sparsity: PyTorch's dense product, our own dense kernel, and the packed one, in turns over
several matrices that together exceed the caches (as the layers of a model do). Packed matrices lie on large pages of
memory, and so do those of our own dense kernel; PyTorch's are measured where it puts them ("torch") and on large pages
("large"). "of limit" is how close the packed product comes to its bytes divided by the measured bandwidth.
"""

from __future__ import annotations

import argparse
import ctypes
import time

import torch
from torch.nn import functional

from coprune.base.native.build import MatrixStruct, instruction_set, load_kernels
from coprune.base.pages import on_large_pages
from coprune.packed.header import read_header
from coprune.packed.operator import native_matrix, pack_matrix, row_starts
from coprune.packed.timing import Clock, measure_bandwidth, time_in_turns

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default="2048x2048,4096x4096")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--sparsities", default="0.5,0.8")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--cpu-time", action="store_true", help="for one thread on a machine that others use too")
    parser.add_argument("--megabytes", type=int, default=128, help="of dense matrices per measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time adds up the threads; use it with --threads 1")
    bandwidth = measure_bandwidth(clock=clock)
    print(f"{options.threads} threads, {clock.__name__}, {instruction_set()}, memory {bandwidth / 1e9:.1f} GB/s")
    for size in options.sizes.split(","):
        rows, columns = map(int, size.split("x"))
        for name, dtype in DTYPES.items():
            for sparsity in map(float, options.sparsities.split(",")):
                matrices = _matrices(rows, columns, dtype, sparsity, options.megabytes << 20)
                for batch in map(int, options.batches.split(",")):
                    print(f"{size:>11} {name:<9} {sparsity:.0%}", end="")
                    _print_products(matrices, batch, options.repeats, bandwidth, clock)


def _matrices(
    rows: int, columns: int, dtype: torch.dtype, sparsity: float, size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    matrices = []
    for _ in range(max(size // (rows * columns * dtype.itemsize), 1)):
        weight = torch.randn(rows, columns).to(dtype)
        weight.masked_fill_(torch.rand(rows, columns) < sparsity, 0.0)
        packed = pack_matrix(weight)
        assert packed is not None
        matrices.append((weight, packed))
    return matrices


def _print_products(
    matrices: list[tuple[torch.Tensor, torch.Tensor]], batch: int, repeats: int, bandwidth: float, clock: Clock
) -> None:
    library = load_kernels()
    if library is None:
        raise SystemExit("the native kernels could not be compiled")
    weight, packed = matrices[0]
    x = torch.randn(batch, weight.shape[1]).to(weight.dtype)
    y = x.new_empty(batch, weight.shape[0])
    large = [on_large_pages(w.view(-1).view(torch.uint8)).view(w.dtype).view(w.shape) for w, _ in matrices]
    structs = [MatrixStruct(None, w.data_ptr(), None, None, *w.shape) for w in large]
    natives = [native_matrix(p, row_starts(p, read_header(p)), read_header(p), None) for _, p in matrices]
    size, threads = weight.dtype.itemsize, torch.get_num_threads()

    def own_dense() -> None:
        for struct in structs:
            pointers = (x.data_ptr(), y.data_ptr())
            library.coprune_multiply(ctypes.addressof(struct), size, 1, *pointers, batch, threads)

    times = time_in_turns(
        {
            "torch": lambda: [functional.linear(x, w) for w, _ in matrices],
            "large": lambda: [functional.linear(x, w) for w in large],
            "own": own_dense,
            "packed": lambda: [native.multiply(x, batch) for native in natives if native],
        },
        repeats,
        clock,
    )
    plain, large_time, own, fast = (1e6 * times[name].median / len(matrices) for name in times)
    spread = (times["packed"].high - times["packed"].low) / times["packed"].median
    limit = 1e6 * packed.numel() / bandwidth
    print(
        f" batch {batch:<2} torch {plain:6.0f} µs (large {large_time:6.0f}), own dense {own:6.0f}, packed {fast:6.0f} "
        f"(±{spread / 2:.0%}): {plain / fast:4.2f}× torch ({large_time / fast:4.2f}×), {own / fast:4.2f}× own dense, "
        f"{limit / fast:4.0%} of limit"
    )


if __name__ == "__main__":
    main()
