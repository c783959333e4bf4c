"""Language models: windows of text to calibrate on, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, about
from coprune.base.processes import Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Set, Setting, say
from coprune.data import EvaluationText, Windows, evaluation_corpus_for, evaluation_tokens
from coprune.data.bos import beginning, bos_of, text_at_bos, windows_at_bos
from coprune.data.corpora import holds_out
from coprune.data.mixture import length_of, marked, mixed, packed, reads_conversations, source_windows
from coprune.data.text import a_longest, first_of_a_length, of_each_length
from coprune.data.tokenizing import Tokenizes
from coprune.data.windows import Sampling, TooShort, draw_samples
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.bos_choice import BosChoice, Score, choose_bos
from coprune.evaluation.measurement import Measured, Perplexity
from coprune.evaluation.own_text import own_documents
from coprune.evaluation.perplexity import perplexity, shared_perplexity, streamed_perplexity
from coprune.evaluation.tasks.task import Data, Remember, Samples
from coprune.model.generation import positions_of
from coprune.model.loaded_model import Loaded
from coprune.model.walk.activations import Activations
from coprune.model.walk.inputs import InputSample
from coprune.model.walk.model_structure import ProvenModel
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import Source, counts_of, split_sources


class TextTask:
    """A language model: windows of text, and perplexity."""

    measure_name = "Perplexity"
    figures: tuple[str, ...] = ("perplexity",)
    _measured = "Perplexity is"

    def __init__(self, recipe: Recipe, loaded: Loaded, processes: Processes, remember: Remember) -> None:
        self._recipe, self._loaded = recipe, loaded
        self._processes, self._remember = processes, remember
        self.seqlen = choose_seqlen(loaded.model, recipe.calibrate.seqlen)
        self._tokenizer = beginning(loaded.tokenizer, recipe.calibrate.bos)

    def calibration(self, needed: bool, reporter: Reporter) -> Windows | None:
        recipe, nsamples = self._recipe, self._recipe.calibrate.samples
        if not needed:
            if not recipe.evaluate.layer_error:
                return None
            nsamples = min(nsamples, -(-4 * InputSample.tokens // self.seqlen))
        with about("dataset", recipe.calibrate.data):
            lengths = sorted({*sample_lengths(recipe.calibrate.data, self._loaded, self.seqlen)})
            said = " or ".join(map(str, lengths))
            reporter.say(f"Calibration: {nsamples} samples of {said} tokens from {recipe.calibrate.data}.")
            try:
                windows = self._samples(nsamples, reporter)
            except BadInput as error:
                if needed or "data" in recipe.calibrate.model_fields_set:
                    raise
                # No text was named, and pruning does not need one.
                reporter.say(f"No layer errors, since there is no calibration data: {error}")
                return None
            if recipe.calibrate.calibrate_on == "generated":
                require_generated(windows)
        if windows.text_tokens is not None and windows.tokens.numel() > windows.text_tokens:
            drawn = f"{windows.tokens.numel():,} tokens are drawn from a text of {windows.text_tokens:,}"
            reporter.say(f"Samples overlap, since {drawn}: fewer samples would do as well, more text would do better.")
        return windows_at_bos(windows, self._bos) if recipe.calibrate.bos == "every" else windows

    def _samples(self, nsamples: int, reporter: Reporter) -> Windows:
        recipe = self._recipe
        asked = recipe.evaluate
        window = self.seqlen if asked.perplexity and asked.data is None else None
        sampling = Sampling(nsamples, self.seqlen, recipe.calibrate.seed, recipe.model.cache_dir, window)
        named, loaded, processes = recipe.calibrate.data, self._loaded, self._processes
        windows = self._remember(
            ("calibration", *self._source, named, *sampling),
            lambda: read_samples(named, loaded, self._tokenizer, sampling, processes, reporter),
        )
        self.check_ids(windows.tokens)
        return windows

    @property
    def _source(self) -> tuple[str, str]:
        """Return what decides the tokens of a text."""
        return self._loaded.source, self._recipe.calibrate.bos

    @property
    def _bos(self) -> int:
        assert self._loaded.tokenizer is not None
        return bos_of(self._loaded.tokenizer, "every")

    def choose_bos(self, score: Score, samples: Samples | None, data: dict[str, Data]) -> BosChoice:
        """Choose the beginning of windows: as asked, or by the dense model's loss.

        Args:
            score: computes the dense model's loss.
            samples: from `calibration`.
            data: from `evaluation`.
        """
        texts = [one for one in data.values() if isinstance(one, EvaluationText) and not one.given]
        windows = None
        if isinstance(samples, Windows) and not samples.given:
            windows = first_of_a_length(samples.tokens)
        elif texts:
            windows = cut_windows(texts[0].tokens, self.seqlen)
        asked, tokenizer = self._recipe.calibrate.bos, self._loaded.tokenizer
        return self._processes.from_first(lambda: choose_bos(asked, tokenizer, windows, score))

    def samples_begun(self, choice: BosChoice, samples: Windows) -> Windows:
        """Return the samples of `calibration` with the chosen beginning."""
        return windows_at_bos(samples, self._bos) if self._shifts(choice) else samples

    def data_begun(self, choice: BosChoice, data: dict[str, Data]) -> dict[str, Data]:
        """Make the windows of evaluation data begin as chosen."""
        if not self._shifts(choice):
            return data
        return {
            name: text_at_bos(one, self._bos, self.seqlen) if isinstance(one, EvaluationText) else one
            for name, one in data.items()
        }

    def _shifts(self, choice: BosChoice) -> bool:
        """Return whether windows still need a BOS token, which only `bos="auto"` decides after reading."""
        return self._recipe.calibrate.bos == "auto" and choice.used == "every"

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        recipe = self._recipe
        if not recipe.evaluate.perplexity:
            return {}
        if recipe.evaluate.data is not None:
            return {name: self._read(name) for name in plain_names(recipe.evaluate.data)}
        found, why = dict[str, Data](), f"{recipe.calibrate.data} has no test split"
        for source in split_sources(recipe.calibrate.data):
            if source.is_own or reads_conversations(source):
                continue
            if not holds_out(source.name):
                if (name := evaluation_corpus_for(source.name)) is not None:
                    found[name] = self._read(name)
                continue
            column = source.options.get("column")
            try:
                text = self._read(source.name if column is None else f"{source.name}:{column}", held_out=True)
            except TooShort as error:
                why = say(error.cause)
                continue
            reporter.say(
                f"{self._measured} measured on {text.source}, {len(text.tokens):,} tokens that are held out for it."
            )
            found[source.name] = text
        if not found:
            reporter.say(say((f"No perplexity: {why}. Name a text with ", Setting("eval_data"), ".")))
        return found

    def _read(self, name: str, held_out: bool = False) -> EvaluationText:
        tokenizer, folder, limit = self._tokenizer, self._recipe.model.cache_dir, self._recipe.evaluate.tokens
        with about("eval_data", name):
            text = self._remember(
                ("evaluation", *self._source, name, self.seqlen, folder, limit, held_out),
                lambda: evaluation_tokens(name, tokenizer, self.seqlen, folder, limit, held_out),
            )
            self.check_ids(text.tokens)
        return text_at_bos(text, self._bos, self.seqlen) if self._recipe.calibrate.bos == "every" else text

    def check_ids(self, tokens: Tensor) -> None:
        """Refuse token ids that the model does not know: they may be handed over, or be of another's tokenizer."""
        vocabulary, largest = (
            getattr(self._loaded.model.config.get_text_config(), "vocab_size", None),
            int(tokens.max()),
        )
        if vocabulary is not None and largest >= vocabulary:  # CANINE hashes characters, and knows all
            raise BadInput(
                f"the token id {largest} is outside the model's vocabulary of {vocabulary}",
                fix="use the model's tokenizer",
            )

    def probe(self, samples: Samples | None, data: dict[str, Data]) -> Tensor:
        texts = [text for text in data.values() if isinstance(text, EvaluationText)]
        return probe_tokens(samples if isinstance(samples, Windows) else None, texts, self.seqlen, self._loaded)

    def batches(self, samples: Tensor, marks: Tensor | None = None) -> Sequence[Tensor]:
        return split_batches(samples, self._recipe, self._loaded.device, marks)

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Measured:
        assert isinstance(data, EvaluationText)
        size, blocks = self._recipe.calibrate.batch_size, len(model.blocks)

        def measure(text: EvaluationText) -> Perplexity:
            if not model.weights.streams:
                return self._perplexity_in_memory(text, advance)
            return streamed_perplexity(model, text, self.seqlen, size, lambda done: advance(done / blocks), activations)

        return shared_perplexity(self._processes, data, self.seqlen, measure)

    def measure_in_memory(self, data: Data, advance: Advance) -> Measured:
        assert isinstance(data, EvaluationText)
        return self._perplexity_in_memory(data, advance)

    def _perplexity_in_memory(self, data: EvaluationText, advance: Advance) -> Perplexity:
        windows = len(data.tokens) // self.seqlen
        return perplexity(
            self._loaded.model,
            data.tokens,
            self.seqlen,
            self._recipe.calibrate.batch_size,
            data.token_bytes,
            advance=lambda done: advance(done / windows),
        )


def choose_seqlen(model: PreTrainedModel, seqlen: int | None) -> int:
    """Return the requested sequence length, or min(2048, the model's limit). Raises BadInput above that limit."""
    config: Any = model.config.get_text_config()
    named = ("max_position_embeddings", "n_positions", "max_target_positions")
    limit = next((found for name in named if (found := getattr(config, name, None))), 0)
    limit = max(0, int(limit) - _unused_positions(model, limit))  # XLNet says -1 for none
    if seqlen is None:
        return min(2048, limit) if limit else 2048
    if limit and seqlen > limit:
        raise BadInput(
            f"seqlen {seqlen} is above this model's limit of {limit} positions", field="seqlen", value=seqlen
        )
    return seqlen


def _unused_positions(model: PreTrainedModel, limit: int) -> int:
    """Return the number of position embeddings before the first token's, where positions count from the padding index."""
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name]
    own = next((m for m in tables if m.num_embeddings == limit and m.padding_idx is not None), None)
    return 0 if own is None or own.padding_idx is None else own.padding_idx + 1


def probe_tokens(windows: Windows | None, texts: Sequence[EvaluationText], seqlen: int, loaded: Loaded) -> torch.Tensor:
    """Return one sample (1 × S int64, at most 512 tokens) for proving the replay: of the data, or random without any."""
    length = min(seqlen, 512)
    if windows is not None:
        sample = a_longest(windows.tokens)[:, :512]
    elif texts:
        sample = texts[0].tokens[None, :length]
    else:
        vocabulary = loaded.model.config.get_text_config().vocab_size
        sample = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    return sample.to(loaded.device)


def samples_per_batch(recipe: Recipe, seqlen: int, device: torch.device) -> int:
    """Return the number of calibration samples per batch: as asked, or as is fastest.

    On a CPU about 512 tokens, whose activations stay in its caches. A rule rather than a measurement, since sums over
    other batches differ in their last bits, and a run must be repeatable.
    """
    # Reconstruction takes one step per batch, so the size matters beyond speed.
    tokens = 512 if in_host_memory(device) and not recipe.prune.reconstruct.steps else 4096
    return recipe.calibrate.batch_size or max(1, tokens // seqlen)


def split_batches(
    windows: Tensor, recipe: Recipe, device: torch.device, marks: Tensor | None = None
) -> Sequence[Tensor]:
    """Cut calibration samples (N × S) into batches of one length on the device, in the order of their first samples.

    marks: N × S, of every token, cut likewise and given instead.
    """
    values, found = windows if marks is None else marks, list[tuple[int, Tensor]]()
    groups = list(of_each_length(windows))
    if len(groups) < 2:
        return torch.split(values.to(device), samples_per_batch(recipe, windows.shape[1], device))
    for rows, length in groups:
        for own in rows.split(samples_per_batch(recipe, length, device)):
            found.append((int(own[0]), values[own, :length].to(device)))
    # Shuffled, so that the first and last batches have several lengths like the others.
    return [batch for _, batch in sorted(found, key=lambda pair: pair[0])]


def read_samples(
    data: str,
    loaded: Loaded,
    tokenizer: Tokenizes | None,
    sampling: Sampling,
    processes: Processes,
    reporter: Reporter,
) -> Windows:
    """Draw calibration samples.

    Args:
        data: the sources, as `split_sources` reads them.
        loaded: the dense model.
        tokenizer: as it begins a text.
        sampling: how many, and how.
        processes: those that need them; the first one writes.
        reporter: hears of what takes long.

    Raises:
        BadInput: a source cannot be read, or has not enough.
    """
    sources, nsamples = split_sources(data), sampling.nsamples
    if len(sources) == 1 and sources[0].is_plain and not reads_conversations(sources[0]):
        return draw_samples(sources[0].name, tokenizer, sampling)
    counts, lengths = (
        counts_of([source.share for source in sources], nsamples),
        sample_lengths(data, loaded, sampling[1]),
    )
    found: list[tuple[Source, Windows]] = []
    each = zip(sources, counts, lengths, strict=True)
    for source, count, length in sorted(each, key=lambda one: one[0].is_own):
        if count == 0:
            continue  # so small a share of so few samples is none
        if source.is_own:
            windows = _own(source, loaded, sampling._replace(nsamples=count, seqlen=length), processes, reporter)
        else:
            own = sampling._replace(nsamples=count, seqlen=length)
            windows = source_windows(source, (tokenizer, loaded.tokenizer), own)
        found.append((source, windows))
    order = {source.name: place for place, source in enumerate(sources)}
    return mixed(sorted(found, key=lambda pair: order[pair[0].name]), sampling.seed)


def sample_lengths(data: str, loaded: Loaded, seqlen: int) -> list[int]:
    """Return the sample length of every source. Raises BadInput for more than the model has positions."""
    limit, found = positions_of(loaded.model), list[int]()
    for source in split_sources(data):
        length = length_of(source, seqlen)
        if limit is not None and length > limit:
            raise BadInput(
                f"samples of {source.name} have {length} tokens, and the model {limit} positions",
                field="dataset",
                value=data,
                fix="give it a smaller seqlen",
            )
        found.append(length)
    return found


def _own(source: Source, loaded: Loaded, sampling: Sampling, processes: Processes, reporter: Reporter) -> Windows:
    nsamples, seqlen, seed = sampling[:3]
    documents = processes.from_first(lambda: own_documents(source, loaded, nsamples, seqlen, seed, reporter))
    said = "the dense model's own text" if source.prompts is None else f"the dense model's answers to {source.prompts}"
    return packed(documents, nsamples, seqlen, None, said)


def require_generated(windows: Windows) -> Windows:
    """Raise BadInput if nobody says which tokens a model wrote, or it wrote none of them."""
    if windows.generated is None or not bool(windows.generated.any()):
        raise BadInput(
            "no token of the calibration data is marked as generated",
            field="calibrate_on",
            value="generated",
            fix=("calibrate on what a model wrote, such as ", Set("dataset", "self"), ", or leave it out"),
        )
    return marked(windows)
