"""Decoding from packed and semi-structured weights, beside dense ones."""

from __future__ import annotations

import coprune
from coprune.packed.timing import TRIED
from gpu_sections.models import real, wide
from gpu_sections.section import Asked, Result, head, row


def packed(asked: Asked) -> Result:
    """What `coprune bench` measures of a real model and of wide blocks, both pruned to 2:4 by magnitude."""
    models = {"wide": str(wide(asked)[0])}
    if (found := real(asked)) is not None:
        models["real"] = found.model
    best = []
    for name, model in models.items():
        target = asked.folder / f"halved-{name}"
        coprune.prune(
            model, "magnitude", pattern="2:4", evaluate=False, layer_error=False, save_model=target, quiet=True,
            dtype="bfloat16", device=asked.device,
        )  # fmt: skip
        prompt, tokens, repeats = (4, 2, 2) if asked.tiny else (512, 16, 5)
        measured = coprune.bench(
            target, (1,) if asked.tiny else (1, 16), prompt=prompt, tokens=tokens, repeats=repeats, device=asked.device
        )
        told = str(measured).replace(f"{asked.folder}/", "")
        print(f"```text\n{told}\n```\n", flush=True)
        tell_tried()
        decoding = [row for row in measured.rows if row.phase == "decode"]
        fastest = max(decoding, key=lambda row: row.speedup)
        best.append(f"{name} decodes {fastest.speedup:.2f} × as fast {fastest.form}")
    return True, ", ".join(best)


def tell_tried() -> None:
    """Print which ways were tried for packed products, and where they won."""
    if TRIED:
        head(" way", " weight", "inputs", " won")
        for kind, won in TRIED.items():
            many = f"below {1 << kind.inputs}" if kind.way == "semi-structured" else kind.inputs
            row(kind.way, " × ".join(map(str, kind.shape)), many, "yes" if won else "no")
        print(flush=True)
        TRIED.clear()
