"""The types that annotations allow, for comparing annotations in tests."""

from __future__ import annotations

import typing
from typing import Any


def kinds(annotation: Any) -> set[Any]:
    """Return the types allowed by a union, an optional or a literal."""
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    arguments = typing.get_args(annotation)
    if type(None) in arguments or typing.get_origin(annotation) in (typing.Union, type(int | str)):
        return {kind for argument in arguments for kind in kinds(argument)}
    return {typing.get_origin(annotation) or annotation}
