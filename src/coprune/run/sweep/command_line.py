"""The commands that a sweep and each of its runs stand for, so that they can be read, copied and repeated."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from coprune.recipe.flags import flags_of
from coprune.recipe.grammar import write_scalar
from coprune.recipe.recipe import DEFAULTS, Recipe
from coprune.report.links import SWEEP_FILE


def command_of(recipe: Recipe) -> str:
    """`coprune prune …` with every field that is not at its default, quoted for a shell."""
    words = ["coprune", "prune", recipe.model.name]
    for name, value in recipe.flat().items():
        if name not in ("model", "options") and value != DEFAULTS[name]:
            words += _option(name, value)
        elif name == "options":
            for option, chosen in value.items():
                words += [f"--{option.replace('_', '-')}", write_scalar(chosen)]
    return shlex.join(words)


def sweep_command(folder: Path) -> str:
    """`coprune sweep …` of what lies in a folder, which does what is not done yet, quoted for a shell."""
    return shlex.join(["coprune", "sweep", str(folder / SWEEP_FILE)])


def _option(name: str, value: Any) -> list[str]:
    flag = flags_of(name)[0]
    if isinstance(value, bool):
        yes, _, no = flag.partition("/")
        return [yes if value else no]
    if isinstance(value, tuple):
        return [word for one in value for word in (flag, str(one))]
    return [flag, str(value)]
