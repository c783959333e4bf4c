"""A device that runs out of memory: the run must end with a one-line message, and the next one must work."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import coprune
from gpu_sections.models import wide
from gpu_sections.section import SIMULATED, Asked, Result, mib


def full(asked: Asked) -> Result:
    """Give a run half of the memory that it took before."""
    folder, words = wide(asked)
    samples, seqlen = (8, 32) if asked.tiny else (8, 2048)
    data: dict[str, Any] = {"dataset": str(words), "nsamples": samples, "seqlen": seqlen, "evaluate": False}
    given: dict[str, Any] = {**data, "stream": True, "quiet": True, "device": asked.device, "pattern": "2:4"}

    def run(name: str) -> int | None:
        done = coprune.prune(str(folder), "sparsegpt", check_memory=False, save_model=asked.folder / name, **given)
        return done.report.peak_device_memory_bytes

    peak = run("whole")
    if peak is None:
        return None, "the device does not tell of its memory"
    print(f"A run that took {mib(peak)} MiB there gets half of that. It says:\n")
    with limited(asked.device, peak // 2):
        try:
            run("full")
        except coprune.OutOfMemory as error:
            said = str(error)
        else:
            return False, "it ran all the same"
    print(f"> {said}")
    if len(said.splitlines()) != 1:
        return False, "that is more than one line"
    gc.collect()  # what the error's frames held
    run("full")
    return True, "one line, and with all of the memory the same run went on"


@contextmanager
def limited(device: str, nbytes: int) -> Iterator[None]:
    """Limit the bytes that this process's tensors may take on the device, within the `with` body."""
    if device == SIMULATED:
        from support.simdevice.device import library

        library.sim_limit(nbytes)
        try:
            yield
        finally:
            library.sim_limit(0)
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
