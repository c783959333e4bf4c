"""`coprune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coprune.base.words import Command
from coprune.commands.terminal import show, show_next


def merge(
    model: Annotated[str, typer.Argument(help="The pruned model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of a masked adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Merge a masked adapter into its pruned model; every zero stays zero."""
    from coprune.training.adapter_merge import merge

    show(str(merge(model, adapter, output, quiet=quiet)))
    show_next(("measure it: ", Command("evaluate", output)))
