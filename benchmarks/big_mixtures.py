"""Memory and speed of `coprune prune MIXTURE --remove experts=keep:…` (three quarters), beside `cp` of the same files.

Writes a synthetic mixture of random codes, cuts it in a fresh process whose memory is sampled (its own pages, and those of
mapped files, which the system can reclaim), and deletes everything. The mixture is a Qwen3 as one GGUF file in Q4_K, or a
folder in FP8 with the shapes of DeepSeek-V3.

    python benchmarks/big_mixtures.py gguf --gigabytes 20 --experts 128 --scores aimer,reap
    python benchmarks/big_mixtures.py fp8 --layers 2 --experts 16
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file
from synthetic import VOCABULARY, word_tokenizer, write_words
from torch import Tensor
from transformers import DeepseekV3Config

HEADS, HEAD, TOKENS, STEP = 16, 128, 512, 128
MIB = 1 << 20
COPIED = 8 * 10**9
"""Most bytes of a file that are copied for comparison."""
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("form", choices=["gguf", "fp8"])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the GGUF file, about")
    parser.add_argument("--layers", type=int, default=2, help="of the folder")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="the width of an expert")
    parser.add_argument("--scores", default="aimer,reap", help="each cuts the file anew")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the files are written for a while")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="coprune-big-", dir=asked.folder))
    try:
        measure(asked, folder)
    finally:
        shutil.rmtree(folder)


def measure(asked: argparse.Namespace, folder: Path) -> None:
    text = write_words(folder / "words.txt", 5000)
    if asked.form == "gguf":
        source, small = folder / "big.gguf", folder / "small.gguf"
        write_gguf(source, asked)
        text.write_text("A mixture sends each token to a few of its experts. " * 200)
    else:
        source, small = folder / "big", folder / "small"
        write_fp8(source, asked)
    size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.iterdir()))
    print(f"source  {size / 1e9:.2f} GB", flush=True)
    copied, started, most = folder / "copied", time.perf_counter(), min(size, COPIED)
    if source.is_file():
        with copied.open("wb") as target:
            subprocess.run(["head", "-c", str(most), str(source)], check=True, stdout=target)
    else:
        subprocess.run(["cp", "-r", str(source), str(copied)], check=True)
    subprocess.run(["sync"], check=True)
    print(f"copied  {most / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    subprocess.run(["rm", "-r", str(copied)], check=True)
    for score in asked.scores.split(","):
        cut(asked, folder, (source, small, text), score)


def cut(asked: argparse.Namespace, folder: Path, files: tuple[Path, Path, Path], score: str) -> None:
    """Measure one cut. files: the source, the target and the text; score: chooses the experts."""
    source, small, text = files
    command = [sys.executable, "-m", "coprune", "prune", str(source), "--score", score, "-q", "--no-gate"]
    command += ["--remove", f"experts=keep:{asked.experts * 3 // 4}"]
    command += ["--save", str(folder / "run"), "--save-model", str(small)]
    if score != "aimer":
        command += [
            "--dataset",
            str(text),
            "--seqlen",
            str(asked.seqlen),
            "--nsamples",
            str(asked.samples),
            "--no-eval",
        ]
    command += [] if source.is_file() else ["--stream"]
    started = time.perf_counter()
    process, (own, mapped) = watched(command)
    report = json.loads((folder / "run" / "report.json").read_text())
    phases = {p["name"]: p["seconds"] for p in report["phases"]} or {"scores": report["prune_seconds"]}
    print(f"{score:8}{time.perf_counter() - started:.0f} s, {process:.0f} s of a processor: ", end="")
    print(", ".join(f"{name} {took:.0f}" for name, took in phases.items()))
    print(f"        own pages {own / MIB:.0f} MiB at most, of files {mapped / MIB:.0f}", flush=True)
    subprocess.run(["rm", "-r", str(folder / "run"), str(small)], check=True)


def watched(command: list[str]) -> tuple[float, tuple[int, int]]:
    """Run a command; returns its CPU seconds, and its peak bytes of own pages and of mapped files."""
    before, most = time.process_time(), (0, 0)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            except OSError:
                break
            found = {key: 1024 * int(kib) for key, kib in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}
            if found:
                most = max(most[0], found["RssAnon"]), max(most[1], found["RssFile"] + found["RssShmem"])
                before = sum(map(int, ticks)) / 100
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return before, most


def write_gguf(file: Path, asked: argparse.Namespace) -> None:
    """Write the file, one tensor in memory at a time."""
    generator, kind = np.random.default_rng(0), GGMLQuantizationType.Q4_K
    values, size = GGML_QUANT_SIZES[kind]
    width, experts, inner = asked.width, asked.experts, asked.inner
    coded: Shapes = {
        "attn_q": (HEADS * HEAD, width),
        "attn_k": (HEADS * HEAD // 4, width),
        "attn_v": (HEADS * HEAD // 4, width),
        "attn_output": (width, HEADS * HEAD),
        "ffn_gate_exps": (experts, inner, width),
        "ffn_up_exps": (experts, inner, width),
        "ffn_down_exps": (experts, width, inner),
    }
    plain: Shapes = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
    plain["ffn_gate_inp"] = (experts, width)
    blocks = max(2, round(asked.gigabytes * 1e9 / sum(math.prod(shape) * size // values for shape in coded.values())))
    with closing(GGUFWriter(file, "qwen3moe")) as writer:
        write_settings(writer, asked, blocks)
        todo: list[tuple[str, tuple[int, ...], bool]] = [("token_embd", (TOKENS, width), True)]
        todo += [("output", (TOKENS, width), True), ("output_norm", (width,), False)]
        for number in range(blocks):
            todo += [(f"blk.{number}.{name}", shape, False) for name, shape in plain.items()]
            todo += [(f"blk.{number}.{name}", shape, True) for name, shape in coded.items()]
        for name, shape, is_coded in todo:
            stored = (*shape[:-1], shape[-1] // values * size) if is_coded else shape
            dtype: Any = np.dtype(np.uint8 if is_coded else np.float32)
            nbytes = math.prod(stored) * dtype.itemsize
            writer.add_tensor_info(f"{name}.weight", stored, dtype, nbytes, kind if is_coded else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # Every tensor is a part of one table of random codes, which is faster than drawing each.
        most = max(math.prod(shape) // values for _, shape, is_coded in todo if is_coded)
        pool = generator.integers(0, 256, (2 * most, size), dtype=np.uint8)
        for name, shape, is_coded in todo:
            if is_coded:
                # Scales and minima of 31 on average and codes of 7.5 make values of about one standard deviation.
                start, count = int(generator.integers(most)), math.prod(shape) // values
                own = pool[start : start + count]
                own[:, :4] = (np.array([1, 7.5]) * 0.2 / (31 * shape[-1] ** 0.5)).astype(np.float16).view(np.uint8)
                writer.write_tensor_data(own.reshape(*shape[:-1], -1))
            elif "norm" in name:
                writer.write_tensor_data(np.ones(shape, np.float32))
            else:
                writer.write_tensor_data(generator.standard_normal(shape, np.float32) / np.float32(width**0.5))


def write_settings(writer: GGUFWriter, asked: argparse.Namespace, blocks: int) -> None:
    """Write the metadata that llama.cpp needs, with a byte tokenizer."""
    numbers = {
        "vocab_size": TOKENS,
        "context_length": 2048,
        "embedding_length": asked.width,
        "block_count": blocks,
        "feed_forward_length": 4 * asked.width,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS // 4,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
        "expert_count": asked.experts,
        "expert_used_count": 4,
        "expert_feed_forward_length": asked.inner,
    }
    for key, number in numbers.items():
        writer.add_uint32(f"qwen3moe.{key}", number)
    writer.add_float32("qwen3moe.rope.freq_base", 10000.0)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as tokenizers of bytes call the bytes
    alphabet = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    names = [*alphabet, "<s>", "</s>", alphabet[0] + alphabet[1]]
    names += [f"<unused{number}>" for number in range(TOKENS - len(names))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([1] * 256 + [3] * (len(names) - 256))
    writer.add_token_merges([f"{alphabet[0]} {alphabet[1]}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def write_fp8(folder: Path, asked: argparse.Namespace) -> None:
    """Write a folder, a layer in memory at a time."""
    folder.mkdir()
    config = DeepseekV3Config(
        num_hidden_layers=asked.layers,
        first_k_dense_replace=0,
        n_routed_experts=asked.experts,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        architectures=["DeepseekV3ForCausalLM"],
        dtype=torch.bfloat16,
    )
    weight_map: dict[str, str] = {}
    for number in range(asked.layers + 1):
        file, tensors = f"model-{number:05d}.safetensors", dict(tensors_of(config, number))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    layer, inner = (folder / "model-00000.safetensors").stat().st_size, 3 * config.moe_intermediate_size
    print(f"layer   {layer / MIB:.0f} MiB of codes, a decoded expert {inner * config.hidden_size * 2 / MIB:.0f} MiB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [STEP, STEP], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": said}))
    word_tokenizer().save_pretrained(folder)


def tensors_of(config: DeepseekV3Config, number: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer, or, for the index after the last layer, those outside all layers."""
    generator, width, rank = torch.Generator().manual_seed(number), config.hidden_size, config.q_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    assert rank is not None
    assert nope is not None
    assert rope is not None
    assert value is not None
    if number == config.num_hidden_layers:
        for name in ("model.embed_tokens", "lm_head"):
            yield f"{name}.weight", torch.randn(config.vocab_size, width, generator=generator).bfloat16()
        yield "model.norm.weight", torch.ones(width, dtype=torch.bfloat16)
        return
    heads, inner = config.num_attention_heads, config.moe_intermediate_size
    shapes = {
        "self_attn.q_a_proj": (rank, width),
        "self_attn.q_b_proj": (heads * (nope + rope), rank),
        "self_attn.kv_a_proj_with_mqa": (config.kv_lora_rank + rope, width),
        "self_attn.kv_b_proj": (heads * (nope + value), config.kv_lora_rank),
        "self_attn.o_proj": (width, heads * value),
    }
    for owner in [f"mlp.experts.{expert}" for expert in range(config.n_routed_experts)] + ["mlp.shared_experts"]:
        shapes |= {f"{owner}.{name}": (inner, width) for name in ("gate_proj", "up_proj")}
        shapes[f"{owner}.down_proj"] = (width, inner)
    for name, (rows, columns) in shapes.items():
        codes = torch.randint(0, 0x40, (rows, columns), generator=generator, dtype=torch.uint8)  # from 0 to 2
        codes |= torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8) << 7
        yield f"model.layers.{number}.{name}.weight", codes.view(torch.float8_e4m3fn)
        scales = torch.full((-(-rows // STEP), -(-columns // STEP)), 2 * columns**-0.5)
        yield f"model.layers.{number}.{name}.weight_scale_inv", scales
    norms = {"input_layernorm": width, "post_attention_layernorm": width}
    norms |= {"self_attn.q_a_layernorm": rank, "self_attn.kv_a_layernorm": config.kv_lora_rank}
    for name, size in norms.items():
        yield f"model.layers.{number}.{name}.weight", torch.ones(size, dtype=torch.bfloat16)
    router = torch.randn(config.n_routed_experts, width, generator=generator) * width**-0.5
    yield f"model.layers.{number}.mlp.gate.weight", router.bfloat16()
    yield f"model.layers.{number}.mlp.gate.e_score_correction_bias", torch.zeros(config.n_routed_experts)


if __name__ == "__main__":
    main()
