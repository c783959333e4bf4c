"""Divergence and agreement against plain versions of their definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import PreTrainedModel

import coprune
from coprune.base.errors import BadInput, NumericalError
from coprune.evaluation.batches import cut_windows
from coprune.evaluation.closeness import closeness, compare_logits
from support.pico import pico_model, pico_tokens

SEQLEN = 16


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return pico_model("llama")


@pytest.fixture(scope="module")
def pruned(dense: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model with a third of its blocks' weights zeroed."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter[parameter.abs() < 0.04] = 0
    return model


def test_closeness_equals_its_definition_for_any_batch_size(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    tokens = pico_tokens(1, 7 * SEQLEN + 3)[0]
    windows = cut_windows(tokens, SEQLEN)
    p = dense(windows).logits[:, :-1].double().softmax(-1)
    q = pruned(windows).logits[:, :-1].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    nll = -q.log().gather(-1, windows[:, 1:, None]).squeeze(-1).mean(-1)
    for batch_size in (None, 1, 3):
        found, along = closeness(dense, pruned, tokens, SEQLEN, batch_size)
        assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
        assert torch.allclose(along, nll, rtol=1e-5)
        assert found.top1_agreement == pytest.approx(float(same.mean()))
        assert (found.seqlen, found.windows, found.positions) == (SEQLEN, 7, 7 * (SEQLEN - 1))
        assert found.kl_interval is not None
        assert found.kl_interval[0] < found.kl < found.kl_interval[1]
    assert 0 < found.top1_agreement < 1


def test_a_model_is_closest_to_itself(dense: PreTrainedModel) -> None:
    done: list[int] = []
    found, _ = closeness(dense, dense, pico_tokens(1, 5 * SEQLEN)[0], SEQLEN, batch_size=2, advance=done.append)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.kl >= 0
    assert found.top1_agreement == 1
    assert done == [2, 2, 1]


def test_closeness_of_two_distributions_matches_a_computation_by_hand() -> None:
    even = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    skewed = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()  # the last position does not count
    found = compare_logits(even[None], skewed[None])
    assert float(found.kl) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    other = compare_logits(skewed[None], even[None])
    assert float(other.kl) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert float(other.top1_agreement) == 0


def test_models_of_different_vocabularies_and_broken_models_are_refused(dense: PreTrainedModel) -> None:
    tokens = pico_tokens(1, 2 * SEQLEN)[0] % 100
    with pytest.raises(BadInput, match="256 and 128 tokens in their vocabularies"):
        closeness(dense, pico_model("llama", vocab_size=128), tokens, SEQLEN)
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(NumericalError, match="NaN in 2 of 2"):
        closeness(dense, broken, tokens, SEQLEN)


def test_perplexity_comes_from_the_pass_that_compares(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    seen: list[int] = []
    hook = pruned.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    tokens = pico_tokens(1, 6 * SEQLEN)[0]
    found = coprune.evaluate(pruned, tokens, against=dense, seqlen=SEQLEN, quiet=True)
    hook.remove()
    alone = coprune.evaluate(pruned, tokens, seqlen=SEQLEN, quiet=True)
    assert sum(seen) == len(tokens)
    assert found.perplexity[0].value == pytest.approx(alone.perplexity[0].value, rel=1e-6)
    assert found.perplexity[0].source == alone.perplexity[0].source
