"""Recovery from removal by training every block after its cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import coprune
from support.pico import pico_model, pico_tokens
from support.saved import load_clean

IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "align": 16, "evaluate": False, "quiet": True}
MENDED: dict[str, Any] = {"reconstruct": 4}


@pytest.mark.parametrize(
    ("family", "remove"),
    [
        ("llama", "channels=0.4,heads=0.5,blocks=0.34"),
        ("gpt_oss", "channels=0.4,heads=0.5"),  # bias tables, attention sinks
        pytest.param("jamba", "channels=0.4", marks=pytest.mark.slow),  # uncut blocks after cut ones
    ],
)
def test_silenced_parts_stay_silent_during_training(family: str, remove: str, tmp_path: Path) -> None:
    model = pico_model(family)
    result = coprune.prune(model, remove=remove, save_model=tmp_path / "small", **SETTINGS, **MENDED)
    small = load_clean(tmp_path / "small")
    tokens = pico_tokens(2, 16)
    with torch.no_grad():
        silent, found = model(tokens, use_cache=False).logits, small(tokens, use_cache=False).logits
    torch.testing.assert_close(found, silent, rtol=1e-4, atol=1e-4)
    trainings = result.report.trainings
    assert trainings
    # No training makes the watched batches worse.
    assert all(training.end <= training.start for training in trainings)


def hidden(model: Any) -> Tensor:
    """Return the last block's output: tokens × width."""
    with torch.no_grad():
        states: Tensor = model(IDS, output_hidden_states=True, use_cache=False).hidden_states[-1]
    return states.flatten(0, 1)


def test_training_after_a_cut_gets_closer_to_the_dense_model() -> None:
    dense = hidden(pico_model("llama"))

    def distance(**settings: Any) -> float:
        model = pico_model("llama")
        coprune.prune(model, remove="channels=0.4,heads=0.5", **SETTINGS, **settings)
        return float((hidden(model) - dense).norm())

    assert distance(reconstruct=20) < distance()


@pytest.mark.slow
def test_blocks_after_a_removed_one_are_trained_to_compensate() -> None:
    def model() -> Any:
        made = pico_model("llama")
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            made.get_parameter(f"model.layers.1.{name}.weight").mul_(0.5)  # the removed one
        return made

    dense, alone, helped = hidden(model()), model(), model()
    coprune.prune(alone, remove="blocks=0.34", **SETTINGS)
    coprune.prune(helped, remove="blocks=0.34", **SETTINGS, reconstruct=20)
    assert (hidden(helped) - dense).norm() < (hidden(alone) - dense).norm()
