"""A reporter's messages, bars and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from coprune.base.progress import Event, Reporter, Said, shortened


@dataclass(frozen=True)
class Counted(Event):
    kind: ClassVar[str] = "counted"
    number: int
    unit: str


def test_listeners_of_a_quiet_reporter_receive_every_event(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_reporter_prints_markup_literally(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().say("[bold] is no markup")
    assert capsys.readouterr().err == "[bold] is no markup\n"


def test_a_long_line_stays_one_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    line = "a path that is long /" + "x" * 200
    Reporter().say(line)
    assert capsys.readouterr().err == f"{line}\n"


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Reporter().bar("Pruning", 20) as advance:
        for _ in range(20):  # 40 seconds each
            now += 40
            advance(1)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "Pruning: 10 % after 1 min, about 12 min left.",
        "Pruning: 20 % after 3 min, about 11 min left.",
    ]
    assert len(said) == 9  # every 80 seconds, but not at the end
    with Reporter(quiet=True).bar("Pruning", 20) as advance:
        now += 1000
        advance(1)
    assert capsys.readouterr().err == ""


def test_the_end_of_a_long_description_is_kept() -> None:
    assert shortened("Perplexity on a.txt", 28) == "Perplexity on a.txt"
    found = shortened("Perplexity on /home/somebody/texts/of/mine/wiki.test.raw", 28)
    assert (len(found), found[-17:]) == (28, "ine/wiki.test.raw")
    assert found.startswith("Perplexi")


def test_quiet_hides_the_hubs_bars_only_within_its_context() -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        with Reporter().libraries():
            assert not are_progress_bars_disabled()
        with Reporter(quiet=True).libraries():
            assert are_progress_bars_disabled()
        assert not are_progress_bars_disabled()
    finally:
        if before:
            disable_progress_bars()
