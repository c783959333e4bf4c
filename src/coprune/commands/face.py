"""How messages name settings and commands on the command line: `--no-stream`, `coprune eval FOLDER --tasks …`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from coprune.base.words import Face, Set
from coprune.commands.table import CALLED
from coprune.recipe.flags import flags_of


class CommandLine(Face):
    """Settings are flags, calls are commands."""

    between = " "

    def name(self, setting: str) -> str:
        return flags_of(setting)[0].partition("/")[0]

    def setting(self, name: str) -> str:
        return self.name(name)

    def set(self, name: str, value: Any) -> str:
        yes, _, no = flags_of(name)[0].partition("/")
        if isinstance(value, bool):
            return yes if value else no or f"no {yes}"
        return f"{yes} {_word(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        said = [part.said_in(self) if isinstance(part, Set) else _word(part) for part in parts]
        return " ".join(["coprune", CALLED.get(name, name), *said])


def _word(value: Any) -> str:
    return "…" if value is ... else shlex.quote(str(value))
