"""A GGUF file exported with a template is the smaller model in transformers, in llama.cpp and in its metadata."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.gguf_files.llama_cpp import GgufType, LlamaCpp, has_llama_cpp
from coprune.gguf_files.metadata import Counts, Field, config_of, corrected
from coprune.gguf_files.tensor_matching import Matcher
from coprune.model.checkpoint.load import quiet_transformers
from coprune.model.checkpoint.names import EDITS_FILE
from coprune.model.edit import Edit, KeepSlices
from coprune.model.edits import Edits, history_of
from coprune.model.kept_slices import KeptSlices
from support.pico import pico_model, pico_tokens
from support.pico_folder import save
from support.pico_gguf import distinct_norms, in_gguf_order, write_pico_gguf
from support.sample import sampled
from support.saved import load_clean, tensors_of

TOKENS = pico_tokens(1, 16)
PRUNING: dict[str, Any] = {"dataset": pico_tokens(8, 32), "align": 32, "evaluate": False, "quiet": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pico llama as a folder and as GGUF files, and one without half of the heads, some channels and a block."""
    folder = tmp_path_factory.mktemp("place")
    model = distinct_norms(pico_model("llama"))
    save(model, folder / "dense")
    write_pico_gguf(model, folder / "f32.gguf")
    write_pico_gguf(model, folder / "q8_0.gguf", "Q8_0")
    remove = "channels=0.34,heads=0.5,blocks=0.34"
    coprune.prune(folder / "dense", remove=remove, save_model=folder / "small", **PRUNING)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pico Qwen2 as a folder and as a GGUF file."""
    folder = tmp_path_factory.mktemp("qwen")
    model = distinct_norms(pico_model("qwen2", use_sliding_window=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    save(model, folder / "dense")
    write_pico_gguf(model, folder / "dense.gguf", arch="qwen2")
    return folder


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_clean(folder)(TOKENS, use_cache=False).logits[0]


def in_transformers(file: Path) -> Tensor:
    with torch.no_grad(), quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)(
            TOKENS
        ).logits[0]


def in_llama_cpp(file: Path) -> Tensor:
    if not has_llama_cpp():
        pytest.skip("llama-cpp-py-sync is not installed")
    return LlamaCpp(file, context=32, threads=1).logits(TOKENS[0].tolist())


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def number(file: Path, key: str) -> int | None:
    field = GGUFReader(file).fields.get(f"llama.{key}")
    return None if field is None else field.contents()


@pytest.mark.parametrize(("run", "most"), [(in_transformers, 1e-6), (in_llama_cpp, 2e-3)])
@pytest.mark.parametrize("model", ["dense", "small"])
def test_both_runtimes_compute_the_same_as_the_folder(
    model: str, run: Callable[[Path], Tensor], most: float, place: Path, tmp_path: Path
) -> None:
    made = coprune.export(place / model, tmp_path / "out.gguf", like=place / "f32.gguf", type="f32", quiet=True)
    assert off(run(made.path), logits_of(place / model)) < most


def test_metadata_has_the_new_counts_and_the_head_width(place: Path, tmp_path: Path) -> None:
    file = coprune.export(place / "small", tmp_path / "out.gguf", like=place / "f32.gguf", quiet=True).path
    expected = {"block_count": 2, "feed_forward_length": 64, "attention.head_count": 2, "attention.head_count_kv": 1}
    expected |= {"embedding_length": 64, "attention.key_length": 16, "attention.value_length": 16}
    assert {key: number(file, key) for key in expected} == expected
    assert {tensor.name.split(".")[1] for tensor in GGUFReader(file).tensors if tensor.name.startswith("blk.")} == {
        "0",
        "1",
    }


def test_the_template_may_be_in_another_type(place: Path, tmp_path: Path) -> None:
    file = coprune.export(place / "small", tmp_path / "out.gguf", like=place / "q8_0.gguf", type="f32", quiet=True).path
    assert off(in_transformers(file), logits_of(place / "small")) < 1e-6


@pytest.mark.parametrize(
    ("kind", "most"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 5e-2), ("q5_0", 0.3), ("q4_0", 0.6), ("q4_k_m", 0.6)]
)
def test_every_type_exports_within_its_error(kind: GgufType, most: float, place: Path, tmp_path: Path) -> None:
    if kind == "q4_k_m" and not has_llama_cpp():
        pytest.skip("llama-cpp-py-sync is not installed")
    made = coprune.export(place / "small", tmp_path / "out.gguf", like=place / "f32.gguf", type=kind, quiet=True)
    assert off(in_transformers(made.path), logits_of(place / "small")) < most
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_folder_records_all_changes_since_its_source(place: Path, tmp_path: Path) -> None:
    """After two cuts and a training, the template need not be named."""
    shutil.copytree(place / "small", tmp_path / "small")
    edits = tmp_path / "small" / EDITS_FILE
    assert history_of(place / "small")[0] == str((place / "dense").resolve())
    assert str(place) not in edits.read_text()
    shutil.copy(place / "f32.gguf", tmp_path)
    edits.write_text(json.dumps(json.loads(edits.read_text()) | {"source": "../f32.gguf"}))
    coprune.prune(tmp_path / "small", remove="channels=0.5", save_model=tmp_path / "smaller", **PRUNING)
    tuned = load_clean(tmp_path / "smaller")
    with torch.no_grad():
        tuned.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.01)
    save(tuned, tmp_path / "tuned")
    Edits().write(tmp_path / "tuned", str(tmp_path / "smaller"))
    shutil.rmtree(tmp_path / "small")
    made = coprune.export(tmp_path / "tuned", tmp_path / "out.gguf", type="f32", quiet=True)
    assert made.like == (tmp_path / "f32.gguf").resolve()
    channels = [line.partition(" of")[0] for one in made.removed if (line := one.line()).startswith("channels")]
    assert channels == ["channels 96 → 64", "channels 64 → 32"]
    assert number(made.path, "feed_forward_length") == 32
    assert off(in_transformers(made.path), logits_of(tmp_path / "tuned")) < 1e-6


def test_a_gguf_file_is_converted_to_another_type(place: Path, tmp_path: Path) -> None:
    file = coprune.export(place / "f32.gguf", tmp_path / "out.gguf", type="q8_0", quiet=True).path
    assert off(in_transformers(file), logits_of(place / "dense")) < 5e-2


def test_a_tied_output_is_not_exported_again(tmp_path: Path) -> None:
    """A tied model's file has no output tensor; a folder may store it, but only with the same values."""
    model = distinct_norms(pico_model("llama", tie_word_embeddings=True))
    write_pico_gguf(model, tmp_path / "tied.gguf")
    save(model, tmp_path / "tied")
    tensors = tensors_of(tmp_path / "tied")
    for file in (tmp_path / "tied").glob("*.safetensors*"):
        file.unlink()
    embedding = tensors["model.embed_tokens.weight"]
    for output, refused in ((embedding.clone(), False), (embedding + 1, True)):
        save_file(tensors | {"lm_head.weight": output}, tmp_path / "tied" / "model.safetensors")
        with pytest.raises(BadInput, match=r"lacks lm_head\.weight, which the model has") if refused else nullcontext():
            coprune.export(tmp_path / "tied", tmp_path / f"{refused}.gguf", like=tmp_path / "tied.gguf", quiet=True)


def test_another_model_of_the_same_shapes_is_refused(place: Path, tmp_path: Path) -> None:
    other = write_pico_gguf(distinct_norms(pico_model("llama", seed=5)), tmp_path / "other.gguf")
    with pytest.raises(BadInput, match="of another model"):
        coprune.export(place / "small", tmp_path / "out.gguf", like=other, quiet=True)
    assert not (tmp_path / "out.gguf").exists()


def test_a_smaller_model_without_a_record_is_refused(place: Path, tmp_path: Path) -> None:
    save(distinct_norms(pico_model("llama", intermediate_size=64)), tmp_path / "narrow")
    with pytest.raises(BadInput, match="there is no record of what was removed"):
        coprune.export(tmp_path / "narrow", tmp_path / "out.gguf", like=place / "f32.gguf", quiet=True)


def test_equal_tensors_that_became_different_are_refused(place: Path, tmp_path: Path) -> None:
    example = write_pico_gguf(pico_model("llama"), tmp_path / "ones.gguf")
    save(pico_model("llama"), tmp_path / "same")
    assert coprune.export(tmp_path / "same", tmp_path / "out.gguf", like=example, quiet=True).tensors == 30
    with pytest.raises(UnsupportedModel, match="equal in the GGUF file but differ"):
        coprune.export(place / "dense", tmp_path / "other.gguf", like=example, quiet=True)


def test_a_model_with_biases_and_unpermuted_rows_is_exported(qwen: Path, tmp_path: Path) -> None:
    coprune.prune(qwen / "dense", remove="channels=0.34", save_model=tmp_path / "small", **PRUNING)
    made = coprune.export(tmp_path / "small", tmp_path / "out.gguf", like=qwen / "dense.gguf", type="f32", quiet=True)
    assert off(in_llama_cpp(made.path), logits_of(tmp_path / "small")) < 2e-3


def test_a_file_that_no_runtime_could_load_is_not_written(qwen: Path, tmp_path: Path) -> None:
    """llama.cpp expects this architecture's queries to be as wide as the model, and transformers does not read their width."""
    coprune.prune(qwen / "dense", remove="heads=0.5", save_model=tmp_path / "small", **PRUNING)
    with pytest.raises(UnsupportedModel, match="no installed runtime"):
        coprune.export(tmp_path / "small", tmp_path / "out.gguf", like=qwen / "dense.gguf", type="f32", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("kind", sampled(["F32", "Q8_0", "Q4_0"], quick=["Q8_0"]))
def test_an_architecture_unknown_to_transformers_is_exported(kind: str, tmp_path: Path) -> None:
    """The file's tensors are identified in the source's folder, even if the file rounded them."""
    scales: dict[str, Any] = {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }
    model = distinct_norms(pico_model("granite", **scales))
    save(model, tmp_path / "dense")
    write_pico_gguf(model, tmp_path / "dense.gguf", kind, arch="granite")
    coprune.prune(
        tmp_path / "dense", remove="channels=0.34,heads=0.5,blocks=0.34", save_model=tmp_path / "small", **PRUNING
    )
    made = coprune.export(
        tmp_path / "small", tmp_path / "out.gguf", like=tmp_path / "dense.gguf", type="f32", quiet=True
    )
    assert off(in_llama_cpp(made.path), logits_of(tmp_path / "small")) < 2e-3


def test_kinds_of_blocks_that_metadata_cannot_express_are_refused() -> None:
    """In this architecture every sixth block has full attention, whatever the metadata say, so no earlier block may go."""
    numbers = {
        "block_count": 7,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "context_length": 128,
        "vocab_size": 256,
    }
    numbers |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16}
    fields = {f"gemma3.{key}": Field(value, int(GGUFValueType.UINT32)) for key, value in numbers.items()}
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert config_of(fields, "gemma3")["layer_types"] == kinds
    for dropped, possible in ((6, True), (2, False)):
        kept = [index for index in range(7) if index != dropped]
        changes = {"num_hidden_layers": 6, "layer_types": [kinds[index] for index in kept]}
        with nullcontext() if possible else pytest.raises(UnsupportedModel, match="layer_types ssssfs"):
            assert corrected(fields, "gemma3", Counts(changes, {}, kept, 7, {}))["gemma3.block_count"].value == 6


def test_blocks_that_differ_in_width_are_refused(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "dense", tmp_path / "uneven")
    tensors = tensors_of(folder)
    kept: dict[str, list[Edit]] = {}
    for block, size in ((0, 64), (1, 32)):
        slices = {}
        for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
            name = f"model.layers.{block}.mlp.{part}_proj.weight"
            slices[name] = KeptSlices(dim=dim, size=96, ranges=[[(0, size)]])
            tensors[name] = slices[name].cut(tensors[name])
        kept[f"model.layers.{block}"] = [KeepSlices(kept=slices)]
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    Edits(kept).write(folder)
    with pytest.raises(UnsupportedModel, match=r"blk\.\*\.ffn_gate.weight is 32×64 and 64×64 and 96×64"):
        coprune.export(folder, tmp_path / "out.gguf", like=place / "f32.gguf", quiet=True)


def test_removed_experts_are_absent_in_the_file(tmp_path: Path) -> None:
    # transformers assumes the default width of this family's experts, and llama.cpp always normalises gates.
    model = distinct_norms(pico_model("qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True))
    save(model, tmp_path / "dense")
    write_pico_gguf(model, tmp_path / "dense.gguf", arch="qwen3moe")
    coprune.prune(tmp_path / "dense", remove="experts=0.5,blocks=0.34", save_model=tmp_path / "small", **PRUNING)
    made = coprune.export(
        tmp_path / "small", tmp_path / "out.gguf", like=tmp_path / "dense.gguf", type="f32", quiet=True
    )
    (stacked,) = (tensor for tensor in GGUFReader(made.path).tensors if tensor.name == "blk.1.ffn_gate_exps.weight")
    assert [*stacked.shape] == [64, 768, 2]
    assert GGUFReader(made.path).fields["qwen3moe.expert_count"].contents() == 2
    assert off(in_llama_cpp(made.path), logits_of(tmp_path / "small")) < 2e-3


def test_removed_channels_of_experts_are_absent_in_the_file(tmp_path: Path) -> None:
    """transformers does not read their number in this family, so it cannot check the file."""
    model = distinct_norms(pico_model("qwen3_moe", norm_topk_prob=True))
    save(model, tmp_path / "dense")
    write_pico_gguf(model, tmp_path / "dense.gguf", arch="qwen3moe")
    coprune.prune(tmp_path / "dense", remove="channels=0.5", save_model=tmp_path / "small", **PRUNING | {"align": 16})
    made = coprune.export(
        tmp_path / "small", tmp_path / "out.gguf", like=tmp_path / "dense.gguf", type="f32", quiet=True
    )
    assert GGUFReader(made.path).fields["qwen3moe.expert_feed_forward_length"].contents() == 16
    assert off(in_llama_cpp(made.path), logits_of(tmp_path / "small")) < 2e-3


def test_rows_are_found_in_any_order_transposed_stacked_and_with_one_added() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(8, 6, generator=generator) for name in ("a", "b", "e.0", "e.1")}
    tensors["norm"] = torch.randn(6, generator=generator)
    mixed = torch.randperm(8, generator=generator)
    wanted = {
        "x": tensors["a"][mixed],
        "y": tensors["b"].T,
        "exps": torch.stack([tensors["e.1"], tensors["e.0"]]),
        "n": tensors["norm"] + 1,
        "none": torch.randn(8, 6, generator=generator),
    }
    found = Matcher(tensors).find(wanted.items())
    assert [piece.names for piece in found["exps"]] == [("e.1",), ("e.0",)]
    assert found["none"] == []
    for name in ("x", "y", "n"):
        (piece,) = found[name]
        torch.testing.assert_close(piece.arrange(tensors[piece.names[0]]) + piece.added, wanted[name])


def test_equal_rows_are_ordered_as_in_another_block() -> None:
    order = in_gguf_order(torch.arange(8.0)[:, None], 2)[:, 0].long()
    first, second = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 4)
    second[1], second[6] = 1.0, 2.0
    tensors = {"blocks.0.q": first, "blocks.1.q": second}
    (piece,) = Matcher(tensors).find([("blk.1.q", second[order]), ("blk.0.q", first[order])])["blk.1.q"]
    assert piece.order is not None
    assert torch.equal(piece.order, order)
    with pytest.raises(UnsupportedModel, match="equal rows"):
        Matcher({"q": second}).find([("q", second[order])])
