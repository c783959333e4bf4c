"""What tests of commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.commands import run_command


@pytest.fixture
def coprune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to succeed; its standard output."""

    def run(*arguments: Any) -> str:
        ended = run_command(list(arguments), monkeypatch, capsys)
        assert ended.code == 0, ended.err
        return ended.out

    return run
