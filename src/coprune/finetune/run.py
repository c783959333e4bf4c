"""One fine-tuning run from settings to report: load, find the masks, measure, train, measure again, save."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.checkpoint.load import load_model
from coprune.checkpoint.locate import locate
from coprune.checkpoint.weights import InMemory
from coprune.data import EvaluationText
from coprune.errors import BadInput
from coprune.evaluate.perplexity import perplexity
from coprune.files import write_text
from coprune.finetune.adapters import add_adapter, choose_targets, merge, plain_warning, save_adapter
from coprune.finetune.distill import Distillation, Objective
from coprune.finetune.masks import Masks, find_masks, plain_parameters, select_parameters
from coprune.finetune.report import REPORT_FILE, BeforeAfter, FinetuneReport, curves, finetune_card
from coprune.finetune.saving import save_model
from coprune.finetune.settings import FinetuneSettings
from coprune.finetune.teacher_cache import TeacherCache
from coprune.finetune.text_windows import TrainingText, read_training_text
from coprune.finetune.trainer import ZeroKeepingTrainer, build_trainer
from coprune.preparation import Loaded, choose_seqlen, read_evaluation
from coprune.progress import Reporter
from coprune.recipe import Recipe, make_recipe
from coprune.report.schema import installed_versions

_IDENTITY = "identity.json"
# Where results go and what is measured afterwards may differ between a run and its resumption.
_FREE = {"save", "save_model", "cache_dir", "evaluate", "eval_data", "eval_tokens", "report_to", "save_every"}


@dataclass
class Session:
    """All that a run has gathered before it trains. `model` has its adapters on, if it gets any."""

    settings: FinetuneSettings
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    """Of the checkpoint, in which the result is saved."""
    masks: Masks
    text: TrainingText
    evaluation: dict[str, EvaluationText]
    block_size: int
    reporter: Reporter

    @property
    def training_folder(self) -> Path:
        """Where the Trainer keeps what a run resumes from; removed when it is over."""
        return self.settings.run_folder / "training"


def finetune(settings: FinetuneSettings, reporter: Reporter | None = None) -> FinetuneReport:
    """Fine-tune a pruned model so that every zero stays zero, and save the result with its curves.

    Goes on where an interrupted run with the same settings, model and text stopped. Under torchrun or accelerate every
    process calls this. Raises BadInput for what cannot be done as asked, BrokenMask, NumericalError, VerificationError.
    """
    first = int(os.environ.get("RANK", "0")) == 0
    reporter = (reporter or Reporter()) if first else Reporter(quiet=True)
    if first:
        _prepare_folders(settings)
    session = prepare_session(settings, reporter)
    resume = _resume_from(session, first)
    before = _perplexities(session, "before") if first else {}
    objective = _objective(session, first)
    with reporter.bar(f"Fine-tuning ({settings.mode})", 1.0) as advance:
        trainer = build_trainer(
            session.model, session.masks, settings, session.text, session.training_folder, objective, advance
        )
        cached = session.model.config.use_cache
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        session.model.config.use_cache = cached
    trained = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    report = _finish(session, trainer, before, trained) if first else _report(session, trainer, [], trained, None, None)
    accelerator: Any = trainer.accelerator
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def prepare_session(settings: FinetuneSettings, reporter: Reporter) -> Session:
    """Check all that can be checked, cheap things first."""
    recipe = _recipe(settings)
    location = locate(settings.model, settings.cache_dir)
    reporter.say(f"Loading {settings.model}")
    model, tokenizer = load_model(location, "auto")
    masks = find_masks(model)
    reporter.say(
        f"{len(masks.matrices)} pruned matrices, {masks.sparsity:.2%} zeros: "
        + ", ".join(f"{count} × {name}" for name, count in masks.patterns.items())
    )
    dtype = model.dtype
    limit = choose_seqlen(model, recipe)
    block_size = settings.block_size or min(1024, limit)
    text = read_training_text(settings, tokenizer, block_size)
    loaded = Loaded(InMemory(model), tokenizer, location.name, False)
    evaluation = read_evaluation(recipe, loaded, block_size, reporter)
    prepared = _make_trainable(model, masks, settings, reporter)
    return Session(settings, prepared, tokenizer, dtype, masks, text, evaluation, block_size, reporter)


def _recipe(settings: FinetuneSettings) -> Recipe:
    """The part of the settings that a pruning run shares, for what it shares with one."""
    names = ("model", "dataset", "cache_dir", "evaluate", "eval_data", "eval_tokens")
    return make_recipe({name: getattr(settings, name) for name in names} | {"seqlen": settings.block_size})


def _make_trainable(
    model: PreTrainedModel, masks: Masks, settings: FinetuneSettings, reporter: Reporter
) -> PreTrainedModel | PeftModel:
    if settings.mode == "lora":
        # Seeded here, since adapters are drawn before the Trainer sets its seed.
        torch.manual_seed(settings.seed)
        targets = choose_targets(masks, settings.train, settings.rank)
        left = len(masks.matrices) - len(targets)
        if left and not settings.train:
            reporter.say(f"{left} pruned matrices are fused experts and get no adapter; they stay as they are.")
        if not settings.masked:
            reporter.say(f"Plain adapters are saved unmerged. {plain_warning(masks)}")
        return add_adapter(
            model, masks, targets, settings.rank, settings.alpha, settings.dropout, masked=settings.masked
        )
    # Small updates would vanish in half precision, so what is trained is float32.
    torch.nn.Module.to(model, dtype=torch.float32)
    for parameter in select_parameters(model, settings.train):
        parameter.requires_grad_(True)
    return model


def _objective(session: Session, first: bool) -> Objective | None:
    """The loss of distillation, with its teacher beside the model or run ahead; None for the text's own loss."""
    settings = session.settings
    if settings.mode != "distill":
        return None
    assert settings.teacher is not None
    session.reporter.say(f"Loading the teacher {settings.teacher}")
    teacher, _ = load_model(locate(settings.teacher, settings.cache_dir), "auto")
    _require_same_vocabulary(session.model, teacher)
    device = _device(settings)
    torch.nn.Module.to(teacher, device)
    weights = (settings.temperature, settings.kl_weight, settings.weight_of_hidden, settings.text_weight)
    if settings.top_k is None:
        return Distillation(teacher, *weights)
    cache = TeacherCache(session.training_folder / "teacher")
    tokens = session.text.train.tokens
    with session.reporter.bar("Running the teacher ahead", len(tokens)) as advance:
        if first:
            cache.fill(teacher, tokens, settings.top_k, settings.temperature, device, advance)
    return Distillation(cache, *weights)


def _require_same_vocabulary(model: PreTrainedModel | PeftModel, teacher: PreTrainedModel) -> None:
    mine, dense = (m.config.get_text_config() for m in (model, teacher))
    if mine.vocab_size != dense.vocab_size:
        raise BadInput(
            f"the teacher has a vocabulary of {dense.vocab_size} tokens and the model one of {mine.vocab_size}; the "
            "teacher has to be the dense model that was pruned, or one with the same tokenizer."
        )


def _device(settings: FinetuneSettings) -> torch.device:
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _perplexities(session: Session, when: str) -> dict[str, float]:
    """Perplexity of the model as it is now, adapters included, on every text."""
    found = {}
    model: Any = session.model
    torch.nn.Module.to(model, _device(session.settings))
    for name, text in session.evaluation.items():
        windows = len(text.tokens) // session.block_size
        with session.reporter.bar(f"Perplexity {when}", windows) as advance:
            found[name] = perplexity(model, text.tokens, session.block_size, None, text.token_bytes, advance).value
        session.reporter.say(f"Perplexity {when} on {name} (sequence length {session.block_size}): {found[name]:.2f}")
    return found


def _finish(session: Session, trainer: ZeroKeepingTrainer, before: dict[str, float], trained: int) -> FinetuneReport:
    """Measure, merge, verify and save; what a run resumes from is removed last."""
    settings = session.settings
    after = _perplexities(session, "after")
    texts = session.evaluation
    changes = [
        BeforeAfter(
            data=name, source=texts[name].source, seqlen=session.block_size, before=before[name], after=after[name]
        )
        for name in texts
    ]
    folder = None if settings.mode == "lora" and not settings.masked else settings.model_folder
    adapter = settings.run_folder / "adapter" if settings.mode == "lora" else None
    draft = _report(session, trainer, changes, trained, adapter, folder)
    model: Any = session.model
    if adapter is not None:
        shutil.rmtree(adapter, ignore_errors=True)  # of an earlier try: the report was not written yet
        save_adapter(model, adapter, finetune_card(draft.model_copy(update={"saved_model": None})))
    if folder is not None:
        merged = merge(model, session.masks) if isinstance(model, PeftModel) else model
        save_model(merged, session.tokenizer, session.masks, session.dtype, folder, finetune_card(draft))
    report = draft.model_copy(update={"sparsity_after": _sparsity_now(session)})
    report.write(settings.run_folder)
    shutil.rmtree(session.training_folder, ignore_errors=True)
    return report


def _report(
    session: Session,
    trainer: ZeroKeepingTrainer,
    changes: list[BeforeAfter],
    trained: int,
    adapter: Path | None,
    folder: Path | None,
) -> FinetuneReport:
    curve, held_out = curves(trainer.state.log_history)
    return FinetuneReport(
        settings=session.settings,
        source=session.text.source,
        windows=len(session.text.train),
        block_size=session.block_size,
        fingerprint=session.text.fingerprint,
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
        perplexity=changes,
        adapter=adapter,
        saved_model=folder,
        versions=installed_versions(),
    )


def _sparsity_now(session: Session) -> float:
    sizes = sum(entry.matrix.shape[0] * entry.matrix.shape[1] for entry in session.masks.matrices)
    return sum(entry.matrix.zeros() for entry in session.masks.matrices) / sizes


def _prepare_folders(settings: FinetuneSettings) -> None:
    """Refuse to write where something is already; a run folder without a report is an unfinished run's."""
    folder = settings.run_folder
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; name another run folder with --save.")
    if (folder / REPORT_FILE).exists():
        raise BadInput(f"{folder} already holds a finished run; name another folder with --save, or remove it.")
    target = settings.model_folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target} already exists and is not empty; name another folder with --save-model.")


def _resume_from(session: Session, first: bool) -> Path | None:
    """The last whole state of an interrupted run with the same settings, model and text, if there is one.

    Raises BadInput if the folder holds an unfinished run of something else.
    """
    folder = session.training_folder
    identity = {k: v for k, v in session.settings.model_dump(mode="json").items() if k not in _FREE}
    identity |= {
        "masks": session.masks.fingerprint(),
        "weights": _fingerprint(session),
        "text": session.text.fingerprint,
    }
    try:
        earlier = json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if earlier is None:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_text(folder / _IDENTITY, json.dumps(identity, indent=2))
        return None
    differing = [
        f"{key} was {earlier.get(key)!r} and is {now!r}" for key, now in identity.items() if earlier.get(key) != now
    ]
    if differing:
        raise BadInput(
            f"{folder} belongs to an unfinished run in which {'; '.join(differing)}. Finish that run with its own "
            "settings, or remove the folder, or name another run folder with --save."
        )
    # The Trainer writes this file last, so a state that has it is whole.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest is not None:
        session.reporter.say(f"Going on from step {newest.name.rpartition('-')[2]} of an interrupted run.")
    return newest


def _fingerprint(session: Session) -> str:
    """Names the pruned weights by a sample of them: 16 hex digits."""
    digest = hashlib.sha256()
    parameters = plain_parameters(session.model)
    for entry in session.masks.matrices:
        digest.update(parameters[entry.parameter].detach().flatten()[:64].to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
