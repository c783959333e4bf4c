"""The teacher of a distillation: loaded, checked, and set beside the student or run ahead."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import load_model, task_of
from coprune.model.checkpoint.locate import locate
from coprune.recipe.train import has_teacher, nothing_to_learn
from coprune.training.distill import Distillation, Objective, TeacherCache
from coprune.training.session import Session
from coprune.training.trainer import training_device


def distillation_of(session: Session, first: bool) -> Objective | None:
    """Return the loss of distillation, with a teacher in memory or precomputed; None for the data's own loss."""
    settings = session.settings
    if not has_teacher(settings.train.mode):
        return None
    assert settings.train.distill.teacher is not None
    session.reporter.say(f"Loading the teacher {settings.train.distill.teacher}")
    teacher, _ = load_model(locate(settings.train.distill.teacher, settings.model.cache_dir), "auto")
    _require_same_outputs(session.loaded.model, teacher)
    device = training_device(settings.model.device)
    torch.nn.Module.to(teacher, device)
    if settings.train.dtype == "bfloat16":
        _in_bfloat16(teacher, device)
    hidden = settings.train.distill.weight_of_hidden if session.block_size is not None else 0.0
    counterparts = _counterparts(session, teacher) if hidden else []
    hidden = 0.0 if counterparts is None else hidden
    temperature = settings.train.distill.temperature or (1.0 if session.block_size is not None else 2.0)
    if not settings.train.distill.kl_weight + hidden + settings.train.distill.text_weight:
        raise nothing_to_learn().renamed({"finetune_kl_weight": "kl_weight"})
    weights = (temperature, settings.train.distill.kl_weight, hidden, settings.train.distill.text_weight)
    if settings.train.distill.top_k is None:
        return Distillation(teacher, *weights, counterparts or [])
    cache = TeacherCache(session.training_folder / "teacher")
    tokens = session.data.train.tokens
    with session.reporter.bar("Running the teacher ahead", len(tokens)) as advance:
        if first:
            cache.fill(teacher, tokens, settings.train.distill.top_k, temperature, device, advance)
    return Distillation(cache, *weights)


def _in_bfloat16(teacher: PreTrainedModel, device: torch.device) -> None:
    """Make a teacher compute in bfloat16 like the student, whatever dtype its weights have."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.Linear):
            # Autocast would convert the weight again for every batch; the embedding keeps a tied weight unconverted.
            module.weight = torch.nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
    teacher.forward = torch.autocast(device.type, torch.bfloat16)(teacher.forward)


def _counterparts(session: Session, teacher: PreTrainedModel) -> list[int] | None:
    """Return the teacher's hidden state for each block; None, with a message, where they do not compare."""
    mine = session.loaded.model
    blocks, theirs = len(find_blocks(mine)), len(find_blocks(teacher))
    found = session.history.counterparts(blocks, theirs)
    if mine.config.get_text_config().hidden_size != teacher.config.get_text_config().hidden_size:
        found = None
    if found is None:
        session.reporter.say("Hidden states are not compared: nothing tells which of the teacher's are meant.")
    return found


def _require_same_outputs(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    mine, dense = (_outputs(m) for m in (model, teacher))
    if mine != dense:
        raise BadInput(
            f"the teacher has a {dense} and the model a {mine}",
            field="teacher",
            fix="The teacher has to be the dense model that was pruned, or one with the same tokenizer or classes",
        )


def _outputs(model: PreTrainedModel) -> str:
    if task_of(model.config) == "images":
        return f"head of {model.config.num_labels} classes"
    return f"vocabulary of {model.config.get_text_config().vocab_size} tokens"
