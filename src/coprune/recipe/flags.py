"""Flags and commands of the command line for settings and calls. Nothing heavy is imported here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coprune.base.words import Face, Set

ALIASES = {"prune_method": "method", "sparsity_ratio": "sparsity", "sparsity_type": "pattern"}
"""Names in the Wanda repository's main.py that differ from the settings' names here; the rest only have underscores."""
_SHORT = {"method": "-m", "sparsity": "-s", "pattern": "-p"}
_SWITCHES = {"evaluate": "eval", "evaluate_dense": "eval-dense"} | {
    name: name.replace("_", "-")
    for name in ("layer_error", "gate", "stream", "check_memory", "masked", "finetune_masked", "permute", "rotate")
}
"""Flags with a `--no-` form, without their dashes."""


def flags_of(setting: str, in_training: bool = False) -> list[str]:
    """Return the flags of a setting's option, its main flag first. in_training: whether the command is `coprune finetune`."""
    if setting in _SWITCHES:
        return [f"--{_SWITCHES[setting]}/--no-{_SWITCHES[setting]}"]
    if in_training and setting == "train":  # --train means something else in a pruning run
        return ["--train-only"]
    others = [name for name, means in ALIASES.items() if means == setting]
    return [f"--{name.replace('_', '-')}" for name in (setting, *others)] + (
        [_SHORT[setting]] if setting in _SHORT else []
    )


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with dashes for underscores in flags: `--save_model` becomes `--save-model`."""
    found = []
    for word in arguments:
        flag, sign, value = word.partition("=")
        found.append(f"{flag.replace('_', '-')}{sign}{value}" if word.startswith("--") else word)
    return found


CALLED = {"evaluate": "eval"}
"""Commands whose name differs from their Python function."""


class CommandLine(Face):
    """The wording of messages on the command line: settings are flags, calls are commands."""

    between = " "

    def __init__(self, command: str = "prune") -> None:
        """Use the flags of a command."""
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
        # A value that begins with a dash would be parsed as a flag.
        return f"{yes}{'=' if str(value).startswith('-') else ' '}{_word(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        own = CommandLine(name)
        said = [part.said_in(own) if isinstance(part, Set) else _word(part) for part in parts]
        return " ".join(["coprune", CALLED.get(name, name), *said])


def _word(value: Any) -> str:
    return "…" if value is ... else shlex.quote(str(value))
