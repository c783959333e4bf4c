"""Prune large language models after training, measure what it did, and save a checkpoint that others can load.

The public face is what `__all__` names. It is loaded on first use, so that `import coprune` and the command's
`--help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from coprune.packed.registration import register_with_transformers

if TYPE_CHECKING:
    from coprune.base.errors import (
        BadInput,
        BrokenMask,
        CopruneError,
        LostProcess,
        NumericalError,
        UnsupportedModel,
        VerificationError,
    )
    from coprune.evaluation.comparison import Comparison
    from coprune.evaluation.evaluate import evaluate
    from coprune.evaluation.evaluation import Evaluation
    from coprune.evaluation.perplexity import perplexity
    from coprune.packed.accelerate import accelerate
    from coprune.packed.quantizer import load_packed
    from coprune.pruning.methods import register_method
    from coprune.recipe.recipe import Recipe
    from coprune.report.schema import Report
    from coprune.run.compare import compare
    from coprune.run.estimate.found import Estimate
    from coprune.run.inspect import inspect
    from coprune.run.inspection import Inspection
    from coprune.run.prune import estimate, prune
    from coprune.run.stages import Result, run_recipe

    __version__: str

# After `import coprune`, transformers loads packed folders like any other; this imports neither it nor torch.
register_with_transformers()

_HOME = {
    "accelerate": "coprune.packed.accelerate",
    "load_packed": "coprune.packed.quantizer",
    "BadInput": "coprune.base.errors",
    "BrokenMask": "coprune.base.errors",
    "CopruneError": "coprune.base.errors",
    "LostProcess": "coprune.base.errors",
    "NumericalError": "coprune.base.errors",
    "UnsupportedModel": "coprune.base.errors",
    "VerificationError": "coprune.base.errors",
    "Comparison": "coprune.evaluation.comparison",
    "Evaluation": "coprune.evaluation.evaluation",
    "compare": "coprune.run.compare",
    "evaluate": "coprune.evaluation.evaluate",
    "Recipe": "coprune.recipe.recipe",
    "Report": "coprune.report.schema",
    "Result": "coprune.run.stages",
    "perplexity": "coprune.evaluation.perplexity",
    "Estimate": "coprune.run.estimate.found",
    "Inspection": "coprune.run.inspection",
    "inspect": "coprune.run.inspect",
    "estimate": "coprune.run.prune",
    "prune": "coprune.run.prune",
    "register_method": "coprune.pruning.methods",
    "run_recipe": "coprune.run.stages",
}

__all__ = [
    "BadInput",
    "BrokenMask",
    "Comparison",
    "CopruneError",
    "Estimate",
    "Evaluation",
    "Inspection",
    "LostProcess",
    "NumericalError",
    "Recipe",
    "Report",
    "Result",
    "UnsupportedModel",
    "VerificationError",
    "accelerate",
    "compare",
    "estimate",
    "evaluate",
    "inspect",
    "load_packed",
    "perplexity",
    "prune",
    "register_method",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("coprune")
    if name not in _HOME:
        raise AttributeError(f"module 'coprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
