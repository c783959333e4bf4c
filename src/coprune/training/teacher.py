"""The teacher of a distillation: loaded, checked, and set beside the student."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import load_model, task_of
from coprune.model.checkpoint.locate import locate
from coprune.recipe.train import has_teacher
from coprune.training.distill import Distillation, Objective
from coprune.training.session import Session
from coprune.training.trainer import training_device

_OF_TOKENS, _OF_CLASSES = 1.0, 2.0
"""Temperatures at which distributions over tokens, and over classes, are compared."""


def distillation_of(session: Session) -> Objective | None:
    """Return the loss of distillation, with its teacher in memory; None for the data's own loss."""
    settings = session.settings
    if not has_teacher(settings.train.mode):
        return None
    assert settings.train.teacher is not None
    session.reporter.say(f"Loading the teacher {settings.train.teacher}")
    teacher, _ = load_model(locate(settings.train.teacher, settings.model.cache_dir), "auto")
    _require_same_outputs(session.loaded.model, teacher)
    device = training_device(settings.model.device)
    torch.nn.Module.to(teacher, device)
    if settings.train.dtype == "bfloat16":
        _in_bfloat16(teacher, device)
    if session.block_size is None:
        return Distillation(teacher, _OF_CLASSES, hidden=False)
    counterparts = _counterparts(session, teacher)
    return Distillation(teacher, _OF_TOKENS, counterparts is not None, counterparts or [])


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
