"""Fixtures for tests of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.commands import run_command


@pytest.fixture
def coprune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, which has to succeed, and returns its standard output."""

    def run(*arguments: Any) -> str:
        ended = run_command(list(arguments), monkeypatch, capsys)
        assert ended.code == 0, ended.err
        return ended.out

    return run
