"""Fine-tuning of a pruned model."""

from __future__ import annotations

from typing import Any

import torch

import coprune
from coprune.base.devices import device_memory, reset_peak
from coprune.recipe.train_part import Mode
from gpu_sections.models import SMOLLM2, real
from gpu_sections.section import SIMULATED, Asked, Result, head, mib, row


def adapters(asked: Asked) -> Result:
    """Some steps of masked adapters and of distillation; every save verifies that the zeros are kept."""
    found = real(asked)
    if found is None:
        return None, SMOLLM2.missing
    if asked.device == SIMULATED:
        from transformers import training_args

        # Which kinds of GPU can compute in bfloat16 transformers keeps a list of.
        vars(training_args)["is_torch_bf16_gpu_available"] = lambda: True
    pruned = asked.folder / "to-tune"
    sizes: dict[str, Any] = {"nsamples": 8, "seqlen": 32 if asked.tiny else 128, "evaluate": False, "quiet": True}
    coprune.prune(
        found.model,
        "wanda",
        pattern="2:4",
        dataset=found.data["dataset"],
        device=asked.device,
        save_model=pruned,
        **sizes,
    )
    steps, seqlen, batch = (2, 16, 2) if asked.tiny else (20, 512, 8)
    print(f"{steps} steps of {batch} × {seqlen} tokens, bfloat16.\n")
    head(" ", "s a step", "loss: first", "last", "MiB at most there")
    teachers: dict[Mode, str | None] = {"lora": None, "distill": found.model}
    for mode, teacher in teachers.items():
        place = torch.empty(1, device=asked.device).device
        reset_peak(place)
        report = coprune.finetune(
            pruned,
            mode,
            quiet=True,
            teacher=teacher,
            dataset=found.data["dataset"],
            seqlen=seqlen,
            batch_size=batch,
            dtype="bfloat16",
            max_steps=steps,
            evaluate=False,
            save=asked.folder / mode,
            device=asked.device,
        )
        there = device_memory(place)
        losses = [point.loss for point in report.curve]
        cells = f"{report.seconds / report.steps:.3f}", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"
        row(mode, *cells, mib(there.peak if there else None))
    return True, "the zeros stayed"
