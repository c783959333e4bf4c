"""Cases: fine-tuning a pruned model, keeping its zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coprune.base.progress import Reporter
from support.pico import pico_model
from support.saved import tensors_of
from support.simdevice import NAME
from support.simdevice.cases.case import Case

Trained = tuple[list[float], dict[str, torch.Tensor]]


def trained(folder: Path, family: str, device: str, reporter: Reporter | None = None, **changes: Any) -> Trained:
    """Train on a device, making the data if missing; return the losses and the saved tensors."""
    from transformers import training_args

    from coprune.recipe.views import training_recipe
    from coprune.training.finetuning import run_finetuning
    from support.pruned import pruned_model, save, settings_for, write_text

    # transformers has a list of GPUs that support bfloat16.
    vars(training_args)["is_torch_bf16_gpu_available"] = lambda: True
    forget_device()
    source, text = folder / family, folder / "text.txt"
    if not source.exists():
        save(pruned_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2}), source)
        save(pico_model("llama", vocab_size=1002, num_hidden_layers=2), folder / "dense")
        write_text(text, 700)
    out = Path(changes.pop("out", folder / f"tuned-{device}"))
    if "distill" in changes.get("mode", ""):
        changes["teacher"] = str(folder / "dense")
    settings = training_recipe(settings_for(out, source, text, device=device, **changes))
    report = run_finetuning(settings, reporter or Reporter(quiet=True))
    return [point.loss for point in report.curve], tensors_of(out / "model")


def forget_device() -> None:
    """Reset accelerate, which keeps its first device for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()  # type: ignore[no-untyped-call, unused-ignore]


def trained_alike(family: str, mode: str, **changes: Any) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        cpu, device = (trained(folder, family, name, mode=mode, **changes) for name in ("cpu", NAME))
        worst = max(abs(a / b - 1) for a, b in zip(cpu[0], device[0], strict=True))
        assert worst < 0.05, (cpu[0], device[0])
        for name, weight in cpu[1].items():
            if weight.ndim == 2 and float((weight == 0).float().mean()) > 0.05:
                assert torch.equal(weight == 0, device[1][name] == 0), name
        return f"{len(cpu[0])} losses within {worst:.1e}, the same zeros"

    return run


def resumed(folder: Path) -> str:
    """Check that an interrupted training resumes to the same bits."""
    from support.pruned import StoppedAt

    settings: dict[str, Any] = {"mode": "lora", "save_every": 2}
    try:
        trained(folder, "llama", NAME, StoppedAt(0.7), out=folder / "stopped", **settings)
        raise AssertionError("it was not stopped")
    except KeyboardInterrupt:
        pass
    again = trained(folder, "llama", NAME, out=folder / "stopped", **settings)
    whole = trained(folder, "llama", NAME, out=folder / "whole", **settings)
    assert all(torch.equal(weight, again[1][name]) for name, weight in whole[1].items())
    return "to the bits of a run that nobody stopped"


def trainings() -> tuple[Case, ...]:
    """Return the cases of every mode, in float32 and bfloat16."""
    mixed: dict[str, Any] = {"dtype": "bfloat16", "gradient_checkpointing": True}
    return (
        Case("lora", trained_alike("llama", "lora", max_steps=2)),
        Case("distill", trained_alike("llama", "distill", max_steps=2), True),
        Case("lora bf16", trained_alike("llama", "lora", dtype="bfloat16")),
        Case("dense", trained_alike("llama", "dense", held_out=0.2)),
        Case("gpt2 lora", trained_alike("gpt2", "lora")),
        Case("gpt2 dense", trained_alike("gpt2", "dense")),
        Case("lora-distill bf16", trained_alike("llama", "lora-distill", dtype="bfloat16")),
        Case("distill mixed bf16", trained_alike("llama", "distill", **mixed)),
        Case("resumed", resumed),
    )
