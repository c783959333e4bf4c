"""A run whose device has no memory left ends with one message that names what takes less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import coprune
from coprune.commands.face import CommandLine
from coprune.run import stages
from support.pico import pico_model


def test_a_run_out_of_memory_says_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full.\nMore of torch's words"
        )

    monkeypatch.setattr(stages, "prune_blocks", no_memory)
    with pytest.raises(coprune.OutOfMemory) as caught:
        coprune.prune(pico_model("llama"), "magnitude", evaluate=False, layer_error=False, quiet=True)
    said = caught.value.text(CommandLine())
    assert said.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full")
    assert "--batch-size 1" in said
    assert "--activation-memory 0" in said
    assert len(said.splitlines()) == 1
