"""A run that would not fit is refused with settings that would, as either face names them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coprune.base.errors import BadInput
from coprune.commands.table import CommandLine
from coprune.run.estimate.found import Estimate, Proposal


def test_a_run_that_would_not_fit_is_refused_with_settings_that_would() -> None:
    refused = Estimate(2**30, 60.0, 0, 0)
    for proposal, python, flags in (
        (None, "Or run it all the same with check_memory=False.", "Or run it all the same with --no-check-memory."),
        (
            Proposal({"stream": True, "batch_size": 1}, enough=True, halves=False),
            "It would with stream=True, batch_size=1. Or run",
            "It would with --stream --batch-size 1. Or run",
        ),
        (
            Proposal({"nsamples": 8}, enough=False, halves=True),
            "Even nsamples=8 would not be enough; dtype='bfloat16' and a machine with more memory would help. Or",
            "Even --nsamples 8 would not be enough; --dtype bfloat16 and a machine with more memory would help. Or",
        ),
    ):
        with pytest.raises(BadInput, match=r"^the run would not fit\. Estimate: ") as caught:
            replace(refused, proposal=proposal).require()
        assert python in str(caught.value)
        assert flags in caught.value.text(CommandLine())
        assert caught.value.field == "check_memory"
