"""The learning-rate schedule, and trainings that end with the time limit."""

from __future__ import annotations

import pytest

from coprune.training.trainer import Pace, rate_at


def test_the_rate_rises_and_then_falls() -> None:
    rates = [rate_at(i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[3] == pytest.approx(1)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[40] - rates[60] == pytest.approx(0.2 / 0.97)


def test_a_training_ends_with_its_steps_or_minutes_whichever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("coprune.training.trainer.time.perf_counter", lambda: now)
    measured = Pace(60)
    measured.start(seconds_before=12)
    now = 118.0
    measured.update(10, 100)
    assert measured.done == pytest.approx(0.5)
    measured.update(90, 100)
    assert measured.done == pytest.approx(0.9)
    now = 200.0
    measured.update(91, 100)
    assert measured.done == 1
    by_steps = Pace(None)
    by_steps.update(25, 100)
    assert by_steps.done == pytest.approx(0.25)
