"""Fine-tuning uses only the requested device, and no precision that is slow on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.precision import SLOW_IN_BFLOAT16
from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.recipe.views import training_recipe
from coprune.steps.train import training_of
from coprune.training.finetuning import run_finetuning
from coprune.training.trainer import arguments_on, training_device
from support.pruned import pruned_model, save, settings_for, write_text


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs, as far as torch, transformers and accelerate ask; returns those that were made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(
        torch.accelerator, "set_device_index", lambda index: current.append(torch.device("cuda", index))
    )
    # Accelerate also sets the current device.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return current


def test_only_the_requested_gpu_is_used(two_gpus: list[torch.device], tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState

    second = torch.device("cuda", 1)
    try:
        arguments = arguments_on(second, output_dir=str(tmp_path), report_to=[])
        assert arguments.device == second
        assert arguments.n_gpu == 1, "more would be taken by DataParallel"
        assert arguments.train_batch_size == arguments.per_device_train_batch_size
        assert PartialState().device == second
        assert two_gpus[-1] == second
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_training_device_must_exist_and_follows_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_device("auto") == torch.device("cpu")
    with pytest.raises(BadInput, match="cannot be used here"):
        training_device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training_device("auto") == torch.device("cuda", 1)


def test_fine_tuning_uses_the_device_of_the_pruning(tmp_path: Path) -> None:
    recipe = make_recipe({"model": "m", "device": "cuda:1", "finetune": "lora", "save": str(tmp_path / "run")})
    assert training_of(recipe).model.device == "cuda:1"
    assert training_recipe(settings_for(tmp_path, tmp_path, tmp_path)).model.device == "cpu"


@pytest.mark.parametrize(
    ("data", "trained"),
    [("self=0.3,embedded=0.6,c4=0.1", "embedded"), ("self", "wikitext2"), ("words.txt", "words.txt")],
)
def test_a_training_after_pruning_reads_one_source_of_text(data: str, trained: str) -> None:
    recipe = make_recipe({"model": "m", "dataset": data, "finetune": "lora", "finetune_minutes": 1, "save_model": "x"})
    assert training_of(recipe).calibrate.data == trained


def test_fine_tuning_uses_float32_on_a_processor_without_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(pruned_model(num_hidden_layers=1), tmp_path / "model")
    write_text(tmp_path / "text.txt", 300)
    lines: list[str] = []
    monkeypatch.setattr("coprune.base.progress.Reporter.say", lambda self, line: lines.append(line))
    monkeypatch.setattr("coprune.training.finetuning.multiplies_bfloat16", lambda _: False)

    def trained(name: str, half: bool) -> dict[str, Tensor]:
        how = settings_for(
            tmp_path / name,
            tmp_path / "model",
            tmp_path / "text.txt",
            mode="dense",
            max_steps=2,
            dtype="bfloat16" if half else "float32",
        )
        assert run_finetuning(training_recipe(how), Reporter(quiet=True)).settings.train.dtype == "float32"
        return load_file(tmp_path / name / "model" / "model.safetensors")

    asked, exact = trained("asked", True), trained("exact", False)
    assert all(torch.equal(asked[name], exact[name]) for name in exact)
    assert lines.count(f"{SLOW_IN_BFLOAT16} This training therefore computes in float32.") == 1
