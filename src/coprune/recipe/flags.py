"""Settings and calls on the command line: flags and commands. Nothing heavy is imported here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coprune.base.words import Face, Set

ALIASES = {"prune_method": "method", "sparsity_ratio": "sparsity", "sparsity_type": "pattern"}
"""Settings by their names in the Wanda repository's main.py; its other flags are called as here, with underscores."""
_SHORT = {"method": "-m", "sparsity": "-s", "pattern": "-p"}
_SWITCHES = {"evaluate": "eval", "evaluate_dense": "eval-dense"} | {
    name: name.replace("_", "-")
    for name in ("layer_error", "gate", "stream", "check_memory", "masked", "finetune_masked", "permute", "rotate")
}
"""Flags that have an opposite, without their dashes."""


def flags_of(setting: str, in_training: bool = False) -> list[str]:
    """Return the flags of a setting's option, its own first. in_training: whether they are of `coprune finetune`."""
    if setting in _SWITCHES:
        return [f"--{_SWITCHES[setting]}/--no-{_SWITCHES[setting]}"]
    if in_training and setting == "train":  # which has another meaning in a run that prunes
        return ["--train-only"]
    others = [name for name, means in ALIASES.items() if means == setting]
    return [f"--{name.replace('_', '-')}" for name in (setting, *others)] + (
        [_SHORT[setting]] if setting in _SHORT else []
    )


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which a flag's underscores are dashes: `--save_model` as `--save-model`."""
    found = []
    for word in arguments:
        flag, sign, value = word.partition("=")
        found.append(f"{flag.replace('_', '-')}{sign}{value}" if word.startswith("--") else word)
    return found


CALLED = {"evaluate": "eval"}
"""Commands that are not called like their function in Python."""


class CommandLine(Face):
    """Settings are flags, calls are commands."""

    between = " "

    def __init__(self, command: str = "prune") -> None:
        """Speak to whoever typed a command, whose flags are named."""
        self._trains = command == "finetune"

    def name(self, setting: str) -> str:
        return flags_of(setting, self._trains)[0].partition("/")[0]

    def setting(self, name: str) -> str:
        return self.name(name)

    def set(self, name: str, value: Any) -> str:
        yes, _, no = flags_of(name, self._trains)[0].partition("/")
        if isinstance(value, bool):
            return yes if value else no or f"no {yes}"
        if isinstance(value, list | tuple):
            return " ".join(self.set(name, one) for one in value)
        # What begins with a dash would be taken for another flag.
        return f"{yes}{'=' if str(value).startswith('-') else ' '}{_word(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        own = CommandLine(name)
        said = [part.said_in(own) if isinstance(part, Set) else _word(part) for part in parts]
        return " ".join(["coprune", CALLED.get(name, name), *said])


def _word(value: Any) -> str:
    return "…" if value is ... else shlex.quote(str(value))
