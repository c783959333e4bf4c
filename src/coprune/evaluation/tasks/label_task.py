"""Classifiers of texts, text pairs or words, and rerankers: accuracy on a labelled file."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from coprune.base.errors import NumericalError, about
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Setting, say
from coprune.data.labelled_text import HINT, LabelledText, LabelledTexts, labelled_texts
from coprune.evaluation.accuracy import aggregate_accuracy, rank_classes
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.measurement import Accuracy
from coprune.evaluation.tasks.task import Walked
from coprune.evaluation.tasks.text_task import TextInputs
from coprune.model.checkpoint.load import evaluating
from coprune.model.transformers_private import auto_choice
from coprune.model.walk.block_calls import input_device


class LabelAccuracy:
    """Accuracy on a labelled file; only for models in memory, since texts have many lengths."""

    name = "Accuracy"
    figures: tuple[str, ...] = ("accuracy",)

    def __init__(self, inputs: TextInputs) -> None:
        self._inputs = inputs
        self._config: Any = inputs.loaded.model.config
        self._each_word = auto_choice(AutoModelForTokenClassification, self._config) is type(inputs.loaded.model)

    def evaluation(self, reporter: Reporter) -> dict[str, LabelledTexts]:
        asked = self._inputs.recipe.evaluate
        if not asked.perplexity:
            return {}
        if asked.data is None:
            named = ("name texts with labels with ", Setting("eval_data"))
            reporter.say(say(("No accuracy: no labels are known; ", *named, f" ({HINT}).")))
            return {}
        found = dict[str, LabelledTexts]()
        numbers = {str(name): int(number) for name, number in (self._config.label2id or {}).items()}
        for name in plain_names(asked.data):
            with about("eval_data", name):
                found[name] = labelled_texts(name, numbers, int(self._config.num_labels), self._each_word)
        return found

    def measure(self, data: LabelledTexts, advance: Advance, walked: Walked | None = None) -> Accuracy:
        def measured() -> Accuracy:
            with self._inputs.loaded.whole(Reporter(quiet=True)):
                return self._of_whole(data, advance)

        return self._inputs.processes.from_first(measured)

    def _of_whole(self, data: LabelledTexts, advance: Advance) -> Accuracy:
        read = [self._tokens(row) for row in data.rows]
        alike: dict[int, list[int]] = defaultdict(list)
        for place, (inputs, _) in enumerate(read):
            alike[inputs["input_ids"].shape[1]].append(place)
        ranked: dict[int, Tensor] = {}
        model, device = self._inputs.loaded.model, input_device(self._inputs.loaded.model)
        with evaluating(model), torch.inference_mode():
            for length, places in alike.items():  # texts of one length, so that none is padded
                size = self._together(length)
                for part in (places[start : start + size] for start in range(0, len(places), size)):
                    inputs = {k: torch.cat([read[p][0][k] for p in part]).to(device) for k in read[part[0]][0]}
                    logits = model(**inputs).logits.cpu()
                    for place, own in zip(part, logits, strict=True):
                        ranked[place] = self._ranked(own[None] if own.ndim == 1 else own, read[place][1])
                    advance(len(part) / len(read))
        order = range(len(read))
        labels = torch.tensor([label for p in order for label in data.rows[p].labels[: len(ranked[p])]])
        unit = "words" if self._each_word else "texts"
        return aggregate_accuracy(torch.cat([ranked[p] for p in order]), labels).model_copy(update={"unit": unit})

    def _together(self, length: int) -> int:
        # Models that classify by the last token find it by the padding token.
        if self._config.get_text_config().pad_token_id is None:
            return 1
        return self._inputs.recipe.calibrate.batch_size or max(1, 4096 // length)

    def _tokens(self, row: LabelledText) -> tuple[dict[str, Tensor], list[int]]:
        """Tokenise a text; return its tokens and the index of each word's first token."""
        tokenizer: Any = self._inputs.tokenizer
        limit = min(int(tokenizer.model_max_length), self._inputs.seqlen)
        text, options = row.text, {"truncation": True, "max_length": limit, "return_tensors": "pt", "verbose": False}
        if isinstance(text, tuple):
            return dict(tokenizer(*text, **options)), []
        if isinstance(text, str):
            return dict(tokenizer(text, **options)), []
        encoded = tokenizer(text, is_split_into_words=True, **options)
        words = encoded.word_ids(0)
        first = [words.index(word) for word in range(len(text)) if word in words]
        return dict(encoded), first

    def _ranked(self, logits: Tensor, first: list[int]) -> Tensor:
        """Return the classes of a text or of its words, the likeliest first. logits: 1 or S × classes."""
        own = logits[first] if self._each_word else logits[:1]
        if own.shape[-1] > 1:
            return rank_classes(own)
        if bool(own.isnan().any()):
            raise NumericalError("the model's output is NaN for some texts")
        return (own > 0).to(torch.int64)  # a single score, from a reranker
