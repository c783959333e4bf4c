"""Quantised pico checkpoints: plain encoders of every format, and the dense checkpoint that each decodes to.

None of coprune's encoders or decoders is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.pico_folder import save_pico

BLOCK, GROUP = 16, 16
Encoded = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by the suffixes of their names, and the float32 values that they encode."""
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _spread(scales: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    whole = scales.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
    return whole[..., : shape[-2], : shape[-1]]


def _largest(weight: Tensor, rows: int, columns: int) -> Tensor:
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    high, wide = padded.shape[-2] // rows, padded.shape[-1] // columns
    return padded.abs().unflatten(-1, (wide, columns)).unflatten(-3, (high, rows)).amax(dim=(-3, -1)).clamp_min(1e-6)


def _float8(weight: Tensor, scales: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    whole = _spread(scales, rows, columns, weight.shape)
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return codes, codes.float() * whole


def fp8_block(weight: Tensor) -> Encoded:
    scales = _largest(weight, BLOCK, BLOCK) / 448
    codes, values = _float8(weight, scales, BLOCK, BLOCK)
    return {".weight": codes, ".weight_scale_inv": scales}, values


def fp8_channel(weight: Tensor) -> Encoded:
    scales = (_largest(weight, 1, weight.shape[1]) / 448).bfloat16()
    codes, values = _float8(weight, scales.float(), 1, weight.shape[1])
    return {".weight": codes, ".weight_scale": scales}, values


def fp8_tensor(weight: Tensor) -> Encoded:
    scales = _largest(weight, *weight.shape) / 448
    codes, values = _float8(weight, scales, *weight.shape)
    beside = {".input_scale": torch.tensor([0.5])}
    return {".weight": codes, ".weight_scale": scales.reshape(1)} | beside, values


def _asymmetric(weight: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return scales and zero points per row, for codes from low to high."""
    least, most = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scales = ((most - least) / (high - low)).clamp_min(1e-6)
    return scales, low - least / scales


def int8_asymmetric(weight: Tensor) -> Encoded:
    """Encode as compressed-tensors int-quantized with zero points; rows are far from zero, so that these differ."""
    weight = weight + weight.std() * torch.linspace(-1, 1, len(weight))[:, None]
    scales, zeros = _asymmetric(weight, -128, 127)
    zeros = zeros.round().clamp(-128, 127).to(torch.int8)
    codes = (weight / scales + zeros).round().clamp(-128, 127).to(torch.int8)
    stored = {".weight": codes, ".weight_scale": scales, ".weight_zero_point": zeros}
    return stored, (codes.float() - zeros.float()) * scales


def fp8_asymmetric(weight: Tensor) -> Encoded:
    """Encode as compressed-tensors float-quantized with zero points."""
    weight = weight + weight.std() * torch.linspace(-1, 1, len(weight))[:, None]
    scales, zeros = _asymmetric(weight, -448, 448)
    points = zeros.to(torch.float8_e4m3fn)
    codes = (weight / scales + points.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored = {".weight": codes, ".weight_scale": scales, ".weight_zero_point": points}
    return stored, (codes.float() - points.float()) * scales


def int4_asymmetric(weight: Tensor) -> Encoded:
    """Encode as compressed-tensors pack-quantized with zero points per group, packed along the rows."""
    grouped = weight.unflatten(1, (-1, GROUP))
    least, most = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scales = ((most - least) / 15).clamp_min(1e-6).bfloat16()
    zeros = (-8 - least / scales.float()).round().clamp(-8, 7)
    whole, points = (_spread(one.float(), 1, GROUP, weight.shape) for one in (scales, zeros))
    codes = (weight / whole + points).round().clamp(-8, 7)
    stored = {".weight_packed": _words(codes + 8), ".weight_scale": scales, ".weight_shape": torch.tensor(weight.shape)}
    return stored | {".weight_zero_point": _words((zeros + 8).T).T}, (codes - points) * whole


def int4(weight: Tensor, group: int = GROUP) -> Encoded:
    """Encode as compressed-tensors pack-quantized, symmetric."""
    scales = (_largest(weight, 1, group) / 7).bfloat16()
    whole = _spread(scales.float(), 1, group, weight.shape)
    codes = (weight / whole).round().clamp(-8, 7)
    fields = (codes.long() + 8).unflatten(1, (-1, 8)) << (4 * torch.arange(8))
    words = fields.sum(dim=-1).numpy().astype("uint32").view("int32")
    stored = {".weight_packed": torch.from_numpy(words), ".weight_scale": scales}
    return stored | {".weight_shape": torch.tensor(weight.shape)}, codes * whole


def _nibbles(values: Tensor) -> Tensor:
    codes = (values[..., None] - _FP4).abs().argmin(dim=-1).to(torch.uint8)
    return torch.where((codes == 0) & (values < 0), 8, codes)


def _pairs(codes: Tensor) -> Tensor:
    return codes[..., ::2] + 16 * codes[..., 1::2]


def mxfp4(weight: Tensor) -> Encoded:
    """Encode as in gpt-oss: experts × inputs × outputs, stored by output in groups of 32 inputs."""
    rows = weight.transpose(1, 2)
    exponents = (_largest(rows, 1, 32) / 6).log2().ceil()
    whole = _spread(torch.exp2(exponents), 1, 32, rows.shape)
    codes = _nibbles(rows / whole)
    stored = {"_blocks": _pairs(codes).unflatten(-1, (-1, 16)), "_scales": (exponents + 127).to(torch.uint8)}
    return stored, (_FP4[codes.int()] * whole).transpose(1, 2)


def _nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factor = weight.abs().amax() / (6 * 448)
    scales = (_largest(weight, 1, 16) / 6 / factor).to(torch.float8_e4m3fn)
    whole = _spread(scales.float() * factor, 1, 16, weight.shape).clamp_min(1e-12)
    codes = _nibbles(weight / whole)
    return _pairs(codes), scales, factor, _FP4[codes.int()] * whole


def nvfp4(weight: Tensor) -> Encoded:
    """Encode as in compressed-tensors: scales are divided by the global one."""
    codes, scales, factor, _ = _nvfp4(weight)
    inverse = (1 / factor).reshape(1)
    stored = {".weight_packed": codes, ".weight_scale": scales, ".weight_global_scale": inverse}
    low, high = codes & 15, codes >> 4
    values = _FP4[torch.stack((low, high), dim=-1).flatten(1).int()]
    return stored, values * _spread(scales.float() / inverse, 1, 16, weight.shape)


def nvfp4_modelopt(weight: Tensor) -> Encoded:
    codes, scales, factor, _ = _nvfp4(weight)
    stored = {".weight": codes, ".weight_scale": scales, ".weight_scale_2": factor.reshape(())}
    low, high = codes & 15, codes >> 4
    values = _FP4[torch.stack((low, high), dim=-1).flatten(1).int()]
    return stored, values * _spread(scales.float() * factor, 1, 16, weight.shape)


@dataclass(frozen=True)
class Format:
    """A format: its encoder of one weight, and its configuration."""

    encode: Callable[[Tensor], Encoded]
    config: dict[str, Any]
    weights: str = r"model\.layers\..*(proj|experts.*)\.weight"


def compressed(form: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Return a configuration of compressed-tensors. inputs: how servers quantise activations."""
    group = {"targets": ["Linear"], "format": form, "weights": weights}
    groups = {"group_0": group if inputs is None else group | {"input_activations": inputs}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    }


FORMATS = {
    "fp8 block": Format(fp8_block, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}),
    "fp8 channel": Format(fp8_channel, compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "fp8 tensor": Format(fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int4": Format(int4, compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP)),
    "int4 asymmetric": Format(
        int4_asymmetric, compressed("pack-quantized", num_bits=4, type="int", group_size=GROUP, symmetric=False)
    ),
    "int8 asymmetric": Format(
        int8_asymmetric, compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False)
    ),
    "fp8 asymmetric": Format(
        fp8_asymmetric, compressed("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=False)
    ),
    "mxfp4": Format(mxfp4, {"quant_method": "mxfp4"}, r"model\.layers\..*experts\.(gate_up|down)_proj"),
    "nvfp4": Format(nvfp4, compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group")),
    "nvfp4 modelopt": Format(nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def _words(codes: Tensor) -> Tensor:
    """Pack eight codes of a row into a word, the first in the lowest bits."""
    fields = codes.long().unflatten(-1, (-1, 8)) << (4 * torch.arange(8))
    return torch.from_numpy(fields.sum(dim=-1).numpy().astype("uint32").view("int32"))


def _by_input(weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, zero points and scales of inputs × outputs, and the values out × in. groups: number of each input's group."""
    by_group = [weight[:, groups == group] for group in range(int(groups.max()) + 1)]
    low, high = (torch.stack([own.min(dim=1).values for own in sign]) for sign in (by_group, [-g for g in by_group]))
    scales = ((-high - low) / 15).clamp_min(1e-6).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = ((weight.T / scales[groups].float()).round() + zeros[groups]).clamp(0, 15)
    return codes, zeros, scales, ((codes - zeros[groups]) * scales[groups].float()).T


def gptq(weight: Tensor) -> Encoded:
    """Encode as GPTQ: groups of inputs in another order; stored zero points are one less."""
    inputs = weight.shape[1]
    groups = torch.randperm(inputs, generator=torch.Generator().manual_seed(0)) // GROUP
    codes, zeros, scales, values = _by_input(weight, groups)
    stored = {".qweight": _words(codes.T).T, ".qzeros": _words(zeros - 1), ".scales": scales, ".g_idx": groups.int()}
    return stored, values


def awq(weight: Tensor) -> Encoded:
    """Encode as AWQ: a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    codes, zeros, scales, values = _by_input(weight, torch.arange(weight.shape[1]) // GROUP)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    stored = {
        end: _words(own.unflatten(-1, (-1, 8))[..., order].flatten(-2))
        for end, own in ((".qweight", codes), (".qzeros", zeros))
    }
    return stored | {".scales": scales}, values


READ_ONLY = {
    "gptq": Format(gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "awq": Format(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}


def quantised_pico(folder: Path, form: str, family: str, **changes: Any) -> tuple[Path, Path]:
    """Save a quantised pico model, and the dense model that it decodes to; return both folders."""
    dense = save_pico(folder / "dense", family, **changes)
    return quantise(dense, folder / "quantised", {**FORMATS, **READ_ONLY}[form]), dense


def quantise(dense: Path, quantised: Path, how: Format) -> Path:
    """Save a quantised copy of a folder, and replace the folder's weights by those that it decodes to; return the copy."""
    shutil.copytree(dense, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": how.config}))
    weight_map: dict[str, str] = {}
    for file in sorted(dense.glob("*.safetensors")):
        tensors = load_file(file)
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if re.fullmatch(how.weights, name) is None:
                stored[name] = tensor
                continue
            parts, values = how.encode(tensor.float())
            tensors[name] = values.to(tensor.dtype).contiguous()
            stored |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        save_file(stored, quantised / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file.name)
    index = quantised / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return quantised
