"""How every command prints: what others wrote (models, files, names) steers no terminal."""

from __future__ import annotations

import typer

from coprune.base.shown import printable


def show(text: str) -> None:
    """Print a result on standard output."""
    typer.echo(printable(text))


def tell(text: str) -> None:
    """Print what is no result on standard error."""
    typer.echo(printable(text), err=True)
