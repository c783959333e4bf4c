"""Measure one model as asked, with nothing measured twice: every part is looked up in the cache first."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from coprune.base.errors import BadInput, about
from coprune.base.processes import ALONE
from coprune.base.progress import Reporter
from coprune.data.images import LabelledImages
from coprune.evaluation.cache import EvaluationCache, text_fingerprint
from coprune.evaluation.closeness import closeness
from coprune.evaluation.evaluation import Evaluation, WeightFacts, weight_facts
from coprune.evaluation.extras import zero_shot_settings
from coprune.evaluation.measurement import Accuracy, Closeness, Perplexity
from coprune.evaluation.perplexity import perplexity
from coprune.evaluation.sources import Source, Stored
from coprune.evaluation.tasks import read_anew
from coprune.evaluation.tasks.text import TextTask, choose_seqlen
from coprune.evaluation.texts import Text, split_texts
from coprune.evaluation.zero_shot import ZeroShot
from coprune.model.opened import Loaded
from coprune.recipe.recipe import Recipe

_VERSIONS = ("torch", "transformers", "lm_eval")


class Subject:
    """One model to measure: found and named at once, loaded when a measurement is not in the cache.

    Args:
        recipe: its model, and how everything is measured.
        cache: what was measured before.
        reporter: who hears of it.
        tasks: what lm-eval is to run, as `Extras` found it; None for nothing.
        source: the model, if the recipe does not name it.

    Raises:
        BadInput: there is no such model.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache: EvaluationCache,
        reporter: Reporter,
        tasks: dict[str, Any] | None,
        source: Source | None = None,
    ) -> None:
        self.recipe = recipe
        self._source = source or Stored(recipe.model)
        self.fingerprint, self.name = self._source.fingerprint, self._source.name
        self.classifies = self._source.classifies
        self._asked = split_texts(recipe.evaluation.data)
        self._tasks = tasks
        self._cache = cache
        self._reporter = reporter
        self._loaded: Loaded | None = None
        self._texts: dict[str, Any] = {}

    @property
    def loaded(self) -> Loaded:
        """The model in memory."""
        if self._loaded is None:
            if isinstance(self._source, Stored):
                self._reporter.say(f"Loading {self.name}")
            self._loaded = self._source.open()
        return self._loaded

    def release(self) -> None:
        """Free the model."""
        self._loaded = None
        self._texts = {}

    def measure(self) -> Evaluation:
        """Count weights, measure perplexity on every text, and run the tasks if there are any."""
        return Evaluation(
            model=self.name,
            weights=self._cache.get(self._key("weights"), WeightFacts, self._count),
            perplexity=tuple(
                self._cache.get(self._key("perplexity", **self._text_key(text)), Perplexity, self._measure_text(text))
                for text in ([] if self.classifies else self._asked)
            ),
            accuracy=self._accuracies() if self.classifies else (),
            zero_shot=None if self._tasks is None else self._zero_shot(self._tasks),
        )

    def _accuracies(self) -> tuple[Accuracy, ...]:
        """Measured anew each time, since reading a folder of images to name it takes as long as the measurement."""
        from coprune.evaluation.tasks import ImageTask

        task = ImageTask(self.recipe, self.loaded, ALONE, read_anew)
        found = []
        for name, images in task.evaluation(self._reporter).items():
            assert isinstance(images, LabelledImages)
            with self._reporter.bar(f"Accuracy on {name}", 1) as advance:
                found.append(task.measure_in_memory(images, advance).on(name, images.source))
        return tuple(found)

    def closeness_to(self, dense: Subject) -> tuple[Closeness, ...]:
        """Compare the next-token distributions with another model's on every text; both are in memory for that.

        Raises BadInput if their vocabularies differ, or their tokenizers cut the text differently.
        """
        if self.classifies or dense.classifies:
            raise BadInput(
                "closeness compares next-token distributions, which classifiers of images have not",
                field="against",
                fix="compare them by accuracy",
            )
        return tuple(
            self._cache.get(
                self._key("closeness", dense=dense.fingerprint, **self._text_key(text)),
                Closeness,
                self._compare_on(text, dense),
            )
            for text in self._asked
        )

    def _count(self) -> WeightFacts:
        return weight_facts(self.loaded.model, self._source.bytes_of_weights())

    def text(self, asked: Text) -> Any:
        """An evaluation text in this model's tokens."""
        if asked.label not in self._texts:
            recipe = asked.recipe(self.recipe)
            read = TextTask(recipe, self.loaded, ALONE, read_anew).evaluation(self._reporter)
            self._texts[asked.label] = read[asked.name]
        return self._texts[asked.label]

    def _measure_text(self, asked: Text) -> Callable[[], Perplexity]:
        def measure() -> Perplexity:
            text, asks = self.text(asked), asked.recipe(self.recipe).calibration
            seqlen = choose_seqlen(self.loaded.model, asks.seqlen)
            with self._reporter.bar(f"Perplexity on {asked.label}", len(text.tokens) // seqlen) as advance:
                found = perplexity(self.loaded.model, text.tokens, seqlen, asks.batch_size, text.token_bytes, advance)
            return found.on(asked.label, text.source, text.fingerprint)

        return measure

    def _compare_on(self, asked: Text, dense: Subject) -> Callable[[], Closeness]:
        def compare() -> Closeness:
            text, asks = self.text(asked), asked.recipe(self.recipe).calibration
            seqlen = choose_seqlen(self.loaded.model, asks.seqlen)
            if dense.text(asked).fingerprint != text.fingerprint:
                raise BadInput(
                    f"{self.name} and {dense.name} cut {asked.name} into different tokens, so their predictions cannot be "
                    "compared"
                )
            with self._reporter.bar(f"Closeness on {asked.label}", len(text.tokens) // seqlen) as advance:
                models = dense.loaded.model, self.loaded.model
                found = closeness(*models, text.tokens, seqlen, asks.batch_size, advance)
            return found.on(asked.label, text.source, text.fingerprint)

        return compare

    def _zero_shot(self, tasks: dict[str, Any]) -> ZeroShot:
        from coprune.evaluation.harness import zero_shot
        from coprune.evaluation.harness_tasks import tasks_fingerprint

        settings = zero_shot_settings(self.recipe)

        def run() -> ZeroShot:
            loaded = self.loaded
            if loaded.tokenizer is None:
                raise BadInput(f"{self.name} has no tokenizer, which zero-shot tasks need", field="tasks")
            return zero_shot(loaded.model, loaded.tokenizer, settings, tasks, self._reporter)

        # A batch size changes nothing but rounding.
        key = self._key(
            "zero-shot",
            shots=settings.num_fewshot,
            limit=settings.limit,
            tasks=tasks_fingerprint(tasks, settings.limit),
        )
        return self._cache.get(key, ZeroShot, run)

    def _text_key(self, asked: Text) -> dict[str, Any]:
        recipe = asked.recipe(self.recipe)
        with about("eval_data", asked.label):
            fingerprint = text_fingerprint(asked.name)
        return {
            "text": fingerprint,
            "name": asked.label,
            "seqlen": recipe.calibration.seqlen,
            "tokens": recipe.evaluation.tokens,
        }

    def _key(self, what: str, **settings: Any) -> str:
        versions = {name: _version(name) for name in _VERSIONS}
        facts = {"what": what, "model": self.fingerprint, "dtype": self.recipe.model.dtype, **settings, **versions}
        return json.dumps(facts, sort_keys=True, default=str)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
