"""Calibration samples from several sources by their shares, in mixed order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.base.words import Setting
from coprune.data.conversations import Document, holds_conversations, read_conversations
from coprune.data.in_memory import given_samples
from coprune.data.text import NOTHING, padded
from coprune.data.tokenizing import Tokenizes
from coprune.data.windows import Sampling, SourcePart, Windows, draw_samples, fingerprint
from coprune.recipe.sources import Source


def reads_conversations(source: Source) -> bool:
    """Return whether a source is read as conversations: if requested, or if it is a file of them."""
    if source.is_own or source.options.get("template") == "none":
        return False
    return source.options.get("template") == "chat" or holds_conversations(source.name)


def length_of(source: Source, seqlen: int) -> int:
    """Return the sample length of a source: its own option, the caller's data's, or the run's."""
    own: int = source.options.get("seqlen") or given_samples(source.name).get("seqlen") or seqlen
    return own


def source_windows(
    source: Source,
    tokenizer: tuple[Tokenizes | None, PreTrainedTokenizerBase | None],
    sampling: Sampling,
) -> Windows:
    """Return samples of an existing source.

    Args:
        source: any except generated text.
        tokenizer: with the chosen BOS, and the original with its chat template.
        sampling: number, length and seed.

    Raises:
        BadInput: as `calibration_windows` and `read_conversations`.
    """
    column = source.options.get("column")
    if reads_conversations(source):
        if tokenizer[1] is None:
            raise BadInput(
                "conversations need a tokenizer", field="processor", fix=("give it with ", Setting("processor"))
            )
        return packed(read_conversations(source.name, tokenizer[1], column), *sampling[:3], source.name)
    name = source.name if column is None else f"{source.name}:{column}"
    return draw_samples(name, tokenizer[0], sampling)


def packed(documents: Sequence[Document], nsamples: int, seqlen: int, seed: int | None, source: str) -> Windows:
    """Return samples cut from documents concatenated in random order, or in the given one without a seed.

    Raises BadInput if there are not enough tokens.
    """
    order = list(range(len(documents)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    needed, total = nsamples * seqlen, sum(len(document.ids) for document in documents)
    if total < needed:
        raise BadInput(
            f"{source} has {total} tokens, but {nsamples} samples of {seqlen} need {needed}",
            fix=(
                "use more of it, or fewer samples with ",
                Setting("nsamples"),
                " or shorter ones with ",
                Setting("seqlen"),
            ),
        )
    ids = [token for i in order for token in documents[i].ids][:needed]
    marks = [mark for i in order for mark in documents[i].generated][:needed]
    tokens, generated = torch.tensor(ids).view(nsamples, seqlen), torch.tensor(marks).view(nsamples, seqlen)
    return marked(Windows(tokens, "", source, generated=generated))


def marked(windows: Windows) -> Windows:
    """Add the mask of generated tokens to the samples and their fingerprint."""
    name = fingerprint(windows.tokens)
    if windows.generated is not None:
        name = f"{name}-{fingerprint(windows.generated)[:8]}"
    return replace(windows, fingerprint=name)


def mixed(found: Sequence[tuple[Source, Windows]], seed: int) -> Windows:
    """Join the samples of all sources in random order; those of a single source are unchanged."""
    parts = tuple(
        SourcePart(
            name=source.name,
            source=one.source,
            nsamples=len(one.tokens),
            fingerprint=one.fingerprint,
            seqlen=one.tokens.shape[1],
        )
        for source, one in found
    )
    if len(found) == 1:
        return replace(found[0][1], parts=parts)
    order = torch.randperm(sum(part.nsamples for part in parts), generator=torch.Generator().manual_seed(seed))
    tokens = padded([one.tokens for _, one in found], NOTHING)[order]
    marks = None
    if any(one.generated is not None for _, one in found):
        # Unmarked text has no prompt to exclude.
        whole = [torch.ones_like(one.tokens, dtype=torch.bool) for _, one in found]
        own = [all_ if one.generated is None else one.generated for all_, (_, one) in zip(whole, found, strict=True)]
        marks = padded(own, False)[order]
    said = "; ".join(f"{part.nsamples} of {part.source}" for part in parts)
    given = any(one.given for _, one in found)
    return marked(Windows(tokens, "", said, given, marks, parts))
