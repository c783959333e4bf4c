"""Cases: removing channels, heads, blocks and experts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from support.saved import tensors_of
from support.simdevice import NAME
from support.simdevice.cases.case import ROUNDED, Case, pruned


def removed(family: str, remove: str, **settings: Any) -> Callable[[Path], str]:
    """Return a case that removes parts on both devices and compares the saved models."""

    def run(folder: Path) -> str:
        found = {}
        for device in ("cpu", NAME):
            pruned(device, family, {}, remove=remove, save_model=folder / device, align=16, **settings)
            found[device] = tensors_of(folder / device)
        return ROUNDED.compare(found["cpu"], found[NAME])

    return run


def removals() -> tuple[Case, ...]:
    """Return the cases of each kind of part, even and uneven, without and with compensation."""
    always = [
        Case(
            "llama channels, heads and blocks, mended",
            removed("llama", "channels=0.4,heads=0.5,blocks=0.34", reconstruct=2),
            True,
        ),
        Case("olmoe experts", removed("olmoe", "experts=0.25")),
    ]
    scores = [
        Case(f"llama {remove} by {score}", removed("llama", remove, score=score))
        for remove, score in (("blocks=0.34", "influence"), ("channels=0.4", "magnitude"), ("heads=0.5", "wanda_sp"))
    ]
    parts = [
        Case(f"{family} {remove}", removed(family, remove))
        for family, remove in product(("gpt2", "mixtral", "gpt_oss", "deepseek_v3"), ("channels=0.4", "blocks=0.34"))
    ]
    more = [
        Case("mixtral experts and channels", removed("mixtral", "experts=0.25,channels=0.4")),
        Case("llama uneven by error", removed("llama", "channels=0.33", allocation="error")),
        Case("llama with zeros on top", removed("llama", "channels=0.4", method="wanda", sparsity=0.5)),
    ]
    return (*always, *scores, *parts, *more)
