"""The command that a recipe stands for, so that a run of a sweep can be read, copied and repeated by itself."""

from __future__ import annotations

import shlex
from typing import Any

from coprune.commands.options import flags_of
from coprune.recipe.recipe import Recipe


def command_of(recipe: Recipe) -> str:
    """`coprune prune …` with every field that is not at its default, quoted for a shell."""
    words = ["coprune", "prune", recipe.model]
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if name not in ("model", "options") and value != field.default:
            words += _option(name, value)
        elif name == "options":
            for option, chosen in value.items():
                words += [f"--{option.replace('_', '-')}", _text(chosen)]
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    flag = flags_of(name)[0]
    if isinstance(value, bool):
        yes, _, no = flag.partition("/")
        return [yes if value else no]
    if isinstance(value, tuple):
        return [word for one in value for word in (flag, _text(one))]
    return [flag, _text(value)]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
