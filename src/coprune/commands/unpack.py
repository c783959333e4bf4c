"""`coprune unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coprune.commands.terminal import show


def unpack(
    source: Annotated[Path, typer.Argument(help="Folder of a packed model.")],
    target: Annotated[Path, typer.Argument(help="Folder for the dense model.")],
) -> None:
    """Restore the dense folder that was packed, byte for byte."""
    from coprune.packed.folder import unpack

    unpack(source, target)
    show(f"unpacked  {target}")
