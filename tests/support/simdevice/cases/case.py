"""One case: work on a device, and the comparison of its result with the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import coprune
from support.pico import pico_model
from support.simdevice import NAME

IDS = torch.randint(3, 250, (8, 32), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, Any] = {"dataset": IDS, "batch_size": 2, "evaluate": False, "quiet": True, "check_memory": False}
"""Settings of a run on a model in memory: more tokens than any matrix has inputs, so that results are well-conditioned."""


class Case(NamedTuple):
    """A name, and a function that runs in an empty folder and returns what was compared, or raises."""

    name: str
    run: Callable[[Path], str]
    always: bool = False
    """Whether it is part of every test run."""


@dataclass(frozen=True)
class Alike:
    """Allowed differences of a device's result from the CPU's."""

    moved: float = 0.002
    """Share of zeros that may be elsewhere, since rounding may reverse the order of scores."""
    distance: float = 1e-3
    """Relative distance of the weights that both keep."""

    def compare(self, cpu: Mapping[str, Tensor], device: Mapping[str, Tensor]) -> str:
        """Raise AssertionError if tensors differ by more; return the differences."""
        assert cpu.keys() == device.keys(), "other tensors"
        moved, total, difference, norm = 0, 0, 0.0, 0.0
        for name, wanted in cpu.items():
            found = device[name].cpu()
            assert found.dtype == wanted.dtype, name
            assert found.shape == wanted.shape, name
            assert bool(torch.isfinite(found.float()).all()), f"{name} is not finite"
            both = (found != 0) & (wanted != 0)
            moved, total = moved + int(((found == 0) != (wanted == 0)).sum()), total + wanted.numel()
            difference += float(((found.double() - wanted.double()) * both).square().sum())
            norm += float((wanted.double() * both).square().sum())
        distance = (difference / max(norm, 1e-30)) ** 0.5
        told = f"{moved} of {total} zeros moved, the rest {distance:.1e} apart"
        assert moved <= self.moved * total, told
        assert distance <= self.distance, told
        return told


NEAR = Alike()
ROUNDED = Alike(moved=0.02, distance=0.02)
"""Tolerance for 16-bit weights, or if rounded values decide later steps."""


def pruned(device: str, family: str, changes: Mapping[str, Any], **settings: Any) -> Any:
    """Prune a pico model on the device; return the result."""
    prune: Any = coprune.prune
    dtype = settings.pop("model_dtype", torch.float32)
    model = torch.nn.Module.to(pico_model(family, dtype=dtype, **changes), device)
    return prune(model, **{**SETTINGS, **settings})


def pruned_alike(
    family: str, method: str, alike: Alike = NEAR, *, changes: Mapping[str, Any] | None = None, **settings: Any
) -> Callable[[Path], str]:
    """Return a case that prunes a pico model on both devices and compares weights and reports."""
    few = {"n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers": 2} | dict(changes or {})

    def run(folder: Path) -> str:
        cpu, device = (pruned(name, family, few, method=method, **settings) for name in ("cpu", NAME))
        assert next(device.model.parameters()).device.type == NAME
        for wanted, found in zip(cpu.report.matrices, device.report.matrices, strict=True):
            assert (wanted.name, wanted.sparsity) == (found.name, found.sparsity)
            if wanted.relative_layer_error is not None:
                assert abs(found.relative_layer_error - wanted.relative_layer_error) < 0.02, wanted.name
        told = alike.compare(cpu.model.state_dict(), device.model.state_dict())
        if told.startswith("0 of"):
            checksums = [[matrix.mask_checksum for matrix in result.report.matrices] for result in (cpu, device)]
            assert checksums[0] == checksums[1], "other checksums of the same masks"
        return told

    return run
