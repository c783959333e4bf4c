"""The demonstration: a real model, real text, one method, what it did; no network but for the packages."""

from __future__ import annotations

from coprune.base.progress import Reporter
from coprune.recipe.recipe import make_recipe
from coprune.report.summary import summary_lines
from coprune.run.stages import run_recipe

_PROMPT = "The city of Paris is"


def run_demo(nsamples: int, reporter: Reporter) -> list[str]:
    """Prune SmolLM2-135M to 50 % with Wanda in memory and return the lines to print."""
    recipe = make_recipe(
        {
            "model": {"name": "smollm2-135m", "stream": False},
            "calibration": {"data": "embedded", "samples": nsamples, "seqlen": 512},
            "evaluation": {"tokens": 32 * 512, "prompt": _PROMPT},
        }
    )
    report = run_recipe(recipe, reporter=reporter, write=False).report
    assert report.sample is not None
    return [
        *summary_lines(report),
        "",
        "The model's weights come from a 4-bit file and were dequantised before pruning.",
        f"dense:  {_PROMPT} {report.sample.dense}",
        f"pruned: {_PROMPT} {report.sample.pruned}",
    ]
