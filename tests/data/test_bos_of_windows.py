"""BOS at the start of a text, of every window, or nowhere, whatever the tokenizer's default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from coprune.base.errors import BadInput
from coprune.data.bos import beginning, put_by, text_at_bos, windows_at_bos
from coprune.data.windows import EvaluationText, Windows, calibration_windows, evaluation_tokens, fingerprint
from coprune.recipe.parts import AskedBos
from support.pico_folder import pico_tokenizer, write_words

BOS = 1
HABITS = {"puts it": True, "puts none": False}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_words(tmp_path / "text.txt", count=200)


def ids_of(file: Path) -> list[int]:
    ids: list[int] = pico_tokenizer()(file.read_text(), verbose=False)["input_ids"]
    return ids


def tokenizer_with(puts: bool) -> PreTrainedTokenizerFast:
    return pico_tokenizer("put" if puts else "known")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("habit", HABITS)
def test_a_tokenizers_own_bos_is_detected_and_changed(habit: str, fast: bool, text_file: Path) -> None:
    tokenizer, ids = tokenizer_with(HABITS[habit]), ids_of(text_file)
    if not fast:

        class Slow(PreTrainedTokenizerFast):
            is_fast = False

        tokenizer.__class__ = Slow
    assert put_by(tokenizer) == (BOS if HABITS[habit] else None)
    expected: dict[AskedBos, list[int]] = {"never": ids, "first": [BOS, *ids]}
    expected["auto"] = expected["first"] if HABITS[habit] else ids
    for asked, tokens in expected.items():
        text = evaluation_tokens(str(text_file), beginning(tokenizer, asked), 16)
        assert text.tokens.tolist() == tokens
        assert text.bytes == len(text_file.read_bytes())
        assert text.fingerprint == fingerprint(torch.tensor(tokens))


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("seqlen", [2, 7, 16, 200])
def test_every_evaluation_window_begins_with_bos_and_continues_the_text(
    habit: str, seqlen: int, text_file: Path
) -> None:
    tokenizer, ids = tokenizer_with(HABITS[habit]), ids_of(text_file)
    before = evaluation_tokens(str(text_file), beginning(tokenizer, "every"), seqlen)
    text = text_at_bos(before, BOS, seqlen)
    windows = text.tokens.view(-1, seqlen).tolist()
    assert len(windows) == len(before.tokens) // seqlen
    assert [window[0] for window in windows] == [BOS] * len(windows)
    behind = [token for window in windows for token in window[1:]]
    assert behind == ids[: len(windows) * (seqlen - 1)]
    sizes = text.token_bytes.view(-1, seqlen)
    assert not bool(sizes[:, 0].any())
    # The same bytes as these tokens had without BOS between them.
    plain = evaluation_tokens(str(text_file), pico_tokenizer(), seqlen)
    assert sizes[:, 1:].flatten().tolist() == plain.token_bytes[: len(behind)].tolist()
    assert text.fingerprint != before.fingerprint


@pytest.mark.parametrize("habit", HABITS)
def test_calibration_windows_begin_with_bos_and_drop_their_last_token(habit: str, text_file: Path) -> None:
    tokenizer, puts = tokenizer_with(HABITS[habit]), HABITS[habit]

    def drawn(asked: AskedBos) -> Windows:
        return calibration_windows(str(text_file), beginning(tokenizer, asked), 50, 32, seed=0)

    usual, first, never = (drawn(asked).tokens for asked in ("auto", "first", "never"))
    assert torch.equal(usual, first if puts else never)
    assert not bool((never == BOS).any())
    every = windows_at_bos(drawn("every"), BOS).tokens
    assert every.shape == usual.shape
    for begun, window in zip(every.tolist(), usual.tolist(), strict=True):
        assert begun == (window if window[0] == BOS else [BOS, *window[:-1]])


@pytest.mark.parametrize("asked", ["first", "every"])
def test_bos_is_refused_for_a_tokenizer_without_one(asked: Any) -> None:
    with pytest.raises(BadInput, match="no token that begins a text"):
        beginning(pico_tokenizer(), asked)
    tokenizer = pico_tokenizer()
    assert beginning(tokenizer, "never") is tokenizer
    assert beginning(None, asked) is None


def test_token_ids_passed_by_the_caller_stay_unchanged() -> None:
    ids = torch.arange(3, 35)
    windows = Windows(ids.view(2, 16), "", "", given=True)
    assert windows_at_bos(windows, BOS) is windows
    text = EvaluationText(ids, torch.zeros(32, dtype=torch.int64), "", "", given=True)
    assert text_at_bos(text, BOS, 16) is text
