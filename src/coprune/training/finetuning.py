"""Run a fine-tuning: load the model, find the masks, measure, train, measure again, save."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.files import full_disk_explained
from coprune.base.memory import freed_memory_kept
from coprune.base.precision import SLOW_IN_BFLOAT16, multiplies_bfloat16
from coprune.base.processes import started_processes
from coprune.base.progress import Reporter
from coprune.evaluation.answers.questions import plan_of
from coprune.evaluation.answers.run_answers import Look
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import named, task_for
from coprune.evaluation.tasks.embedding_task import PassageVectors
from coprune.evaluation.transcripts import TranscriptChange
from coprune.model.blocks import by_list, find_blocks
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import READ_TEXT, dtype_name, load_model, task_at, task_of
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.weights import InMemory
from coprune.model.loaded_model import Loaded, open_model
from coprune.recipe.parts import ModelPart
from coprune.recipe.recipe import Recipe
from coprune.recipe.train_part import has_adapters, has_teacher
from coprune.report.provenance import MadeFacts
from coprune.report.schema import installed_versions
from coprune.training.adapters import plain_warning, save_adapter, without_adapters
from coprune.training.distill import Distillation
from coprune.training.finetune_card import adapter_card, finetune_card
from coprune.training.finetune_report import (
    AccuracyChange,
    Change,
    EmbeddingsChange,
    FinetuneReport,
    PerplexityChange,
    change,
    curves,
)
from coprune.training.resume import (
    beside_others,
    finish_announced,
    finish_run_folder,
    output_of,
    resume_from,
)
from coprune.training.saving import round_to, save_model
from coprune.training.session import Session, prepare_session
from coprune.training.time_limit import TimeLimit
from coprune.training.trainer import ZeroKeepingTrainer, build_trainer, train, training_device
from coprune.training.training_events import TrainingPhase, TrainingPhaseDone


def run_finetuning(
    settings: Recipe, reporter: Reporter | None = None, *, began: float | None = None, after_pruning: bool = False
) -> FinetuneReport:
    """Fine-tune a pruned model so that every zero stays zero, and save the result with its curves.

    Resumes an interrupted run with the same settings, model and data. Under torchrun or accelerate every process calls this.

    Args:
        settings: of the training.
        reporter: receives progress; by default it prints to standard error.
        began: start of the time limit by `time.monotonic`; by default now.
        after_pruning: whether the model was pruned in the same run.

    Returns:
        The report of the training.

    Raises:
        BadInput: the request cannot be fulfilled.
        BrokenMask, NumericalError, VerificationError: as in `coprune.finetune`.
    """
    minutes = settings.train.minutes
    limit = TimeLimit(None if minutes is None else 60 * minutes, began or time.monotonic(), after_pruning)
    if not after_pruning:
        settings = with_a_text(settings)
    processes = started_processes()
    first = processes.first
    reporter = (reporter or Reporter()) if first else Reporter(quiet=True)
    asked, settings = settings, in_precision_of_the_device(settings)
    if asked.train.dtype != settings.train.dtype:
        reporter.say(f"{SLOW_IN_BFLOAT16} This training therefore computes in float32.")
    settings, said = beside_others(settings)
    if said is not None:
        reporter.say(said)
    output = output_of(settings)
    if processes.size == 1 and (report := finish_announced(settings)) is not None:
        return report
    if first:
        output.prepare()
    with output.claimed() if first else nullcontext(), reporter.libraries():
        return _run(settings, reporter, first, limit)


def with_a_text(settings: Recipe) -> Recipe:
    """Return the settings with the embedded text, which needs no network, if the model reads text and none is named."""
    if "data" in settings.calibrate.model_fields_set:
        return settings
    reads_text = task_at(locate(settings.model.name, settings.model.cache_dir)) in (*READ_TEXT, "labels")
    return settings.replaced(dataset="embedded") if reads_text else settings


def in_precision_of_the_device(settings: Recipe) -> Recipe:
    """Return the settings with float32 if they ask for bfloat16 and it is slow on the device."""
    if settings.train.dtype != "bfloat16" or multiplies_bfloat16(training_device(settings.model.device)):
        return settings
    return settings.replaced(finetune_dtype="float32")


def _run(settings: Recipe, reporter: Reporter, first: bool, limit: TimeLimit) -> FinetuneReport:
    began = time.monotonic()
    joined = dist.is_initialized()  # then the caller keeps using the process group
    session = prepare_session(settings, reporter, limit, training_device(settings.model.device))
    if first and settings.output.overwrite:
        output_of(settings).replace_earlier()
    resume = resume_from(session, first)
    early = replace(session, reporter=limit.before_training(reporter, settings))
    # New adapters change nothing, and a masked one's update is computed at every call.
    untrained = session.model.disable_adapter() if isinstance(session.model, PeftModel) else nullcontext()
    with limit.before_and_after(), untrained:
        before = _measure(early, "pruned") if first else {}
        look = look_before(early, limit) if first else Look(None)
    limit.repeated += look.spared
    objective = distillation_of(early, limit)
    dense = _measure_teacher(early, objective) if first else {}
    session.data, seconds = limit.planned(session.data, settings, resume is not None, reporter)
    began = _end_phase(TrainingPhase.PREPARE, began, reporter)
    with reporter.bar(f"Fine-tuning ({settings.train.mode})", 1.0) as advance:
        trainer = build_trainer(session, objective, seconds, advance)
        cached = getattr(session.model.config, "use_cache", None)
        with full_disk_explained(session.training_folder), freed_memory_kept():
            train(trainer, resume)
        began = _end_phase(TrainingPhase.TRAIN, began, reporter)
        if cached is not None:
            session.model.config.use_cache = cached
        _release(session.model, trainer)
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    if first:
        report = _finish(session, trainer, (before, dense, look), trained, limit)
    else:
        report = _report(session, trainer, [], trained, None, None)
    accelerator: Any = trainer.accelerator
    accelerator.wait_for_everyone()
    if not joined:
        accelerator.end_training()
    _end_phase(TrainingPhase.FINISH, began, reporter)
    return report


def _end_phase(phase: TrainingPhase, began: float, reporter: Reporter) -> float:
    """Report the seconds of a phase, and return the start of the next one by `time.monotonic`."""
    ended = time.monotonic()
    reporter.tell(TrainingPhaseDone(phase, ended - began))
    return ended


def _release(model: PreTrainedModel | PeftModel, trainer: ZeroKeepingTrainer) -> None:
    """Remove the training's wrappers of a model's forward, so that it computes like the saved model."""
    accelerator: Any = trainer.accelerator
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)


def _measure(session: Session, which: str) -> dict[str, Measured]:
    """Measure the current model, adapters included, on all evaluation data."""
    found: dict[str, Measured] = {}
    model: Any = session.model
    torch.nn.Module.to(model, training_device(session.settings.model.device))
    metric = session.task.metric
    for name, data in session.evaluation.items():
        with session.reporter.bar(f"{metric.name}, {which} model", 1) as advance:
            measured = metric.measure(data, advance)
        found[name] = named(measured, name, data)
        session.reporter.say(found[name].of_model(which))
    return found


def _measure_teacher(session: Session, objective: Distillation | None) -> dict[str, Measured]:
    """Embed the evaluation data with the dense model, for comparison; empty for models that do not embed."""
    text = session.task.inputs.text
    if session.loaded.task != "embeddings" or text is None or objective is None or not session.evaluation:
        return {}
    assert isinstance(objective.teacher, PreTrainedModel)
    dense = replace(session.loaded, weights=InMemory(objective.teacher))
    length = session.settings.replaced(seqlen=text.seqlen)
    return _measure(replace(session, task=task_for(length, dense), model=objective.teacher), "dense")


def _finish(
    session: Session,
    trainer: ZeroKeepingTrainer,
    seen: tuple[dict[str, Measured], dict[str, Measured], Look],
    trained: int,
    limit: TimeLimit,
) -> FinetuneReport:
    """Measure, merge, verify and save; the resumable states are removed last.

    seen: measurements of the model before training and of the dense one, and answers.
    """
    settings, (before, dense, look) = session.settings, seen
    model: Any = session.model
    adapts = has_adapters(settings.train.mode)
    if not adapts:
        round_to(model, session.dtype)
    elif settings.train.adapters.masked:
        model.merge_adapter()
    after = _measure(session, "fine-tuned")
    look.ask(session.loaded.model, session.loaded, limit.of_answers(session.reporter, settings.evaluate.answers))
    changes = [change(before[name], after[name], dense.get(name)) for name in session.evaluation]
    folder = None if adapts and not settings.train.adapters.masked else settings.trained_folder
    adapter = settings.training_folder / "adapter" if adapts else None
    draft = _report(session, trainer, changes, trained, adapter, folder).answered(look.facts(), look.left_out)
    if adapter is not None:
        shutil.rmtree(adapter, ignore_errors=True)  # left by an earlier attempt without a report
        save_adapter(model, adapter, adapter_card(draft, plain_warning(session.masks)))
    if folder is not None:
        output_of(settings).announce(draft)
        merged = without_adapters(model, session.masks) if isinstance(model, PeftModel) else model
        probe = session.task.inputs.probe(None, session.evaluation)
        processor, dtype = session.loaded.processor, dtype_name(session.dtype)
        beside = Companions(processor, dtype, settings.model.name, session.location)
        save_model(merged, session.masks, beside, finetune_card(draft), folder, probe)
    report = draft.model_copy(update={"sparsity_after": _sparsity_now(session)})
    finish_run_folder(report)
    return report


def _report(
    session: Session,
    trainer: ZeroKeepingTrainer,
    changes: list[Change],
    trained: int,
    adapter: Path | None,
    folder: Path | None,
) -> FinetuneReport:
    curve, held_out = curves(trainer.state.log_history)
    return FinetuneReport(
        settings=session.settings,
        source=session.data.source,
        windows=len(session.data.train),
        block_size=session.block_size,
        fingerprint=session.data.fingerprint,
        processes=trainer.args.world_size,
        trained_parameters=trained,
        pruned_matrices=len(session.masks.matrices),
        patterns=session.masks.patterns,
        sparsity_before=session.masks.sparsity,
        sparsity_after=_sparsity_now(session),
        masks=session.masks.fingerprint(),
        steps=trainer.state.global_step,
        seconds=curve[-1].seconds if curve else 0.0,
        curve=curve,
        held_out=held_out,
        perplexity=[found for found in changes if isinstance(found, PerplexityChange)],
        accuracy=[found for found in changes if isinstance(found, AccuracyChange)],
        embeddings=[found for found in changes if isinstance(found, EmbeddingsChange)],
        transcripts=[found for found in changes if isinstance(found, TranscriptChange)],
        unit=session.data.unit,
        adapter=adapter,
        saved_model=folder,
        removed=session.history.removed,
        versions=installed_versions(),
        made=MadeFacts.here(),
    )


def _sparsity_now(session: Session) -> float:
    sizes = sum(entry.matrix.shape[0] * entry.matrix.shape[1] for entry in session.masks.matrices)
    return sum(entry.matrix.zeros() for entry in session.masks.matrices) / max(sizes, 1)


def look_before(session: Session, limit: TimeLimit) -> Look:
    """Generate reference answers, with the model before its fine-tuning or with the dense model.

    Raises:
        BadInput: the requested answers are not possible, or the dense model has other tokens.
    """
    settings, reporter = session.settings, session.reporter
    plan = plan_of(settings.evaluate.answers, saves=True)
    device = training_device(settings.model.device)
    # In distillation only for requested answers, since the dense model has to be loaded again.
    asked = settings.evaluate.answers
    name = settings.train.teacher if asked.compares or not has_teacher(settings.train.mode) else None
    if plan is None or name is None:
        own: dict[str, Any] = {"device": str(device)}
        if session.loaded.model.dtype != session.dtype:  # all weights are trained, in float32
            own["dtype"] = dtype_name(session.loaded.model.dtype)
        look = Look(plan, settings.model.model_copy(update=own), "before")
        look.prepare(session.loaded, reporter)
        torch.nn.Module.to(session.loaded.model, device)
        look.ask_dense(session.loaded, limit.of_answers(reporter, asked))
        return look
    part = ModelPart(name=name, device=str(device), cache_dir=settings.model.cache_dir)
    look = Look(plan, part)
    look.prepare(session.loaded, reporter)
    if look.looks:
        reporter.say(f"Loading the dense model {name}")
        dense = open_model(part, stream=False)
        _require_same_tokens(session, dense)
        # The prompts were tokenised with the model's own tokenizer.
        dense = Loaded(InMemory(dense.model), session.loaded.processor, dense.source, dense.quantised_source)
        look.ask_dense(dense, reporter)
        look.keep_rows(dense)
    return look


def _require_same_tokens(session: Session, dense: Loaded) -> None:
    mine, other = (loaded.model.config.get_text_config().vocab_size for loaded in (session.loaded, dense))
    if mine != other:
        raise BadInput(
            f"the models have {other} and {mine} tokens in their vocabularies, so their answers cannot be compared",
            field="teacher",
            value=session.settings.train.teacher,
            fix="give the dense model that was pruned",
        )


_OF_TOKENS, _OF_CLASSES = 1.0, 2.0
"""Temperatures for comparing distributions over tokens and over classes."""


def distillation_of(session: Session, limit: TimeLimit) -> Distillation | None:
    """Return the distillation loss with its teacher in memory; None in modes without a teacher."""
    settings = session.settings
    if not has_teacher(settings.train.mode):
        return None
    assert settings.train.teacher is not None
    session.reporter.say(f"Loading the teacher {settings.train.teacher}: about {limit.loading:.0f} s, as for the model")
    with session.reporter.bar("Loading the teacher", 1.0):
        teacher, _ = load_model(locate(settings.train.teacher, settings.model.cache_dir), "auto")
    _require_same_outputs(session.loaded.model, teacher)
    device = training_device(settings.model.device)
    torch.nn.Module.to(teacher, device)
    if settings.train.dtype == "bfloat16":
        _in_bfloat16(teacher, device)
    if session.block_size is None:
        return Distillation(teacher, _OF_CLASSES, hidden=False)
    counterparts = _counterparts(session, teacher)
    metric = session.task.metric
    temperature = _OF_CLASSES if session.loaded.task == "labels" else _OF_TOKENS
    pooled = metric.pooling.of_hidden if isinstance(metric, PassageVectors) else None
    return Distillation(teacher, temperature, counterparts is not None, counterparts or [], pooled)


def _in_bfloat16(teacher: PreTrainedModel, device: torch.device) -> None:
    """Make a teacher compute in bfloat16 like the student, whatever dtype its weights have."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.Linear):
            # Converted once, where autocast would do it for every batch; a tied embedding keeps the original weight.
            module.weight = torch.nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    teacher.forward = torch.autocast(device.type, torch.bfloat16)(teacher.forward)


def _counterparts(session: Session, teacher: PreTrainedModel) -> list[list[int]] | None:
    """Return the index of the teacher's hidden state for each block, by list; None, with a message, if they do not match."""
    mine, found = session.loaded.model, list[list[int]]()
    lists = [by_list(find_blocks(model)) for model in (mine, teacher)]
    for own, theirs in zip(*lists, strict=False):
        path = f"{own[0].name.rpartition('.')[0]}." if len(lists[0]) > 1 else ""
        known = session.history.counterparts(len(own), len(theirs), path)
        found += [] if known is None else [known]
    alike = mine.config.get_text_config().hidden_size == teacher.config.get_text_config().hidden_size
    if alike and len(found) == len(lists[0]) == len(lists[1]):
        return found
    session.reporter.say("Hidden states are not compared, since they do not match the teacher's.")
    return None


def _require_same_outputs(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    mine, dense = (_outputs(m) for m in (model, teacher))
    if mine != dense:
        raise BadInput(
            f"the teacher has a {dense} and the model a {mine}",
            field="teacher",
            fix="The teacher has to be the dense model that was pruned, or one with the same tokenizer or classes",
        )


def _outputs(model: PreTrainedModel) -> str:
    task = task_of(model.config, type(model))
    if task in ("images", "labels"):
        return f"head of {model.config.num_labels} classes"
    if task == "embeddings":
        return f"width of {model.config.get_text_config().hidden_size} values"
    return f"vocabulary of {model.config.get_text_config().vocab_size} tokens"
