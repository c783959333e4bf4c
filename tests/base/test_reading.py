"""Reads from a device are batched and checks on it deferred; host memory is checked immediately."""

from __future__ import annotations

import pytest
import torch

from coprune.base.errors import NumericalError
from coprune.base.reading import Questions, Reading, reading_later, refuse_if, to_host
from support.other_device import OTHER, OtherDevice

ERROR = NumericalError("too large")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def test_checks_in_host_memory_fail_immediately() -> None:
    refuse_if(FALSE, ERROR)
    with reading_later(), pytest.raises(NumericalError, match="too large"):
        refuse_if(TRUE, ERROR)
    tensors = [torch.ones(3), None, TRUE]
    assert all(found is given for found, given in zip(to_host(*tensors), tensors, strict=True))


def test_a_deferred_check_is_evaluated_with_the_next_reading() -> None:
    reading = Reading()
    reading.add(FALSE, NumericalError("this holds not"))
    assert reading.read(TRUE) == [TRUE]
    reading.add(FALSE, NumericalError("this holds not"))
    reading.add(TRUE, ERROR)
    reading.add(TRUE, NumericalError("this comes later"))
    with pytest.raises(NumericalError, match="too large"):
        reading.read(None)
    assert reading.read(None) == [None], "each is looked at once"


def test_on_a_device_checks_are_deferred_to_the_end_of_the_block_at_most() -> None:
    with OtherDevice():
        doubt = torch.tensor([1.0, torch.inf]).to(OTHER).isinf().any()
        with pytest.raises(NumericalError, match="too large"):
            refuse_if(doubt, ERROR)
        later = reading_later()
        with later:
            refuse_if(doubt.logical_not(), ERROR)
        later = reading_later()
        later.__enter__()
        refuse_if(doubt, ERROR)
        with pytest.raises(NumericalError, match="too large"):
            later.__exit__(None, None, None)


def test_tensors_of_all_dtypes_are_read_in_one_copy() -> None:
    here = [
        torch.arange(5),
        None,
        torch.rand(2, 3).T,
        TRUE,
        torch.rand(()).double(),
        torch.zeros(0, 4),
        torch.rand(7) > 0.5,
    ]
    with OtherDevice():
        there = [None if tensor is None else tensor.to(OTHER) for tensor in here]
        for found, wanted in zip(to_host(*there), here, strict=True):
            if wanted is None or found is None:
                assert found is wanted
                continue
            assert found.device.type == "cpu"
            assert torch.equal(found, wanted)


def test_in_host_memory_a_question_is_answered_immediately() -> None:
    questions: Questions[str] = Questions()
    assert questions.ask(FALSE, "first") is None
    assert questions.ask(TRUE, "second") == "second"
    assert questions.rest() is None


def test_on_a_device_each_answer_is_read_after_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coprune.base.reading.in_host_memory", lambda device: False)
    monkeypatch.setattr("coprune.base.reading.on_its_way", lambda tensor: lambda: tensor)
    questions: Questions[str] = Questions()
    assert questions.ask(FALSE, "first") is None
    assert questions.ask(TRUE, "second") is None
    assert questions.ask(FALSE, "third") == "second"
    assert questions.rest() is None
    assert questions.ask(TRUE, "last") is None
    assert questions.rest() == "last"
