"""The commands that make, undo and measure packed checkpoints; nothing heavy is imported before one runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer


def pack(
    source: Annotated[Path, typer.Argument(help="Folder of a pruned model (safetensors).")],
    target: Annotated[Path, typer.Argument(help="Folder for the packed model.")],
    form: Annotated[
        str,
        typer.Option("--format", help="auto takes whichever is smaller: bitmask (any pattern) or nm (N:M positions)."),
    ] = "auto",
    drop_negative_zeros: Annotated[
        bool, typer.Option("--drop-negative-zeros", help="Do not keep weights that are -0.0; unpacked they are 0.0.")
    ] = False,
) -> None:
    """Store a pruned model's kept weights and where they are; bit for bit the same model, and smaller.

    Example: coprune pack out/pruned out/packed
    """
    from coprune.base.errors import unknown_name
    from coprune.packed.folder import pack_folder
    from coprune.packed.format import FORMATS, Format

    if form not in FORMATS:
        raise unknown_name("packed format", form, FORMATS)
    sizes = pack_folder(source, target, cast(Format, form), drop_negative_zeros)
    typer.echo(f"packed    {len(sizes.names)} tensors, {sizes.packed_dense:,} → {sizes.packed_packed:,} bytes")
    typer.echo(
        f"in all    {sizes.dense:,} → {sizes.packed:,} bytes ({sizes.packed / max(sizes.dense, 1):.3f}) in {target}"
    )
    if sizes.negative_zeros and not drop_negative_zeros:
        typer.echo(
            f"note      {sizes.negative_zeros:,} weights are -0.0 and kept; --drop-negative-zeros makes it smaller"
        )


def unpack(
    source: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    target: Annotated[Path, typer.Argument(help="Folder for the dense model.")],
) -> None:
    """Give back the dense folder that was packed, byte for byte."""
    from coprune.packed.folder import unpack_folder

    unpack_folder(source, target)
    typer.echo(f"unpacked  {target}")


def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a pruned model, packed or not.")],
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to decode per measurement.", min=1)] = 24,
    repeats: Annotated[int, typer.Option(help="Measurements of each form, in turns.", min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. [torch's choice]", min=1)] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the figures to this file; RUN/bench.json puts them into RUN's page."),
    ] = None,
) -> None:
    """Measure prefill and decoding on this machine: dense, packed and semi-structured in turns, as ratios in one run.

    Example: coprune bench out/pruned --json out/SmolLM2/2-4/wanda/bench.json
    """
    import torch

    from coprune.base.errors import BadInput
    from coprune.base.files import write_text
    from coprune.packed.bench import bench as measure
    from coprune.packed.bench import format_bench

    sizes = [part.strip() for part in batches.split(",")]
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise BadInput(f"--batches {batches!r} should be positive numbers with commas between, such as 1,4,16.")
    if threads is not None:
        torch.set_num_threads(threads)
    found = measure(model, tuple(map(int, sizes)), prompt, tokens, repeats, dtype, device)
    typer.echo(format_bench(found))
    if json_file is not None:
        write_text(json_file, json.dumps(found.to_dict(), indent=2) + "\n")
        _put_into_page(json_file)


def _put_into_page(json_file: Path) -> None:
    """Make the page of the run again whose folder now holds the figures."""
    from coprune.report.folder import PAGE_FILE, REPORT_FILE, write_page

    run = json_file.parent
    if json_file.name == "bench.json" and (run / REPORT_FILE).is_file() and write_page([run], run / PAGE_FILE):
        typer.echo(f"page      {run / PAGE_FILE}")
