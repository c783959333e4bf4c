"""A model of a billion parameters, half of them zero: packed in transformers beside llama.cpp's float16 and eight bits.

The weights are random, since only the time is asked for. The same model is written three times, as a dense checkpoint, as a
packed one and as GGUF files; that llama.cpp runs the same model is seen by its next token. Then `coprune bench` measures
all of them in turns.

    python benchmarks/wide.py                             # 16 blocks of width 2048: 0.9 billion parameters
    python benchmarks/wide.py --blocks 4 --compile
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from synthetic import write_llama
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import coprune
from coprune.gguf_files.llama_cpp import LlamaCpp, Quantisation, quantize
from coprune.packed.bench import bench
from coprune.packed.folder import pack


def main() -> None:
    """Make what is not there, and print what `coprune bench` prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="to decode per measurement")
    parser.add_argument("--compile", action="store_true", help="also with a compiled step")
    parser.add_argument("--folder", type=Path, default=Path("out/wide"), help="where the models are kept")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    folder = asked.folder / f"{asked.blocks}x{asked.width}"
    dense, packed, half, eight = (folder / name for name in ("dense", "packed", "f16.gguf", "q8_0.gguf"))
    if not packed.is_dir():
        write_llama(dense, asked.blocks, asked.width)
        pack(halved(dense, folder / "pruned"), packed)
    if not eight.is_file():
        require_same(write_gguf(dense, half), dense)
        quantize(half, eight, Quantisation("q8_0"))
    print(f"{sum(p.numel() for p in load(dense).parameters()):,} parameters")
    models = [str(path) for path in (dense, packed, half, eight)]
    print(bench(models, None, dtype="bfloat16", tokens=asked.tokens, compile=asked.compile))


def load(folder: Path) -> PreTrainedModel:
    """The dense model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model


def halved(dense: Path, target: Path) -> Path:
    """Half of every matrix of the blocks zero, at random."""
    if not target.is_dir():
        coprune.prune(str(dense), "magnitude", sparsity=0.5, evaluate=False, layer_error=False, save_model=target)
    return target


def write_gguf(dense: Path, file: Path) -> Path:
    """The same weights as llama.cpp has them: rows of queries and keys by pairs that are turned together."""
    model = load(dense)
    config = model.config
    assert isinstance(config, LlamaConfig)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    keys, rope = config.num_key_value_heads, dict(config.rope_parameters or {})
    assert keys is not None
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(keys)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    for name, value in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        heads = {"q_proj": config.num_attention_heads, "k_proj": keys}.get(name.split(".")[-2])
        weight = (
            value if heads is None else value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        )
        writer.add_tensor(found, weight.float().numpy().astype(np.float16 if weight.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@torch.no_grad()
def require_same(file: Path, dense: Path) -> None:
    """The most likely next tokens are those of transformers."""
    ids = torch.arange(7, 71)
    ours, theirs = load(dense)(ids[None]).logits[0].float(), LlamaCpp(file).logits(ids.tolist())
    share = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    assert share > 0.9, f"llama.cpp runs another model: only {share:.0%} of the next tokens are the same"


if __name__ == "__main__":
    main()
