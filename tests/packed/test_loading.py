"""transformers loads packed folders: unpacked or kept packed, whatever renames or fuses the weights on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.native.product import TILE_BYTES
from coprune.packed.folder import pack, unpack
from coprune.packed.linear import PackedLinear
from coprune.packed.quantizer import CopruneConfig, load_packed
from coprune.packed.registration import register_with_transformers
from support.pico import pico_model

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "llama-tied": LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}
register_with_transformers()


def save_pruned(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.masked_fill_(torch.rand(parameter.shape) < 0.6, 0.0)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def equal_states(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    state, other = a.state_dict(), b.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_unpacked_on_load_is_the_dense_model(name: str, tmp_path: Path) -> None:
    dense = save_pruned(CONFIGS[name], tmp_path / "dense")
    sizes = pack(tmp_path / "dense", tmp_path / "packed")
    assert sizes.packed < 0.75 * sizes.dense
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert equal_states(loaded, dense)
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")  # an ordinary model, saved as one
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_packed_gives_the_same_outputs_and_saves_packed(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = save_pruned(CONFIGS[name], tmp_path / "dense", dtype)
    pack(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed")
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    expected = {"llama": 15, "llama-tied": 14, "mixtral": 9, "gpt2": 0}  # GPT-2's are Conv1D
    assert len(layers) == expected[name]
    assert model.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=tolerance, atol=tolerance)
    model.save_pretrained(tmp_path / "again")
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), dense)
    unpack(tmp_path / "again", tmp_path / "dense again")
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "dense again"), dense)
    assert equal_states(model.dequantize(), dense)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "nemotron_h"])
def test_kept_packed_is_saved_in_shards_and_under_other_names(family: str, tmp_path: Path) -> None:
    made = pico_model(family)
    for parameter in made.parameters():
        parameter.masked_fill_((torch.rand(parameter.shape) < 0.6) & (parameter.ndim >= 2), 0.0)
    made.save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed")
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    assert len([*(tmp_path / "again").glob("*.safetensors")]) > 1
    assert torch.equal(outputs(load_packed(tmp_path / "again")), outputs(model))
    unpack(tmp_path / "again", tmp_path / "dense again")
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "dense again"), made)


def test_generation_from_a_packed_model(tmp_path: Path) -> None:
    dense: Any = save_pruned(CONFIGS["llama"], tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed", "nm")
    pack(tmp_path / "dense", tmp_path / "bitmask")
    prompt = torch.arange(1, 6)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = dense.generate(prompt, **options)
    for folder in ("packed", "bitmask"):
        assert torch.equal(load_packed(tmp_path / folder).generate(prompt, **options), expected)


def test_another_dtype_is_unpacked_and_cast(tmp_path: Path) -> None:
    dense = save_pruned(CONFIGS["llama"], tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    model = load_packed(tmp_path / "packed", dtype=torch.bfloat16)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert equal_states(model, nn.Module.to(dense, torch.bfloat16))


def test_damage_is_bad_input_before_anything_is_loaded(tmp_path: Path) -> None:
    save_pruned(CONFIGS["llama"], tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="checksum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    path.write_bytes(data[:-1000])
    with pytest.raises(BadInput, match="cut off"):
        load_packed(tmp_path / "packed")
    with pytest.raises(BadInput, match="not a packed folder"):
        load_packed(tmp_path / "dense")


def test_a_newer_format_and_packing_on_the_fly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="version 2"):
        CopruneConfig(version=2)
    save_pruned(CONFIGS["llama"], tmp_path / "dense")
    with pytest.raises(BadInput, match=r"coprune\.pack"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=CopruneConfig())


def test_registration_before_transformers_is_imported() -> None:
    """After it, every other test of this file registers, and loads."""
    script = """
import sys
from coprune.packed.registration import register_with_transformers
register_with_transformers()
register_with_transformers()
assert not {"torch", "transformers"} & set(sys.modules)
import transformers.quantizers.auto, inspect
assert {"coprune"} <= transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING.keys()
assert {"coprune"} <= transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING.keys()
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(transformers.quantizers.auto)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_memory_of_the_process_is_that_of_the_packed_weights(tmp_path: Path) -> None:
    """Resident memory of a fresh process, which reads the same model packed and dense."""
    config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.8, 0.0)
    model.save_pretrained(tmp_path / "dense")
    sizes = pack(tmp_path / "dense", tmp_path / "packed")
    script = """
import gc, sys, torch
from coprune.packed.quantizer import load_packed
from transformers import AutoModelForCausalLM
from coprune.packed.registration import register_with_transformers
register_with_transformers()
def resident():
    gc.collect()
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from coprune.base.native.build import load_kernels
load_kernels()
before = resident()
model = load_packed(sys.argv[1]) if sys.argv[2] == "packed" else AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    model(torch.arange(8)[None])
    model(torch.arange(200)[None] % 64)
print(resident() - before)
"""

    def growth(kind: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path / "packed"), kind]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    margin = 40 << 20  # activations, Python
    assert growth("dense") > sizes.dense - margin
    assert growth("packed") < sizes.packed + TILE_BYTES + margin < sizes.dense - margin


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gpt2", "transformer.h.*.attn.c_attn.weight (2)"),
        ("mixtral", "model.layers.*.block_sparse_moe.experts.*.w1.weight (8)"),
        ("llama-tied", None),
    ],
)
def test_what_cannot_stay_packed_is_named(
    name: str, kinds: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pruned(CONFIGS[name], tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed")
    load_packed(tmp_path / "packed")
    messages = [record.getMessage() for record in caplog.records if record.name == "coprune.packed.quantizer"]
    assert [kinds in message for message in messages if kinds] == [True] * len(messages)
    assert len(messages) == (kinds is not None)
