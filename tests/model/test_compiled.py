"""Decoding with a compiled step gives the same text as without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from coprune.base.errors import BadInput
from coprune.model.compiled import compile_decoding


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    made: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    return made


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make graphs as usual but run them uncompiled, since compiling is torch's work and takes a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr("coprune.model.compiled.torch.compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("without_inductor")
def test_generate_uses_the_compiled_step_and_writes_the_same(model: PreTrainedModel) -> None:
    asked: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True)
    asked["return_dict_in_generate"] = True
    prompts = (
        {"input_ids": torch.arange(5)[None]},
        {
            "input_ids": torch.arange(10).reshape(2, 5),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        },
    )
    write: Any = model.generate
    expected, before = [write(**prompt, **asked) for prompt in prompts], model.forward
    undo = compile_decoding(model)
    try:
        for prompt, wanted in zip(prompts, expected, strict=True):
            torch._dynamo.utils.counters.clear()
            torch._dynamo.reset()
            found = write(**prompt, **asked)
            assert torch.equal(found.sequences, wanted.sequences)
            torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-5)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one for all steps, none for the prompt
        assert model.config._attn_implementation == "eager"
    finally:
        undo()
    assert model.config._attn_implementation == "sdpa"
    assert model.forward == before
    assert model.generation_config is not None
    assert model.generation_config.cache_implementation is None


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_a_step_of_more_sizes_than_torch_compiles_writes_the_same(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    write: Any = model.generate
    prompts = [torch.arange(4).repeat(batch, 1) for batch in (1, 2)]
    expected = [write(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) for ids in prompts]
    undo = compile_decoding(model)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            for ids, wanted in zip(prompts, expected, strict=True):
                assert torch.equal(write(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), wanted)
    finally:
        undo()
    assert sum("others are slower" in record.message for record in caplog.records) == 1


def test_compiled_code_is_not_saved_with_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    settings: Any = model.generation_config
    undo = compile_decoding(model)
    try:
        model.save_pretrained(tmp_path / "model")
        assert settings.cache_implementation == "static"
    finally:
        undo()
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.cache_implementation, saved.disable_compile) == (None, settings.disable_compile)
    assert not {"forward", "save_pretrained"} & vars(model).keys()


def test_models_that_do_not_generate_are_not_compiled() -> None:
    with pytest.raises(BadInput, match="does not generate text"):
        compile_decoding(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's own compiler
def test_torch_compile_itself_writes_the_same(model: PreTrainedModel) -> None:
    ids, asked = torch.arange(5)[None], dict(max_new_tokens=12, do_sample=False)
    write: Any = model.generate
    expected = write(ids, **asked)
    torch._dynamo.reset()
    undo = compile_decoding(model)
    try:
        assert torch.equal(write(ids, **asked), expected)
    finally:
        undo()
