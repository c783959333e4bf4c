"""Perplexity against a plain version of the published computation, for any batch size, and per byte."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, NumericalError
from coprune.evaluation.batches import bootstrap_interval, cut_windows, default_batch_size, slices
from coprune.evaluation.measurement import Perplexity
from coprune.evaluation.perplexity import aggregate, perplexity, window_nll
from coprune.report.figures import PerplexityFacts
from support.pico import pico_model, pico_tokens
from support.pico_hybrids import VOCABULARY

SEQLEN = 16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return pico_model("llama")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Return tokens of nine whole windows and a tail, which is dropped."""
    return pico_tokens(1, 9 * SEQLEN + 5)[0]


def published_perplexity(model: PreTrainedModel, tokens: torch.Tensor, seqlen: int) -> float:
    """Compute perplexity as the published code does, one window at a time."""
    nsamples = tokens.numel() // seqlen
    nlls = []
    for i in range(nsamples):
        inputs = tokens[None, i * seqlen : (i + 1) * seqlen]
        logits = model(inputs).logits
        shift_logits = logits[:, :-1, :].contiguous()
        shift_labels = inputs[:, 1:]
        loss = nn.CrossEntropyLoss()(shift_logits.reshape(-1, shift_logits.size(-1)), shift_labels.reshape(-1))
        nlls.append(loss.float() * seqlen)
    return torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)).item()


@pytest.mark.parametrize("batch_size", [None, 1, 2, 4, 9, 100])
def test_perplexity_is_the_published_one_whatever_the_batch_size(
    model: PreTrainedModel, tokens: torch.Tensor, batch_size: int | None
) -> None:
    found = perplexity(model, tokens, SEQLEN, batch_size)
    assert found.value == pytest.approx(published_perplexity(model, tokens, SEQLEN), rel=1e-5)
    assert (found.seqlen, found.windows, found.tokens) == (SEQLEN, 9, 9 * (SEQLEN - 1))


def test_perplexity_in_half_precision_takes_the_softmax_in_float32(tokens: torch.Tensor) -> None:
    model = pico_model("llama", dtype=torch.bfloat16)
    logits = model(cut_windows(tokens, SEQLEN)).logits
    expected = nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, VOCABULARY), cut_windows(tokens, SEQLEN)[:, 1:].reshape(-1)
    )
    assert perplexity(model, tokens, SEQLEN, 9).value == pytest.approx(math.exp(expected), rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 12), vocabulary=st.integers(2, 40), most_values=st.integers(1, 100))
def test_slices_cover_every_row_once_within_their_limit(rows: int, vocabulary: int, most_values: int) -> None:
    logits = torch.randn(rows, vocabulary)
    cut = list(slices(logits, most_values))
    assert torch.equal(torch.cat([logits[part] for part in cut]), logits)
    assert all((part.stop - part.start) * vocabulary <= max(most_values, vocabulary) for part in cut)


def test_a_window_of_large_logits_is_summed_slice_by_slice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 2**22, generator=generator)  # four rows fit into a slice
    tokens = torch.randint(2**22, (2, 6), generator=generator)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    found = window_nll(logits, tokens)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected.view(2, 5).mean(dim=1))


def test_uniform_logits_have_the_vocabulary_as_perplexity_and_its_bits_per_byte() -> None:
    nll = window_nll(torch.zeros(3, 5, 64), torch.zeros(3, 5, dtype=torch.int64))
    # Every predicted token covers 3 bytes; the bytes of first tokens do not count.
    sizes = torch.tensor([[1000, 3, 3, 3, 3]]).expand(3, -1)
    found = aggregate(nll, 5, sizes)
    assert found.value == pytest.approx(64)
    assert found.tokens == 12
    assert found.bits_per_byte == pytest.approx(6 / 3)
    assert found.per_byte == pytest.approx(4)
    assert found.interval == pytest.approx((64, 64))


def test_per_byte_follows_from_the_total_loss(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    sizes = torch.arange(tokens.numel()) % 7
    found = perplexity(model, tokens, SEQLEN, token_bytes=sizes)
    total = float(found.losses().sum()) * (SEQLEN - 1)
    covered = int(sizes[: 9 * SEQLEN].view(9, SEQLEN)[:, 1:].sum())
    assert found.per_byte == pytest.approx(math.exp(total / covered))
    assert found.bits_per_byte == pytest.approx(total / covered / math.log(2))
    unknown = perplexity(model, tokens, SEQLEN)
    assert (unknown.per_byte, unknown.bits_per_byte) == (None, None)


def test_the_interval_contains_the_value_is_seeded_and_narrows_with_more_windows() -> None:
    nll = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5 + 3
    few, many = aggregate(nll[:25], 8), aggregate(nll, 8)
    for found in (few, many):
        assert found.interval is not None
        assert found.interval[0] < found.value < found.interval[1]
    assert aggregate(nll, 8).interval == many.interval
    assert aggregate(nll[:1], 8).interval is None
    low, high = bootstrap_interval(nll)  # type: ignore[misc]
    # The normal approximation of the same interval.
    half = 1.96 * float(nll.std()) / 20
    assert (low, high) == pytest.approx((float(nll.mean()) - half, float(nll.mean()) + half), abs=0.005)
    few_low, few_high = bootstrap_interval(nll[:25])  # type: ignore[misc]
    assert few_high - few_low > 2 * (high - low)


def test_progress_counts_windows(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    done: list[int] = []
    perplexity(model, tokens, SEQLEN, batch_size=4, advance=done.append)
    assert done == [4, 4, 1]


def test_dropout_is_off_and_the_training_mode_is_restored(tokens: torch.Tensor) -> None:
    model = pico_model("llama", attention_dropout=0.5)
    expected = perplexity(model, tokens, SEQLEN).value
    model.train()
    model.model.norm.eval()  # as if a part were frozen
    before = {name: part.training for name, part in model.named_modules()}
    assert perplexity(model, tokens, SEQLEN).value == expected
    assert {name: part.training for name, part in model.named_modules()} == before


def test_a_bad_model_has_infinite_perplexity_and_nan_is_an_error() -> None:
    ruined = aggregate(torch.tensor([800.0, 900.0]), 4, torch.ones(2, 4, dtype=torch.int64))
    assert ruined.value == math.inf
    assert ruined.bits_per_byte == pytest.approx(850 / math.log(2))
    assert ruined.per_byte == math.inf
    with pytest.raises(NumericalError, match=r"NaN in 1 of 3 evaluation windows \(first: 1\)"):
        aggregate(torch.tensor([1.0, math.nan, 2.0]), 4)


@pytest.mark.parametrize(
    ("length", "seqlen", "batch_size", "message"),
    [(15, 16, None, "15 tokens, less than one window of 16"), (64, 1, None, "at least 2"), (64, 16, 0, "batch size")],
)
def test_invalid_arguments_are_refused_by_name(
    model: PreTrainedModel, length: int, seqlen: int, batch_size: int | None, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        perplexity(model, torch.zeros(length, dtype=torch.int64), seqlen, batch_size)


def test_tokens_form_one_stream_and_unknown_ids_are_refused(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    whole = perplexity(model, tokens, 24)
    assert perplexity(model, tokens[None], 24) == whole
    for unknown in (tokens - 10_000, tokens + 10_000):
        with pytest.raises(BadInput, match=r"the token id .* use the model's tokenizer"):
            perplexity(model, unknown, 24)


@pytest.mark.parametrize(
    ("seqlen", "vocabulary", "expected"), [(512, 49_152, 8), (2048, 32_000, 2), (2048, 262_144, 1), (8192, 32_000, 1)]
)
def test_the_default_batch_is_bounded_by_the_memory_of_its_logits(seqlen: int, vocabulary: int, expected: int) -> None:
    assert default_batch_size(seqlen, vocabulary) == expected


def test_an_infinite_perplexity_survives_json() -> None:
    ruined = aggregate(torch.tensor([800.0, 900.0]), 4, torch.ones(2, 4, dtype=torch.int64)).on("text", "here", "a")
    assert Perplexity.model_validate_json(ruined.model_dump_json()) == ruined
    facts = PerplexityFacts.of(None, ruined)
    assert PerplexityFacts.model_validate_json(facts.model_dump_json()) == facts
