"""Prune large language models after training, measure the effect, and save a checkpoint that others can load.

`__all__` lists the public API. It is loaded on first use, so that `import coprune` and the command's `--help` do not wait
for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from coprune.base.environment import require_posix

if TYPE_CHECKING:
    from coprune.base.errors import (
        BadInput,
        BrokenMask,
        CopruneError,
        LostProcess,
        NumericalError,
        OutOfMemory,
        UnsupportedModel,
        VerificationError,
    )
    from coprune.evaluation.comparison_table import Comparison
    from coprune.evaluation.evaluate_call import evaluate
    from coprune.evaluation.evaluation import Evaluation
    from coprune.evaluation.perplexity import perplexity
    from coprune.fitting.fit_call import fit
    from coprune.fitting.fit_result import Fitted
    from coprune.pruning.methods import register_method
    from coprune.recipe.recipe import Recipe
    from coprune.report.hub_upload import push
    from coprune.report.schema import Report
    from coprune.run.memory_estimate import Estimate
    from coprune.run.result import Result
    from coprune.runner.prune_call import estimate, prune
    from coprune.runner.run_recipe import run_recipe
    from coprune.steps.export import Gguf, export
    from coprune.steps.inspect import Inspection, inspect
    from coprune.steps.write_text import generate
    from coprune.sweeps.generation_speed import Bench, bench
    from coprune.sweeps.model_comparison import compare
    from coprune.sweeps.sweep_call import sweep
    from coprune.sweeps.sweep_result import SweepResult
    from coprune.training.adapter_merge import Merged, merge
    from coprune.training.finetune_call import finetune
    from coprune.training.finetune_report import FinetuneReport
    from coprune.training.keep_zeros import keep_zeros

    __version__: str

_HOME = {
    "BadInput": "coprune.base.errors",
    "Bench": "coprune.sweeps.generation_speed",
    "BrokenMask": "coprune.base.errors",
    "Comparison": "coprune.evaluation.comparison_table",
    "CopruneError": "coprune.base.errors",
    "Estimate": "coprune.run.memory_estimate",
    "Evaluation": "coprune.evaluation.evaluation",
    "FinetuneReport": "coprune.training.finetune_report",
    "Fitted": "coprune.fitting.fit_result",
    "Gguf": "coprune.steps.export",
    "Inspection": "coprune.steps.inspect",
    "LostProcess": "coprune.base.errors",
    "OutOfMemory": "coprune.base.errors",
    "Merged": "coprune.training.adapter_merge",
    "NumericalError": "coprune.base.errors",
    "Recipe": "coprune.recipe.recipe",
    "Report": "coprune.report.schema",
    "Result": "coprune.run.result",
    "SweepResult": "coprune.sweeps.sweep_result",
    "UnsupportedModel": "coprune.base.errors",
    "VerificationError": "coprune.base.errors",
    "bench": "coprune.sweeps.generation_speed",
    "compare": "coprune.sweeps.model_comparison",
    "estimate": "coprune.runner.prune_call",
    "evaluate": "coprune.evaluation.evaluate_call",
    "export": "coprune.steps.export",
    "finetune": "coprune.training.finetune_call",
    "fit": "coprune.fitting.fit_call",
    "generate": "coprune.steps.write_text",
    "inspect": "coprune.steps.inspect",
    "keep_zeros": "coprune.training.keep_zeros",
    "merge": "coprune.training.adapter_merge",
    "perplexity": "coprune.evaluation.perplexity",
    "prune": "coprune.runner.prune_call",
    "push": "coprune.report.hub_upload",
    "register_method": "coprune.pruning.methods",
    "run_recipe": "coprune.runner.run_recipe",
    "sweep": "coprune.sweeps.sweep_call",
}

__all__ = [
    "BadInput",
    "Bench",
    "BrokenMask",
    "Comparison",
    "CopruneError",
    "Estimate",
    "Evaluation",
    "FinetuneReport",
    "Fitted",
    "Gguf",
    "Inspection",
    "LostProcess",
    "Merged",
    "NumericalError",
    "OutOfMemory",
    "Recipe",
    "Report",
    "Result",
    "SweepResult",
    "UnsupportedModel",
    "VerificationError",
    "bench",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "finetune",
    "fit",
    "generate",
    "inspect",
    "keep_zeros",
    "merge",
    "perplexity",
    "prune",
    "push",
    "register_method",
    "run_recipe",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("coprune")
    if name not in _HOME:
        raise AttributeError(f"module 'coprune' has no attribute {name!r}")
    require_posix()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
