"""`coprune push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coprune.base.words import Command
from coprune.commands.terminal import show, show_next


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a saved model, of adapters, or of a run that saved its model.")
    ],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Upload a saved model with its card to the Hugging Face Hub; create the repository if it does not exist.

    Example: coprune push out/pruned me/SmolLM2-2-4 --private
    """
    from coprune.base.progress import Reporter
    from coprune.report.hub_upload import push

    with Reporter(quiet).libraries():
        address = push(folder, repository, private)
    show(f"pushed to {address}")
    show_next(("inspect it from another machine: ", Command("inspect", repository)))
