"""One run on two GPUs, whose result must equal that of one."""

from __future__ import annotations

import subprocess
import sys
import time

import torch

from gpu_sections.models import SMOLLM2, real, tensors
from gpu_sections.section import SIMULATED, Asked, Result, head, row


def together(asked: Asked) -> Result:
    """Prune a real model with one process and with two."""
    from support.simdevice.cases.case import ROUNDED

    if asked.device == SIMULATED or (asked.device != "cpu" and torch.accelerator.device_count() < 2):
        return None, "there is one device here"
    found = real(asked)
    if found is None:
        return None, SMOLLM2.missing
    sizes = ["--nsamples", "8", "--seqlen", "32"] if asked.tiny else ["--nsamples", "64", "--seqlen", "1024"]
    head(" processes", "s")
    saved = {}
    for number in (1, 2):
        saved[number] = asked.folder / f"by-{number}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        settings = [
            "--method",
            "sparsegpt",
            "--pattern",
            "2:4",
            "--dataset",
            found.data["dataset"],
            "--no-eval",
            *sizes,
        ]
        places = [
            "--device",
            asked.device,
            "--save",
            str(asked.folder / f"run-{number}"),
            "--save-model",
            str(saved[number]),
        ]
        started = time.monotonic()
        command = [*launcher, "-m", "coprune", "prune", found.model, *settings, *places, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return False, f"{number} processes ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
        row(number, f"{time.monotonic() - started:.1f}")
    return True, ROUNDED.compare(tensors(saved[1]), tensors(saved[2]))
