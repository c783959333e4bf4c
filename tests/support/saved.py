"""Random models as folders, and comparison of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.companions import copy_companions
from coprune.model.checkpoint.lazy import LazyCheckpoint
from coprune.model.checkpoint.load import quiet_transformers
from coprune.model.checkpoint.locate import ModelFolder
from coprune.model.checkpoint.weights import Weights
from coprune.model.checkpoint.writer import REST, CheckpointWriter
from coprune.recipe.parts import DtypeName
from support.pico import FAMILIES, pico_model, pico_tokens
from support.pico_pairs import pico_pairs

# One for each way in which a checkpoint may differ from its model: tied and untied, Conv1D, experts fused on load
# (with other names), experts fused in the files already, dense blocks before mixtures, parameters kept in float32.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    **{name: (name, {}) for name in ("gpt2", "opt", "gemma2", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")},
}
assert "llama" in FAMILIES


def random_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a model with random parameters and persistent buffers, so that no two are equal."""
    family, changes = MODELS[name]
    model = pico_model(family, **changes)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(std=0.2)
    nn.Module.to(model, dtype)
    return model


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, shards: str = "100KB") -> PreTrainedModel:
    """Save a random model in shards, and return it."""
    model = random_model(name, dtype)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=shards)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors in a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load_clean(folder: Path) -> PreTrainedModel:
    """Load with transformers; fail if a key is missing, unexpected or of another shape."""
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        named: Any = (
            getattr(transformers, config.architectures[0]) if config.is_encoder_decoder else AutoModelForCausalLM
        )
        model, info = named.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    loaded: PreTrainedModel = model.eval()
    return loaded


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert equal names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def write_blocks(weights: Weights, writer: CheckpointWriter, blocks: Sequence[str]) -> None:
    for block in blocks:
        weights.acquire(block)
        writer.write(block, weights.original_tensors(block), {"block": block})
        weights.release(block)


def stream(source: Path, target: Path, dtype: DtypeName = "auto") -> Path:
    """Copy a checkpoint through the skeleton, block by block."""
    lazy = LazyCheckpoint(ModelFolder(source, source.name), dtype)
    blocks = [block.name for block in find_blocks(lazy.model)]
    writer = CheckpointWriter(target, [REST, *blocks], lazy.total_bytes)
    lazy.acquire_rest(blocks)
    writer.write(REST, lazy.rest_tensors(blocks))
    write_blocks(lazy, writer, blocks)
    copy_companions(lazy.location, writer.partial, dtype)
    assert not target.exists()
    return writer.finish()


def saved_like(model: PreTrainedModel, small: PreTrainedModel | None, folder: Path, rounding: float) -> PreTrainedModel:
    """Load a removal's folder; require that it computes the same as the silenced big model and the small one in memory.

    rounding: allowed difference between the model in memory and the saved one.
    """
    assert small is not None
    saved = load_clean(folder)
    assert saved.num_parameters() == small.num_parameters()
    with torch.no_grad():
        silent, found = _logits(model), _logits(saved)
        torch.testing.assert_close(found, silent, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(_logits(small), found, rtol=rounding, atol=rounding)
        own = saved.config._attn_implementation
        saved.set_attn_implementation("eager")  # which uses other numbers of the configuration
        torch.testing.assert_close(_logits(saved), found, rtol=1e-4, atol=1e-4)
        saved.set_attn_implementation(own)
    return saved


def _logits(model: PreTrainedModel) -> Tensor:
    given: dict[str, Tensor] = {"input_ids": pico_tokens(2, 16)}
    if model.config.is_encoder_decoder:
        pairs = pico_pairs(model, 2)
        given = {model.main_input_name: pairs.source, "decoder_input_ids": pairs.written}
    logits: Tensor = model(**given, use_cache=False).logits
    return logits
