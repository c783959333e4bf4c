"""Models that read a text as a whole: they fill in masked tokens, label texts, or embed them.

All are calibrated on windows of plain text between the marks that their tokenizer puts around a text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForTokenClassification

from coprune.base.errors import BadInput, NumericalError, about
from coprune.base.processes import Processes
from coprune.base.progress import Advance, Reporter
from coprune.base.words import Set, Setting, say
from coprune.data import EvaluationText, Windows
from coprune.data.labelled_text import HINT, LabelledText, LabelledTexts, labelled_texts
from coprune.data.marks import Marks
from coprune.data.text import NOTHING
from coprune.evaluation.asked_texts import plain_names
from coprune.evaluation.batches import batches, cut_windows, default_batch_size, inference_logits, slices
from coprune.evaluation.bos_choice import BosChoice, Score
from coprune.evaluation.measurement import Accuracy, Embedded, Perplexity
from coprune.evaluation.perplexity import aggregate
from coprune.evaluation.tasks.image_task import aggregate_accuracy, rank_classes
from coprune.evaluation.tasks.task import Data, Remember, Samples
from coprune.evaluation.tasks.text_task import TextTask
from coprune.model.checkpoint.companions import modules_of
from coprune.model.checkpoint.load import WHAT, evaluating
from coprune.model.checkpoint.locate import ModelFolder, locate
from coprune.model.checkpoint.shards import read_json
from coprune.model.loaded_model import Loaded
from coprune.model.transformers_private import auto_choice
from coprune.model.walk.activations import Activations
from coprune.model.walk.block_calls import input_device
from coprune.model.walk.model_structure import ProvenModel
from coprune.model.walk.walk import streamed_logits
from coprune.recipe.recipe import Recipe
from coprune.recipe.sources import split_sources

MASKED_APART = 7
"""Distance of masked tokens, for about the 15 % that such models are trained with."""
PASSAGE = 128
"""Tokens of a passage that is embedded, if nobody asks for another length."""
PASSAGES = 1024
"""Maximum number of passages, each of which is compared with all others."""


class WholeTextTask(TextTask):
    """The common part of tasks of whole texts. Raises BadInput for settings that only models have that write text."""

    _usual_length: int | None = None
    """Tokens of a text at most, if no length is asked for; None for as many as the model takes."""

    def __init__(self, recipe: Recipe, loaded: Loaded, processes: Processes, remember: Remember) -> None:
        super().__init__(recipe, loaded, processes, remember)
        if self._usual_length is not None and recipe.calibrate.seqlen is None:
            self.seqlen = min(self._usual_length, self.seqlen)
        what = f"{loaded.source} {WHAT[loaded.task]}"
        if recipe.evaluate.runs_tasks:
            raise BadInput(f"{what}, and zero-shot tasks are for models that write", field="tasks")
        if any(source.is_own for source in split_sources(recipe.calibrate.data)):
            raise BadInput(f"{what}, and writes none to calibrate on", field="dataset", value=recipe.calibrate.data)
        self._marks = Marks.of(loaded.tokenizer) if recipe.calibrate.bos == "auto" else Marks()

    def calibration(self, needed: bool, reporter: Reporter) -> Windows | None:
        windows = super().calibration(needed, reporter)
        return None if windows is None else self.as_read(windows)

    def as_read(self, windows: Windows) -> Windows:
        """Return windows of text as the model reads them: between the marks."""
        return self._marks.around_samples(windows)

    def _read(self, name: str, held_out: bool = False) -> EvaluationText:
        return self._marks.around_text(super()._read(name, held_out), self.seqlen)

    def choose_bos(self, score: Score, samples: Samples | None, data: dict[str, Data]) -> BosChoice:
        """Return the default, since the windows already begin with the marks."""
        return BosChoice()

    def _size(self, values: int) -> int:
        """Return the number of windows per batch. values: outputs of the model per token."""
        return self._recipe.calibrate.batch_size or default_batch_size(self.seqlen, values)

    def _own_windows(self, text: EvaluationText) -> Tensor:
        return self._processes.share(cut_windows(text.tokens, self.seqlen))


class MaskedTask(WholeTextTask):
    """A model that fills in masked tokens: pseudo-perplexity (arXiv 1910.14659), with one token of seven masked at a time."""

    measure_name = "Pseudo-perplexity"
    _measured = "Pseudo-perplexity is"

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        if self._recipe.evaluate.perplexity and self._loaded.tokenizer is not None:
            self._mask()
        return super().evaluation(reporter)

    def _mask(self) -> int:
        mask = None if self._loaded.tokenizer is None else self._loaded.tokenizer.mask_token_id
        if not isinstance(mask, int):
            lacks = f"the tokenizer of {self._loaded.source} has no token that masks another"
            raise BadInput(lacks, field="evaluate", fix=("measure nothing with ", Set("evaluate", False)))
        return mask

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Perplexity:
        assert isinstance(data, EvaluationText)
        own = self._own_windows(data)
        if not model.weights.streams:
            found = self._in_memory(own, advance)
        else:
            masked = list(self._masked(own.to(input_device(model.module))))
            behind = iter(masked)
            blocks = len(model.blocks)
            scores = streamed_logits(
                model,
                [tokens for tokens, _, _ in masked],
                lambda logits, _: _masked_nll(logits, *next(behind)[1:]),
                lambda done: advance(done / blocks),
                activations,
            )
            found = self._summed(scores)
        return self._perplexity(torch.cat(self._processes.gather(found)))

    def measure_in_memory(self, data: Data, advance: Advance) -> Perplexity:
        assert isinstance(data, EvaluationText)
        return self._perplexity(self._in_memory(cut_windows(data.tokens, self.seqlen), advance))

    def _in_memory(self, windows: Tensor, advance: Advance) -> Tensor:
        found, count = [], len(list(self._masked(windows)))
        with inference_logits(self._loaded.model) as logits_of:
            for tokens, original, where in self._masked(windows):
                found.append(_masked_nll(logits_of(tokens), original, where))
                advance(1 / count)
        return self._summed(found)

    def masked_at_random(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Mask random tokens, one of seven. Returns windows (N × S int64) and what is masked, elsewhere `NOTHING`."""
        inside, there = (
            self._marks.inside(self.seqlen),
            torch.rand(windows.shape, generator=torch.Generator().manual_seed(self._recipe.calibrate.seed))
            < 1 / MASKED_APART,
        )
        there[:, : inside.start] = there[:, inside.stop :] = False
        return windows.masked_fill(there, self._mask()), windows.masked_fill(~there, NOTHING)

    def _masked(self, windows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield batches of masked windows with the original tokens and the masked places, until every token was masked once."""
        mask, positions = self._mask(), torch.arange(self.seqlen, device=windows.device)
        inside = self._marks.inside(self.seqlen)
        text = (positions >= inside.start) & (positions < inside.stop)
        for batch in batches(windows, self._size(self._vocabulary)) if len(windows) else ():
            for turn in range(MASKED_APART):
                where = text & (positions % MASKED_APART == turn)
                yield batch.masked_fill(where, mask), batch, where

    @property
    def _vocabulary(self) -> int:
        return int(self._loaded.model.config.get_text_config().vocab_size)

    def _summed(self, scores: Sequence[Tensor]) -> Tensor:
        """Return the mean negative log likelihood of every window's tokens, from that of its turns."""
        turns = [sum(scores[i : i + MASKED_APART]) for i in range(0, len(scores), MASKED_APART)]
        count = len(range(self.seqlen)[self._marks.inside(self.seqlen)])
        return torch.cat([torch.as_tensor(turn) for turn in turns] or [torch.zeros(0, dtype=torch.float64)]) / count

    def _perplexity(self, nll: Tensor) -> Perplexity:
        tokens = len(nll) * len(range(self.seqlen)[self._marks.inside(self.seqlen)])
        return aggregate(nll, self.seqlen).model_copy(update={"masked": True, "tokens": tokens})


def _masked_nll(logits: Tensor, original: Tensor, where: Tensor) -> Tensor:
    """Return the summed negative log likelihood of every window's masked tokens in nats: B float64, on the CPU.

    logits: B × S × vocabulary; original: B × S int64; where: S bool.
    """
    found = []
    for rows, targets in zip(logits[:, where.to(logits.device)], original[:, where].to(logits.device), strict=True):
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for part in slices(rows):
            loss = functional.cross_entropy(rows[part].to(torch.float32), targets[part], reduction="none")
            total += loss.sum(dtype=torch.float64)
        found.append(total)
    return torch.stack(found).cpu()


class EmbeddingTask(WholeTextTask):
    """A model that embeds texts: vectors of passages, in which a pruned model is held against the dense one."""

    measure_name = "Embeddings"
    figures = ("cosine", "overlap")
    _measured = "Embeddings are"
    _usual_length = PASSAGE

    def __init__(self, recipe: Recipe, loaded: Loaded, processes: Processes, remember: Remember) -> None:
        super().__init__(recipe, loaded, processes, remember)
        self.pooling = Pooling.of_folder(_folder_of(recipe, loaded))

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Embedded:
        assert isinstance(data, EvaluationText)
        own = self._own_windows(self._passages(data))
        if not model.weights.streams:
            found = self._in_memory(own, advance)
        else:
            there, blocks = own.to(input_device(model.module)), len(model.blocks)
            found = streamed_logits(
                model,
                list(batches(there, self._size(1))) if len(there) else [],
                lambda hidden, _: self.pooling.of_hidden(hidden).cpu(),
                lambda done: advance(done / blocks),
                activations,
            )
        width = found[0].shape[1] if found else 0
        gathered = self._processes.gather(torch.cat(found) if found else torch.zeros(0, width))
        return self._embedded([one for one in gathered if len(one)])

    def measure_in_memory(self, data: Data, advance: Advance) -> Embedded:
        assert isinstance(data, EvaluationText)
        return self._embedded(self._in_memory(cut_windows(self._passages(data).tokens, self.seqlen), advance))

    def _passages(self, text: EvaluationText) -> EvaluationText:
        most = PASSAGES * self.seqlen
        return EvaluationText(text.tokens[:most], text.token_bytes[:most], text.fingerprint, text.source, text.given)

    def _in_memory(self, windows: Tensor, advance: Advance) -> list[Tensor]:
        found = []
        with inference_logits(self._loaded.model) as hidden_of:
            for batch in batches(windows, self._size(1)) if len(windows) else ():
                found.append(self.pooling.of_hidden(hidden_of(batch)).cpu())
                advance(len(batch) / len(windows))
        return found

    def _embedded(self, vectors: Sequence[Tensor]) -> Embedded:
        found = torch.cat(list(vectors))
        if not bool(found.isfinite().all()):
            raise NumericalError("the model's vectors are NaN for some passages")
        return Embedded.of(found, self.seqlen)


def _folder_of(recipe: Recipe, loaded: Loaded) -> Path | None:
    """Return the folder of a model's files, or None for a model in memory without one."""
    if (folder := Path(loaded.source)).is_dir():
        return folder
    with suppress(BadInput):
        location = locate(loaded.source, recipe.model.cache_dir, weights=False)
        return location.path if isinstance(location, ModelFolder) else None
    return None


class LabelTask(WholeTextTask):
    """A classifier of texts, pairs of texts or words, or a reranker: accuracy on a file with labels."""

    measure_name = "Accuracy"
    figures = ("accuracy",)

    def evaluation(self, reporter: Reporter) -> dict[str, Data]:
        recipe = self._recipe
        if not recipe.evaluate.perplexity:
            return {}
        if recipe.evaluate.data is None:
            named = ("name texts with labels with ", Setting("eval_data"))
            reporter.say(say(("No accuracy: no labels are known; ", *named, f" ({HINT}).")))
            return {}
        found = dict[str, Data]()
        for name in plain_names(recipe.evaluate.data):
            with about("eval_data", name):
                found[name] = labelled_texts(name, self._numbers, self._classes, self._each_word)
        return found

    @property
    def _config(self) -> Any:
        return self._loaded.model.config

    @property
    def _numbers(self) -> dict[str, int]:
        return {str(name): int(number) for name, number in (self._config.label2id or {}).items()}

    @property
    def _classes(self) -> int:
        return int(self._config.num_labels)

    @property
    def _each_word(self) -> bool:
        return auto_choice(AutoModelForTokenClassification, self._config) is type(self._loaded.model)

    def measure(self, model: ProvenModel, data: Data, activations: Activations, advance: Advance) -> Accuracy:
        def measured() -> Accuracy:
            with self._loaded.whole(Reporter(quiet=True)):
                return self.measure_in_memory(data, advance)

        return self._processes.from_first(measured)

    def measure_in_memory(self, data: Data, advance: Advance) -> Accuracy:
        assert isinstance(data, LabelledTexts)
        read = [self._tokens(row) for row in data.rows]
        alike: dict[int, list[int]] = defaultdict(list)
        for place, (inputs, _) in enumerate(read):
            alike[inputs["input_ids"].shape[1]].append(place)
        ranked: dict[int, Tensor] = {}
        model, device = self._loaded.model, input_device(self._loaded.model)
        with evaluating(model), torch.inference_mode():
            for length, places in alike.items():  # texts of one length, so that none is filled up
                for part in _parts(places, self._together(length)):
                    inputs = {k: torch.cat([read[p][0][k] for p in part]).to(device) for k in read[part[0]][0]}
                    logits = model(**inputs).logits.cpu()
                    for place, own in zip(part, logits, strict=True):
                        ranked[place] = self._ranked(own[None] if own.ndim == 1 else own, read[place][1])
                    advance(len(part) / len(read))
        order = range(len(read))
        labels = torch.tensor([label for p in order for label in data.rows[p].labels[: len(ranked[p])]])
        return aggregate_accuracy(torch.cat([ranked[p] for p in order]), labels).model_copy(update={"unit": self._unit})

    @property
    def _unit(self) -> str:
        return "words" if self._each_word else "texts"

    def _together(self, length: int) -> int:
        # A model that uses a text's last token needs the padding token.
        if self._config.get_text_config().pad_token_id is None:
            return 1
        return self._recipe.calibrate.batch_size or max(1, 4096 // length)

    def _tokens(self, row: LabelledText) -> tuple[dict[str, Tensor], list[int]]:
        """Return a text's tokens, and the first token of every word."""
        tokenizer: Any = self._loaded.tokenizer
        if tokenizer is None:
            raise BadInput("a classifier in memory needs its tokenizer", field="processor")
        limit = min(int(tokenizer.model_max_length), self.seqlen)
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
        """Return the classes of a text or of its words, likeliest first. logits: 1 or S × classes."""
        own = logits[first] if self._each_word else logits[:1]
        if own.shape[-1] > 1:
            return rank_classes(own)
        if bool(own.isnan().any()):
            raise NumericalError("the model's output is NaN for some texts")
        return (own > 0).to(torch.int64)  # a score, as rerankers give it


def _parts(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_OLD = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}


@dataclass(frozen=True)
class Pooling:
    """Concatenated pooling modes."""

    modes: tuple[str, ...] = ("mean",)

    @classmethod
    def of_folder(cls, folder: Path | None) -> Pooling:
        """Read a folder's pooling. Raises BadInput for an unknown mode."""
        for module in modules_of(folder):
            config = module / "config.json"
            said = read_json(config) if config.is_file() else {}
            if not any(key.startswith("pooling_mode") for key in said):
                continue
            modes = said.get("pooling_mode") or [m for m in _MODES if said.get(f"pooling_mode_{_OLD.get(m, m)}")]
            modes = (modes,) if isinstance(modes, str) else tuple(map(str, modes)) or ("mean",)
            if not set(modes) <= set(_MODES):
                raise BadInput(f"{config} pools by {', '.join(modes)}, which coprune does not know", field="model")
            return cls(modes)
        return cls()

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Return a unit vector per text: B × (modes · H) float32. hidden: B × S × H, without padding."""
        found = torch.cat([_pooled(hidden.to(torch.float32), mode) for mode in self.modes], dim=-1)
        return torch.nn.functional.normalize(found, dim=-1)


def _pooled(hidden: Tensor, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[:, -1]
    if mode == "max":
        return hidden.amax(dim=1)
    if mode == "weightedmean":
        weights = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)
        return (hidden * weights[:, None]).sum(dim=1) / weights.sum()
    return hidden.mean(dim=1)  # a text's length does not change its direction
