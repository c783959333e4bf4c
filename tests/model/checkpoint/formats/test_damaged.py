"""Tensors beside a quantised weight are read or refused by name; damaged parts and configurations give one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coprune.base.errors import BadInput
from coprune.model.checkpoint.shards import read_tensor
from coprune.model.checkpoint.source_encoding import checkpoint_entries
from support.quantised import FORMATS, READ_ONLY, quantised_pico

Change = Callable[[dict[str, Tensor]], None]
PLACE = "model.layers.0.self_attn.q_proj."
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def damaged(folder: Path, form: str, change: Change | None = None, config: dict[str, Any] | None = None) -> Path:
    """Write a quantised pico checkpoint with changed tensors or `quantization_config`."""
    source, _ = quantised_pico(folder, form, "gpt_oss" if form == "mxfp4" else "llama")
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    if change is not None:
        change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((source / "config.json").read_text())
    content["quantization_config"] |= config or {}
    (source / "config.json").write_text(json.dumps(content))
    return source


def read_all(folder: Path) -> None:
    for entry in checkpoint_entries(folder).values():
        read_tensor(entry)


def _with(last: str, tensor: Tensor, place: str = PLACE) -> Change:
    return lambda tensors: tensors.update({f"{place}{last}": tensor})


@pytest.mark.parametrize(
    ("form", "last", "place"),
    [
        ("fp8 block", "weight_zero_points", PLACE),
        ("fp8 channel", "weight_g_idx", PLACE),
        ("fp8 tensor", "pre_quant_scale", PLACE),
        ("int8 asymmetric", "bias_scale", PLACE),
        ("int4", "weight_global_scale", PLACE),
        ("nvfp4", "weight_zero_point", PLACE),
        ("mxfp4", "_zero_points", EXPERTS),
        ("gptq", "qweight_scale", PLACE),
        ("awq", "perm", PLACE),
        ("fp8 block", "weight_scale_inv", "lm_head."),
    ],
)
def test_unread_tensors_beside_a_weight_are_refused_by_name(form: str, last: str, place: str, tmp_path: Path) -> None:
    assert form in {**FORMATS, **READ_ONLY}
    source = damaged(tmp_path, form, _with(last, torch.ones(4), place))
    with pytest.raises(BadInput, match=f"{place}{last} .* coprune does not know how to read it"):
        checkpoint_entries(source)


def test_codes_without_a_decoder_are_refused(tmp_path: Path) -> None:
    source = damaged(tmp_path, "fp8 block", _with("table", torch.ones(4, 4).to(torch.float8_e4m3fn)))
    with pytest.raises(BadInput, match=r"q_proj.table .F8_E4M3. belongs to a quantised weight"):
        checkpoint_entries(source)


def test_biases_and_scales_of_activations_are_kept(tmp_path: Path) -> None:
    beside = {"bias": torch.ones(64), "input_scale": torch.ones(1), "output_zero_point": torch.ones(1)}
    read_all(
        damaged(tmp_path, "fp8 channel", lambda tensors: tensors.update({PLACE + k: v for k, v in beside.items()}))
    )


@pytest.mark.parametrize(
    ("form", "last", "value", "told"),
    [
        ("int8 asymmetric", "weight_zero_point", torch.zeros(3, 1, dtype=torch.int8), r"has the shape \(3, 1\)"),
        ("int8 asymmetric", "weight_zero_point", torch.zeros(64, 1), "is F32, but zero points of INT8 are I8"),
        ("int4 asymmetric", "weight_zero_point", torch.zeros(3, 1, dtype=torch.int32), r"has the shape \(3, 1\)"),
        ("nvfp4", "weight_global_scale", torch.tensor([torch.inf]), "is NaN or infinite"),
        ("int4", "weight_shape", torch.tensor([torch.nan, 64.0]), "is F32, but shape of INT4 are I64 or I32"),
        ("int4", "weight_shape", torch.tensor([1, 2]), r"says \[1, 2\], but the codes are"),
        ("int4", "weight_scale", torch.ones(64, 4, dtype=torch.int32), "is I32, but scales of INT4 are"),
        ("mxfp4", "_scales", None, "is F32, but scales of MXFP4 are U8 or F8_E8M0"),
        ("gptq", "g_idx", torch.full((64,), torch.nan), "is F32 of the shape"),
        ("gptq", "scales", torch.ones(4, 64, dtype=torch.int32), "is I32 of the shape"),
    ],
)
def test_parts_of_another_type_or_shape_are_named(
    form: str, last: str, value: Tensor | None, told: str, tmp_path: Path
) -> None:
    place = EXPERTS if form == "mxfp4" else PLACE

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[place + last] = tensors[place + last].float() if value is None else value

    with pytest.raises(BadInput, match=f"{place}{last} .*{told}"):
        read_all(damaged(tmp_path, form, change))


@pytest.mark.parametrize(
    ("form", "config", "told"),
    [
        ("gptq", {"bits": 4.0}, r"bits cannot be 4\.0"),
        ("awq", {"version": 3}, "version cannot be 3"),
        ("int4", {"config_groups": {"g": {"weights": [4]}}}, r"config_groups\.g\.weights cannot be \[4\]"),
        ("int4", {"config_groups": {"g": {"weights": {"num_bits": True}}}}, r"num_bits cannot be True"),
        ("fp8 block", {"weight_block_size": [16, 0]}, r"weight_block_size\.1 cannot be 0"),
        ("fp8 block", {"weight_block_size": "16x16"}, "weight_block_size cannot be '16x16'"),
    ],
)
def test_a_configuration_with_values_of_wrong_types_is_one_error(
    form: str, config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"quantization_config of config.json: .*{told}"):
        read_all(damaged(tmp_path, form, config=config))
