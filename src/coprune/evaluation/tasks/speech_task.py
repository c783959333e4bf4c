"""Models that write what they hear: recordings to calibrate on, and word errors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coprune.base.errors import BadInput, about
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Setting, say
from coprune.data import Windows
from coprune.data.pairs import Pairs, begun, pair_fingerprint
from coprune.data.speech import HINT, Recording, Recordings, read_recordings, waveform, word_errors
from coprune.data.text import NOTHING, padded
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.measurement import Transcribed
from coprune.evaluation.tasks.pair_task import PairTask
from coprune.evaluation.tasks.task import Data, Samples
from coprune.model.checkpoint.load import evaluating, quiet_transformers
from coprune.model.walk.activations import Activations
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.model_structure import ProvenModel


class SpeechTask(PairTask):
    """An encoder of sound with a decoder of text."""

    measure_name = "Word error"
    figures = ("word_error", "alike")

    def _samples(self, nsamples: int, reporter: Reporter) -> Windows:
        name = self._recipe.calibrate.data
        found = read_recordings(name)
        order = list(range(len(found)))
        random.Random(self._recipe.calibrate.seed).shuffle(order)
        rows = [found.rows[row] for row in order[:nsamples]]
        if len(rows) < nsamples:
            reporter.say(f"{name} has {len(rows)} recordings, so {len(rows)} samples are all that there are.")
        features, said = self._features(rows), [row.said for row in rows]
        if None in said:
            with self._loaded.whole(Reporter(quiet=True)):
                own = self._transcripts(features)
            said = [heard if words is None else words for words, heard in zip(said, own, strict=True)]
        limits: dict[str, Any] = {"truncation": True, "max_length": self.seqlen}
        tokens = [torch.tensor([self._words(text, **limits)]) for text in said]
        pairs = Pairs.of(features, padded([begun(one, self.start) for one in tokens], NOTHING))
        self.check_ids(pairs.written)
        how = " (and what the dense model hears in them)" if any(row.said is None for row in rows) else ""
        return Windows(pairs, pair_fingerprint(pairs), f"{found.source}{how}")

    def own_pairs(self, reporter: Reporter) -> Windows | None:
        """Return the recordings of the calibration data with their words. Raises BadInput if words are missing."""
        rows = read_recordings(self._recipe.calibrate.data).rows
        if (silent := next((row for row in rows if row.said is None), None)) is not None:
            raise BadInput(f"nobody tells what is said in {silent.file}", field="dataset", fix=HINT)
        return self._samples(len(rows), reporter)

    def _words(self, text: str | None, **options: Any) -> list[int]:
        tokenizer: Any = self._loaded.tokenizer
        ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
        return ids

    def _features(self, rows: Sequence[Recording]) -> Tensor:
        """Return the features of recordings: N × features."""
        extractor = self._extractor
        return self._heard([waveform(row.file, extractor.sampling_rate) for row in rows])

    def _heard(self, waves: Sequence[Any]) -> Tensor:
        extractor, name = self._extractor, self._loaded.model.main_input_name
        options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"}
        try:
            found = extractor(list(waves), **options)
        except ValueError:  # it pads to no length of its own
            found = extractor(list(waves), padding=True, **options)
        features: Tensor = found[name]
        return features

    @property
    def _extractor(self) -> Any:
        extractor = getattr(self._loaded.processor, "feature_extractor", None)
        if extractor is None:
            raise BadInput(
                "a model that hears needs its processor, with what makes features of sound",
                field="processor",
                fix=("give it with ", Setting("processor")),
            )
        return extractor

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        asked = self._recipe.evaluate
        if not asked.perplexity:
            return {}
        if asked.data is None:
            reporter.say(say(("No word error: name recordings with ", Setting("eval_data"), f" ({HINT}).")))
            return {}
        found = dict[str, Data]()
        for name in plain_names(asked.data):
            with about("eval_data", name):
                found[name] = read_recordings(name)
        return found

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        if isinstance(samples, Windows):
            return super().probe(samples, data)
        noise = np.random.default_rng(0).normal(size=self._extractor.sampling_rate).astype(np.float32)
        tokens = torch.tensor([self._words("a b c")])
        there = self._loaded.device
        return Pairs.of(self._heard([noise]).to(there), begun(tokens, self.start).to(there))

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Transcribed:  # type: ignore[override]
        def measured() -> Transcribed:
            with self._loaded.whole(Reporter(quiet=True)):
                return self.measure_in_memory(data, advance)

        return self._processes.from_first(measured)

    def measure_in_memory(self, data: Data, advance: Advance) -> Transcribed:  # type: ignore[override]
        assert isinstance(data, Recordings)
        heard = []
        for row in data.rows:
            heard += self._transcripts(self._features([row]))
            advance(1 / len(data))
        said = [row.said for row in data.rows]
        errors = [word_errors(one, other) for one, other in zip(said, heard, strict=True) if one is not None]
        wrong, words = sum(error for error, _ in errors), sum(count for _, count in errors)
        return Transcribed(heard=tuple(heard), word_error=wrong / words if words else None)

    @torch.inference_mode()
    def _transcripts(self, features: Tensor) -> list[str]:
        model: Any = self._loaded.model
        tokenizer: Any = self._loaded.tokenizer
        found: list[str] = []
        given = features.to(input_device(model), next(model.parameters()).dtype)
        with evaluating(model), quiet_transformers():
            for one in given.split(1):
                ids = model.generate(
                    **{model.main_input_name: one}, do_sample=False, num_beams=1, max_new_tokens=self.seqlen // 2
                )
                found += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]
