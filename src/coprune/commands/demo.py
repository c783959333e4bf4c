"""`coprune demo`: a real model, real text, one method, what it did; no network but for the packages."""

from __future__ import annotations

from typing import Annotated

import typer

_PROMPT = "The city of Paris is"


def demo(
    nsamples: Annotated[int, typer.Option(help="Calibration samples of 512 tokens.", min=1)] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Prune SmolLM2-135M to 50 % with Wanda, on text that needs no network, and show what that did."""
    from coprune.run.prune import prune

    report = prune(
        "smollm2-135m",
        dataset="embedded",
        nsamples=nsamples,
        seqlen=512,
        eval_tokens=32 * 512,
        prompt=_PROMPT,
        quiet=quiet,
    ).report
    typer.echo(str(report))
    typer.echo("\nThe model's weights come from a 4-bit file and were dequantised before pruning.")
    if report.sample is not None:
        typer.echo(f"dense:  {_PROMPT} {report.sample.dense}")
        typer.echo(f"pruned: {_PROMPT} {report.sample.pruned}")
