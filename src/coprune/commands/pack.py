"""`coprune pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from coprune.commands.terminal import show


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
    from coprune.packed.folder import pack
    from coprune.packed.format import Format

    show(str(pack(source, target, cast(Format, form), drop_negative_zeros)))
