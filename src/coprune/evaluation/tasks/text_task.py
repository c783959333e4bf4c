"""Language models: calibration on windows of text, and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, about
from coprune.base.processes import ALONE, Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Set, Setting, say
from coprune.data.bos import beginning, bos_of, text_at_bos, windows_at_bos
from coprune.data.corpora import evaluation_corpus_for, holds_out
from coprune.data.marks import Marks
from coprune.data.mixture import length_of, mixed, packed, reads_conversations, source_windows
from coprune.data.text import a_longest, first_of_a_length, of_each_length
from coprune.data.tokenizing import Tokenizes
from coprune.data.windows import EvaluationText, Samples, Sampling, TooShort, Windows, draw_samples, evaluation_tokens
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.batches import batches, cut_windows, default_batch_size
from coprune.evaluation.bos_choice import BosChoice, Score, choose_bos
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.own_text import own_documents
from coprune.evaluation.perplexity import aggregate, window_nll
from coprune.evaluation.tasks.task import Data, Remember, Walked, joined, read_anew, scored, texts_of
from coprune.model.checkpoint.load import WHAT
from coprune.model.generation import positions_of
from coprune.model.loaded_model import Loaded
from coprune.model.walk.inputs import InputSample
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import Source, counts_of, split_sources

Batch = TypeVar("Batch", bound=Tensor)
Text = TypeVar("Text", bound=EvaluationText)
PROBED = 512
"""Maximum number of tokens in the sample on which the walk is proved."""


class TextInputs:
    """Windows of text.

    Args:
        recipe: the recipe.
        loaded: the model.
        processes: the processes that read and measure together.
        remember: returns tokenised texts, from the store if they were tokenised before.
        whole: whether the model reads whole texts and does not generate; its windows then include the special tokens that its
            tokenizer puts around a text.
        usual: default maximum length of a text; None for the model's limit.

    Raises:
        BadInput: a setting only applies to models that generate text.
    """

    def __init__(
        self,
        recipe: Recipe,
        loaded: Loaded,
        processes: Processes = ALONE,
        remember: Remember = read_anew,
        whole: bool = False,
        usual: int | None = None,
    ) -> None:
        self.recipe, self.loaded, self.processes, self._remember = recipe, loaded, processes, remember
        self.seqlen = choose_seqlen(loaded.model, recipe.calibrate.seqlen)
        if usual is not None and recipe.calibrate.seqlen is None:
            self.seqlen = min(usual, self.seqlen)
        self._tokenizer = beginning(loaded.tokenizer, recipe.calibrate.bos)
        self.whole, self.marks = whole, Marks()
        if whole:
            what = f"{loaded.source} {WHAT[loaded.task]}"
            if recipe.evaluate.runs_tasks:
                raise BadInput(f"{what}, and zero-shot tasks are for models that generate text", field="tasks")
            if any(source.is_own for source in split_sources(recipe.calibrate.data)):
                cause = f"{what}, so it cannot generate calibration text"
                raise BadInput(
                    cause, field="dataset", value=recipe.calibrate.data, fix=("name a text with ", Setting("dataset"))
                )
            self.marks = Marks.of(loaded.tokenizer) if recipe.calibrate.bos == "auto" else Marks()

    @property
    def text(self) -> TextInputs:
        return self

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises BadInput for a model in memory without one."""
        if self.loaded.tokenizer is None:
            needs = "a model in memory needs its tokenizer to read text"
            raise BadInput(needs, field="processor", fix=("give it with ", Setting("processor")))
        return self.loaded.tokenizer

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return int(self.loaded.model.config.get_text_config().vocab_size)

    def calibration(self, needed: bool, reporter: Reporter) -> Windows | None:
        windows = self.calibrated(needed, reporter, self._drawn)
        if windows is None:
            return None
        return self.as_read(windows_at_bos(windows, self._bos) if self.recipe.calibrate.bos == "every" else windows)

    def calibrated(
        self, needed: bool, reporter: Reporter, draw: Callable[[int, Reporter], Samples[Batch]]
    ) -> Samples[Batch] | None:
        """Draw calibration samples as in `calibration`. draw: draws a number of samples, reporting slow work."""
        recipe, nsamples = self.recipe, self.recipe.calibrate.samples
        if not needed:
            if not recipe.evaluate.layer_error:
                return None
            nsamples = min(nsamples, -(-4 * InputSample.tokens // self.seqlen))
        with about("dataset", recipe.calibrate.data):
            lengths = sorted({*sample_lengths(recipe.calibrate.data, self.loaded, self.seqlen)})
            said = " or ".join(map(str, lengths))
            reporter.say(f"Calibration: {nsamples} samples of {said} tokens from {recipe.calibrate.data}.")
            try:
                samples = draw(nsamples, reporter)
            except BadInput as error:
                if needed or "data" in recipe.calibrate.model_fields_set:
                    raise
                # No text was named, and pruning does not need one.
                reporter.say(f"No layer errors, since there is no calibration data: {error}")
                return None
            if recipe.calibrate.calibrate_on == "generated":
                require_generated(samples)
        if samples.text_tokens is not None and samples.tokens.numel() > samples.text_tokens:
            drawn = f"{samples.tokens.numel():,} tokens are drawn from a text of {samples.text_tokens:,}"
            reporter.say(f"Samples overlap, since {drawn}: fewer samples would do as well, more text would do better.")
        return samples

    def _drawn(self, nsamples: int, reporter: Reporter) -> Windows:
        recipe = self.recipe
        asked = recipe.evaluate
        window = self.seqlen if asked.perplexity and asked.data is None else None
        sampling = Sampling(nsamples, self.seqlen, recipe.calibrate.seed, recipe.model.cache_dir, window)
        data, loaded, processes = recipe.calibrate.data, self.loaded, self.processes
        windows = self._remember(
            ("calibration", *self._source, data, *sampling),
            lambda: read_samples(data, loaded, self._tokenizer, sampling, processes, reporter),
        )
        self.check_ids(windows.tokens)
        return windows

    def as_read(self, windows: Windows) -> Windows:
        """Return windows of text as the model reads them: with special tokens around them, if it reads whole texts."""
        return self.marks.around_samples(windows) if self.whole else windows

    @property
    def _source(self) -> tuple[str, str]:
        """Return what decides the tokens of a text, for a key."""
        return self.loaded.source, self.recipe.calibrate.bos

    @property
    def _bos(self) -> int:
        return bos_of(self.tokenizer, "every")

    def choose_bos(self, score: Score, samples: Windows | None, data: Mapping[str, Data]) -> BosChoice:
        """Choose where windows get a BOS token: as requested, or by the dense model's loss; whole texts leave no choice.

        Args:
            score: computes the dense model's loss.
            samples: from `calibration`.
            data: the evaluation data.
        """
        if self.whole:
            return BosChoice()
        texts = [text for text in texts_of(data) if not text.given]
        windows = None
        if samples is not None and not samples.given:
            windows = first_of_a_length(samples.tokens)
        elif texts:
            windows = cut_windows(texts[0].tokens, self.seqlen)
        asked, tokenizer = self.recipe.calibrate.bos, self.loaded.tokenizer
        return self.processes.from_first(lambda: choose_bos(asked, tokenizer, windows, score))

    def samples_begun(self, choice: BosChoice, samples: Windows) -> Windows:
        """Return the samples of `calibration` with BOS tokens as chosen."""
        return windows_at_bos(samples, self._bos) if self._shifts(choice) else samples

    def data_begun(self, choice: BosChoice, data: dict[str, Data]) -> dict[str, Data]:
        """Return the evaluation data with BOS tokens as chosen."""
        if not self._shifts(choice):
            return data
        begun = [text_at_bos(text, self._bos, self.seqlen) for text in texts_of(data)]
        return dict(zip(data, begun, strict=True))

    def _shifts(self, choice: BosChoice) -> bool:
        """Return whether windows still need a BOS token, since `bos="auto"` is decided only after reading."""
        return self.recipe.calibrate.bos == "auto" and choice.used == "every"

    def evaluation(self, measured: str, reporter: Reporter, read: Callable[[str, bool], Text]) -> dict[str, Text]:
        """Open all evaluation data, by name.

        Args:
            measured: the measurement, as the subject of a sentence with its verb.
            reporter: told about held-out text.
            read: opens the data of a name; True for the part held out from calibration.
        """
        recipe = self.recipe
        if not recipe.evaluate.perplexity:
            return {}
        if recipe.evaluate.data is not None:
            return {name: read(name, False) for name in plain_names(recipe.evaluate.data)}
        found, why = dict[str, Text](), f"{recipe.calibrate.data} has no test split"
        for source in split_sources(recipe.calibrate.data):
            if source.is_own or reads_conversations(source):
                continue
            if not holds_out(source.name):
                if (name := evaluation_corpus_for(source.name)) is not None:
                    found[name] = read(name, False)
                continue
            column = source.options.get("column")
            try:
                text = read(source.name if column is None else f"{source.name}:{column}", True)
            except TooShort as error:
                why = say(error.cause)
                continue
            reporter.say(f"{measured} measured on {text.source}, {len(text.tokens):,} tokens that are held out for it.")
            found[source.name] = text
        if not found:
            reporter.say(say((f"No perplexity: {why}. Name a text with ", Setting("eval_data"), ".")))
        return found

    def opened(self, name: str, held_out: bool = False) -> EvaluationText:
        """Open a text for evaluation, as the model reads it. held_out: whether to open the held-out part."""
        tokenizer, folder, limit = self._tokenizer, self.recipe.model.cache_dir, self.recipe.evaluate.tokens
        with about("eval_data", name):
            text = self._remember(
                ("evaluation", *self._source, name, self.seqlen, folder, limit, held_out),
                lambda: evaluation_tokens(name, tokenizer, self.seqlen, folder, limit, held_out),
            )
            self.check_ids(text.tokens)
        if self.recipe.calibrate.bos == "every":
            text = text_at_bos(text, self._bos, self.seqlen)
        return self.marks.around_text(text, self.seqlen) if self.whole else text

    def check_ids(self, tokens: Tensor) -> None:
        """Raise BadInput for token ids outside the model's vocabulary, passed by the caller or from another tokenizer."""
        vocabulary = getattr(self.loaded.model.config.get_text_config(), "vocab_size", None)
        largest = int(tokens.max())
        if vocabulary is not None and largest >= vocabulary:  # CANINE hashes characters, so it accepts all ids
            raise BadInput(
                f"the token id {largest} is outside the model's vocabulary of {vocabulary}",
                fix="use the model's tokenizer",
            )

    def probe(self, samples: Windows | None, data: Mapping[str, Data]) -> Tensor:
        length, texts = min(self.seqlen, PROBED), texts_of(data)
        if samples is not None:
            sample = a_longest(samples.tokens)[:, :PROBED]
        elif texts:
            sample = texts[0].tokens[None, :length]
        else:
            sample = torch.randint(self.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        return sample.to(self.loaded.device)

    def batches(self, samples: Tensor, marks: Tensor | None = None) -> Sequence[Tensor]:
        return split_batches(samples, self.recipe, self.loaded.device, marks)

    def measured_at_once(self, values: int) -> int:
        """Return the number of windows per evaluation batch. values: outputs of the model per token."""
        return self.recipe.calibrate.batch_size or default_batch_size(self.seqlen, values)

    def own_batches(self, tokens: Tensor, values: int) -> list[Tensor]:
        """Return this process's share of an evaluation text's windows, in batches. values: outputs of the model per token."""
        own = self.processes.share(cut_windows(tokens, self.seqlen))
        return list(batches(own, self.measured_at_once(values))) if len(own) else []


class TextPerplexity:
    """Perplexity of windows of text."""

    name = "Perplexity"
    figures: tuple[str, ...] = ("perplexity",)

    def __init__(self, inputs: TextInputs) -> None:
        self._inputs = inputs

    def evaluation(self, reporter: Reporter) -> dict[str, EvaluationText]:
        return self._inputs.evaluation("Perplexity is", reporter, self._inputs.opened)

    def measure(self, data: EvaluationText, advance: Advance, walked: Walked | None = None) -> Perplexity:
        inputs = self._inputs
        own = inputs.own_batches(data.tokens, inputs.vocabulary)
        parts, progress = zip(own, own, strict=True), (advance, sum(map(len, own)))
        nll = scored(inputs.loaded, parts, lambda logits, tokens: window_nll(logits, tokens).cpu(), progress, walked)
        sizes = cut_windows(data.token_bytes, inputs.seqlen)
        return aggregate(joined(inputs.processes, nll), inputs.seqlen, sizes)


def choose_seqlen(model: PreTrainedModel, seqlen: int | None) -> int:
    """Return the requested sequence length, or min(2048, the model's limit). Raises BadInput above that limit."""
    config: Any = model.config.get_text_config()
    named = ("max_position_embeddings", "n_positions", "max_target_positions")
    limit = next((found for name in named if (found := getattr(config, name, None))), 0)
    limit = max(0, int(limit) - _unused_positions(model, limit))  # XLNet has -1 for no limit
    return seqlen_within(limit, seqlen)


def seqlen_within(limit: int, seqlen: int | None) -> int:
    """Return the requested sequence length, or min(2048, limit); 0 is no limit. Raises BadInput above the limit."""
    if seqlen is None:
        return min(2048, limit) if limit else 2048
    if limit and seqlen > limit:
        cause = f"seqlen {seqlen} is above this model's limit of {limit} positions"
        raise BadInput(cause, field="seqlen", value=seqlen, fix=("use at most ", Set("seqlen", limit)))
    return seqlen


def _unused_positions(model: PreTrainedModel, limit: int) -> int:
    """Return the number of position embeddings before the first token's, where positions count from the padding index."""
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name]
    own = next((m for m in tables if m.num_embeddings == limit and m.padding_idx is not None), None)
    return 0 if own is None or own.padding_idx is None else own.padding_idx + 1


def samples_per_batch(recipe: Recipe, seqlen: int, device: torch.device) -> int:
    """Return the number of calibration samples per batch: as requested, or as is usually fastest.

    On a CPU that is about 512 tokens, whose activations stay in its caches. A fixed rule, not a measurement: other batch
    sizes change the last bits of sums, and a run must be repeatable.
    """
    # Reconstruction takes one step per batch, so the size matters beyond speed.
    tokens = 512 if in_host_memory(device) and not recipe.prune.reconstruct.steps else 4096
    return recipe.calibrate.batch_size or max(1, tokens // seqlen)


def split_batches(
    windows: Tensor, recipe: Recipe, device: torch.device, marks: Tensor | None = None
) -> Sequence[Tensor]:
    """Split calibration samples (N × S) into batches of equal length on the device, in the order of their first samples.

    marks: a value per token (N × S), to be split likewise and returned instead.
    """
    values, found = windows if marks is None else marks, list[tuple[int, Tensor]]()
    groups = list(of_each_length(windows))
    if len(groups) < 2:
        return torch.split(values.to(device), samples_per_batch(recipe, windows.shape[1], device))
    for rows, length in groups:
        for own in rows.split(samples_per_batch(recipe, length, device)):
            found.append((int(own[0]), values[own, :length].to(device)))
    # In the order of first samples, so that the first and last batches have various lengths, too.
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
        data: the sources, as for `split_sources`.
        loaded: the dense model.
        tokenizer: its tokenizer, with the chosen BOS behaviour.
        sampling: number of samples, and how to draw them.
        processes: the processes that need them; if text has to be generated, the first one does it.
        reporter: reports slow work.

    Raises:
        BadInput: a source cannot be read, or is too short.
    """
    sources, nsamples = split_sources(data), sampling.nsamples
    if len(sources) == 1 and sources[0].is_plain and not reads_conversations(sources[0]):
        return draw_samples(sources[0].name, tokenizer, sampling)
    counts = counts_of([source.share for source in sources], nsamples)
    lengths = sample_lengths(data, loaded, sampling.seqlen)
    found: list[tuple[Source, Windows]] = []
    each = zip(sources, counts, lengths, strict=True)
    for source, count, length in sorted(each, key=lambda one: one[0].is_own):
        if count == 0:
            continue  # the source's share is less than one sample
        own = sampling._replace(nsamples=count, seqlen=length)
        if source.is_own:
            windows = _own(source, loaded, own, processes, reporter)
        else:
            windows = source_windows(source, (tokenizer, loaded.tokenizer), own)
        found.append((source, windows))
    order = {source.name: place for place, source in enumerate(sources)}
    return mixed(sorted(found, key=lambda pair: order[pair[0].name]), sampling.seed)


def sample_lengths(data: str, loaded: Loaded, seqlen: int) -> list[int]:
    """Return the sample length of every source. Raises BadInput if one exceeds the model's positions."""
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


def require_generated(samples: Samples[Any]) -> None:
    """Raise BadInput if no token of the samples is marked as generated."""
    if samples.generated is None or not bool(samples.generated.any()):
        raise BadInput(
            "no token of the calibration data is marked as generated",
            field="calibrate_on",
            value="generated",
            fix=("calibrate on what a model wrote, such as ", Set("dataset", "self"), ", or leave it out"),
        )
