"""`coprune methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from coprune.commands.show import show


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method.", show_default=False)] = None,
) -> None:
    """List the pruning methods and their own options."""
    from coprune.pruning.methods.describe import describe_methods

    show("\n".join(describe_methods(name)))
