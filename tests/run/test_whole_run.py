"""Runs from recipe to report, streamed and in memory, and of OPT at its real width."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import coprune
from coprune.base.errors import BadInput
from coprune.model.blocks import find_blocks
from coprune.model.leftovers import NotLoaded
from coprune.model.matrices import find_matrices
from coprune.recipe.pattern import NM, Target
from coprune.recipe.recipe import Recipe
from coprune.report.schema import Report
from support.pico import FAMILIES, MIXTURES, pico_model
from support.pico_folder import pico_tokenizer, save, save_pico, write_words
from support.sample import sampled
from support.saved import load_clean, tensors_of
from support.walking import Propagation, prune_with_full_forwards, wanda_as_published

RUN_FILES = {"recipe.yaml", "report.json", "report.html", "distributions.json", "log_wanda.txt"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_words(folder / "words.txt")
    write_words(folder / "test.txt", count=200, seed=1)
    return folder


def settings(texts: Path, **more: Any) -> dict[str, Any]:
    return {"dataset": str(texts / "words.txt"), "nsamples": 6, "seqlen": 32, "batch_size": 2, "quiet": True, **more}


def without_seconds(report: Report) -> list[dict[str, Any]]:
    return [matrix.model_dump(exclude={"seconds"}) for matrix in report.matrices]


@pytest.mark.parametrize(
    ("family", "dtype"),
    sampled(
        itertools.product(["llama", "opt", "gpt2", "gemma2", "mixtral", "gpt_oss"], ["auto", "bfloat16"]),
        quick=[
            ("llama", "auto"),
            ("gpt2", "bfloat16"),
        ],
    ),
)
def test_streamed_and_in_memory_are_bit_identical(family: str, dtype: Any, texts: Path, tmp_path: Path) -> None:
    assert family in FAMILIES | MIXTURES
    folder = save_pico(tmp_path / "model", family)
    reports = {}
    for stream in (True, False):
        result = coprune.prune(
            folder,
            "sparsegpt",
            stream=stream,
            save_model=tmp_path / str(stream),
            eval_data=str(texts / "test.txt"),
            dtype=dtype,
            **settings(texts),
        )
        assert result.model is not None  # the streamed one is read from its folder
        reports[stream] = result.report
    streamed, in_memory = (tensors_of(tmp_path / str(stream)) for stream in (True, False))
    assert streamed.keys() == in_memory.keys() == tensors_of(folder).keys()
    assert all(torch.equal(streamed[name], in_memory[name]) for name in streamed)
    assert without_seconds(reports[True]) == without_seconds(reports[False])
    for a, b in zip(*(reports[s].perplexity for s in (True, False)), strict=True):
        assert (a.dense, a.pruned) == pytest.approx((b.dense, b.pruned), rel=1e-3 if dtype != "auto" else 1e-5)
    load_clean(tmp_path / "True")


def test_a_tensor_that_the_model_does_not_load_is_named_and_saved(texts: Path, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", "llama")
    save_file({"somebody.elses": torch.ones(1)}, folder / "more.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["somebody.elses"] = "more.safetensors"
    index.write_text(json.dumps(content))
    report = coprune.prune(
        folder, "magnitude", save_model=tmp_path / "out", evaluate=False, stream=True, **settings(texts)
    ).report
    assert report.left_out == [NotLoaded("somebody.elses", 1)]
    assert torch.equal(tensors_of(tmp_path / "out")["somebody.elses"], torch.ones(1))


def test_a_model_in_memory_is_pruned_in_place(texts: Path) -> None:
    model, oracle = pico_model("llama"), pico_model("llama")
    result = coprune.prune(model, "wanda", processor=pico_tokenizer(), pattern="2:4", **settings(texts))
    assert result.model is model
    from coprune.data.windows import calibration_windows

    windows = calibration_windows(str(texts / "words.txt"), pico_tokenizer(), 6, 32, 0)
    assert result.report.calibration.fingerprint == windows.fingerprint
    prune_with_full_forwards(oracle, windows.tokens.split(2), wanda_as_published(Target(NM(2, 4), 0.5)), "block")
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_run_folder_has_recipe_report_and_log(texts: Path, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    result = coprune.prune(
        folder,
        "wanda",
        sparsity=0.6,
        save=tmp_path / "run",
        save_model=tmp_path / "pruned",
        eval_data=str(texts / "test.txt"),
        **settings(texts),
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml") == result.report.recipe
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["sparsity"] == 0.6
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert coprune.Report.read(tmp_path / "run" / "report.json") == result.report
    assert 0 < report["prune_seconds"] < report["total_seconds"]
    assert report["peak_memory_bytes"] > 1e6
    assert {"python", "torch", "transformers", "coprune"} <= report["versions"].keys()
    # Rows lose ⌊0.6 · width⌋ weights: 38 of 64 and 57 of 96.
    assert {m["shape"][1]: m["sparsity"] for m in report["matrices"]} == {64: 38 / 64, 96: 57 / 96}
    assert report["sparsity"]["target"] == 0.6
    zeros = sum(int((tensor == 0).sum()) for name, tensor in tensors_of(tmp_path / "pruned").items() if "proj" in name)
    total = sum(m["shape"][0] * m["shape"][1] for m in report["matrices"])
    assert report["sparsity"]["matrices"] == pytest.approx(zeros / total)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "wanda" in card
    assert report["calibration"]["fingerprint"] in card


def test_nothing_is_written_unless_requested(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    coprune.prune(pico_model("llama", num_hidden_layers=1), "magnitude", processor=pico_tokenizer(), **settings(texts))
    assert not list(tmp_path.iterdir())


def test_a_streamed_run_without_a_model_to_save_leaves_no_checkpoint(texts: Path, tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model", num_hidden_layers=2)
    result = coprune.prune(folder, "wanda", stream=True, save=tmp_path / "run", **settings(texts))
    with pytest.raises(BadInput, match="the run left no model in memory; keep it with save_model="):
        _ = result.model
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES


def test_sparsity_zero_changes_nothing(texts: Path) -> None:
    model, dense = pico_model("llama"), pico_model("llama")
    coprune.prune(model, "sparsegpt", processor=pico_tokenizer(), sparsity=0, **settings(texts))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.fixture(scope="module")
def wide_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of facebook/opt-125m's sizes except depth and vocabulary."""
    config = AutoConfig.for_model(
        "opt",
        hidden_size=768,
        ffn_dim=3072,
        num_attention_heads=12,
        num_hidden_layers=2,
        word_embed_proj_dim=768,
        max_position_embeddings=2048,
        do_layer_norm_before=True,
        dropout=0.1,
        activation_function="relu",
        vocab_size=256,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("opt") / "model"
    save(model.eval(), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("propagation", ["block", "sequential"])
def test_opt_is_pruned_at_its_real_width(propagation: Propagation, wide_opt: Path, texts: Path, tmp_path: Path) -> None:
    result = coprune.prune(
        wide_opt,
        "sparsegpt",
        pattern="2:4",
        propagation=propagation,
        stream=True,
        save_model=tmp_path / "pruned",
        eval_data=str(texts / "test.txt"),
        **settings(texts, nsamples=4, seqlen=64),
    )
    assert {matrix.name.rpartition(".")[2] for matrix in result.report.matrices} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    }
    assert all(
        matrix.sparsity == 0.5 and 0 < (matrix.relative_layer_error or 0) < 1 for matrix in result.report.matrices
    )
    model, dense = load_clean(tmp_path / "pruned"), tensors_of(wide_opt)
    for block in find_blocks(model):
        for matrix in find_matrices(block.module, block.name):
            assert bool((matrix.read() != 0).unflatten(1, (-1, 4)).sum(dim=2).eq(2).all()), matrix.name
    # Biases, norms, embeddings and positions are unchanged.
    for name, tensor in tensors_of(tmp_path / "pruned").items():
        if not name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            assert torch.equal(tensor, dense[name]), name
    tokens = torch.tensor(pico_tokenizer()((texts / "test.txt").read_text())["input_ids"])[: 3 * 64].view(3, 64)
    for found, measured in (("dense", load_clean(wide_opt)), ("pruned", model)):
        with torch.no_grad():
            loss = measured(tokens, labels=tokens).loss
        assert getattr(result.report.perplexity[0], found) == pytest.approx(math.exp(loss), rel=1e-4)
