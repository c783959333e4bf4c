"""Quantised checkpoints are cut or pruned and saved in the same format; kept values have the source's bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import coprune
from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.progress import Reporter
from coprune.model.checkpoint.load import load_model, quiet_transformers
from coprune.model.checkpoint.locate import locate
from coprune.recipe.recipe import make_recipe
from coprune.report.run_events import Rounded
from coprune.runner.run_recipe import run_recipe
from support.pico import pico_tokens
from support.pico_folder import listing, write_words
from support.quantised import FORMATS, quantised_pico
from support.saved import load_clean, tensors_of

IDS = pico_tokens(4, 16)
SETTINGS: dict[str, Any] = {"dataset": IDS, "evaluate": False, "quiet": True, "align": 1}
CASES = dict.fromkeys(FORMATS, "llama") | {"int4": "qwen3_moe", "mxfp4": "gpt_oss"}
"""A family for every format."""
QUICK = ("fp8 block", "int4", "mxfp4")
CODES = re.compile(r"(_packed|_blocks|proj\.weight)$")


def decoded(folder: Path) -> PreTrainedModel:
    return load_model(locate(folder), processed=False)[0]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def pruned(model: Path, folder: Path, **settings: Any) -> Path:
    coprune.prune(str(model), save=folder / "run", save_model=folder / "model", **{**SETTINGS, **settings})
    return folder / "model"


def assert_same_model(found: Path, expected: Path) -> None:
    """Assert that both decode to the same values."""
    left, right = decoded(found), decoded(expected)
    for (name, one), other in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(logits(left), logits(right))


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(tensor.shape or (1,)).view(torch.uint8)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form in QUICK else pytest.mark.slow) for form in CASES]
)
def test_magnitude_zeros_match_the_decoded_model_and_change_nothing_else(form: str, tmp_path: Path) -> None:
    source, dense = quantised_pico(tmp_path, form, CASES[form])
    settings = {"method": "magnitude", "sparsity": 0.5, "stream": True}
    found = pruned(source, tmp_path / "a", **settings)
    assert_same_model(found, pruned(dense, tmp_path / "b", **settings))
    before, after = tensors_of(source), tensors_of(found)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = raw(after[name]) == raw(tensor)
        if not CODES.search(name):
            assert bool(same.all()), name
    assert json.loads((found / "config.json").read_text())["quantization_config"] == FORMATS[form].config


@pytest.mark.parametrize(
    ("form", "family"), [("fp8 block", "llama"), pytest.param("mxfp4", "gpt_oss", marks=pytest.mark.slow)]
)
def test_wanda_in_memory_gives_the_decoded_models_masks(form: str, family: str, tmp_path: Path) -> None:
    source, dense = quantised_pico(tmp_path, form, family)
    settings = {"method": "wanda", "sparsity": 0.5, "stream": False}
    assert_same_model(pruned(source, tmp_path / "a", **settings), pruned(dense, tmp_path / "b", **settings))


@pytest.mark.parametrize(
    ("form", "family", "stream"),
    [
        pytest.param("fp8 block", "qwen3_moe", True, marks=pytest.mark.slow),
        pytest.param("int4", "qwen3_moe", False, marks=pytest.mark.slow),
        ("fp8 block", "deepseek_v3", True),
        ("mxfp4", "gpt_oss", True),
    ],
)
def test_remaining_experts_keep_the_sources_bytes(form: str, family: str, stream: bool, tmp_path: Path) -> None:
    many = {"n_routed_experts": 8} if family == "deepseek_v3" else {}
    source, dense = quantised_pico(tmp_path, form, family, **many)
    settings = {"remove": "experts=0.5", "stream": stream}
    found = pruned(source, tmp_path / "a", **settings)
    assert_same_model(found, pruned(dense, tmp_path / "b", **settings))
    before = [raw(tensor) for tensor in tensors_of(source).values()]
    whole = {bytes(tensor.numpy().tobytes()) for tensor in before}
    for name, tensor in tensors_of(found).items():
        rows = [tensor] if ".experts." not in name or tensor.ndim < 3 else list(tensor)
        slices = {bytes(row.numpy().tobytes()) for one in before if one.ndim > 2 for row in one} | whole
        if "router" not in name and "gate.weight" not in name and "bias" not in name:
            assert all(raw(row).numpy().tobytes() in slices for row in rows), name


def test_blocks_are_removed_with_their_scales_and_layer_lists_are_updated(tmp_path: Path) -> None:
    source, dense = quantised_pico(tmp_path, "fp8 block", "llama")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.layers.2.mlp", "model.layers.0.mlp"]
    (source / "config.json").write_text(json.dumps(config))
    found = pruned(source, tmp_path / "a", remove="blocks=0.34", score="kl", stream=True)
    assert_same_model(found, pruned(dense, tmp_path / "b", remove="blocks=0.34", score="kl", stream=True))
    left = json.loads((found / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.2.mlp" not in left
    assert set(left) <= {"lm_head", "model.layers.0.mlp", "model.layers.1.mlp"}


@pytest.mark.parametrize(
    ("form", "family", "what"),
    [("fp8 block", "llama", "channels"), ("fp8 block", "llama", "heads"), ("mxfp4", "gpt_oss", "channels")],
)
def test_channels_and_heads_are_removed_in_whole_scale_blocks(
    form: str, family: str, what: str, tmp_path: Path
) -> None:
    source, _ = quantised_pico(tmp_path, form, family, **({"intermediate_size": 128} if form == "mxfp4" else {}))
    found = pruned(source, tmp_path / "a", remove=f"{what}=0.5", score="magnitude", stream=True)
    before, after = tensors_of(source), tensors_of(found)
    smaller = [name for name in after if after[name].shape != before[name].shape]
    assert smaller
    model = decoded(found)  # the run itself compared its logits with those of the silenced model
    assert bool(torch.isfinite(logits(model)).all())
    for name in smaller:
        columns = {bytes(raw(row).numpy().tobytes()) for row in before[name].flatten(0, -2)}
        if after[name].shape[-1] == before[name].shape[-1]:
            assert all(raw(row).numpy().tobytes() in columns for row in after[name].flatten(0, -2)), name


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"remove": "channels=0.25"}, 48),  # 54 of 72 requested: three blocks of 16, without the half block at the end
        ({"remove": "channels=0.25", "score": "flap"}, 48),
        ({"remove": "channels=0.25", "allocation": "error"}, None),
        ({"remove": "channels=0.1", "score": "magnitude"}, 64),
    ],
)
def test_channels_of_a_width_that_blocks_do_not_divide_are_kept_in_whole_blocks(
    settings: dict[str, Any], kept: int | None, tmp_path: Path
) -> None:
    source, _ = quantised_pico(tmp_path, "fp8 block", "llama", intermediate_size=72)
    found = pruned(source, tmp_path / "a", **settings)  # the run itself compared it with the silenced model
    config = json.loads((found / "config.json").read_text())
    assert config["intermediate_size"] % 16 == 0
    assert kept in (None, config["intermediate_size"])
    before, after = (tensors_of(folder)["model.layers.0.mlp.up_proj.weight"] for folder in (source, found))
    rows = [bytes(raw(row).numpy().tobytes()) for row in before]
    blocks = [rows.index(bytes(raw(row).numpy().tobytes())) for row in after]
    assert all(first % 16 == 0 for first in blocks[::16])
    assert "quantization_config" in config


def test_fewer_channels_than_two_blocks_are_refused_with_an_alternative(tmp_path: Path) -> None:
    source, _ = quantised_pico(tmp_path, "fp8 block", "llama", intermediate_size=24)
    with pytest.raises(UnsupportedModel, match=r"FP8 \(E4M3\), a scale for 16 × 16, so .* in whole blocks of 16 only"):
        pruned(source, tmp_path / "a", remove="channels=0.5")
    dense = pruned(source, tmp_path / "b", remove="channels=0.5", encoding="dense")
    assert load_clean(dense).config.intermediate_size < 24
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())


@pytest.mark.parametrize(("form", "stream"), [("fp8 block", True), pytest.param("int4", False, marks=pytest.mark.slow)])
def test_updated_weights_are_rounded_and_reported(form: str, stream: bool, tmp_path: Path) -> None:
    source, _ = quantised_pico(tmp_path, form, "llama")
    report = coprune.prune(
        str(source),
        method="sparsegpt",
        sparsity=0.5,
        stream=stream,
        save_model=tmp_path / "model",
        save=tmp_path / "run",
        **SETTINGS,
    ).report
    assert any(isinstance(event, Rounded) for event in report.events)
    before, after = tensors_of(source), tensors_of(tmp_path / "model")
    for name in before:
        if "scale" in name:
            assert torch.equal(before[name], after[name]), name
    weight = decoded(tmp_path / "model").get_parameter("model.layers.0.mlp.up_proj.weight")
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


class Stopping(Reporter):
    """A reporter that raises KeyboardInterrupt after a block."""

    def bar(self, description: str, total: float) -> Any:
        @contextmanager
        def bar() -> Any:
            done = 0.0

            def advance(amount: float) -> None:
                nonlocal done
                done += amount
                if description.startswith("Pruning") and done >= 2:
                    raise KeyboardInterrupt

            yield advance

        return bar()


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source, _ = quantised_pico(tmp_path, "int4", "llama")
    settings: dict[str, Any] = {
        "model": str(source),
        "dataset": str(write_words(tmp_path / "words.txt")),
        "nsamples": 4,
    }
    settings |= {"seqlen": 16, "evaluate": False, "method": "sparsegpt", "sparsity": 0.5}
    whole, halves = (
        make_recipe({**settings, "stream": True, "save": tmp_path / n / "run", "save_model": tmp_path / n / "model"})
        for n in ("whole", "halves")
    )
    first = run_recipe(whole, reporter=Reporter(quiet=True)).report
    with pytest.raises(KeyboardInterrupt):
        run_recipe(halves, reporter=Stopping(quiet=True))
    second = run_recipe(halves, reporter=Reporter(quiet=True)).report
    first_rounded, second_rounded = (
        [event for event in report.events if isinstance(event, Rounded)] for report in (first, second)
    )
    assert second_rounded == first_rounded
    weights = [
        {name: content for name, content in listing(folder).items() if name.endswith((".safetensors", "config.json"))}
        for folder in (tmp_path / "whole" / "model", tmp_path / "halves" / "model")
    ]
    assert weights[0] == weights[1]


def test_transformers_reads_the_written_checkpoint(tmp_path: Path) -> None:
    source, _ = quantised_pico(tmp_path, "mxfp4", "gpt_oss")
    found = pruned(source, tmp_path / "a", method="magnitude", sparsity=0.5, stream=True)
    with quiet_transformers():
        other: Any = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    assert torch.allclose(logits(other.float()), logits(decoded(found)), atol=2e-2)


def test_inspect_names_the_encoding_of_every_kind(tmp_path: Path) -> None:
    source, _ = quantised_pico(tmp_path, "fp8 block", "llama")
    lines = coprune.inspect(str(source), quiet=True, weights=False).lines()
    stored = [line for line in lines if line.startswith("  stored")]
    assert len(stored) == 7
    told = "FP8 (E4M3), a scale for 16 × 16; rows in blocks of 16 and columns in blocks of 16 can go"
    assert f"  stored  model.layers.*.mlp.up_proj.weight (3): {told}" in stored


def _scales_of(shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(shape)

    return change


def _not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][1, 1] = torch.nan


def _without_scales(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            _scales_of((3, 3)),
            r"up_proj\.weight_scale_inv has the shape \(3, 3\), which does not fit .*up_proj\.weight",
        ),
        (_not_a_number, r"layers\.0\.mlp\.up_proj\.weight_scale_inv holds scales that are NaN or infinite"),
        (_without_scales, r"holds .*layers\.0\.mlp\.up_proj\.weight in F8_E4M3 and lacks .*, its scales"),
    ],
    ids=["shape", "nan", "missing"],
)
def test_damaged_parts_are_one_line_with_the_tensors_name(
    damage: Callable[[dict[str, Tensor]], None], told: str, tmp_path: Path
) -> None:
    source, _ = quantised_pico(tmp_path, "fp8 block", "llama")
    (source / "model.safetensors.index.json").unlink()
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    damage(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=told):
        pruned(source, tmp_path / "a", method="magnitude", sparsity=0.5)
