"""Encoders with decoders that write one text for another: pairs to calibrate on, and the perplexity of targets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput, about
from coprune.base.progress import Advance, Reporter
from coprune.data import EvaluationText, Windows
from coprune.data.pairs import (
    EvaluationPairs,
    Pairs,
    alike,
    from_text,
    holds_pairs,
    pair_fingerprint,
    read_pairs,
    tokenised,
)
from coprune.evaluation.batches import default_batch_size, inference_logits
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.perplexity import aggregate, window_nll
from coprune.evaluation.tasks.task import Data, Samples
from coprune.evaluation.tasks.text_task import samples_per_batch
from coprune.evaluation.tasks.whole_texts import WholeTextTask
from coprune.model.walk.activations import Activations
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.walk import streamed_logits

LENGTH = 512
"""Tokens of a source, or of a target, if nobody asks for another number: more than most pairs have."""
HELD_OUT = 10
"""Of so many pairs of the user's own one is measured on, where nothing else is named."""


class PairTask(WholeTextTask):
    """An encoder with a decoder."""

    measure_name = "Perplexity of targets"
    _measured = "Perplexity of targets is"
    _usual_length = LENGTH

    @property
    def start(self) -> int:
        """The token that the decoder begins with."""
        model: Any = self._loaded.model
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        with suppress(ValueError, AttributeError):  # of a configuration that does not say
            if shift is not None:
                return int(shift(labels=torch.tensor([[5, 6]]))[0, 0])
        config = model.config
        said = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        return next((int(one) for one in said if one is not None), 0)

    def as_read(self, windows: Windows) -> Windows:
        """Return windows of text as pairs, and pairs as they are."""
        if isinstance(windows.tokens, Pairs):
            return windows
        return from_text(super().as_read(windows), self._loaded.tokenizer, self._marks, self.start)

    def own_pairs(self, reporter: Reporter) -> Windows | None:
        """Return the pairs of the calibration data; None where it is plain text."""
        if not holds_pairs(self._recipe.calibrate.data):
            return None
        return self._tokenised(self._rows(), self._recipe.calibrate.data)

    def _samples(self, nsamples: int, reporter: Reporter) -> Windows:
        name = self._recipe.calibrate.data
        if not holds_pairs(name):
            return super()._samples(nsamples, reporter)
        rows = self._rows()
        if len(rows) < nsamples:
            raise BadInput(f"{name} has {len(rows)} pairs to calibrate on, fewer than {nsamples}", field="nsamples")
        return self._tokenised(rows[:nsamples], name)

    def _rows(self) -> list[tuple[str, str]]:
        """Return the pairs of the calibration data in a random order, without those that are measured on."""
        rows = read_pairs(self._recipe.calibrate.data)
        if self._recipe.evaluate.perplexity and self._recipe.evaluate.data is None:
            rows = rows[: len(rows) - len(rows) // HELD_OUT]
        random.Random(self._recipe.calibrate.seed).shuffle(rows)
        return rows

    def _tokenised(self, rows: Sequence[tuple[str, str]], name: str) -> Windows:
        tokenizer = self._loaded.tokenizer
        if tokenizer is None:
            raise BadInput("a model in memory needs its tokenizer to read text", field="processor")
        pairs = tokenised(rows, tokenizer, self.start, self.seqlen)
        self.check_ids(pairs.source)
        self.check_ids(pairs.written)
        return Windows(pairs, pair_fingerprint(pairs), name)

    def _read(self, name: str, held_out: bool = False) -> EvaluationText:
        if holds_pairs(name):
            with about("eval_data", name):
                rows = read_pairs(name)
                return EvaluationPairs.of(
                    self._tokenised(rows[len(rows) - len(rows) // HELD_OUT :] if held_out else rows, name)
                )
        text = super()._read(name, held_out)
        windows = text.tokens[: len(text.tokens) // self.seqlen * self.seqlen].view(-1, self.seqlen)
        return EvaluationPairs.of(
            from_text(Windows(windows, "", text.source, text.given), self._loaded.tokenizer, self._marks, self.start)
        )

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        given = samples.tokens if isinstance(samples, Windows) else None
        pairs = [given, *(one.pairs for one in data.values() if isinstance(one, EvaluationPairs))]
        first = next((one for one in pairs if isinstance(one, Pairs)), None)
        if first is None:
            vocabulary = self._loaded.model.config.get_text_config().vocab_size
            random_ids = torch.randint(
                vocabulary, (1, min(self.seqlen, 64)), generator=torch.Generator().manual_seed(0)
            )
            first = Pairs.of(random_ids, random_ids)
        longest = int((first.written >= 0).sum(dim=1).argmax())
        _, one = next(alike(first[longest : longest + 1]))
        return Pairs.of(one.source.to(self._loaded.device), one.written.to(self._loaded.device))

    def batches(self, samples: Tensor, marks: Tensor | None = None) -> Sequence[Tensor]:
        assert isinstance(samples, Pairs)
        assert marks is None
        found = list[tuple[int, Tensor]]()
        for rows, pairs in alike(samples):
            size = samples_per_batch(self._recipe, max(pairs.shape[1], *pairs.source.shape[1:]), self._loaded.device)
            parts = zip(rows.split(size), pairs.split(size), strict=True)
            found += [(int(own[0]), part.to(self._loaded.device)) for own, part in parts]
        return [batch for _, batch in sorted(found, key=lambda pair: pair[0])]

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Perplexity:
        assert isinstance(data, EvaluationPairs)
        own = self._processes.share(data.pairs)
        assert isinstance(own, Pairs)
        if model.weights.streams and len(own):
            blocks, batches = len(model.blocks), self._evaluated(own)
            scores = streamed_logits(
                model,
                [batch for _, batch in batches],
                lambda logits, batch: _summed_nll(logits, batch),
                lambda done: advance(done / blocks),
                activations,
            )
            nll = _in_order([rows for rows, _ in batches], scores)
        else:
            nll = self._in_memory(own, advance)
        return self._perplexity(torch.cat(self._processes.gather(nll)), data)

    def measure_in_memory(self, data: Data, advance: Advance) -> Perplexity:
        assert isinstance(data, EvaluationPairs)
        return self._perplexity(self._in_memory(data.pairs, advance), data)

    def _in_memory(self, pairs: Pairs, advance: Advance) -> Tensor:
        rows, scores = list[Tensor](), list[Tensor]()
        with inference_logits(self._loaded.model) as logits_of:
            for own, batch in self._evaluated(pairs) if len(pairs) else ():
                rows.append(own)
                scores.append(_summed_nll(logits_of(batch), batch))
                advance(len(own) / len(pairs))
        return _in_order(rows, scores)

    def _evaluated(self, pairs: Pairs) -> list[tuple[Tensor, Pairs]]:
        """Return batches of pairs of equal lengths, with their numbers."""
        size = self._recipe.calibrate.batch_size or default_batch_size(self.seqlen, self._vocabulary)
        found = []
        for rows, own in alike(pairs):
            parts = zip(rows.split(size), own.split(size), strict=True)
            found += [(numbers, part.to(self._loaded.device)) for numbers, part in parts]
        return found

    @property
    def _vocabulary(self) -> int:
        return int(self._loaded.model.config.get_text_config().vocab_size)

    def _perplexity(self, nll: Tensor, data: EvaluationPairs) -> Perplexity:
        """Compute the perplexity. nll: of every pair, summed over the tokens of its target."""
        count = len(data.tokens)
        # Every token counts alike, so that the mean over pairs is the mean over tokens.
        found = aggregate(nll * len(nll) / count, data.pairs.shape[1])
        return found.model_copy(update={"targets": True, "tokens": count})


def _summed_nll(logits: Tensor, batch: Tensor) -> Tensor:
    """Return the negative log likelihood of every target's tokens in nats: B float64, on the CPU. As in `window_nll`."""
    tokens = batch.written if isinstance(batch, Pairs) else batch
    return (window_nll(logits, tokens) * (tokens.shape[1] - 1)).cpu()


def _in_order(rows: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return the scores of all pairs in their order. rows: the numbers of the pairs of each batch."""
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat(list(scores))[torch.cat(list(rows)).argsort()]
