"""Language models: windows of text to calibrate on, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.progress import Advance, Reporter
from coprune.data import EvaluationText, Windows, calibration_windows, evaluation_corpus_for, evaluation_tokens
from coprune.evaluation.perplexity import Perplexity, perplexity
from coprune.evaluation.streamed import streamed_perplexity
from coprune.evaluation.tasks.base import Data, Measured, Samples
from coprune.evaluation.texts import plain_names
from coprune.model.checkpoint.weights import InMemory
from coprune.model.opened import Loaded
from coprune.model.walk.activations import Activations
from coprune.model.walk.statistics import InputSample
from coprune.pruning.pruner import Solver
from coprune.recipe.recipe import Recipe
from coprune.run.checks import looks_at_inputs
from coprune.run.share import shared_perplexity

if TYPE_CHECKING:
    from coprune.run.session import Session


class TextTask:
    """A language model: windows of text, and perplexity."""

    measure_name = "Perplexity"

    def __init__(self, recipe: Recipe, loaded: Loaded) -> None:
        self._recipe, self._loaded = recipe, loaded
        self.seqlen = choose_seqlen(loaded.model, recipe)

    def calibration(self, solver: Solver, reporter: Reporter) -> Windows | None:
        return read_calibration(self._recipe, self._loaded, solver, self.seqlen, reporter)

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        return dict(read_evaluation(self._recipe, self._loaded, self.seqlen, reporter))

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        texts = {name: text for name, text in data.items() if isinstance(text, EvaluationText)}
        return probe_tokens(samples if isinstance(samples, Windows) else None, texts, self.seqlen, self._loaded)

    def batches(self, samples: Tensor) -> Sequence[Tensor]:
        return split_batches(samples, self._recipe, self._loaded.device)

    def measure(self, session: Session, data: Data, activations: Activations, advance: Advance) -> Perplexity:
        assert isinstance(data, EvaluationText)
        weights, blocks, structure, size = (
            session.loaded.weights,
            session.blocks,
            session.structure,
            session.recipe.batch_size,
        )

        def measure(text: EvaluationText) -> Perplexity:
            if isinstance(weights, InMemory):
                return self.measure_in_memory(text, advance)
            return streamed_perplexity(
                weights,
                blocks,
                structure,
                text.tokens,
                self.seqlen,
                size,
                text.token_bytes,
                advance=lambda done: advance(done / len(blocks)),
                activations=activations,
            )

        return shared_perplexity(session.processes, data, self.seqlen, measure)

    def measure_in_memory(self, data: Data, advance: Advance) -> Perplexity:
        assert isinstance(data, EvaluationText)
        windows = len(data.tokens) // self.seqlen
        return perplexity(
            self._loaded.model,
            data.tokens,
            self.seqlen,
            self._recipe.batch_size,
            data.token_bytes,
            advance=lambda done: advance(done / windows),
        )

    def line(self, which: str, name: str, found: Measured) -> str:
        assert isinstance(found, Perplexity)
        return f"Perplexity of the {which} model on {name} (sequence length {self.seqlen}): {found.value:.2f}"


def choose_seqlen(model: PreTrainedModel, recipe: Recipe) -> int:
    """The recipe's sequence length, or min(2048, the model's limit). Raises BadInput if it is above that limit."""
    config: Any = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if recipe.seqlen is None:
        return min(2048, int(limit)) if limit else 2048
    if limit and recipe.seqlen > int(limit):
        raise BadInput(f"seqlen {recipe.seqlen} is above this model's limit of {limit} positions.")
    return recipe.seqlen


def read_calibration(recipe: Recipe, loaded: Loaded, solver: Solver, seqlen: int, reporter: Reporter) -> Windows | None:
    """Draw the calibration samples; None if nothing needs them.

    A method without a statistic needs data for its layer errors alone, for which a few samples do.
    """
    nsamples = recipe.nsamples
    if solver.statistic is None and recipe.reconstruct == 0 and not looks_at_inputs(recipe):
        if not recipe.layer_error:
            return None
        nsamples = min(nsamples, -(-4 * InputSample.tokens // seqlen))
    reporter.say(f"Calibration: {nsamples} samples of {seqlen} tokens from {recipe.dataset}.")
    tokenizer, seed, folder = _tokenizer(loaded), recipe.seed, recipe.cache_dir
    return loaded.reuse.tokens(
        ("calibration", loaded.source, recipe.dataset, nsamples, seqlen, seed, folder),
        lambda: calibration_windows(recipe.dataset, tokenizer, nsamples, seqlen, seed, folder),
    )


def read_evaluation(recipe: Recipe, loaded: Loaded, seqlen: int, reporter: Reporter) -> dict[str, EvaluationText]:
    """Read every evaluation text, by name; empty if none is asked for or known."""
    if not recipe.evaluate:
        return {}
    if recipe.eval_data is None:
        name = evaluation_corpus_for(recipe.dataset)
        if name is None:
            reporter.say(f"No perplexity: {recipe.dataset} has no test split. Name a text with --eval-data.")
            return {}
        names = [name]
    else:
        names = plain_names(recipe.eval_data)
    tokenizer, folder, limit = _tokenizer(loaded), recipe.cache_dir, recipe.eval_tokens

    def read(name: str) -> EvaluationText:
        return loaded.reuse.tokens(
            ("evaluation", loaded.source, name, seqlen, folder, limit),
            lambda: evaluation_tokens(name, tokenizer, seqlen, folder, limit),
        )

    return {name: read(name) for name in names}


def probe_tokens(
    windows: Windows | None, texts: dict[str, EvaluationText], seqlen: int, loaded: Loaded
) -> torch.Tensor:
    """One sample (1 × S int64, at most 512 tokens) to prove the replay with: of the data, or random without any."""
    length = min(seqlen, 512)
    if windows is not None:
        sample = windows.tokens[:1, :length]
    elif texts:
        sample = next(iter(texts.values())).tokens[None, :length]
    else:
        vocabulary = loaded.model.config.get_text_config().vocab_size
        sample = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    return sample.to(loaded.device)


def samples_per_batch(recipe: Recipe, seqlen: int, device: torch.device) -> int:
    """Calibration samples that cross a block together: as many as were asked for, or as many as are fastest.

    On a CPU about 512 tokens, whose activations stay in its caches and leave the allocator alone. A rule and not a
    measurement, since sums over other batches differ in their last bits, and a run must give the same again.
    """
    # Reconstruction takes one step per batch, so there the size decides more than the time.
    tokens = 512 if device.type == "cpu" and not recipe.reconstruct else 4096
    return recipe.batch_size or max(1, tokens // seqlen)


def split_batches(windows: torch.Tensor, recipe: Recipe, device: torch.device) -> Sequence[torch.Tensor]:
    """Cut calibration samples (N × S) into batches on the device."""
    return torch.split(windows.to(device), samples_per_batch(recipe, windows.shape[1], device))


def _tokenizer(loaded: Loaded) -> PreTrainedTokenizerBase:
    if loaded.tokenizer is None:
        raise BadInput("a model in memory needs its tokenizer to read text: prune(model, tokenizer=...).")
    return loaded.tokenizer
