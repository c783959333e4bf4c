"""Answers of a run's models: the dense one's before the run, the result's after it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, CopruneError, UnsupportedModel
from coprune.base.memory import available_bytes
from coprune.base.precision import held_in_bfloat16, multiplies_bfloat16
from coprune.base.progress import Reporter
from coprune.base.words import Command, Set, Words, say
from coprune.evaluation.answers.answer_facts import AnswerFacts, Reference, facts_of
from coprune.evaluation.answers.answer_generation import KeptRows, ask, divergence, key_of_files, rows_along
from coprune.evaluation.answers.answer_records import Along, Answers
from coprune.evaluation.answers.questions import Plan, Questions, questions_for
from coprune.store.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coprune.model.loaded_model import Loaded
    from coprune.recipe.parts import ModelPart

_LATER = ("save the model and run: ", Command("evaluate", "FOLDER", Set("generate", "builtin"), Set("against", ...)))


class Look:
    """The answers of a run's models.

    plan: the prompts; None for no answers; dense: files of the dense model, whose answers are stored; reference: which model
    the result is compared with.
    """

    def __init__(self, plan: Plan | None, dense: ModelPart | None = None, reference: Reference = "dense") -> None:
        self._plan = plan
        self._model = dense
        self._reference = reference
        self._questions: Questions | None = None
        self.rounds = False
        """Whether a float32 model answers in bfloat16; no longer once its code turned out to need float32."""
        self._rounded = dict[str, str]()  # of stored answers' keys: the same whether or not the model's code can
        self._rows: KeptRows | None = None
        self._along: Along | None = None
        self.dense: Answers | None = None
        self.answers: Answers | None = None
        self.spared = 0.0
        """Seconds that stored answers took when they were generated; 0 if they were generated now."""
        self._seconds = 0.0
        self.left_out: str | None = None
        """Why there are no answers, if some were planned."""

    @property
    def looks(self) -> bool:
        """Whether there are prompts to answer."""
        return self._questions is not None

    def prepare(self, loaded: Loaded, reporter: Reporter) -> None:
        """Tokenise the prompts, or skip them if the model cannot answer.

        Raises:
            BadInput: the user asked for answers and the model cannot give any.
        """
        if self._plan is None:
            return
        try:
            self._questions = _questions(self._plan, loaded)
            self.rounds = _rounds(loaded, self._plan)
            self._rounded = {"rounded": "bfloat16"} if self.rounds else {}
        except BadInput as error:
            if self._plan.is_asked:
                raise
            # A classifier never has answers, so no message is needed.
            if loaded.task == "text":
                self._leave_out(error, reporter)

    def _leave_out(self, error: CopruneError, reporter: Reporter) -> None:
        self.left_out = say(error.cause)
        reporter.say(f"No answers are generated: {self.left_out}.")

    def ask_dense(self, loaded: Loaded, reporter: Reporter, batch_size: int | None = None) -> None:
        """Generate the dense model's answers, or use stored ones.

        Raises:
            UnsupportedModel: it cannot generate, and the user asked for its answers.
        """
        if (questions := self._questions) is None or (tokenizer := loaded.tokenizer) is None:
            return

        def answer() -> Answers:
            with loaded.whole(reporter) as model:
                return self._ask(model, tokenizer, questions, reporter, batch_size)

        try:
            if self._model is None:
                self.dense = answer()
            else:
                key = key_of_files(self._model, questions.plan, **self._rounded)
                self.dense, self.spared = Store.of_user().get_sparing(key, Answers, answer)
        except UnsupportedModel as error:
            if questions.plan.is_asked:
                raise
            self._questions = None
            self._leave_out(error, reporter)

    def keep_rows(self, loaded: Loaded) -> None:
        """Store the dense model's logits along its answers before the model is changed."""
        if self._questions is not None and self.dense is not None and self._questions.plan.measures_kl:
            self._rows = KeptRows(rows_along(loaded.model, self._questions, self.dense))

    def ask(self, model: PreTrainedModel, loaded: Loaded, reporter: Reporter, batch_size: int | None = None) -> None:
        """Generate the answers of the run's model. loaded: provides the tokenizer.

        Raises:
            UnsupportedModel: it cannot generate, and the user asked for its answers.
        """
        if self._questions is None or loaded.tokenizer is None:
            return
        try:
            self.answers = self._ask(model, loaded.tokenizer, self._questions, reporter, batch_size)
        except UnsupportedModel as error:
            if self._questions.plan.is_asked:
                raise
            self._leave_out(error, reporter)
            return
        if self._rows is not None and self.dense is not None:
            self._along = divergence(self._rows, rows_along(model, self._questions, self.dense))

    def keep(self, saved: ModelPart) -> None:
        """Store the answers of the run's model as those of the files that it was saved in, for a training of it."""
        if self._questions is not None and self.answers is not None:
            key = key_of_files(saved, self._questions.plan, **self._rounded)
            Store.of_user().complete(key, self.answers, self._seconds)

    def _ask(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Questions,
        reporter: Reporter,
        batch_size: int | None,
    ) -> Answers:
        began = time.perf_counter()
        try:
            with held_in_bfloat16(model) if self.rounds else nullcontext():
                answers = ask(model, tokenizer, questions, reporter, batch_size)
        except RuntimeError:
            if not self.rounds:
                raise
            self.rounds = False  # code that adds float32 tensors of its own, such as XLNet's positions
            answers = ask(model, tokenizer, questions, reporter, batch_size)
        self._seconds = time.perf_counter() - began
        return answers

    def facts(self) -> AnswerFacts | None:
        """Return both models' answers side by side, or None until the second has answered."""
        if self._questions is None or self.answers is None:
            return None
        prompts = self._questions.plan.prompts.texts
        facts = facts_of(self._questions.asked, prompts, (self.dense, self.answers), self._along)
        return facts.model_copy(update={"reference": self._reference})


def _rounds(loaded: Loaded, plan: Plan) -> bool:
    """Return whether a float32 model answers in bfloat16: if a CPU is fast in it, and the user asked for no answers.

    It takes half the time or less to see whether answers loop. The model is in memory in both precisions.
    """
    if plan.is_asked or loaded.model.dtype != torch.float32 or not in_host_memory(loaded.device):
        return False
    available, whole = available_bytes(), sum(one.nbytes for one in loaded.model.parameters())
    needed = whole // 2 + whole * loaded.weights.streams
    return (available is None or needed <= available // 2) and multiplies_bfloat16(loaded.device)


def _questions(plan: Plan, loaded: Loaded) -> Questions:
    fix: Words | None = None
    if loaded.task != "text":
        from coprune.model.checkpoint.load import WHAT

        cause = f"the model {WHAT[loaded.task]}, so it generates no text"
    elif (lacks := loaded.lacks_room()) is not None:
        cause, fix = lacks, _LATER
    elif loaded.tokenizer is None:
        cause, fix = "the model has no tokenizer", "put the tokenizer's files next to the model"
    elif not loaded.model.can_generate():
        cause = f"{type(loaded.model).__name__} does not generate text"
    else:
        return questions_for(plan, loaded.tokenizer, loaded.model)
    raise BadInput(cause, field="generate", fix=fix)
