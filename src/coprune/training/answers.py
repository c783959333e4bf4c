"""What a model writes before and after it is fine-tuned, beside the dense model if that is named."""

from __future__ import annotations

import torch

from coprune.base.errors import BadInput
from coprune.evaluation.answers.look import Look
from coprune.evaluation.answers.questions import plan_of
from coprune.model.checkpoint.weights import InMemory
from coprune.model.opened import Loaded, open_model
from coprune.recipe.parts import ModelPart
from coprune.training.one_device import training_device
from coprune.training.session import Session


def look_before(session: Session) -> Look:
    """Let the model answer that is to be fine-tuned, or the dense one in its place.

    Raises:
        BadInput: answers that somebody asked for cannot be had, or the dense model has other tokens.
    """
    settings, reporter = session.settings, session.reporter
    plan = plan_of(settings.answers, saves=True)
    device = training_device(settings.device)
    if plan is None or settings.against is None:
        look = Look(plan, reference="before")
        look.prepare(session.loaded, reporter)
        torch.nn.Module.to(session.loaded.model, device)
        look.ask_dense(session.loaded, reporter)
        return look
    part = ModelPart(name=settings.against, device=str(device), cache_dir=settings.cache_dir)
    look = Look(plan, part)
    look.prepare(session.loaded, reporter)
    if look.looks:
        reporter.say(f"Loading the dense model {settings.against}")
        dense = open_model(part, stream=False)
        _require_same_tokens(session, dense)
        # What it is asked are the tokens of the model's own tokenizer.
        dense = Loaded(InMemory(dense.model), session.loaded.processor, dense.source, dense.quantised_source)
        look.ask_dense(dense, reporter)
        look.keep_rows(dense)
    return look


def _require_same_tokens(session: Session, dense: Loaded) -> None:
    mine, other = (loaded.model.config.get_text_config().vocab_size for loaded in (session.loaded, dense))
    if mine != other:
        raise BadInput(
            f"the models have {other} and {mine} tokens in their vocabularies, so their answers cannot be compared",
            field="against",
            value=session.settings.against,
            fix="give the dense model that was pruned",
        )
