"""`prune mixture.gguf --save-model small.gguf`: the remaining experts and blocks keep their bytes, in any type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from torch import Tensor

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Reporter
from coprune.gguf_files.llama_cpp import LlamaCpp, Quantisation, has_llama_cpp, quantize
from coprune.gguf_files.metadata import Field, config_of
from coprune.gguf_files.removed_parts import GgufParts
from coprune.model.checkpoint.load import load_model
from coprune.model.checkpoint.locate import GgufFile
from coprune.model.edit import Edit
from coprune.model.edits import Edits
from coprune.model.routing import NeverChosen
from support.commands import run_command
from support.pico import pico_model, pico_tokens
from support.pico_folder import listing
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import content_of

TOKENS = pico_tokens(1, 16)
PRUNING: dict[str, Any] = {"dataset": pico_tokens(8, 32), "evaluate": False, "gate": False, "quiet": True}
TYPES = [pytest.param("q8_0", marks=pytest.mark.slow), "q4_k_m", pytest.param("iq4_xs", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a pico Qwen3 mixture in several types, whose second block matters least."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), content_of("bytes")
    # k-quants take rows of 256 values.
    sizes: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 8}
    vocabulary = len(json.loads(tokenizer)["model"]["vocab"])
    model = distinct_norms(pico_model("qwen3_moe", vocab_size=vocabulary, norm_topk_prob=True, **sizes))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.01 if name.startswith("model.layers.1.") else 1)
                parameter[..., 0, :] = 0  # so the first channel is the same for every token, in every block
    for kind in ("F16", "Q8_0"):
        write_pico_gguf(model, folder / f"{kind.lower()}.gguf", kind, "qwen3moe", tokenizer)
    for kind in ("q4_k_m", "iq4_xs") if has_llama_cpp() else ():
        quantize(folder / "f16.gguf", folder / f"{kind}.gguf", Quantisation(kind))
    return folder


def made(whole: Path, kind: str) -> tuple[Path, Path]:
    """Return a file of a type, and the one made from it without one of three blocks and two of eight experts."""
    source, small = whole / f"{kind}.gguf", whole / f"small-{kind}.gguf"
    if not source.exists():
        pytest.skip("llama-cpp-py-sync is not installed")
    if not small.exists():
        coprune.prune(source, save_model=small, **PRUNING, remove="experts=keep:6,blocks=0.34")
    return source, small


def experts_left(source: Path, small: Path) -> dict[int, list[int]]:
    """Return the experts whose router rows remain, by the number of the remaining block."""
    before, after = (
        {stored.name: stored.data for stored in GGUFReader(file).tensors if "ffn_gate_inp" in stored.name}
        for file in (source, small)
    )
    rows = {number: [*map(bytes, before[f"blk.{number}.ffn_gate_inp.weight"])] for number in range(len(before))}
    found = {}
    for own in after.values():
        (number,) = (number for number, there in rows.items() if bytes(own[0]) in there)
        found[number] = [rows[number].index(bytes(row)) for row in own]
    return found


def fields_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("kind", TYPES)
def test_bytes_are_the_sources_and_the_metadata_is_updated(kind: str, whole: Path) -> None:
    source, small = made(whole, kind)
    kept = experts_left(source, small)
    assert [*kept] == [0, 2]
    written = {stored.name: stored for stored in GGUFReader(small).tensors}
    for stored in GGUFReader(source).tensors:
        name, expected = stored.name, stored.data
        if name.startswith("blk."):
            _, number, rest = name.split(".", 2)
            if number == "1":
                continue
            name = f"blk.{int(number) // 2}.{rest}"
            if "_exps" in rest or "gate_inp" in rest:
                expected = expected[kept[int(number)]]
        found = written.pop(name)
        assert found.tensor_type == stored.tensor_type
        assert np.array_equal(found.data, expected)
    assert not written
    assert fields_of(small) == fields_of(source) | {"qwen3moe.expert_count": 6, "qwen3moe.block_count": 2}


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_computes_the_same_as_the_masked_source(kind: str, whole: Path) -> None:
    source, small = made(whole, kind)
    masked, _ = load_model(GgufFile(source, source.name), processed=False)
    cut, _ = load_model(GgufFile(small, small.name), processed=False)
    with torch.no_grad():
        dense, found = (model(TOKENS, use_cache=False).logits for model in (masked, cut))
    for number, kept in experts_left(source, small).items():
        router = masked.model.layers[number].mlp.gate
        router.forward = NeverChosen(router, torch.isin(torch.arange(8), torch.tensor(kept)), [])
    del masked.model.layers[1]
    with torch.no_grad():
        expected = masked(TOKENS, use_cache=False).logits
    assert off(found, expected) < 1e-5
    if has_llama_cpp():  # it rounds the inputs of products to eight bits, so the source is off by as much
        assert off(in_llama_cpp(small, TOKENS), expected[0]) < 1.5 * off(in_llama_cpp(source, TOKENS), dense[0])


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
@pytest.mark.parametrize("kind", TYPES)
def test_llama_cpp_computes_the_same_as_the_masked_source(kind: str, whole: Path, tmp_path: Path) -> None:
    source, small, masked = whole / f"{kind}.gguf", tmp_path / "small.gguf", tmp_path / "masked.gguf"
    coprune.prune(source, save=tmp_path / "run", save_model=small, **PRUNING, remove="experts=keep:6")
    shutil.copyfile(source, masked)
    kept = experts_left(source, small)
    reader = GGUFReader(masked, "r+")
    for stored in reader.tensors:
        if "gate_inp" in stored.name:
            # The first channel is positive for every token, so that no other expert is ever chosen.
            gone = np.setdiff1d(np.arange(8), kept[int(stored.name.split(".")[1])])
            stored.data[gone] = 0
            stored.data[gone, 0] = -1e6
    reader.data.flush()
    dense, expected, found = (in_llama_cpp(file, TOKENS) for file in (source, masked, small))
    assert off(dense, expected) > 0.01  # so these experts matter
    # It rounds the inputs of products to eight bits, so a last bit may become a whole step for one token.
    *others, worst = sorted(off(*both) for both in zip(found, expected, strict=True))
    assert others[-1] < 1e-6
    assert worst < 5e-3


def in_llama_cpp(file: Path, tokens: Tensor) -> Tensor:
    return LlamaCpp(file, context=32, threads=1).logits(tokens[0].tolist())


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-py-sync is not installed")
def test_llama_cpp_computes_the_same_if_no_token_used_a_removed_expert(whole: Path, tmp_path: Path) -> None:
    few = TOKENS[:, :3]  # which use at most six of eight experts
    source, small = whole / "q4_k_m.gguf", tmp_path / "small.gguf"
    asked = PRUNING | {"dataset": few, "remove": "experts=keep:6", "score": "frequency"}
    coprune.prune(source, save_model=small, **asked)
    before, after = (in_llama_cpp(file, few) for file in (source, small))
    assert fields_of(small)["qwen3moe.expert_count"] == 6
    assert off(after, before) < 1e-5


def test_the_command_removes_parts_and_finishes_a_killed_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, small = tmp_path / "text.txt", tmp_path / "small.gguf"
    text.write_text("A mixture sends each token to a few of its experts. " * 40)
    asked = f"prune {whole / 'q8_0.gguf'} --remove experts=keep:6 --dataset {text} --seqlen 32 --nsamples 4 --no-eval --no-gate"
    places = ["--save", str(tmp_path / "run"), "--save-model", str(small)]
    ended = run_command([*asked.split(), *places], monkeypatch, capsys)
    assert (ended.code, f"{small} (bytes compared with the source's)" in ended.out) == (0, True)
    assert fields_of(small)["qwen3moe.expert_count"] == 6
    written = small.stat().st_mtime_ns
    (tmp_path / "run" / "report.json").rename(tmp_path / "run" / ".report.json")
    assert run_command([*asked.split(), *places], monkeypatch, capsys).code == 0
    assert (tmp_path / "run" / "report.json").is_file()
    assert small.stat().st_mtime_ns == written


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"remove": "channels=0.5"}, "removing channels rewrites the values of its tensors"),
    "zeros": ({"sparsity": 0.5}, "zeros change the values"),
    "a map": ({"remove": "blocks=0.25", "score": "map"}, "the map of blocks changes the values"),
    "zeros too": ({"remove": "experts=0.25", "pattern": "2:4"}, "zeros change the values"),
    "trained": ({"remove": "experts=0.25", "finetune": "dense"}, "a training changes the values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_edits_that_need_decoded_weights_are_refused_at_once(
    case: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked, text = REFUSED[case]
    with pytest.raises(BadInput, match=text):
        coprune.prune(whole / "q8_0.gguf", save_model="small.gguf", **PRUNING | asked)
    assert not listing(tmp_path)


def test_expert_widths_are_read_from_the_file() -> None:
    fields = {
        f"qwen2moe.{key}": Field(number, int(GGUFValueType.UINT32))
        for key, number in {"expert_feed_forward_length": 48, "expert_shared_feed_forward_length": 96}.items()
    }
    config = config_of(fields, "qwen2moe")
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (48, 96)


def test_a_file_with_other_routers_or_values_is_refused_as_source(whole: Path, tmp_path: Path) -> None:
    source = whole / "q8_0.gguf"
    model, _ = load_model(GgufFile(source, source.name), processed=False)
    parts = GgufParts(GgufFile(source, source.name), [f"model.layers.{number}" for number in range(3)])
    router = model.get_parameter("model.layers.1.mlp.gate.weight")
    parts.require_router("model.layers.1", router)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_gate_inp.weight"):
        parts.require_router("model.layers.0", router)
    with pytest.raises(UnsupportedModel, match="has 3 blocks, but transformers builds 2"):
        GgufParts(GgufFile(source, source.name), ["model.layers.0", "model.layers.1"])
    with pytest.raises(UnsupportedModel, match="changes values"):
        parts.cut(tmp_path / "small.gguf", Edits({"model.layers.0": [Edit()]}), Reporter(quiet=True))
