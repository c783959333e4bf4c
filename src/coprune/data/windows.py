"""Tokens from text: calibration windows drawn as in the papers, and the token stream of an evaluation.

Each draw has its own generator, with the same numbers as `random.seed(seed)`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.base.memory import available_bytes
from coprune.base.words import Setting
from coprune.data.corpora import calibration_text, evaluation_text, holds_out
from coprune.data.in_memory import GivenTokens
from coprune.data.text import LOCAL_FILE_HINT, Documents
from coprune.data.tokenizing import Tokenizes, encode


class SourcePart(BaseModel):
    """Samples drawn from one source."""

    model_config = ConfigDict(frozen=True)

    name: str
    source: str
    nsamples: int
    fingerprint: str
    seqlen: int | None = None
    """Tokens per sample; None in older reports."""

    def line(self) -> str:
        """Return a line on name, size and fingerprint."""
        each = "" if self.seqlen is None else f" of {self.seqlen} tokens"
        return f"{self.name}: {self.nsamples} samples{each}, fingerprint {self.fingerprint}"


class TooShort(BadInput):
    """The error for a text too short to hold anything out."""


class Sampling(NamedTuple):
    """Number, length and seed of samples."""

    nsamples: int
    seqlen: int
    seed: int
    cache_dir: Path | None = None
    held_out_for: int | None = None
    """Window length of the held-out last tenth of the user's own text; None: nothing is held out."""


Batch = TypeVar("Batch", bound=Tensor, covariant=True)


@dataclass(frozen=True)
class Samples(Generic[Batch]):
    """Calibration samples with their fingerprint and source."""

    tokens: Batch
    """Windows of text (N × S int64), images (N × C × H × W float32), or `coprune.data.pairs.Pairs`."""
    fingerprint: str
    source: str
    given: bool = False
    """Token ids passed by the caller, to which no BOS is added."""
    generated: Tensor | None = None
    """Mask of generated tokens, samples × seqlen bool; None if unknown."""
    parts: tuple[SourcePart, ...] = ()
    """Contribution of each source, for several sources or one with options."""
    text_tokens: int | None = None
    """Number of tokens of the text they were drawn from; None for separate documents or several sources."""


Windows = Samples[Tensor]
"""Samples of text: those of several lengths are as wide as the longest (`coprune.data.text`)."""


@dataclass(frozen=True)
class EvaluationText:
    """Text for perplexity: tokens (T int64), the UTF-8 bytes that each covers (T int64), fingerprint, source.

    Tokens without text (such as BOS) cover 0 bytes; the bytes add up to those of the text.
    """

    tokens: Tensor
    token_bytes: Tensor
    fingerprint: str
    source: str
    given: bool = False
    """Token ids passed by the caller, to which no BOS is added."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text that the tokens cover."""
        return int(self.token_bytes.sum())


def calibration_windows(
    name: str,
    tokenizer: Tokenizes | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    cache_dir: Path | None = None,
) -> Windows:
    """Draw calibration samples as in Wanda (arXiv 2306.11695): nsamples × seqlen tokens, int64.

    name: a corpus, a path, a Hub id, or the name of the caller's data (see `coprune.data.corpora.calibration_text`). Token
    ids passed by the caller are the samples themselves. From a joined text windows start anywhere; from separate documents
    (c4) each window lies in a document of more than seqlen tokens.
    Raises BadInput for invalid sizes, an unreadable corpus, or too little text for one sample.
    """
    return draw_samples(name, tokenizer, Sampling(nsamples, seqlen, seed, cache_dir))


def draw_samples(name: str, tokenizer: Tokenizes | None, sampling: Sampling) -> Windows:
    """Draw calibration samples like `calibration_windows`, without the held-out part of the user's own text."""
    nsamples, seqlen, seed, cache_dir, window = sampling
    if nsamples < 1:
        raise BadInput(
            f"the number of calibration samples must be at least 1, not {nsamples}", field="nsamples", value=nsamples
        )
    _require_seqlen(seqlen)
    _require_room(nsamples, seqlen)
    text = calibration_text(name, cache_dir)
    if isinstance(text, GivenTokens):
        windows = _first_windows(text, nsamples, seqlen)
        return Windows(windows, fingerprint(windows), text.source, given=True)
    tokenizer = _needed(tokenizer)
    if isinstance(text, Documents):
        tokens = draw_from_documents(
            text.texts, lambda document: token_ids(tokenizer, document), nsamples, seqlen, seed, text.source
        )
    else:
        ids = token_stream(tokenizer, text.text)
        if window is not None and holds_out(name):
            ids = ids[: len(ids) - held_out_tokens(len(ids), window)]
        tokens = draw_windows(ids, nsamples, seqlen, seed, text.source)
        return Windows(tokens, fingerprint(tokens), text.source, text_tokens=len(ids))
    return Windows(tokens, fingerprint(tokens), text.source)


def held_out_tokens(tokens: int, window: int) -> int:
    """Return the number of tokens held out at the end of a text: a tenth, rounded to whole evaluation windows."""
    return tokens // 10 // window * window


def evaluation_tokens(
    name: str,
    tokenizer: Tokenizes | None,
    seqlen: int,
    cache_dir: Path | None = None,
    limit_tokens: int | None = None,
    held_out: bool = False,
) -> EvaluationText:
    """Tokenise the evaluation part of a corpus, once, as one stream.

    name: as for calibration (see `coprune.data.corpora.evaluation_text`); seqlen: the window length it will be cut
    to; limit_tokens: maximum number of tokens, from the first; held_out: read the part that calibration leaves out.
    For c4 at most 256 windows are kept, as in the papers.
    Raises BadInput if the corpus cannot be read or holds less than one window; TooShort if nothing is held out.
    """
    _require_seqlen(seqlen)
    if limit_tokens is not None and limit_tokens < seqlen:
        raise BadInput(f"a limit of {limit_tokens} tokens is less than one window of {seqlen}", fix="raise it")
    text, most = evaluation_text(name, cache_dir), None
    source = text.source
    if isinstance(text, GivenTokens):
        # The amount of text is unknown, so there are no figures per byte.
        tokens, sizes = text.tokens.flatten(), torch.zeros(text.tokens.numel(), dtype=torch.int64)
    else:
        most = text.most_windows
        tokens, sizes = tokens_and_bytes(_needed(tokenizer), text.text)
    if held_out:
        source, out = f"the last tenth of {source}", held_out_tokens(len(tokens), seqlen)
        if not out:
            raise TooShort(f"{source} does not fill a window of {seqlen} tokens")
        tokens, sizes = tokens[len(tokens) - out :], sizes[len(sizes) - out :]
    limits = [limit for limit in (limit_tokens, most and most * seqlen) if limit]
    keep = min([len(tokens), *limits])
    require_length(keep, seqlen, source)
    tokens = tokens[:keep].clone()
    given = isinstance(text, GivenTokens)
    return EvaluationText(tokens, sizes[:keep].clone(), fingerprint(tokens), source, given)


def token_ids(tokenizer: Tokenizes, text: str) -> list[int]:
    """Tokenise with the tokenizer's own defaults (including BOS), whatever the length."""
    found: list[int] = token_stream(tokenizer, text).tolist()
    return found


def token_stream(tokenizer: Tokenizes, text: str) -> Tensor:
    """Tokenise as `token_ids`: T int64. A large text is tokenised in pieces, since a token takes a hundred bytes meanwhile."""
    parts = [
        torch.tensor(encode(tokenizer, piece, **_marks(number))["input_ids"], dtype=torch.int64)
        for number, piece in enumerate(pieces_of(text))
    ]
    return torch.cat(parts)


def tokens_and_bytes(tokenizer: Tokenizes, text: str) -> tuple[Tensor, Tensor]:
    """Tokenise as `token_stream`, and count the UTF-8 bytes that each token covers: T int64 and T int64."""
    parts = [_tokens_and_bytes(tokenizer, piece, **_marks(number)) for number, piece in enumerate(pieces_of(text))]
    tokens, sizes = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(sizes)


def _marks(number: int) -> dict[str, bool]:
    """Return the options of a piece: only the first gets special tokens."""
    return {"add_special_tokens": False} if number else {}


WHOLE, PIECE = 16_000_000, 1_000_000
"""Maximum number of characters tokenised at once, and piece length of longer texts."""


def pieces_of(text: str) -> Iterator[str]:
    """Yield a text in pieces that begin with white space, where tokens begin too; short texts whole."""
    start = 0
    while len(text) - start > (WHOLE if start == 0 else PIECE):
        end = start + PIECE
        cut = max(text.rfind(mark, start + 1, end) for mark in ("\n", " "))
        yield text[start : cut if cut > 0 else end]
        start = cut if cut > 0 else end
    yield text[start:]


def _tokens_and_bytes(tokenizer: Tokenizes, text: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokenise a piece, and count the UTF-8 bytes that each token covers.

    A token covers the text from its own start to the start of the next, so that the bytes add up exactly. If the tokenizer
    gives no offsets, the bytes are divided evenly.
    """
    if not tokenizer.is_fast:
        ids = encode(tokenizer, text, **options)["input_ids"]
        edges = torch.linspace(0, len(text.encode()), len(ids) + 1, dtype=torch.float64).round().to(torch.int64)
        return torch.tensor(ids, dtype=torch.int64), edges.diff()
    encoded = encode(tokenizer, text, return_offsets_mapping=True, **options)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    # Special tokens report (0, 0), also at the end.
    starts = np.maximum.accumulate(starts)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    if len(starts):
        starts[0] = 0  # leading white space that the tokenizer strips belongs to the first token
    sizes = np.diff(np.append(bytes_before[starts], bytes_before[-1]))
    return torch.tensor(encoded["input_ids"], dtype=torch.int64), torch.from_numpy(sizes)


def fingerprint(tokens: Tensor) -> str:
    """Return 16 hex digits of SHA-256 over the int64 values, and the shape."""
    values = tokens.to(device="cpu", dtype=torch.int64).contiguous().numpy().astype("<i8")
    return f"{hashlib.sha256(values.tobytes()).hexdigest()[:16]}-{'x'.join(map(str, tokens.shape))}"


def _require_room(nsamples: int, seqlen: int) -> None:
    """Raise BadInput before drawing more tokens than fit in memory."""
    available = available_bytes()
    if available is not None and 8 * nsamples * seqlen > available:
        raise BadInput(
            f"{nsamples:,} samples of {seqlen:,} tokens take {8 * nsamples * seqlen:,} bytes, but {available:,} are free",
            field="nsamples",
            value=nsamples,
            fix=("ask for fewer samples with ", Setting("nsamples")),
        )


def _first_windows(given: GivenTokens, nsamples: int, seqlen: int) -> Tensor:
    """Return the first of the caller's samples. Raises BadInput if they do not fit."""
    found = given.tokens if given.tokens.ndim == 2 else given.tokens[None]
    if found.shape[1] != seqlen:
        raise BadInput(f"the samples have {found.shape[1]} tokens, not {seqlen}", field="seqlen", fix="leave it out")
    if len(found) < nsamples:
        raise BadInput(f"there are {len(found)} samples, fewer than {nsamples}", field="nsamples", fix="leave it out")
    return found[:nsamples]


def _needed(tokenizer: Tokenizes | None) -> Tokenizes:
    if tokenizer is None:
        needs = "a model in memory needs its tokenizer to read text"
        raise BadInput(needs, field="processor", fix=("give it with ", Setting("processor")))
    return tokenizer


def _require_seqlen(seqlen: int) -> None:
    if seqlen < 2:
        raise BadInput(
            f"the sequence length must be at least 2, not {seqlen}: one token to see and one to predict",
            field="seqlen",
            value=seqlen,
        )


def draw_windows(
    ids: Sequence[int] | Tensor, nsamples: int, seqlen: int, seed: int, source: str = "the text"
) -> Tensor:
    """Draw windows of consecutive tokens whose starts are uniform: nsamples × seqlen int64.

    Raises BadInput if there are not more than seqlen tokens.
    """
    # The published code never uses the last possible start, so it needs one token more than a window.
    require_length(len(ids), seqlen + 1, source)
    generator = random.Random(seed)
    stream = torch.as_tensor(ids, dtype=torch.int64)
    starts = [generator.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([stream[start : start + seqlen] for start in starts])


def draw_from_documents(
    documents: list[str],
    tokenise: Callable[[str], list[int]],
    nsamples: int,
    seqlen: int,
    seed: int,
    source: str = "the text",
) -> Tensor:
    """Draw random documents until one has more than seqlen tokens, take a random window of it, for every sample.

    Returns nsamples × seqlen int64. The published code may draw a document again, which among its 356,317 hardly
    happens; here a document is used once, so that a smaller pool gives no repeated samples.
    Raises BadInput if fewer than nsamples documents are long enough.
    """
    generator = random.Random(seed)
    drawn: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < nsamples:
        if len(drawn) == len(documents):
            raise BadInput(
                f"only {len(windows)} of the {len(documents)} documents read from {source} are longer than {seqlen} "
                f"tokens, fewer than the {nsamples} samples asked for",
                fix=("ask for fewer samples with ", Setting("nsamples"), " or shorter ones with ", Setting("seqlen")),
            )
        index = generator.randint(0, len(documents) - 1)
        if index in drawn:
            continue
        drawn.add(index)
        ids = tokenise(documents[index])
        if len(ids) > seqlen:
            start = generator.randint(0, len(ids) - seqlen - 1)
            windows.append(torch.tensor(ids[start : start + seqlen], dtype=torch.int64))
    return torch.stack(windows)


def require_length(tokens: int, needed: int, source: str) -> None:
    """Raise BadInput if a text has fewer tokens than needed."""
    if tokens < needed:
        raise BadInput(
            f"{source} is too short: it has {tokens} tokens, but one sample needs {needed}",
            fix=("use more text, or shorter samples with ", Setting("seqlen"), f". {LOCAL_FILE_HINT}"),
        )
