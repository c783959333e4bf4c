"""Run commands in the test's own process, like the entry point."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from coprune.commands.app import main


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run `coprune ARGUMENTS`; a traceback fails the test."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["coprune", *arguments])
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    captured = capsys.readouterr()
    return Ended(code, captured.out, captured.err)
