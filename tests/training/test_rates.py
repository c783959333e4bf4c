"""Learning rates relative to the size of the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.recipe.presets import preset_settings
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.steps.train import training_of
from coprune.training.finetuning import run_finetuning
from coprune.training.trainer import rates_by_size
from support.pruned import StoppedAt, pruned_model, save, settings_for, write_text


def test_every_parameter_has_its_size_times_the_rate() -> None:
    values = [[[3.0, 0.0], [0.0, 4.0]], [0.1, -0.1], [0.0, 0.0], [100.0, -1.0, 0.0, 2.0, 0.5, 0.25]]
    large, small, empty, gains = (nn.Parameter(torch.tensor(one)) for one in values)
    groups: list[dict[str, Any]] = [
        {"params": [large, small], "weight_decay": 0.5},
        {"params": [empty, gains], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    rates_by_size(optimizer)
    found = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert all(params[0] is one for (params, _, _), one in zip(found, (large, small, empty, gains), strict=True))
    # One gain is a hundred times larger, so others would otherwise move by their whole size.
    assert [rate for _, rate, _ in found] == pytest.approx([0.01 * 12.5**0.5, 0.001, 0.01, 0.01])
    assert [decay for _, _, decay in found] == [0.5, 0.5, 0.0, 0.0]


def test_scaled_weights_take_scaled_steps_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    save(pruned_model(num_hidden_layers=1), tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 700)

    def trained(name: str, reporter: Reporter | None = None, **changes: Any) -> dict[str, torch.Tensor]:
        more = {"mode": "dense", "max_steps": 5, "save_every": 2, "rates": "relative", "learning_rate": 0.01}
        asked = settings_for(tmp_path / name, tmp_path / "model", text, **(more | changes))
        run_finetuning(training_recipe(asked), reporter or Reporter(quiet=True))
        return load_file(tmp_path / name / "model" / "model.safetensors")

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", StoppedAt(0.6))
    cut = trained("cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    one = trained("one", max_steps=1)
    before = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        kept = before[name] != 0
        there = before[name][kept].abs()
        size = there.square().mean().sqrt() if before[name].ndim > 1 else there.median()
        step = (one[name] - before[name])[kept].abs()
        assert float(step.max()) == pytest.approx(
            0.001 * float(size), rel=0.01
        )  # Adam's first step is a tenth of the rate


def test_training_presets_use_relative_rates_and_adapters_refuse_them() -> None:
    assert (
        training_of(
            make_recipe({"model": "m", "pattern": "2:4", **preset_settings("balanced", train="whole")})
        ).train.rates
        == "relative"
    )
    with pytest.raises(BadInput, match="adapters begin at zero"):
        training_recipe({"model": "m", "mode": "lora", "rates": "relative"})
