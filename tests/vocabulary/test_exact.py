"""A smaller vocabulary tokenises texts of kept tokens identically, and loses no other text."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from coprune.vocabulary.choose import Kept
from coprune.vocabulary.kinds import Vocabulary
from coprune.vocabulary.rewrite import cut_tokenizer
from support.vocabularies import KINDS, TEXTS, content_of, kept_of

WORDS = sorted({word for text in TEXTS for word in text.split()})
SPECIAL = ["<s>", "</s>", "<tool>", "<unused1>", "\n\n\n", "        ", "\t\t", "🙂👩‍🚀", "é", "\u200b"]
TEXT = st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(SPECIAL), st.text(max_size=6)), max_size=12).map(
    " ".join
)


@cache
def pair(kind: str, size: int) -> tuple[Tokenizer, Tokenizer, Kept]:
    content = json.loads(content_of(kind))
    kept = kept_of(content, size)
    return Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(cut_tokenizer(content, kept))), kept


def require_exact(dense: Tokenizer, cut: Tokenizer, kept: Kept, text: str) -> bool:
    """Compare two tokenizers on a text; return whether all of its tokens were kept."""
    before, after = (one.encode(text).ids for one in (dense, cut))
    covered = all(token in kept.new for token in before)
    if covered:
        assert [kept.old[token] for token in after] == before, text
    said, again = (one.decode(ids, skip_special_tokens=False) for one, ids in ((dense, before), (cut, after)))
    assert said == again, text
    return covered


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXT, size=st.sampled_from([896, 960]))
def test_texts_of_kept_tokens_are_tokenised_alike_and_every_text_round_trips(kind: str, text: str, size: int) -> None:
    require_exact(*pair(kind, size), text)


@pytest.mark.parametrize("kind", KINDS)
def test_enough_samples_consist_of_kept_tokens(kind: str) -> None:
    dense, cut, kept = pair(kind, 896)
    assert sum(require_exact(dense, cut, kept, word) for word in WORDS) > 100


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "characters"])
def test_every_kept_row_is_reachable(kind: str) -> None:
    dense, cut, kept = pair(kind, 896)
    content = json.loads(cut.to_str())
    smaller, whole = Vocabulary.of(content), Vocabulary.of(json.loads(dense.to_str()))
    added = set(whole.added.values())
    lost = [old for new, old in enumerate(kept.old) if smaller.parts(new) is None and whole.parts(old) is not None]
    assert not lost
    assert len(kept.old) == 896
    unreachable = [old for old in kept.old if whole.parts(old) is None and old not in added | whole.essential()]
    assert not unreachable


def test_a_choice_without_merge_parts_leaves_unreachable_tokens() -> None:
    """Public scripts keep the tokens with the largest weights, without their merge parts."""
    content = json.loads(content_of("bytes"))
    vocabulary = Vocabulary.of(content)
    kept = kept_of(content, 896)
    parts = {part for token in kept.old for part in vocabulary.parts(token) or ()}
    last = max(parts - vocabulary.essential())
    without = Kept(tuple(token for token in kept.old if token != last))
    smaller = Vocabulary.of(cut_tokenizer(content, without))
    assert [token for token in range(len(without.old)) if smaller.parts(token) is None]


@pytest.mark.slow
def test_six_thousand_texts_are_exact_with_a_real_tokenizer(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    content = json.loads(smollm2_tokenizer.backend_tokenizer.to_str())
    kept = kept_of(content, 24_576)
    dense, cut = Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(cut_tokenizer(content, kept)))
    generator = random.Random(0)
    spans = [
        (32, 126),
        (160, 0x24F),
        (0x370, 0x5FF),
        (0x900, 0x97F),
        (0x4E00, 0x4FFF),
        (0xAC00, 0xADFF),
        (0x1F600, 0x1F64F),
    ]
    covered = 0
    for number in range(6000):
        span = spans[number % len(spans)]
        letters = "".join(chr(generator.randint(*span)) for _ in range(generator.randrange(8)))
        words = " ".join(generator.choices([*WORDS, *SPECIAL], k=generator.randrange(1, 8)))
        covered += require_exact(dense, cut, kept, f"{words}{letters}" if number % 2 else letters + words)
    assert covered > 100
