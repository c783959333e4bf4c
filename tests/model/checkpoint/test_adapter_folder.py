"""A folder with a PEFT adapter is read as its base model with the adapter merged."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import coprune
from coprune.base.errors import BadInput
from coprune.model.checkpoint.load import load_model, quiet_transformers
from coprune.model.checkpoint.locate import ModelFolder, locate
from coprune.model.checkpoint.shards import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from support.pico import pico_model, pico_tokens
from support.pico_folder import pico_tokenizer, save_pico, write_words

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """Save a random adapter; return the model with the adapter enabled."""
    torch.manual_seed(1)
    model, _ = load_model(ModelFolder(base, str(base)))
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated names of transformers
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
        adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_pico(tmp_path / "base")


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | settings))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_folder_is_read_as_the_merged_model(
    base: Path, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    adapted = save_adapter(base, tmp_path / "adapter", **settings)
    with caplog.at_level(logging.WARNING):
        found = locate(tmp_path / "adapter")
        locate(tmp_path / "adapter")
    assert caplog.records[0].message == f"Merging the adapter {tmp_path / 'adapter'} into {base}"
    model, tokenizer = load_model(found)
    tokens = pico_tokens(1, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(tokens).logits, load_model(locate(base))[0](tokens).logits, atol=1e-2)
    assert len(tokenizer) == len(pico_tokenizer())
    assert found.name == str(tmp_path / "adapter")


def test_an_adapter_is_pruned_and_inspected_like_a_model(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    words = write_words(tmp_path / "words.txt")
    asked: dict[str, Any] = {"nsamples": 2, "seqlen": 16, "evaluate": False, "quiet": True, "method": "wanda"}
    for stream in (False, True):
        out = tmp_path / f"pruned-{stream}"
        coprune.prune(tmp_path / "adapter", dataset=words, save_model=out, stream=stream, **asked)
    one, other = (load_file(next((tmp_path / f"pruned-{stream}").glob("*.safetensors"))) for stream in (False, True))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert coprune.inspect(tmp_path / "adapter")


def test_a_changed_adapter_or_base_is_located_as_another_model(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    first = locate(tmp_path / "adapter").path
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    second = locate(tmp_path / "adapter").path
    save_pico(base, hidden_act="gelu")
    third = locate(tmp_path / "adapter").path
    assert len({first, second, third}) == 3


def test_an_adapter_with_a_missing_base_names_the_base(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path="somebody/base")
    with pytest.raises(
        BadInput, match=r"is an adapter of somebody/base, which is not on this machine; fetch that \(hf down"
    ):
        locate(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of type PROMPT_TUNING; only LORA"),
        ({"coprune_masks": "abc"}, r"merge it, which keeps every zero: coprune\.merge"),
        ({"r": 10**9}, "whose configuration does not fit its tensors"),
        ({"rank_pattern": {"((a+)+)+b": 2}}, "whose configuration does not fit its tensors"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"r": 2}, "size mismatch"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_message(
    base: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    save_adapter(base, tmp_path / "adapter")
    change(tmp_path / "adapter", **settings)
    with pytest.raises(BadInput, match=said):
        locate(tmp_path / "adapter")
    assert not any((tmp_path / "cache").rglob("*.safetensors"))


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    save_pico(tmp_path / "short", num_hidden_layers=1)
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "short"))
    with pytest.raises(
        BadInput, match=r"is not an adapter of .*short, which has no layer for base_model.model.model.layers.1"
    ):
        locate(tmp_path / "adapter")


def test_an_adapter_without_some_of_its_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)
    with pytest.raises(BadInput, match="that lacks tensors"):
        locate(tmp_path / "adapter")


def test_zeros_of_a_pruned_base_are_not_filled(tmp_path: Path) -> None:
    model = pico_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter[:, ::2] = 0
    with quiet_transformers():
        model.save_pretrained(tmp_path / "pruned")
        pico_tokenizer().save_pretrained(tmp_path / "pruned")
    save_adapter(tmp_path / "pruned", tmp_path / "adapter")
    with pytest.raises(BadInput, match=r"which is pruned: merging would fill .* zeros"):
        locate(tmp_path / "adapter")
