"""The vocabulary cut: choose the tokens to keep, write the smaller model, report the cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from tokenizers import Tokenizer

from coprune.base.errors import BadInput, CopruneError
from coprune.base.memory import available_bytes
from coprune.base.progress import Reporter
from coprune.base.words import Set, Setting, Words, say
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile
from coprune.recipe.parts import DtypeName
from coprune.recipe.structure import RemovePart
from coprune.recipe.vocabulary_cut import Loss
from coprune.store.notes import read_note, write_note
from coprune.vocabulary.choose import Kept, Weights, choose, closure, possible
from coprune.vocabulary.counts import CODE, Texts, read_texts, weigh
from coprune.vocabulary.cut_facts import TextCost, VocabularyFacts
from coprune.vocabulary.cut_sources import Source, described
from coprune.vocabulary.kinds import Vocabulary, WordPiece
from coprune.vocabulary.measure import Cuts, Judge, first_tokens
from coprune.vocabulary.prompts import prompts
from coprune.vocabulary.samples import LANGUAGES, NAMES, SOURCES
from coprune.vocabulary.smallest import search
from coprune.vocabulary.tokenizer_file import named_in

LEAST_SAVED = 0.05
"""Minimum share of the weights' bytes to save, unless forced."""
MEASURED, SEARCHED = 4_096, 16_384
"""Number of held-out tokens for measuring; and for searching and proving a size, half each."""
_FEWEST = 1_000
"""Minimum number of characters of each half."""
_ALWAYS = ("en", "de", "fr", "es", "ru", "zh", "ar", "hi")
"""Languages that the model is always run on; the other samples are only tokenised."""


@dataclass(frozen=True)
class Asked:
    """Settings of a cut."""

    structure: RemovePart
    data: str
    """The calibration text."""
    cache_dir: Path | None = None
    dtype: DtypeName = "auto"
    device: str | torch.device = "cpu"
    runs: bool = True
    """Whether a model may be run to measure."""
    tokens: int | None = None
    """Number of held-out tokens; None for the default."""
    state: Path | None = None
    """File with the state of a search, to resume it."""
    key: str = ""
    """Fingerprint of model and texts, which must match that file."""


@dataclass
class Cutting:
    """The cut of a model's vocabulary."""

    source: Source
    asked: Asked
    reporter: Reporter
    content: Mapping[str, Any] = field(init=False)
    vocabulary: Vocabulary = field(init=False)
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        self.vocabulary = self.source.vocabulary
        self.content = self.vocabulary.content
        if beyond := [number for number in named_in(self.content) if number >= self.source.rows]:
            token = self.vocabulary.tokens[min(beyond)]
            cause = (
                f"the tokenizer adds {token!r} to texts, but the model has no row for it (only {self.source.rows:,})"
            )
            raise BadInput(cause, field="model", value=self.source.location.name)
        self._parts: Callable[[int], tuple[int, ...] | None] = cache(self.vocabulary.parts)
        structure = self.asked.structure
        self.texts = read_texts(structure.vocabulary_text, self.asked.data, self.asked.cache_dir, self.reporter)
        if not self.asked.runs and isinstance(structure.vocabulary, Loss):
            fix = ("keep a number of tokens, or leave out ", Set("evaluate", False))
            raise BadInput(
                "a limit on the loss needs measurements with the model",
                field="remove",
                value=structure.parts[0],
                fix=fix,
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The whole tokenizer."""
        return Tokenizer.from_str(json.dumps(self.content))

    @cached_property
    def essential(self) -> set[int]:
        """Ids that are always kept, with all tokens they are merged from."""
        found = self.vocabulary.essential() | self.source.named | set(self.source.processor.all_special_ids)
        for text in prompts(self.source.processor):
            found |= set(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return closure((number for number in found if number < self.source.rows), self._parts)

    @cached_property
    def weights(self) -> Weights:
        """Weight of every token."""
        return weigh(self.tokenizer, self.texts, self.source.rows, self.vocabulary.texts, self.reporter)

    def choose(self, size: int) -> Kept:
        """Return the tokens to keep. Raises BadInput like `choose`."""
        return choose(size, self.weights, self.essential, self._parts)

    @cached_property
    def judge(self) -> Judge | str:
        """The model that scores texts, or the reason why it cannot."""
        if not self.asked.runs:
            return "perplexity is not measured, or the model is streamed"
        if isinstance(self.vocabulary.kind, WordPiece):
            return "it does not generate text"
        room, needed = available_bytes(), self.source.parameters * (4 if self._is_gguf else 2)
        if room is not None and needed > room:
            return f"it takes {needed / 2**30:.1f} GiB, but only {room / 2**30:.1f} are free"
        try:
            model, _ = load_model(self.source.location, self.asked.dtype, self.asked.device, processed=False)
        except CopruneError as error:
            return say(error.cause)
        begin = self.source.processor.bos_token_id
        return Judge(model, begin if begin is not None else self.source.processor.eos_token_id)

    @property
    def _is_gguf(self) -> bool:
        return isinstance(self.source.location, GgufFile)

    def _require_judge(self) -> Judge:
        if isinstance(self.judge, str):
            raise BadInput(f"the model cannot be run: {self.judge}", field="remove", fix="keep a number of tokens")
        return self.judge

    def require_possible(self) -> None:
        """Raise BadInput, before counting, for an impossible number of tokens or a cut that saves too little."""
        target = self.asked.structure.vocabulary
        if target is not None and not isinstance(target, Loss):
            size = possible(target.kept(self.source.rows), len(self.essential), self.source.rows)
            self.refuse_useless(Kept(tuple(range(size))))

    def size(self) -> tuple[Kept, dict[str, Any]]:
        """Return the tokens to keep, and the results of the search for their number.

        Raises:
            BadInput: the number is too small or too large, or none meets the allowed loss.
        """
        target = self.asked.structure.vocabulary
        assert target is not None
        if not isinstance(target, Loss):
            return self.choose(target.kept(self.source.rows)), {}
        judge = self._require_judge()
        searched, proving = self.halves()
        cutting = self

        def rise(texts: list[str], size: int) -> float:
            cuts = Cuts.of(cutting.tokenizer, cutting.content, cutting.choose(size))
            with cutting.reporter.bar(f"Trying {size:,} tokens", len(texts)) as advance:
                return judge.rise(cuts, texts, advance)

        tries = Tries(self.asked.state, self._fingerprint())
        found = search(
            target.most,
            (len(self.essential), self.source.rows),
            lambda size: rise(searched, size),
            lambda size: rise(proving, size),
            tries.known,
            tries.keep,
        )
        return self.choose(found.size), {"tries": dict(tries.known), "proven": found.proven}

    def halves(self) -> tuple[list[str], list[str]]:
        """Return held-out passages for the search, and others for the proof. Raises BadInput if there are too few."""
        limit = self.asked.tokens or SEARCHED
        held = first_tokens(self.tokenizer, self.texts.held_out, limit, least=2)
        halves = held[::2], held[1::2]
        if min(sum(map(len, half)) for half in halves) < _FEWEST:
            fix: Words = ("name a longer one with ", Setting("vocabulary_text"))
            raise BadInput(
                "the held-out text is too short to search for a size and prove its loss", field="remove", fix=fix
            )
        return halves

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.weights.tobytes())
        digest.update(repr((self.asked.key, self.source.rows, sorted(self.essential), self.halves())).encode())
        return digest.hexdigest()[:16]

    def facts(self, kept: Kept, found: Mapping[str, Any]) -> VocabularyFacts:
        """Measure the cost of a choice. found: results of the search."""
        before, after = self.source.bytes_of(kept)
        cuts = Cuts.of(self.tokenizer, self.content, kept)
        judge = self.judge
        costs = [cuts.cost(label, texts) for label, texts, _ in self._measured()]
        if isinstance(judge, Judge):
            costs = self._judged(judge, cuts, costs)
        weighty = set(self._weightiest(len(kept.old)))
        parts = sum(1 for number in kept.old if number not in weighty and number not in self.essential)
        return VocabularyFacts(
            before=self.source.rows,
            after=len(kept.old),
            kind=described(dict(self.content)),
            essential=len(self.essential),
            parts=parts,
            counted=[f"{source.name} {source.share:.0%}" for source in self.texts.sources],
            bytes_before=before,
            notes=self.source.notes(kept),
            bytes_after=after,
            texts=costs,
            not_run=judge if isinstance(judge, str) else "",
            **found,
        )

    def _weightiest(self, count: int) -> list[int]:
        """Return the tokens with the largest weights, ignoring merges."""
        order = (-self.weights).argsort(kind="stable")
        return [int(number) for number in order if int(number) not in self.essential][: count - len(self.essential)]

    def _measured(self) -> list[tuple[str, list[str], bool]]:
        """Return texts with their labels, and whether the model is run on them."""
        held = first_tokens(self.tokenizer, self.texts.held_out, self.asked.tokens or MEASURED)
        found = [(self.texts.label, held, True)] if held else []
        run = {*_ALWAYS, *self.texts.languages}
        for name, text in LANGUAGES.items():
            found.append((NAMES[name], [text], name in run))
        found.append((CODE, list(SOURCES.values()), True))
        return found

    def _judged(self, judge: Judge, cuts: Cuts, costs: list[TextCost]) -> list[TextCost]:
        measured = self._measured()
        with self.reporter.bar(
            "Measuring bits per byte", sum(len(texts) for _, texts, run in measured if run)
        ) as advance:
            return [
                judge.cost(cuts, label, texts, advance) if run else cost
                for (label, texts, run), cost in zip(measured, costs, strict=True)
            ]

    def refuse_useless(self, kept: Kept) -> None:
        """Raise BadInput for a cut that saves too little, unless forced."""
        before, after = self.source.bytes_of(kept)
        saved = 1 - after / before
        if saved < LEAST_SAVED and not self.asked.structure.vocabulary_force:
            cause = f"{len(kept.old):,} of {self.source.rows:,} tokens save only {saved:.1%} of the weights' bytes"
            fix = ("keep fewer, or force it with ", Set("vocabulary_force", True))
            raise BadInput(cause, field="remove", value=self.asked.structure.parts[0], fix=fix)


class Tried(BaseModel):
    """Losses by vocabulary size, of one search."""

    fingerprint: str
    tries: dict[int, float] = {}


class Tries:
    """Losses by vocabulary size, kept in a file so that a search can resume."""

    def __init__(self, file: Path | None, fingerprint: str) -> None:
        """Read earlier tries with the same fingerprint."""
        self._file = file
        note = None if file is None else read_note(file, Tried)
        same = note is not None and note.record.fingerprint == fingerprint
        self._tried = note.record if note is not None and same else Tried(fingerprint=fingerprint)

    @property
    def known(self) -> dict[int, float]:
        """The losses found so far; may be added to."""
        return self._tried.tries

    def keep(self) -> None:
        """Write the losses found so far."""
        if self._file is not None:
            write_note(self._file, self._tried)
