"""One fine-tuning run from settings to report: load, find the masks, measure, train, measure again, save."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from coprune.base.durable import full_disk_explained
from coprune.base.memory import freed_memory_kept
from coprune.base.precision import SLOW_IN_BFLOAT16, multiplies_bfloat16
from coprune.base.processes import started_processes
from coprune.base.progress import Reporter
from coprune.evaluation.answers.look import Look
from coprune.evaluation.measurement import Measured
from coprune.evaluation.tasks import named
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import dtype_name
from coprune.recipe.finetune import has_adapters
from coprune.report.made import MadeFacts
from coprune.report.schema import installed_versions
from coprune.training.adapters import merge, plain_warning, save_adapter
from coprune.training.answers import look_before
from coprune.training.card import adapter_card, finetune_card
from coprune.training.one_device import training_device
from coprune.training.report import (
    AccuracyChange,
    Change,
    FinetuneReport,
    PerplexityChange,
    change,
    curves,
)
from coprune.training.resume import (
    announce,
    beside_others,
    finish_announced,
    finish_run_folder,
    prepare_folders,
    replace_earlier,
    resume_from,
)
from coprune.training.saving import round_to, save_model
from coprune.training.session import Session, prepare_session
from coprune.training.settings import FinetuneSettings
from coprune.training.teacher import distillation_of
from coprune.training.trainer import ZeroKeepingTrainer, build_trainer, train


def run_finetuning(settings: FinetuneSettings, reporter: Reporter | None = None) -> FinetuneReport:
    """Fine-tune a pruned model so that every zero stays zero, and save the result with its curves.

    Goes on where an interrupted run with the same settings, model and data stopped. Under torchrun or accelerate every
    process calls this. Raises BadInput for what cannot be done as asked, BrokenMask, NumericalError, VerificationError.
    """
    processes = started_processes()
    first = processes.first
    reporter = (reporter or Reporter()) if first else Reporter(quiet=True)
    asked, settings = settings, in_precision_of_the_device(settings)
    if asked.bf16 and not settings.bf16:
        reporter.say(f"{SLOW_IN_BFLOAT16} So this training computes in float32.")
    settings, said = beside_others(settings)
    if said is not None:
        reporter.say(said)
    if processes.size == 1 and (report := finish_announced(settings)) is not None:
        return report
    if first:
        prepare_folders(settings)
    with reporter.libraries():
        return _run(settings, reporter, first)


def in_precision_of_the_device(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings without bfloat16 where that is slow, since it is there for speed."""
    if not settings.bf16 or multiplies_bfloat16(training_device(settings.device)):
        return settings
    return settings.model_copy(update={"bf16": False})


def _run(settings: FinetuneSettings, reporter: Reporter, first: bool) -> FinetuneReport:
    session = prepare_session(settings, reporter)
    if first and settings.overwrite:
        replace_earlier(settings)
    resume = resume_from(session, first)
    before = _measure(session, "pruned") if first else {}
    look = look_before(session) if first else Look(None)
    objective = distillation_of(session, first)
    with reporter.bar(f"Fine-tuning ({settings.mode})", 1.0) as advance:
        trainer = build_trainer(session, objective, advance)
        cached = getattr(session.model.config, "use_cache", None)
        with full_disk_explained(session.training_folder), freed_memory_kept():
            train(trainer, resume)
        if cached is not None:
            session.model.config.use_cache = cached
        _release(session.model, trainer)
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    if first:
        report = _finish(session, trainer, (before, look), trained)
    else:
        report = _report(session, trainer, [], trained, None, None)
    accelerator: Any = trainer.accelerator
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def _release(model: PreTrainedModel | PeftModel, trainer: ZeroKeepingTrainer) -> None:
    """Take off what training put around a model's forward, so that it computes as the saved model will."""
    accelerator: Any = trainer.accelerator
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)


def _measure(session: Session, which: str) -> dict[str, Measured]:
    """Perplexity or accuracy of the model as it is now, adapters included, on everything that is measured on."""
    found: dict[str, Measured] = {}
    model: Any = session.model
    torch.nn.Module.to(model, training_device(session.settings.device))
    task = session.task
    for name, data in session.evaluation.items():
        with session.reporter.bar(f"{task.measure_name}, {which} model", 1) as advance:
            measured = task.measure_in_memory(data, advance)
        found[name] = named(measured, name, data)
        session.reporter.say(found[name].of_model(which))
    return found


def _finish(
    session: Session, trainer: ZeroKeepingTrainer, seen: tuple[dict[str, Measured], Look], trained: int
) -> FinetuneReport:
    """Measure, merge, verify and save; what a run resumes from is removed last. seen: what was measured before."""
    settings, (before, look) = session.settings, seen
    adapts = has_adapters(settings.mode)
    if not adapts:
        round_to(session.model, session.dtype)
    after = _measure(session, "fine-tuned")
    look.ask(session.loaded.model, session.loaded, session.reporter)
    changes = [change(before[name], after[name]) for name in session.evaluation]
    folder = None if adapts and not settings.masked else settings.model_folder
    adapter = settings.run_folder / "adapter" if adapts else None
    draft = _report(session, trainer, changes, trained, adapter, folder).answered(look.facts(), look.left_out)
    model: Any = session.model
    if adapter is not None:
        shutil.rmtree(adapter, ignore_errors=True)  # of an earlier try: the report was not written yet
        save_adapter(model, adapter, adapter_card(draft, plain_warning(session.masks)))
    if folder is not None:
        announce(draft, settings.run_folder)
        merged = merge(model, session.masks) if isinstance(model, PeftModel) else model
        probe = session.task.probe(None, session.evaluation)
        processor, dtype = session.loaded.processor, dtype_name(session.dtype)
        beside = Companions(processor, finetune_card(draft), dtype, str(settings.model), session.location)
        save_model(merged, session.masks, beside, folder, probe)
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
        adapter=adapter,
        saved_model=folder,
        removed=session.history.removed,
        versions=installed_versions(),
        made=MadeFacts.here(),
    )


def _sparsity_now(session: Session) -> float:
    sizes = sum(entry.matrix.shape[0] * entry.matrix.shape[1] for entry in session.masks.matrices)
    return sum(entry.matrix.zeros() for entry in session.masks.matrices) / max(sizes, 1)
