"""Calibration windows against a plain version of the published sampling, and tokens and bytes of an evaluation."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from coprune.base.errors import BadInput
from coprune.data import windows
from coprune.data.windows import (
    Sampling,
    TooShort,
    calibration_windows,
    draw_from_documents,
    draw_samples,
    draw_windows,
    evaluation_tokens,
    fingerprint,
    held_out_tokens,
    token_ids,
    tokens_and_bytes,
)
from support.word_tokenizers import word_tokenizer, words


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words(0, 900))
    return path


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_windows_of_a_file_are_those_of_the_published_sampling(text_file: Path, seed: int) -> None:
    found = calibration_windows(str(text_file), word_tokenizer(), nsamples=16, seqlen=32, seed=seed)

    stream = torch.arange(900)
    random.seed(seed)
    expected = []
    for _ in range(16):
        start = random.randint(0, len(stream) - 32 - 1)
        expected.append(stream[start : start + 32])
    assert torch.equal(found.tokens, torch.stack(expected))
    assert found.tokens.dtype == torch.int64
    assert found.source == str(text_file)


def test_windows_of_documents_are_those_of_the_published_sampling() -> None:
    lengths = [3, 40, 12, 64, 7, 33, 32, 90, 5, 51]
    documents = [words(10 * number, 10 * number + length) for number, length in enumerate(lengths)]
    tokenizer = word_tokenizer()
    found = draw_from_documents(documents, lambda text: tokenizer(text)["input_ids"], nsamples=2, seqlen=32, seed=5)

    random.seed(5)
    expected = []
    for _ in range(2):
        while True:
            index = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[index])["input_ids"]
            if len(ids) > 32:
                break
        start = random.randint(0, len(ids) - 32 - 1)
        expected.append(ids[start : start + 32])
    assert found.tolist() == expected


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    nsamples=st.integers(1, 6),
    seqlen=st.integers(2, 12),
    seed=st.integers(0, 1000),
)
def test_every_sample_lies_within_a_different_document(
    lengths: list[int], nsamples: int, seqlen: int, seed: int
) -> None:
    # The token 100 · document + position shows where a window came from.
    documents = {str(number): [100 * number + i for i in range(length)] for number, length in enumerate(lengths)}
    enough = sum(length > seqlen for length in lengths) >= nsamples
    if not enough:
        with pytest.raises(BadInput, match="fewer than the"):
            draw_from_documents(list(documents), documents.__getitem__, nsamples, seqlen, seed)
        return
    found = draw_from_documents(list(documents), documents.__getitem__, nsamples, seqlen, seed)
    assert found.shape == (nsamples, seqlen)
    assert len(set((found[:, 0] // 100).tolist())) == nsamples
    assert torch.equal(found - found[:, :1], torch.arange(seqlen).expand(nsamples, -1))


def test_sampling_leaves_the_global_generator_alone() -> None:
    random.seed(7)
    state = random.getstate()
    draw_windows(list(range(100)), 4, 10, seed=0)
    assert random.getstate() == state


def test_the_fingerprint_distinguishes_seeds_shapes_and_tokens(text_file: Path) -> None:
    def name(nsamples: int, seed: int) -> str:
        return calibration_windows(str(text_file), word_tokenizer(), nsamples, 32, seed).fingerprint

    assert name(8, 0) == name(8, 0)
    assert len({name(8, 0), name(8, 1), name(4, 0)}) == 3
    assert fingerprint(torch.arange(6).view(2, 3)) != fingerprint(torch.arange(6).view(3, 2))
    assert fingerprint(torch.arange(6, dtype=torch.int32)) == fingerprint(torch.arange(6))
    # Pinned, so that reports stay comparable across releases and machines.
    assert fingerprint(torch.arange(6)) == "f190072c5052f4f4-6"


def test_a_text_longer_than_the_model_allows_gives_no_warning(
    text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "transformers")  # whatever level an earlier test set
    calibration_windows(str(text_file), word_tokenizer(model_max_length=8), 1, 32, 0)
    evaluation_tokens(str(text_file), word_tokenizer(model_max_length=8), 32)
    assert "longer than" not in caplog.text
    word_tokenizer(model_max_length=8)(words(0, 20))  # a plain call does warn for the same text
    assert "longer than" in caplog.text


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "message"),
    [(0, 32, "samples must be at least 1"), (-3, 32, "samples"), (4, 1, "sequence length"), (4, 0, "sequence length")],
)
def test_invalid_sizes_are_refused_before_the_corpus_is_read(nsamples: int, seqlen: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        calibration_windows("no/such/file.txt", word_tokenizer(), nsamples, seqlen, 0)


def test_a_text_shorter_than_one_sample_is_named(text_file: Path) -> None:
    tokenizer = word_tokenizer()
    assert calibration_windows(str(text_file), tokenizer, 2, 899, 0).tokens.shape == (2, 899)
    with pytest.raises(BadInput, match=r"text\.txt is too short: it has 900 tokens, but one sample needs 901"):
        calibration_windows(str(text_file), tokenizer, 2, 900, 0)
    assert evaluation_tokens(str(text_file), tokenizer, 900).tokens.shape == (900,)
    with pytest.raises(BadInput, match="900 tokens, but one sample needs 901"):
        evaluation_tokens(str(text_file), tokenizer, 901)


def test_a_limit_keeps_the_first_tokens_and_their_bytes(text_file: Path) -> None:
    found = evaluation_tokens(str(text_file), word_tokenizer(), 10, limit_tokens=25)
    assert torch.equal(found.tokens, torch.arange(25))
    assert found.bytes == len((words(0, 25) + " ").encode())
    with pytest.raises(BadInput, match="less than one window"):
        evaluation_tokens(str(text_file), word_tokenizer(), 10, limit_tokens=9)


def test_bytes_of_tokens_with_a_start_mark_and_stripped_space() -> None:
    text = "  w1 é€ 😀\n w2 "
    tokens, sizes = tokens_and_bytes(word_tokenizer(start_mark=True), text)
    assert tokens.tolist() == [1001, 1, 1000, 1000, 2]
    assert sizes.tolist() == [2, 3, 6, 6, 3]
    assert int(sizes.sum()) == len(text.encode())


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(text=st.text(min_size=1, max_size=60))
def test_bytes_of_a_real_tokenizer_add_up_to_those_of_the_text(
    smollm2_tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    try:
        expected = len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate is not text
        return
    tokens, sizes = tokens_and_bytes(smollm2_tokenizer, text)
    assert len(tokens) == len(sizes)
    # A text of unknown characters only gives no tokens to cover it.
    assert int(sizes.sum()) == (expected if len(tokens) else 0)
    assert bool((sizes >= 0).all())


@pytest.mark.slow
def test_bytes_of_a_real_tokenizer_are_those_of_its_tokens(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The naïve café — 42 pages."
    tokens, sizes = tokens_and_bytes(smollm2_tokenizer, text)
    pieces = [len(str(smollm2_tokenizer.decode([token])).encode()) for token in tokens.tolist()]
    assert sizes.tolist() == pieces


@pytest.mark.parametrize("samples", [10**12, 10**30])
def test_more_samples_than_fit_in_memory_are_refused_before_drawing(samples: int, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("w1 w2 w3")
    with pytest.raises(BadInput, match="are free") as caught:
        calibration_windows(str(tmp_path / "words.txt"), None, samples, 32, 0)
    assert caught.value.field == "nsamples"


def test_calibration_leaves_out_the_held_out_tenth_of_the_users_text(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(" ".join(["w5"] * 900 + ["w6"] * 100))
    name, tokenizer = str(tmp_path / "mine.txt"), word_tokenizer()
    whole = calibration_windows(name, tokenizer, 64, 32, 0)
    drawn = draw_samples(name, tokenizer, Sampling(64, 32, 0, held_out_for=20))
    held = evaluation_tokens(name, tokenizer, 20, held_out=True)
    last = int(held.tokens[0])
    assert held.tokens.tolist() == [last] * 100
    assert held.source == f"the last tenth of {name}"
    assert bool((whole.tokens == last).any())
    assert not bool((drawn.tokens == last).any())
    assert len(evaluation_tokens(name, tokenizer, 20, limit_tokens=40, held_out=True).tokens) == 40
    assert (held_out_tokens(1000, 30), held_out_tokens(999, 100)) == (90, 0)
    with pytest.raises(TooShort, match=r"the last tenth of .* does not fill a window of 200 tokens"):
        evaluation_tokens(name, tokenizer, 200, held_out=True)
    # A corpus with its own test split is used completely.
    assert draw_samples("embedded", tokenizer, Sampling(4, 32, 0, held_out_for=20)).fingerprint == (
        calibration_windows("embedded", tokenizer, 4, 32, 0).fingerprint
    )


def test_a_large_text_is_tokenised_in_pieces(
    monkeypatch: pytest.MonkeyPatch, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "\n".join(f"Line {number} of a text, with wörds and 漢字." for number in range(3000))
    whole = tokens_and_bytes(smollm2_tokenizer, text)
    monkeypatch.setattr(windows, "WHOLE", 20_000)
    monkeypatch.setattr(windows, "PIECE", 5_000)
    parts = list(windows.pieces_of(text))
    assert len(parts) > 20
    assert "".join(parts) == text
    tokens, sizes = tokens_and_bytes(smollm2_tokenizer, text)
    assert torch.equal(tokens, whole[0])
    assert torch.equal(sizes, whole[1])
    assert token_ids(smollm2_tokenizer, text) == tokens.tolist()
    assert list(windows.pieces_of("x" * 50_000)) == ["x" * 5_000] * 10
