"""Encoder-decoders that turn one text into another: calibration pairs, and the perplexity of targets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from coprune.base.errors import BadInput, about
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Set
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
from coprune.data.windows import Samples, Windows
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.perplexity import aggregate, window_nll
from coprune.evaluation.tasks.task import Data, Remember, Walked, joined, read_anew, scored
from coprune.evaluation.tasks.text_task import TextInputs, samples_per_batch
from coprune.model.loaded_model import Loaded
from coprune.recipe.recipe import Recipe

LENGTH = 512
"""Default maximum tokens of a source, or of a target; more than most pairs have."""
HELD_OUT = 10
"""One in this many of the user's pairs is held out for evaluation, unless other data is named."""


class PairInputs:
    """Pairs from a file, or made from plain text. Arguments and errors as for `TextInputs`."""

    def __init__(
        self, recipe: Recipe, loaded: Loaded, processes: Processes = ALONE, remember: Remember = read_anew
    ) -> None:
        self.text = TextInputs(recipe, loaded, processes, remember, whole=True, usual=LENGTH)
        self._recipe, self._loaded, self._named = recipe, loaded, recipe.calibrate.data

    @property
    def start(self) -> int:
        """The first token of the decoder."""
        model: Any = self._loaded.model
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        with suppress(ValueError, AttributeError):  # a configuration without it
            if shift is not None:
                return int(shift(labels=torch.tensor([[5, 6]]))[0, 0])
        config = model.config
        said = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        return next((int(one) for one in said if one is not None), 0)

    def calibration(self, needed: bool, reporter: Reporter) -> Samples[Pairs] | None:
        if holds_pairs(self._named):
            return self.text.calibrated(needed, reporter, self._drawn)
        windows = self.text.calibration(needed, reporter)
        return None if windows is None else self.made_of(windows)

    def made_of(self, windows: Windows) -> Samples[Pairs]:
        """Make pairs from windows of text, which include the special tokens around them."""
        return from_text(windows, self._loaded.tokenizer, self.text.marks, self.start)

    def own_pairs(self, reporter: Reporter) -> Samples[Pairs] | None:
        """Return the pairs of the calibration data; None if it is plain text."""
        return self._tokenised(self._rows(), self._named) if holds_pairs(self._named) else None

    def _drawn(self, nsamples: int, reporter: Reporter) -> Samples[Pairs]:
        rows = self._rows()
        if len(rows) < nsamples:
            cause = f"{self._named} has {len(rows)} pairs to calibrate on, fewer than {nsamples}"
            raise BadInput(cause, field="nsamples", fix=("use at most ", Set("nsamples", len(rows))))
        return self._tokenised(rows[:nsamples], self._named)

    def _rows(self) -> list[tuple[str, str]]:
        """Return the pairs of the calibration data in random order, without the held-out ones."""
        rows = read_pairs(self._named)
        if self._recipe.evaluate.perplexity and self._recipe.evaluate.data is None:
            rows = rows[: len(rows) - len(rows) // HELD_OUT]
        random.Random(self._recipe.calibrate.seed).shuffle(rows)
        return rows

    def _tokenised(self, rows: Sequence[tuple[str, str]], name: str) -> Samples[Pairs]:
        pairs = tokenised(rows, self.text.tokenizer, self.start, self.text.seqlen)
        self.text.check_ids(pairs.source)
        self.text.check_ids(pairs.written)
        return Samples(pairs, pair_fingerprint(pairs), name)

    def opened(self, name: str, held_out: bool = False) -> EvaluationPairs:
        """Open pairs for evaluation, or a text to make them from. held_out: whether to open the held-out part."""
        if not holds_pairs(name):
            text = self.text.opened(name, held_out)
            windows = cut_windows(text.tokens, self.text.seqlen)
            return EvaluationPairs.of(self.made_of(Windows(windows, "", text.source, text.given)))
        with about("eval_data", name):
            rows = read_pairs(name)
            return EvaluationPairs.of(
                self._tokenised(rows[len(rows) - len(rows) // HELD_OUT :] if held_out else rows, name)
            )

    def probe(self, samples: Samples[Pairs] | None, data: Mapping[str, Data]) -> Tensor:
        given = [] if samples is None else [samples.tokens]
        given += [one.pairs for one in data.values() if isinstance(one, EvaluationPairs)]
        if not given:
            shape, seeded = (1, min(self.text.seqlen, 64)), torch.Generator().manual_seed(0)
            tokens = torch.randint(self.text.vocabulary, shape, generator=seeded)
            given = [Pairs.of(tokens, tokens)]
        longest = int((given[0].written >= 0).sum(dim=1).argmax())
        _, one = next(alike(given[0][longest : longest + 1]))
        found: Pairs = one.to(self._loaded.device)
        return found

    def batches(self, samples: Pairs, marks: Tensor | None = None) -> Sequence[Tensor]:
        found, device = list[tuple[int, Tensor]](), self._loaded.device
        for rows, pairs in alike(samples):
            size = samples_per_batch(self._recipe, max(pairs.shape[1], *pairs.source.shape[1:]), device)
            found += [
                (int(own[0]), part.to(device)) for own, part in zip(rows.split(size), pairs.split(size), strict=True)
            ]
        return [batch for _, batch in sorted(found, key=lambda pair: pair[0])]


class TargetPerplexity:
    """Perplexity of the targets of pairs."""

    name = "Perplexity of targets"
    figures: tuple[str, ...] = ("perplexity",)

    def __init__(self, inputs: PairInputs) -> None:
        self._inputs = inputs

    def evaluation(self, reporter: Reporter) -> dict[str, EvaluationPairs]:
        return self._inputs.text.evaluation("Perplexity of targets is", reporter, self._inputs.opened)

    def measure(self, data: EvaluationPairs, advance: Advance, walked: Walked | None = None) -> Perplexity:
        text, parts = self._inputs.text, list[tuple[Pairs, tuple[Tensor, Tensor]]]()
        own, size = text.processes.share(torch.arange(len(data.pairs))), text.measured_at_once(text.vocabulary)
        for rows, pairs in alike(data.pairs[own]) if len(own) else ():
            batches = zip(pairs.split(size), own[rows].split(size), strict=True)
            parts += [(batch, (numbers, batch.written)) for batch, numbers in batches]
        found = scored(text.loaded, parts, _numbered_nll, (advance, len(own)), walked)
        numbered, count = joined(text.processes, found), len(data.tokens)
        nll = numbered[numbered[:, 0].argsort(), 1]
        # Weighted by the number of tokens, so that the mean over pairs is the mean over tokens.
        figure = aggregate(nll * len(nll) / count, data.pairs.shape[1])
        return figure.model_copy(update={"targets": True, "tokens": count})


def _numbered_nll(logits: Tensor, beside: tuple[Tensor, Tensor]) -> Tensor:
    """Return each pair's number and its target's summed negative log likelihood in nats: B × 2 float64, on the CPU.

    beside: the pairs' numbers (B int64), and the decoder's inputs (B × T int64).
    """
    numbers, tokens = beside
    return torch.stack([numbers.double(), (window_nll(logits, tokens) * (tokens.shape[1] - 1)).cpu()], dim=1)
