"""How long pruning Llama-3-8B on one GPU should take, estimated from counted launches, waits and copies, FLOPs and bytes.

An estimate, not a measurement. The simulated device counted launches, waits and copies on small models; they are scaled to
this model's sizes, with the batches, the matrices and, for SparseGPT, the columns. FLOPs and bytes follow from the shapes.
The speeds of a GPU are assumptions, each an option; `benchmarks/gpu.py` measures them and prints the options. Left out: the
disk, loading, Python's time between launches, and perplexity.

    python benchmarks/gpu_estimate.py                              # one H100 with 80 GB (SXM), 128 × 2048 tokens
    python benchmarks/gpu_estimate.py --float32-tflops 30 --launch-us 10
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from coprune.base.kernels.gram import WIDE_PANEL

COUNTS = Path(__file__).parents[1] / "tests/support/simdevice/counts.json"
COUNTED_BATCHES, COUNTED_WIDTHS = 4, (64, 64, 64, 64, 64, 64, 96)
"""Of the small models' blocks in the tables: batches, and the inputs of their matrices."""
NARROW, WIDE, WIDER, RANKED_AT_ONCE = 256, 512, ", twice as wide", 4096
"""Inputs of the single matrices in the tables, the words for the wider one, and groups that were ranked in one step."""
COPIES_OF_A_BLOCK = 9
"""One for each of its tensors."""
BLOCK_OF_COLUMNS, LAUNCHES_WITH_TRITON = 128, 8
"""Columns that Triton's kernel walks through in one launch, and launches for them with what is around it. Read, not counted."""
PASSES = 2
"""Of the calibration data through a block: with its dense weights, then with its pruned ones."""
Stages = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA and of its calibration tokens."""

    width: int = 4096
    inner: int = 14336
    keys: int = 1024
    """Rows of the matrices that make keys and values."""
    blocks: int = 32
    samples: int = 128
    seqlen: int = 2048
    batch: int = 2

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of every matrix of a block."""
        attention = (
            (self.width, self.width),
            (self.keys, self.width),
            (self.keys, self.width),
            (self.width, self.width),
        )
        return (*attention, (self.inner, self.width), (self.inner, self.width), (self.width, self.inner))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of what goes into them; queries, keys and values share theirs, and so do gate and up."""
        return (self.width, self.width, self.width, self.inner)

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def tokens(self) -> int:
        return self.samples * self.seqlen

    @property
    def batches(self) -> int:
        return -(-self.samples // self.batch)


@dataclass(frozen=True)
class Machine:
    """Assumed speeds of a GPU and its host, below their makers' peak figures."""

    bf16_tflops: float = 400.0
    float32_tflops: float = 45.0
    factor_tflops: float = 15.0
    memory_gbs: float = 2600.0
    pinned_gbs: float = 40.0
    pageable_gbs: float = 5.0
    launch_us: float = 6.0
    wait_us: float = 25.0


class Way(NamedTuple):
    """A way to prune: the method, and the counts used."""

    name: str
    method: str
    stages: Stages
    tensor_cores: bool = True
    """Whether Gram matrices are made there from 16 bits; else in float32."""
    triton: bool = False


class Asked(NamedTuple):
    """Work that a block gives the device."""

    walk_launches: float
    solve_launches: float
    waits: float
    copies: float
    """How often its weights are copied."""


def drawn_out(way: Way, shape: Shape) -> Asked:
    """The work of a block of this shape, scaled from counts on small ones."""

    def counts(stage: str, method: str = way.method) -> Mapping[str, int]:
        return way.stages[f"{method} 2:4: a matrix and its report{stage}"]

    block = way.stages[f"llama {way.method} 2:4: a block"]
    half = way.stages[f"llama {way.method} 2:4, twice as many batches: a block"]
    batch, waits = ((half[kind] - block[kind]) / COUNTED_BATCHES for kind in ("launch", "sync"))
    # The wider matrix has more groups of four than were ranked at once when counting began.
    ranking = counts(WIDER, "wanda")["launch"] - counts("", "wanda")["launch"]
    column, tall = 0.0, 0.0
    if way.method == "sparsegpt":
        column, tall = (counts(WIDER)["launch"] - counts("")["launch"]) / (WIDE - NARROW), ranking / 4
    matrix = counts("")["launch"] - column * NARROW
    rest = block["launch"] - batch * COUNTED_BATCHES - sum(matrix + column * width for width in COUNTED_WIDTHS)
    if way.triton:
        column = LAUNCHES_WITH_TRITON / BLOCK_OF_COLUMNS
    walks = ((column + tall * (rows > RANKED_AT_ONCE)) * width for rows, width in shape.matrices)
    return Asked(
        batch * shape.batches,
        max(rest, 0.0) + matrix * len(shape.matrices) + sum(walks),
        block["sync"] + waits * (shape.batches - COUNTED_BATCHES),
        # The report's own readings are small.
        (block["to_device"] + block["to_host"] - len(COUNTED_WIDTHS) * counts("")["to_host"]) / COPIES_OF_A_BLOCK,
    )


def products_of(shape: Shape) -> float:
    """FLOPs of one pass through a block: its matrices, and attention, half of which is masked."""
    return shape.tokens * (2.0 * shape.weights + 2.0 * shape.seqlen * shape.width)


def passed_by(shape: Shape) -> float:
    """Bytes that one pass through a block reads and writes beside its products, as transformers does it in bfloat16.

    For each value of a hidden state: two norms of 36 (to float32, square, mean, multiply, back, multiply), two sums of 6,
    5 of attention's own; 20 for each turned query or key; 10 for each value between the MLP's matrices.
    """
    turned = shape.width + shape.keys
    return shape.tokens * (89.0 * shape.width + 20.0 * turned + 10.0 * shape.inner)


def gram_of(tokens: int, width: int, panel: int) -> float:
    """FLOPs of a Gram matrix of which only the panels on the diagonal and right of it are computed."""
    return 2.0 * tokens * sum(min(panel, width - start) * (width - start) for start in range(0, width, panel))


def seconds_of_block(way: Way, shape: Shape, machine: Machine) -> dict[str, float]:
    """Seconds of a block by part; `all` is wall time, during which host and device overlap."""
    asked, tera, giga = drawn_out(way, shape), 1e12, 1e9
    # To float32 (2 + 4 bytes), square (4 + 4), sum (4).
    statistics = shape.tokens * sum(shape.inputs) * 18 / (machine.memory_gbs * giga)
    # Some fifteen passes over weights in float32: scores, ranks, masks, the report.
    solving = shape.weights * 60 / (machine.memory_gbs * giga)
    if way.method == "sparsegpt":
        rate = machine.bf16_tflops if way.tensor_cores else machine.float32_tflops
        statistics = sum(gram_of(shape.tokens, width, WIDE_PANEL) for width in shape.inputs) / (rate * tera)
        # Factoring and inverting; every column pushed into the later ones; two layer errors.
        factoring = sum(width**3 for width in shape.inputs) / (machine.factor_tflops * tera)
        updates = sum(rows * columns**2 for rows, columns in shape.matrices)
        solving += factoring + 5 * updates / (machine.float32_tflops * tera)
    products = PASSES * products_of(shape) / (machine.bf16_tflops * tera)
    around = PASSES * passed_by(shape) / (machine.memory_gbs * giga)
    walked, solved = (n * machine.launch_us * 1e-6 for n in (asked.walk_launches, asked.solve_launches))
    waits = asked.waits * machine.wait_us * 1e-6
    weights = 2 * shape.weights / giga
    # Pinned, in beside the computation and out in its queue; what the proof and the check of what was written copy is waited for.
    one_way = weights / machine.pinned_gbs
    waited_for = (asked.copies - 2) * weights / machine.pageable_gbs
    computed = max(products + around + statistics, walked) + max(solving, solved) + waits + one_way
    return {
        "products": products,
        "around them": around,
        "statistics": statistics,
        "solving": solving,
        "launching": walked + solved,
        "waits": waits,
        "copies": 2 * one_way + waited_for,
        "all": max(computed, one_way) + waited_for,
    }


def ways(stages: Stages) -> tuple[Way, ...]:
    """The ways that are compared."""
    return (
        Way("Wanda 2:4", "wanda", stages),
        Way("SparseGPT 2:4", "sparsegpt", stages, triton=True),
        Way("SparseGPT 2:4, Gram matrices in float32", "sparsegpt", stages, triton=True, tensor_cores=False),
        Way("SparseGPT 2:4, `inner_loop=torch`", "sparsegpt", stages),
    )


def table(found: Mapping[str, Mapping[str, float]], blocks: int) -> str:
    """Seconds of all blocks, a row for each way."""
    parts = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(parts)} |", f"| --- |{' ---: |' * len(parts)}"]
    lines += [f"| {name} | {' | '.join(f'{blocks * s:.1f}' for s in row.values())} |" for name, row in found.items()]
    return "\n".join(lines)


def counted() -> Stages:
    """The counts of every stage."""
    stages: Stages = json.loads(COUNTS.read_text(encoding="utf-8"))["stages"]
    return stages


def main() -> None:
    asked = vars(read_arguments())
    shape = replace(Shape(), samples=asked["samples"], seqlen=asked["seqlen"])
    machine = Machine(**{field.name: asked[field.name] for field in fields(Machine)})
    assumed = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in vars(machine).items())
    print(
        f"An estimate, not a measurement: Llama-3-8B, {shape.samples} × {shape.seqlen} tokens, {shape.blocks} blocks, seconds"
    )
    print(f"Assumed: {assumed}\n")
    found = {way.name: seconds_of_block(way, shape, machine) for way in ways(counted())}
    print(table(found, shape.blocks))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told: dict[str, Any] = {
        "bf16_tflops": "products of bfloat16 that a forward pass reaches, 10¹² FLOPs a second",
        "float32_tflops": "products of float32, without TF32",
        "factor_tflops": "factoring and inverting in float32",
        "memory_gbs": "reading and writing of the GPU's memory, GB a second",
        "pinned_gbs": "copies between pinned host memory and the GPU",
        "pageable_gbs": "copies between other host memory and the GPU",
        "launch_us": "of the host for an operation of torch, microseconds",
        "wait_us": "of the host for the device, and until the device is busy again",
    }
    for field in fields(Machine):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=float, default=field.default, help=f"{told[field.name]} [{field.default:g}]")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
