"""`coprune pack`."""

from __future__ import annotations

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
        raise unknown_name("packed format", form, FORMATS, field="format")
    sizes = pack_folder(source, target, cast(Format, form), drop_negative_zeros)
    typer.echo(f"packed    {len(sizes.names)} tensors, {sizes.packed_dense:,} → {sizes.packed_packed:,} bytes")
    typer.echo(
        f"in all    {sizes.dense:,} → {sizes.packed:,} bytes ({sizes.packed / max(sizes.dense, 1):.3f}) in {target}"
    )
    if sizes.negative_zeros and not drop_negative_zeros:
        typer.echo(
            f"note      {sizes.negative_zeros:,} weights are -0.0 and kept; --drop-negative-zeros makes it smaller"
        )
