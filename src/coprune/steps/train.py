"""The training of what a run pruned, from the folder of the pruned model: its settings, its checks, the report of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from coprune.base.devices import DeviceMemory, device_memory
from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.processes import Processes
from coprune.base.progress import Reporter
from coprune.base.words import Set, Together
from coprune.data.mixture import reads_conversations
from coprune.evaluation.answers.facts import judge
from coprune.evaluation.required import judge_measured
from coprune.model.bare_configuration import Imagined
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.locate import GgufFile, Location, holds_weights, locate
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from coprune.model.room import room_on
from coprune.model.walk.activations import GIB
from coprune.recipe.outcome import OutputPart
from coprune.recipe.parts import CalibratePart, ModelPart, PrunePart
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.recipe.sources import split_sources
from coprune.recipe.train import LEARNING_RATES, TrainPart, has_adapters, has_teacher
from coprune.report.card import write_card
from coprune.report.figures import FinetunedFacts
from coprune.report.folder import RECIPE_FILE, announce, finish_run_folder
from coprune.report.schema import Report
from coprune.training.footprint import training_bytes
from coprune.training.report import REPORT_FILE as FINETUNE_FILE
from coprune.training.report import FinetuneReport


def check_training(recipe: Recipe, in_memory: bool) -> None:
    """Check how a model is trained that is to be pruned before.

    Args:
        recipe: of both.
        in_memory: whether the model was handed over, so that its name need not lead to files.

    Raises:
        BadInput: the settings contradict each other, there is no teacher, or the training could never fit.
    """
    settings = training_of(recipe)
    if in_memory:
        _require_teacher(recipe)
    else:
        _require_room(recipe, settings)


def train_pruned(recipe: Recipe, pruned: Report, reporter: Reporter, processes: Processes) -> Report:
    """Fine-tune what a pruning saved to `pruned/` in the run folder, to the folder for the model (or `finetune/model/`).

    Args:
        recipe: of both.
        pruned: the report of the pruning.
        reporter: who hears of it.
        processes: this one among those of the run.

    Returns:
        The report of the run, which speaks of the fine-tuned model; that of the fine-tuning alone is
        `finetune/finetune.json`. Raises as `run_finetuning`.
    """
    from coprune.training.run import run_finetuning  # needs an extra, and takes seconds to import

    settings = training_of(recipe).replaced(**_measured_alike(pruned))
    if processes.first:
        write_text(recipe.run_folder / RECIPE_FILE, recipe.untold().to_yaml())
    before = processes.from_first(lambda: _finetuned_before(settings))
    found = run_finetuning(settings, reporter, after_pruning=True) if before is None else before
    final = _of_both(pruned, recipe, found)
    if processes.first:
        if found.saved_model is not None:
            write_card(final, found.saved_model)
        announce(recipe, final)
        finish_run_folder(recipe, final)
        for line in str(found).splitlines():
            reporter.say(line)
    return final


def _measured_alike(report: Report) -> dict[str, Any]:
    """Return the settings with which the fine-tuned model is measured on the same windows as the pruned one."""
    found: dict[str, Any] = {}
    if report.bos is not None and report.bos.used != "as given":
        found["bos"] = report.bos.used  # as the dense model spoke for
    if report.perplexity and report.model.task in ("text", "masked"):
        found["finetune_eval_seqlen"] = report.perplexity[0].seqlen
    return found


def _of_both(report: Report, recipe: Recipe, found: FinetuneReport) -> Report:
    """Return the report of the pruning with the result of the fine-tuning."""
    facts = FinetunedFacts(
        mode=str(found.settings.train.mode),
        steps=found.steps,
        minutes=found.seconds / 60,
        perplexity={one.data: one.after for one in found.perplexity},
        top1={one.data: one.after_top1 for one in found.accuracy},
        near={
            **{one.data: one.after.headline() for one in found.embeddings},
            **{one.data: one.error() for one in found.transcripts},
        },
    )
    answers = found.answers
    if answers is not None and answers.reference == "before":
        answers = answers.beside(report.answers)
    update = {"recipe": recipe, "finetuned": facts, "saved_model": found.saved_model, "answers": answers}
    asked = recipe.evaluate.answers
    dense = {(one.name, one.data): one.dense for one in report.figures()}
    figures = [one._replace(dense=one.dense or dense.get((one.name, one.data))) for one in found.figures()]
    required = judge(asked.conditions, found.answers) + judge_measured(asked.measured, figures)
    return report.model_copy(update=update | {"no_answers": found.no_answers, "required": required})


def _require_teacher(recipe: Recipe) -> None:
    """Refuse a distillation from a model that is in memory alone, where pruning changes it."""
    if not has_teacher(recipe.train.mode):
        return
    try:
        locate(recipe.model.name, recipe.model.cache_dir)
    except BadInput:
        raise BadInput(
            f"distillation loads the dense model again, but {recipe.model.name} is only in memory",
            field="finetune",
            value=recipe.train.mode,
            fix=("name the model's folder, or use ", Set("finetune", "dense")),
        ) from None


def _require_room(recipe: Recipe, settings: Recipe) -> None:
    """Refuse a training that could never fit, before anything is pruned; of what parts are removed from, less is trained."""
    from coprune.training.session import require_trainable
    from coprune.training.trainer import training_device

    where = locate(recipe.model.name, recipe.model.cache_dir)
    try:
        require_trainable(where, recipe.train.mode)
    except BadInput as error:
        raise error.renamed({"mode": "finetune"}) from None
    if has_adapters(recipe.train.mode) or recipe.remove.parts or not recipe.model.check_memory:
        return
    distills = has_teacher(recipe.train.mode)
    require_room_to_train(where, settings.train.scope, distills, training_device(settings.model.device))


def _finetuned_before(settings: Recipe) -> FinetuneReport | None:
    """Return the report of an earlier run's fine-tuning, or None."""
    from coprune.training.resume import gives_as
    from coprune.training.run import in_precision_of_the_device

    try:
        report = FinetuneReport.model_validate_json(
            (settings.training_folder / FINETUNE_FILE).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None
    return report if gives_as(report, in_precision_of_the_device(settings)) else None


def pruning_of(recipe: Recipe) -> Recipe:
    """Return the recipe of the pruning alone."""
    pruned = recipe.run_folder / "pruned"
    untrained = recipe.model_copy(update={"train": TrainPart()})
    return untrained.replaced(save_model=pruned, generate=None, require=None, push_to_hub=None, private=None)


def training_of(recipe: Recipe) -> Recipe:
    """Return the recipe of the training alone: the same data, seed, measurements and device, for the pruned model."""
    # A default dataset stays unset, since it depends on the model.
    # Of several the largest that is text as it stands: a training reads one.
    sources = split_sources(recipe.calibrate.data)
    plain = [source for source in sources if source.is_text and not reads_conversations(source)]
    named = "data" in recipe.calibrate.model_fields_set and plain
    data: dict[str, Any] = {"data": max(plain, key=lambda source: source.share).name} if named else {}
    asked, answers = recipe.calibrate, recipe.evaluate.answers
    # Only for requested answers, since the dense model has to be loaded again.
    compares = answers.prompts is not None or any(condition.needs_dense for condition in answers.conditions)
    train = recipe.train.model_copy(
        update={
            "teacher": (recipe.train.teacher or recipe.model.name)
            if compares or has_teacher(recipe.train.mode)
            else None,
        }
    )
    pruned, own = recipe.run_folder / "pruned", recipe.run_folder / "finetune"
    return make_recipe(
        {
            "model": ModelPart(name=str(pruned), device=recipe.model.device, cache_dir=recipe.model.cache_dir),
            "prune": PrunePart(exclude=recipe.prune.exclude),
            "calibrate": CalibratePart(seqlen=asked.seqlen, seed=asked.seed, bos=asked.bos, **data),
            "train": train,
            "evaluate": recipe.evaluate,
            "output": OutputPart(run=own, model=recipe.output.model, report_to=recipe.output.report_to),
        }
    )


def require_room_to_train(
    location: Location,
    scope: str,
    distills: bool,
    device: torch.device,
    memory: Callable[[torch.device], DeviceMemory | None] = device_memory,
) -> None:
    """Raise BadInput if a model's weights could not all be trained in the memory of a device.

    Activations are not counted, so a training that passes may still not fit.

    Args:
        location: the model that is to be pruned and then trained, and the teacher of a distillation.
        scope: what is trained, as the settings of a fine-tuning name it. No model is loaded yet: numbers in names tell what
            is in a block.
        distills: whether the dense model lies beside the trained one.
        device: where both go.
        memory: reads a device's memory.
    """
    sizes, stored = _sizes(location)
    needed = training_bytes(sizes, scope) + (stored if distills else 0)
    available, where = room_on(device, memory)
    if available is None or needed <= available:
        return
    what = "all weights" if scope == "all" else f"the {scope}"
    raise BadInput(
        f"training {what} of {location.name} takes {needed / GIB:.1f} GiB {where} at least, and "
        f"{available / GIB:.1f} are there",
        field="finetune",
        fix=(
            "use ",
            Together((Set("preset", "best"), Set("train", "blocks"))),
            " or ",
            Together(
                (
                    Set("finetune", "lora-distill"),
                    Set("finetune_lr", LEARNING_RATES["lora-distill"]),
                    Set("finetune_rates", "absolute"),
                )
            )
            if distills
            else Set("finetune", "lora"),
            ", or skip this check with ",
            Set("check_memory", False),
        ),
    )


def _sizes(location: Location) -> tuple[list[tuple[str, int]], int]:
    """Return the number of weights of each tensor of a model, and the bytes of all once loaded."""
    if isinstance(location, GgufFile):
        sizes = [(t.name, int(t.n_elements)) for t in gguf_reader(location.path, field="model").tensors]
        return sizes, 4 * sum(size for _, size in sizes)  # decoded to float32
    if not holds_weights(location):
        imagined = Imagined(location, "auto", torch.device("cpu"))
        return [(name, one.numel()) for name, one in imagined.model.named_parameters()], imagined.total_bytes
    entries = checkpoint_entries(location.path)
    return [(name, math.prod(e.shape)) for name, e in entries.items()], sum(e.nbytes for e in entries.values())
