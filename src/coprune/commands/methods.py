"""`coprune methods`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from coprune.base.words import Command, Set
from coprune.commands.terminal import show, show_next

if TYPE_CHECKING:
    from coprune.pruning.methods.base import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this method.", show_default=False)] = None,
) -> None:
    """List the pruning methods and their own options."""

    show("\n".join(describe_methods(name)))
    show_next(("use one: ", Command("prune", "MODEL", Set("method", name or ...), Set("save_model", ...))))


def describe_methods(name: str | None = None) -> list[str]:
    """Return lines that list every method (or one) with its options. Raises BadInput for an unknown name."""
    from coprune.pruning.methods import all_methods, find_method, origin_of

    chosen = {name: find_method(name)} if name is not None else all_methods()
    lines = []
    for title, method in chosen.items():
        needs = method.statistic.__name__ if method.statistic is not None else "none"
        origin = origin_of(title)
        source = "" if origin is None else f"; from {origin}"
        lines.append(f"{title}: {_first_line(type(method).__doc__)} (input statistic: {needs}{source})")
        comments = field_comments(type(method))
        for field in dataclasses.fields(method):
            flag = field.name.replace("_", "-")
            lines.append(f"    --{flag:<14} {comments.get(field.name, '')} [{getattr(method, field.name)}]")
    return lines


def field_comments(cls: type[Method]) -> dict[str, str]:
    """Return the docstring of each field of a class on one line, from the source, since Python does not keep them."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class defined in an interactive shell
        return {}
    body = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    comments = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            comments[field.target.id] = " ".join(after.value.value.split())
    return comments


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
