"""Measurement of one model; every part is looked up in the store first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from coprune.base.environment import installed_version
from coprune.base.errors import BadInput, about
from coprune.base.progress import Reporter
from coprune.base.words import Command, LeaveOut
from coprune.evaluation.answers.answer_facts import AnswerFacts, facts_of, judge
from coprune.evaluation.answers.answer_generation import answers_key, ask, divergence, rows_along
from coprune.evaluation.answers.answer_records import Along, Answers
from coprune.evaluation.answers.questions import Plan, Questions, asked_of, plan_of, questions_for
from coprune.evaluation.asked_texts import Text, require_texts, split_texts, text_fingerprint
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.bos_choice import BosChoice, score_in_memory
from coprune.evaluation.closeness import OtherTokens, closeness
from coprune.evaluation.embeddings import EmbeddingChange, embedding_change
from coprune.evaluation.evaluation import Evaluation, WeightFacts, weight_facts
from coprune.evaluation.extra_measurements import zero_shot_settings
from coprune.evaluation.measurement import Accuracy, Closeness, Embedded, Measured, Perplexity, Transcribed
from coprune.evaluation.model_source import Source, Stored
from coprune.evaluation.perplexity import aggregate, perplexity
from coprune.evaluation.required import judge_measured
from coprune.evaluation.tasks import named, task_for
from coprune.evaluation.tasks.text_task import TextInputs, TextPerplexity, choose_seqlen
from coprune.evaluation.transcripts import TranscriptChange, transcript_change
from coprune.evaluation.zero_shot import ZeroShot
from coprune.model.checkpoint.load import WHAT
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe
from coprune.store.store import Key, Store, key_of

_VERSIONS = ("torch", "transformers", "lm_eval")
_WITH_TOKENIZER = "put the tokenizer's files next to the model"
_VERSION = 3
"""Version of the measurements; raise it whenever one changes."""


class Subject:
    """A model to measure: located and identified at once, loaded only for a measurement that is not in the store.

    Args:
        recipe: the model and the settings of all measurements.
        store: holds earlier measurements.
        reporter: receives messages.
        tasks: lm-eval tasks from `Extras`; None for none.
        source: the model, if the recipe does not name it.

    Raises:
        BadInput: the model does not exist.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        reporter: Reporter,
        tasks: dict[str, Any] | None,
        source: Source | None = None,
    ) -> None:
        self.recipe = recipe
        self._source = source or Stored(recipe.model)
        self.fingerprint, self.name = self._source.fingerprint, self._source.name
        self.label = Path(self.name).name
        self.task = self._source.task
        self._asked = split_texts(recipe.evaluate.data)
        require_texts([] if self.task in ("images", "labels", "speech") else self._asked)
        self._tasks = tasks
        self._store = store
        plan = plan_of(recipe.evaluate.answers, saves=False)
        if plan is not None and self.task != "text":
            cause = f"{self.name} {WHAT[self.task]}, and generates no text"
            raise BadInput(cause, field="generate", fix=LeaveOut("generate"))
        self._answers = None
        if plan is not None:
            self._answers = MeasuredAnswers(recipe, plan, self.fingerprint, lambda: self.loaded, store, reporter)
        self._reporter = reporter
        self._loaded: Loaded | None = None
        self._texts: dict[str, Any] = {}
        self._perplexities: dict[str, Perplexity] = {}  # by-products of a comparison
        self._leader: Subject | None = None

    @property
    def loaded(self) -> Loaded:
        """The model in memory."""
        if self._loaded is None:
            self._loaded = self._source.open(self._reporter)
        return self._loaded

    def release(self) -> None:
        """Free the model."""
        self._loaded = None
        self._texts = {}

    def begin_as(self, other: Subject | None) -> None:
        """Measure like another model: with its BOS choice, and answers compared with its. None: independently."""
        self._leader, self._texts = other, {}
        self.__dict__.pop("bos", None)

    @cached_property
    def bos(self) -> BosChoice | None:
        """The BOS choice: as requested, or decided on the first text; None without text."""
        if self._leader is not None:
            return self._leader.bos
        if self.task != "text" or not self._asked:
            return None
        first, asked = self._asked[0], self.recipe.calibrate.bos
        return self._store.get(self._key("bos", asked=asked, **self._text_key(first)), BosChoice, self._choose_bos)

    def _choose_bos(self) -> BosChoice:
        inputs = self._inputs(self._asked[0], self.recipe.calibrate.bos)
        texts = TextPerplexity(inputs).evaluation(self._reporter)
        return inputs.choose_bos(score_in_memory(self.loaded.model), None, texts)

    def _inputs(self, asked: Text, bos: str) -> TextInputs:
        return TextInputs(asked.recipe(self.recipe).replaced(bos=bos), self.loaded)

    def measure(self) -> Evaluation:
        """Count weights, measure perplexity on every text, run the tasks, if any, and judge the answers."""
        answers, asked = self.answers(self._leader), self.recipe.evaluate.answers
        anew = [] if self.task == "text" else self._anew()
        found = Evaluation(
            model=self.name,
            weights=self._store.get(self._key("weights"), WeightFacts, self._count),
            perplexity=(
                *(one for one in anew if isinstance(one, Perplexity)),
                *(
                    self._store.get(self._begun_key("perplexity", text), Perplexity, self._measure_text(text))
                    for text in (self._asked if self.task == "text" else ())
                ),
            ),
            bos=self.bos,
            accuracy=tuple(one for one in anew if isinstance(one, Accuracy)),
            embeddings=tuple(one for one in anew if isinstance(one, Embedded)),
            transcripts=tuple(one for one in anew if isinstance(one, Transcribed)),
            zero_shot=None if self._tasks is None else self._zero_shot(self._tasks),
            answers=answers,
            required=() if answers is None else judge(asked.conditions, answers),
        )
        if self._leader is not None:
            return found  # judged in `held_against`
        return found.model_copy(
            update={"required": (*found.required, *judge_measured(asked.measured, found.figures()))}
        )

    def _anew(self) -> list[Measured]:
        """Measure without the store: reading an image folder to identify it takes as long as the measurement."""
        metric = task_for(self.recipe, self.loaded).metric
        found = []
        for name, data in metric.evaluation(self._reporter).items():
            with self._reporter.bar(f"{metric.name} on {name}", 1) as advance:
                found.append(named(metric.measure(data, advance), name, data))
        return found

    def closeness_to(self, dense: Subject) -> tuple[Closeness, ...]:
        """Compare next-token distributions with another model's on every text, with both in memory.

        Raises BadInput if their vocabularies differ, or their tokenizers tokenise the text differently.
        """
        require_one_task([dense, self])
        held = any(condition.against_dense for condition in self.recipe.evaluate.answers.measured)
        if self.task in ("embeddings", "speech") or (self.task != "text" and held):
            return ()
        if self.task != "text":
            raise BadInput(
                f"closeness compares next-token distributions, and {self.name} {WHAT[self.task]}",
                field="against",
                fix=("use ", Command("compare")),
            )
        return tuple(
            self._store.get(
                self._begun_key("closeness", text, dense=dense.fingerprint),
                Closeness,
                self._compare_on(text, dense),
            )
            for text in self._asked
        )

    def answers(self, dense: Subject | None = None) -> AnswerFacts | None:
        """Return the model's answers compared with another's, or None without prompts."""
        if self._answers is None:
            return None
        return self._answers.facts(None if dense is None else dense._answers)

    def _count(self) -> WeightFacts:
        return weight_facts(self.loaded.model, self._source.bytes_of_weights())

    def text(self, asked: Text) -> Any:
        """Return an evaluation text in this model's tokens."""
        if asked.label not in self._texts:
            used = "auto" if self.bos is None or self.bos.used == "as given" else self.bos.used
            self._texts[asked.label] = self._inputs(asked, used).opened(asked.name)
        return self._texts[asked.label]

    def _measure_text(self, asked: Text) -> Callable[[], Perplexity]:
        def measure() -> Perplexity:
            if asked.label in self._perplexities:
                return self._perplexities[asked.label]
            text, asks = self.text(asked), asked.recipe(self.recipe).calibrate
            seqlen = choose_seqlen(self.loaded.model, asks.seqlen)
            with self._reporter.bar(f"Perplexity on {asked.label}", len(text.tokens) // seqlen) as advance:
                found = perplexity(self.loaded.model, text.tokens, seqlen, asks.batch_size, text.token_bytes, advance)
            return found.on(asked.label, text.source, text.fingerprint)

        return measure

    def _compare_on(self, asked: Text, dense: Subject) -> Callable[[], Closeness]:
        def compare() -> Closeness:
            text, asks = self.text(asked), asked.recipe(self.recipe).calibrate
            seqlen = choose_seqlen(self.loaded.model, asks.seqlen)
            if dense.text(asked).fingerprint != text.fingerprint:
                raise OtherTokens(
                    f"{self.name} and {dense.name} tokenise {asked.name} differently, so their predictions cannot be "
                    "compared"
                )
            with self._reporter.bar(f"Closeness on {asked.label}", len(text.tokens) // seqlen) as advance:
                models = dense.loaded.model, self.loaded.model
                found, nll = closeness(*models, text.tokens, seqlen, asks.batch_size, advance)
            beside = aggregate(nll, seqlen, cut_windows(text.token_bytes, seqlen))
            self._perplexities[asked.label] = beside.on(asked.label, text.source, text.fingerprint)
            return found.on(asked.label, text.source, text.fingerprint)

        return compare

    def _zero_shot(self, tasks: dict[str, Any]) -> ZeroShot:
        from coprune.evaluation.harness import zero_shot
        from coprune.evaluation.harness_tasks import tasks_fingerprint

        settings = zero_shot_settings(self.recipe).logging_as(self.label)

        def run() -> ZeroShot:
            loaded = self.loaded
            if loaded.tokenizer is None:
                cause = f"{self.name} has no tokenizer, which zero-shot tasks need"
                raise BadInput(cause, field="tasks", fix=_WITH_TOKENIZER)
            return zero_shot(loaded.model, loaded.tokenizer, settings, tasks, self._reporter)

        # The batch size only affects rounding, so it is not part of the key.
        key = self._key(
            "zero-shot",
            shots=settings.num_fewshot,
            limit=settings.limit,
            generation=(settings.chat_template, settings.gen_kwargs),
            tasks=tasks_fingerprint(tasks, settings.limit),
        )
        # The store holds no items to log.
        return run() if settings.log_samples else self._store.get(key, ZeroShot, run)

    def _begun_key(self, what: str, asked: Text, **settings: Any) -> Key:
        """Return the key of a text's measurements, including the BOS choice."""
        return self._key(what, bos=None if self.bos is None else self.bos.used, **settings, **self._text_key(asked))

    def _text_key(self, asked: Text) -> dict[str, Any]:
        recipe = asked.recipe(self.recipe)
        with about("eval_data", asked.label):
            fingerprint = text_fingerprint(asked.name)
        return {
            "text": fingerprint,
            "name": asked.label,
            "seqlen": recipe.calibrate.seqlen,
            "tokens": recipe.evaluate.tokens,
        }

    def _key(self, what: str, **settings: Any) -> Key:
        versions = {name: installed_version(name) for name in _VERSIONS}
        facts = {"model": self.fingerprint, "dtype": self.recipe.model.dtype, **settings, **versions}
        return key_of(what, _VERSION, **facts)


def require_one_task(subjects: Sequence[Subject]) -> None:
    """Raise BadInput if the models have different tasks."""
    for subject in subjects[1:]:
        if subject.task != subjects[0].task:
            one, other = sorted((subjects[0], subject), key=lambda who: who.task == "text")
            raise BadInput(
                f"{one.name} {WHAT[one.task]} and {other.name} {WHAT[other.task]}, so they cannot be compared",
                field="models",
            )


def held_against(found: Evaluation, subject: Subject, dense: Subject, other: Evaluation | None = None) -> Evaluation:
    """Compare a model's measurements with another's. other: the other's measurements, if any."""
    near: tuple[EmbeddingChange | TranscriptChange, ...] = ()
    conditions = subject.recipe.evaluate.answers.measured
    beside = subject.task in ("embeddings", "speech")
    if other is None and (beside or any(condition.against_dense for condition in conditions)):
        other = dense.measure()
    if beside and other is not None:
        vectors = zip(other.embeddings, found.embeddings, strict=True)
        heard = zip(other.transcripts, found.transcripts, strict=True)
        near = (*(embedding_change(*pair) for pair in vectors), *(transcript_change(*pair) for pair in heard))
    found = found.model_copy(update={"against": dense.name, "near": near})
    required = judge_measured(conditions, found.figures(other))
    return found.model_copy(update={"required": (*found.required, *required)})


class MeasuredAnswers:
    """One model's answers, generated unless they are in the store.

    Args:
        recipe: the model and how to load it.
        plan: the prompts.
        fingerprint: of the model's files.
        loaded: returns the model.
        store: holds earlier measurements.
        reporter: receives messages.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        fingerprint: str,
        loaded: Callable[[], Loaded],
        store: Store,
        reporter: Reporter,
    ) -> None:
        self._recipe, self._plan, self.fingerprint = recipe, plan, fingerprint
        self._loaded, self._store, self._reporter = loaded, store, reporter

    @cached_property
    def _questions(self) -> Questions:
        loaded = self._loaded()
        if loaded.tokenizer is None:
            cause = f"{loaded.source} has no tokenizer, which prompts need"
            raise BadInput(cause, field="generate", fix=_WITH_TOKENIZER)
        return questions_for(self._plan, loaded.tokenizer, loaded.model)

    @cached_property
    def answers(self) -> Answers:
        """The model's answers. Raises BadInput like `questions_for`."""
        key = answers_key(self.fingerprint, self._recipe.model, self._plan)
        return self._store.get(key, Answers, self._ask)

    def _ask(self) -> Answers:
        questions, loaded = self._questions, self._loaded()
        assert loaded.tokenizer is not None
        size = self._recipe.calibrate.batch_size
        return ask(loaded.model, loaded.tokenizer, questions, self._reporter, size)

    def facts(self, dense: MeasuredAnswers | None) -> AnswerFacts:
        """Return the answers, compared with another model's. Raises BadInput if their tokens differ."""
        asked = asked_of(self._plan, self.answers.chat, self._plan.new_tokens)
        if dense is None:
            return facts_of(asked, self._plan.prompts.texts, (None, self.answers))
        key = answers_key(
            self.fingerprint, self._recipe.model, self._plan, along=dense.fingerprint, figures="kl, acceptance"
        )
        along = self._store.get(key, Along, lambda: self._along(dense))
        return facts_of(asked, self._plan.prompts.texts, (dense.answers, self.answers), along)

    def _along(self, dense: MeasuredAnswers) -> Along:
        models = [one._loaded().model for one in (dense, self)]
        sizes = [model.config.get_text_config().vocab_size for model in models]
        if sizes[0] != sizes[1] or dense._questions.ids != self._questions.ids:
            raise BadInput(
                "the models tokenise the prompts differently, so their answers cannot be compared",
                field="against",
                fix="give a dense model of the same family",
            )
        with self._reporter.bar("Closeness along the dense model's answers", 1):
            rows = [rows_along(model, self._questions, dense.answers) for model in models]
            return divergence(*rows)
