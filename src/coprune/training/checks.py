"""Settings of a fine-tuning that do not go together. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from coprune.base.errors import BadInput
from coprune.base.words import LeaveOut, Set, Setting, Words
from coprune.recipe.answers import AnswersPart, cannot_require
from coprune.recipe.finetune import has_adapters, has_teacher


class Settings(Protocol):
    """The settings that may contradict each other."""

    @property
    def mode(self) -> str: ...
    @property
    def teacher(self) -> str | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def hidden_weight(self) -> float | None: ...
    @property
    def weight_of_hidden(self) -> float: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def text_weight(self) -> float: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def masked(self) -> bool: ...
    @property
    def dropout(self) -> float: ...
    @property
    def rates(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def train(self) -> tuple[str, ...]: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def held_out(self) -> float: ...
    @property
    def answers(self) -> AnswersPart: ...
    @property
    def against(self) -> str | None: ...
    @property
    def save(self) -> Path | None: ...
    @property
    def save_model(self) -> Path | None: ...


_OF_DISTILLATION = ("temperature", "kl_weight", "hidden_weight", "text_weight")
_OF_ADAPTERS = ("rank", "alpha", "dropout", "masked")


def contradiction(asked: Settings, changed: Collection[str]) -> BadInput | None:
    """What is wrong with the settings taken together, with the fix; None if nothing is.

    changed: names of those that are not as they are where nothing is said of them.
    """
    wrong = _of_teacher(asked) or _of_mode(asked, changed) or _of_training(asked)
    return wrong or _of_answers(asked) or _of_folders(asked)


def _of_teacher(asked: Settings) -> BadInput | None:
    if has_teacher(asked.mode) and asked.teacher is None:
        return BadInput(
            f"{asked.mode} needs the dense model", field="teacher", fix=("name it with ", Setting("teacher"))
        )
    if not has_teacher(asked.mode) and (asked.teacher is not None or asked.top_k is not None):
        cause: Words = ("a teacher belongs to ", Set("mode", "distill"), " or ", Set("mode", "lora-distill"))
        return BadInput(cause, field="mode", value=asked.mode)
    if asked.top_k is not None and asked.hidden_weight:
        cause = ("a teacher that runs ahead (", Set("top_k", asked.top_k), ") leaves no hidden states")
        fix: Words = ("add ", Set("hidden_weight", 0))
        return BadInput(cause, field="hidden_weight", value=asked.hidden_weight, fix=fix)
    if has_teacher(asked.mode) and not asked.kl_weight + asked.weight_of_hidden + asked.text_weight:
        return nothing_to_learn()
    return None


def nothing_to_learn() -> BadInput:
    """What to tell where every part of a distillation's loss has the weight zero."""
    fix: Words = ("leave out ", Set("kl_weight", 0))
    return BadInput("nothing is left of the distillation's loss", field="kl_weight", value=0, fix=fix)


def _of_mode(asked: Settings, changed: Collection[str]) -> BadInput | None:
    """A setting of another mode, which this one would not look at."""
    unused = [] if has_teacher(asked.mode) else [*_OF_DISTILLATION]
    unused += [] if has_adapters(asked.mode) else [*_OF_ADAPTERS]
    for name in unused:
        if name in changed:
            cause: Words = (Setting(name), " means nothing to ", Set("mode", asked.mode))
            return BadInput(cause, field=name, value=getattr(asked, name), fix=LeaveOut(name))
    return None


def _of_training(asked: Settings) -> BadInput | None:
    if has_adapters(asked.mode) and asked.masked and asked.dropout:
        product = "the masked update is one product with the weights, which leaves no place for dropout"
        return BadInput(product, field="dropout", value=asked.dropout, fix=LeaveOut("dropout"))
    if has_adapters(asked.mode) and asked.rates == "relative":
        empty = "adapters begin at zero, which has no size that a rate could be relative to"
        return BadInput(empty, field="rates", value=asked.rates, fix=LeaveOut("rates"))
    if asked.scope != "all" and (has_adapters(asked.mode) or asked.train):
        own: Words = (
            (Setting("train"), " says what is trained, too") if asked.train else "adapters are on matrices of their own"
        )
        return BadInput(own, field="scope", value=asked.scope, fix=LeaveOut("scope"))
    if asked.tokens is not None and asked.max_steps is not None:
        cause: Words = (Set("max_steps", asked.max_steps), " says how long to train, too")
        return BadInput(cause, field="tokens", value=asked.tokens, fix=LeaveOut("max_steps"))
    if asked.patience is not None and not (asked.evaluations and asked.held_out):
        cause = (Set("patience", asked.patience), " needs evaluations during the training")
        fix: Words = ("ask for some with ", Setting("held_out" if asked.evaluations else "evaluations"))
        return BadInput(cause, field="patience", value=asked.patience, fix=fix)
    return None


def _of_answers(asked: Settings) -> BadInput | None:
    return cannot_require(asked.answers, ("ask for them with ", Setting("against")) if asked.against is None else None)


def _of_folders(asked: Settings) -> BadInput | None:
    if asked.save is not None and asked.save == asked.save_model:
        same = "the run folder and the model folder are the same"
        return BadInput(same, field="save_model", value=asked.save, fix=("name another with ", Setting("save_model")))
    return None
