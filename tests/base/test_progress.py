"""What a reporter tells its listeners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from coprune.base.progress import Event, Reporter, Said


@dataclass(frozen=True)
class Counted(Event):
    kind: ClassVar[str] = "counted"
    number: int
    unit: str


def test_listeners_hear_what_a_quiet_reporter_does_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[Event] = []
    reporter = Reporter(quiet=True)
    reporter.listeners.append(heard.append)
    reporter.say("[bold] is no markup")
    reporter.tell(Counted(3, "blocks"))
    assert heard == [Said("[bold] is no markup"), Counted(3, "blocks")]
    assert [(event.kind, event.facts()) for event in heard] == [
        ("line", {"text": "[bold] is no markup"}),
        ("counted", {"number": 3, "unit": "blocks"}),
    ]
    assert capsys.readouterr().err == ""


def test_a_line_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().say("[bold] is no markup")
    assert capsys.readouterr().err == "[bold] is no markup\n"
