"""Greedy answers equal those of transformers' generate for any batch; sampling follows the distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.model.generation import Answer, Generation, generate
from support.pico import pico_model, pico_tokens

PROMPTS = [row[:length].tolist() for row, length in zip(pico_tokens(5, 20), (3, 20, 7, 1, 12), strict=True)]


def by_transformers(model: PreTrainedModel, prompt: list[int], new_tokens: int, ends: list[int]) -> list[int]:
    """Continue one prompt greedily with transformers alone."""
    given = torch.tensor([prompt])
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=0)
    write: Any = model.generate
    written = write(given, attention_mask=torch.ones_like(given), generation_config=settings)
    return list(written[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    model = pico_model(family)
    # A token that some answers hold ends them early.
    whole = [by_transformers(model, prompt, 12, []) for prompt in PROMPTS]
    end = Counter(token for tokens in whole for token in set(tokens)).most_common()[-1][0]
    expected = [by_transformers(model, prompt, 12, [end]) for prompt in PROMPTS]
    heard: list[float] = []
    found = generate(
        model, PROMPTS, Generation(12, temperature=0, batch_size=3, end_ids=(end,)), lambda n: heard.append(n)
    )
    assert [answer.tokens for answer in found] == expected
    assert [answer.ended for answer in found] == [tokens[-1] == end for tokens in expected]
    assert any(answer.ended for answer in found)
    assert not all(answer.ended for answer in found)
    assert sum(heard) == sum(len(tokens) for tokens in expected)


def test_the_head_gets_contiguous_vectors_and_the_model_is_restored() -> None:
    """Otherwise torch may copy the head once per row of a batch."""
    model = pico_model("llama")
    seen: list[bool] = []
    with model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].is_contiguous())):
        generate(model, PROMPTS, Generation(2, temperature=0))
        assert all(seen)
        seen.clear()
        model(torch.ones(2, 3, dtype=torch.int64), logits_to_keep=1)
    assert seen == [False]


def texts(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampled_answers_do_not_depend_on_the_batch(family: str) -> None:
    model = pico_model(family)
    alone = generate(model, PROMPTS, Generation(10, seed=3, batch_size=1))
    assert texts(alone) == texts(generate(model, PROMPTS, Generation(10, seed=3, batch_size=4)))
    assert texts(alone) != texts(generate(model, PROMPTS, Generation(10, seed=4)))
    assert alone[2].tokens == generate(model, PROMPTS[:3], Generation(10, seed=3))[2].tokens


def test_tokens_are_sampled_by_their_probability() -> None:
    model = pico_model("llama")
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6]])).logits[0, -1] / 0.5).softmax(-1)
    settings = Generation(1, temperature=0.5, batch_size=1000)
    counts = Counter(answer.tokens[0] for answer in generate(model, [[5, 6]] * 4000, settings))
    for token in expected.topk(5).indices.tolist():
        share = float(expected[token])
        assert abs(counts[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9
    # Only the fewest tokens that reach the probability mass.
    kept = expected.sort(descending=True)
    allowed = kept.indices[: int((kept.values.cumsum(0) < 0.3).sum()) + 1].tolist()
    settings = Generation(1, temperature=0.5, top_p=0.3, batch_size=1000)
    assert {answer.tokens[0] for answer in generate(model, [[5, 6]] * 500, settings)} == set(allowed)


def test_the_model_is_restored_and_its_generation_settings_are_ignored() -> None:
    model = pico_model("llama")
    plain = texts(generate(model, PROMPTS, Generation(8, temperature=0)))
    model.generation_config.repetition_penalty = 5.0
    model.train()
    model.model.norm.eval()
    before = {name: part.training for name, part in model.named_modules()}
    own = model.generation_config
    assert texts(generate(model, PROMPTS, Generation(8, temperature=0))) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0
    assert {name: part.training for name, part in model.named_modules()} == before


def test_answers_end_at_the_models_last_position() -> None:
    model = pico_model("gpt2", n_positions=24)
    found = generate(model, PROMPTS, Generation(10, temperature=0, batch_size=4))
    assert [len(answer.tokens) for answer in found] == [10, 4, 10, 10, 10]
    assert found[1].tokens == by_transformers(model, PROMPTS[1], 4, [])
    with pytest.raises(BadInput, match="prompt 2 has 24 tokens, but the model has only 24 positions"):
        generate(model, [[1], [1] * 24], Generation(10))
    with pytest.raises(BadInput, match="prompt 1 has no tokens"):
        generate(model, [[]], Generation(10))


def test_a_class_that_fails_on_its_own_configuration_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model("llama")
    monkeypatch.setattr(type(model), "forward", lambda self, **given: self.config.vision_start_token_id)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM cannot generate: .*vision_start_token_id"):
        generate(model, PROMPTS, Generation(4))
