"""Speech recognition: recordings to calibrate on, and word error rates."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput, about
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Setting, say
from coprune.data.pairs import Pairs, begun, pair_fingerprint
from coprune.data.speech import HINT, Recording, Recordings, read_recordings, waveform, word_errors
from coprune.data.text import NOTHING, padded
from coprune.data.windows import Samples
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.measurement import Transcribed
from coprune.evaluation.tasks.pair_task import PairInputs
from coprune.evaluation.tasks.task import Data, Remember, Walked, read_anew
from coprune.model.checkpoint.load import evaluating, quiet_transformers
from coprune.model.loaded_model import Loaded
from coprune.model.walk.block_calls import input_device
from coprune.recipe.recipe import Recipe


class SpeechInputs:
    """Pairs of a recording's features and its transcript. Arguments and errors as for `TextInputs`."""

    def __init__(
        self, recipe: Recipe, loaded: Loaded, processes: Processes = ALONE, remember: Remember = read_anew
    ) -> None:
        self._pairs = PairInputs(recipe, loaded, processes, remember)
        self.text, self.batches, self.made_of = self._pairs.text, self._pairs.batches, self._pairs.made_of
        self._recipe, self._loaded = recipe, loaded

    def calibration(self, needed: bool, reporter: Reporter) -> Samples[Pairs] | None:
        return self.text.calibrated(needed, reporter, self._drawn)

    def _drawn(self, nsamples: int, reporter: Reporter) -> Samples[Pairs]:
        name = self._recipe.calibrate.data
        found = read_recordings(name)
        order = list(range(len(found)))
        random.Random(self._recipe.calibrate.seed).shuffle(order)
        rows = [found.rows[row] for row in order[:nsamples]]
        if len(rows) < nsamples:
            reporter.say(f"{name} has {len(rows)} recordings, so only {len(rows)} samples are used.")
        features, said, how = self.features(rows), [row.said for row in rows], ""
        if None in said:
            with self._loaded.whole(Reporter(quiet=True)):
                own = self.transcripts(features)
            said = [heard if words is None else words for words, heard in zip(said, own, strict=True)]
            how = " (and the dense model's transcripts)"
        limits: dict[str, Any] = {"truncation": True, "max_length": self.text.seqlen}
        tokens = [begun(self._tokens(words, **limits), self._pairs.start) for words in said]
        pairs = Pairs.of(features, padded(tokens, NOTHING))
        self.text.check_ids(pairs.written)
        return Samples(pairs, pair_fingerprint(pairs), f"{found.source}{how}")

    def own_pairs(self, reporter: Reporter) -> Samples[Pairs] | None:
        """Return the recordings of the calibration data with their transcripts. Raises BadInput if one is missing."""
        rows = read_recordings(self._recipe.calibrate.data).rows
        if (silent := next((row for row in rows if row.said is None), None)) is not None:
            raise BadInput(f"{silent.file} has no transcript", field="dataset", fix=HINT)
        return self._drawn(len(rows), reporter)

    def probe(self, samples: Samples[Pairs] | None, data: Mapping[str, Data]) -> Tensor:
        if samples is not None:
            return self._pairs.probe(samples, data)
        noise = np.random.default_rng(0).normal(size=self._extractor.sampling_rate).astype(np.float32)
        tokens, there = begun(self._tokens("a b c"), self._pairs.start), self._loaded.device
        return Pairs.of(self._heard([noise]).to(there), tokens.to(there))

    def _tokens(self, text: str | None, **options: Any) -> Tensor:
        """Return the tokens of a text: 1 × T int64."""
        tokenizer: Any = self._loaded.tokenizer
        return torch.tensor([tokenizer(text, verbose=False, **options)["input_ids"]])

    def features(self, rows: Sequence[Recording]) -> Tensor:
        """Return the features of recordings: N × features."""
        return self._heard([waveform(row.file, self._extractor.sampling_rate) for row in rows])

    def _heard(self, waves: Sequence[Any]) -> Tensor:
        extractor, name = self._extractor, self._loaded.model.main_input_name
        options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"}
        try:
            found = extractor(list(waves), **options)
        except ValueError:  # it has no default length to pad to
            found = extractor(list(waves), padding=True, **options)
        features: Tensor = found[name]
        return features

    @property
    def _extractor(self) -> Any:
        extractor = getattr(self._loaded.processor, "feature_extractor", None)
        if extractor is None:
            raise BadInput(
                "a speech model needs its processor, with a feature extractor",
                field="processor",
                fix=("give it with ", Setting("processor")),
            )
        return extractor

    @torch.inference_mode()
    def transcripts(self, features: Tensor) -> list[str]:
        """Transcribe recordings. features: N × features."""
        model: Any = self._loaded.model
        tokenizer: Any = self._loaded.tokenizer
        found: list[str] = []
        given = features.to(input_device(model), next(model.parameters()).dtype)
        with evaluating(model), quiet_transformers():
            for one in given.split(1):
                ids = model.generate(
                    **{model.main_input_name: one}, do_sample=False, num_beams=1, max_new_tokens=self.text.seqlen // 2
                )
                found += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]


class WordErrors:
    """Transcripts of recordings by a model in memory, and word errors if reference transcripts are known."""

    name = "Word error"
    figures: tuple[str, ...] = ("word_error", "alike")

    def __init__(self, inputs: SpeechInputs) -> None:
        self._inputs, self._text = inputs, inputs.text

    def evaluation(self, reporter: Reporter) -> dict[str, Recordings]:
        asked = self._text.recipe.evaluate
        if not asked.perplexity:
            return {}
        if asked.data is None:
            reporter.say(say(("No word error: name recordings with ", Setting("eval_data"), f" ({HINT}).")))
            return {}
        found = dict[str, Recordings]()
        for name in plain_names(asked.data):
            with about("eval_data", name):
                found[name] = read_recordings(name)
        return found

    def measure(self, data: Recordings, advance: Advance, walked: Walked | None = None) -> Transcribed:
        def measured() -> Transcribed:
            heard, errors, words = list[str](), 0, 0
            with self._text.loaded.whole(Reporter(quiet=True)):
                for row in data.rows:
                    heard += self._inputs.transcripts(self._inputs.features([row]))
                    advance(1 / len(data))
                    wrong, spoken = (0, 0) if row.said is None else word_errors(row.said, heard[-1])
                    errors, words = errors + wrong, words + spoken
            return Transcribed(heard=tuple(heard), word_error=errors / words if words else None)

        return self._text.processes.from_first(measured)
