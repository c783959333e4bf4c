"""Pruning and fine-tuning in one run: the pruned model goes to a folder, and is fine-tuned from there.

So either half can be interrupted and goes on, and the pruned model stays to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable

from coprune.base.errors import BadInput
from coprune.base.files import path_of, write_text
from coprune.base.processes import Processes
from coprune.base.progress import Reporter
from coprune.base.words import Setting
from coprune.model.checkpoint.locate import holds_model
from coprune.recipe.recipe import Recipe
from coprune.report.folder import RECIPE_FILE, REPORT_FILE
from coprune.report.schema import Report
from coprune.training.report import FinetuneReport
from coprune.training.run import run_finetuning
from coprune.training.settings import FinetuneSettings, make_settings


def prune_and_finetune(
    recipe: Recipe, prune: Callable[[Recipe], Report], reporter: Reporter, processes: Processes
) -> Report:
    """Prune, save to `pruned/` in the run folder, and fine-tune to the folder for the model (or `finetune/model/`).

    prune: runs a recipe; processes: this one among those of the run. Returns the report of the pruning; that of the
    fine-tuning is `finetune/finetune.json`. Raises as both do.
    """
    settings = settings_of(recipe)  # first of all, so that a mistake in them does not wait for the pruning
    pruning = pruning_of(recipe)
    done = processes.from_first(lambda: _pruned_before(pruning))
    if done is None:
        report = prune(pruning)
        processes.from_first(lambda: None)  # the first one is still saving what all of them are about to read
    else:
        reporter.say(f"Pruned by an earlier run: {pruning.output.model}")
        report = done
    if report.bos is not None and report.bos.used != "as given":
        # As the dense model spoke for, so that the figures of pruned and fine-tuned model are of the same windows.
        settings = settings.model_copy(update={"bos": report.bos.used})
    if processes.first:
        write_text(path_of(recipe.run_folder, RECIPE_FILE), recipe.untold().to_yaml())
    found: FinetuneReport = run_finetuning(settings, reporter)
    if processes.first:
        for line in str(found).splitlines():
            reporter.say(line)
    return report


def pruning_of(recipe: Recipe) -> Recipe:
    """The recipe of the pruning alone."""
    return recipe.replaced(finetune=None, finetune_minutes=None, save_model=recipe.run_folder / "pruned")


def settings_of(recipe: Recipe) -> FinetuneSettings:
    """The settings of the fine-tuning: data, length, seed, evaluation and device of the pruning."""
    # A dataset that nobody named stays so, since it depends on the model what that means.
    data = {"dataset": recipe.calibration.data} if "data" in recipe.calibration.model_fields_set else {}
    return make_settings(
        data
        | {
            "model": str(recipe.run_folder / "pruned"),
            "mode": recipe.finetune.mode,
            "teacher": recipe.model.name if recipe.finetune.mode == "distill" else None,
            "block_size": recipe.calibration.seqlen,
            "minutes": recipe.finetune.minutes,
            "seed": recipe.calibration.seed,
            "device": recipe.model.device,
            "cache_dir": recipe.model.cache_dir,
            "evaluate": recipe.evaluation.perplexity,
            "eval_data": recipe.evaluation.data,
            "eval_tokens": recipe.evaluation.tokens,
            "bos": recipe.calibration.bos,
            "eval_images": recipe.evaluation.images,
            "report_to": recipe.output.report_to or "none",
            "save": recipe.run_folder / "finetune",
            "save_model": recipe.output.model,
        }
    )


def _pruned_before(pruning: Recipe) -> Report | None:
    """The report of an earlier run of the same recipe, whose model is there; None if there was none."""
    path = pruning.run_folder / REPORT_FILE
    if not path.is_file() or pruning.output.model is None or not holds_model(pruning.output.model):
        return None
    report = Report.read(path)
    if report.recipe != pruning:
        raise BadInput(
            f"{pruning.run_folder} already holds another run",
            field="save",
            fix=("name another folder with ", Setting("save")),
        )
    return report
