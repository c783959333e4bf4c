"""Converting a model in memory, matrix by matrix, only where a measurement on this device wins."""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput
from coprune.base.native.build import MatrixStruct, load_kernels
from coprune.base.native.product import IN_KERNEL, multiply_at, serves
from coprune.packed.compiled import compile_decoding
from coprune.packed.linear import PackedLinear
from coprune.packed.quantizer import CopruneConfig, CopruneQuantizer
from coprune.packed.semi_structured import can_convert, semi_structured_linear
from coprune.packed.timing import time_in_turns

MEASURED_LAYERS = 12  # of one kind, in turn, so that their weights come from memory as in a real model
WORTH_IT = 1.03  # below this the difference is within the noise


Form = Callable[[nn.Linear], nn.Module | None]


@dataclass(frozen=True)
class Choice:
    """Timings of linear layers of one shape, dtype and sparsity, and the form chosen for them."""

    kind: str
    """dense, kernel (dense, by our own product), packed or semi-structured."""
    names: tuple[str, ...]
    shape: tuple[int, int]
    sparsity: float
    speedup: float
    """Median time of the dense layer over that of the best alternative (1.0 where there was none)."""


@torch.no_grad()
def accelerate(model: nn.Module, batch: int = 1, repeats: int = 15, *, compile: bool = False) -> list[Choice]:
    """Replace, in place, the linear layers for which another form is faster on this device.

    Layers are measured by shape, dtype and sparsity (in steps of 5 %), in turns with the dense ones. Weights that are
    shared (tied embeddings) stay what they are; their product may be another one.

    Args:
        model: pruned, for inference.
        batch: the number of inputs at a time to be fast for (1: decoding one sequence).
        repeats: measurements of each form.
        compile: afterwards compile the step that makes one token per sequence (transformers' language models): its `generate`
            then has a cache of fixed size, and its first token waits for the compiler, half a minute for thirty blocks.

    Returns:
        Every group of layers with what was measured.

    Raises:
        BadInput: batch or repeats is below 1, or what should be compiled is no model that writes text.
    """
    if batch < 1 or repeats < 1:
        raise BadInput("batch and repeats must be at least 1")
    choices = []
    for (rows, columns, _, twentieths, shared), layers in _groups(model).items():
        choice = _accelerate_group(model, layers, _forms(layers, shared), batch, repeats)
        choices.append(Choice(choice[0], tuple(layers), (rows, columns), twentieths / 20, choice[1]))
    if any(choice.kind == "packed" for choice in choices):
        _save_packed(model)
    if compile:
        compile_decoding(model)
    return choices


def _save_packed(model: nn.Module) -> None:
    """Make `save_pretrained` write packed layers, which have no `weight`, as a packed folder does."""
    made: Any = model
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
        config = CopruneConfig(keep_packed=True)
        made.hf_quantizer = CopruneQuantizer(config, pre_quantized=True)
        made.config.quantization_config = config


def _groups(model: nn.Module) -> dict[tuple[int, int, torch.dtype, int, bool], dict[str, nn.Linear]]:
    uses: dict[int, int] = defaultdict(int)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] += 1
    groups: dict[tuple[int, int, torch.dtype, int, bool], dict[str, nn.Linear]] = defaultdict(dict)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            zeros, shared = (
                1 - float(module.weight.count_nonzero()) / module.weight.numel(),
                uses[id(module.weight)] > 1,
            )
            groups[(*module.weight.shape, module.weight.dtype, round(zeros * 20), shared)][name] = module
    return groups


def _forms(layers: dict[str, nn.Linear], shared: bool) -> dict[str, Form]:
    """Return the forms that the layers of a group can take."""
    forms: dict[str, Form] = {"kernel": kernel_linear}
    if not shared:
        forms["packed"] = PackedLinear.from_linear
        if all(can_convert(layer) for layer in layers.values()):
            forms["semi-structured"] = semi_structured_linear
    return forms


def _accelerate_group(
    model: nn.Module, layers: dict[str, nn.Linear], forms: dict[str, Form], batch: int, repeats: int
) -> tuple[str, float]:
    sample = dict(list(layers.items())[:MEASURED_LAYERS])
    made: dict[str, list[nn.Module]] = {"dense": list(sample.values())}
    for kind, form in forms.items():
        converted = [form(layer) for layer in sample.values()]
        if all(layer is not None for layer in converted):
            made[kind] = [layer for layer in converted if layer is not None]
    if len(made) == 1:
        return "dense", 1.0
    weight = next(iter(layers.values())).weight
    x = torch.randn(batch, weight.shape[1]).to(weight)
    times = time_in_turns({kind: partial(_run, form, x) for kind, form in made.items()}, repeats)
    best = min((kind for kind in made if kind != "dense"), key=lambda kind: times[kind].median)
    speedup = times["dense"].median / times[best].median
    if speedup < WORTH_IT:
        return "dense", speedup
    for name, layer in layers.items():
        converted_layer = forms[best](layer)
        if converted_layer is not None:
            model.set_submodule(name, converted_layer.train(layer.training))
    return best, speedup


def _run(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


_library = torch.library.Library("coprune", "FRAGMENT")
_library.define("dense_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class KernelLinear(nn.Linear):
    """`nn.Linear` that reads its weight once for a few inputs, which PyTorch's product on CPUs does more slowly in bfloat16.

    The weight is the layer's own parameter, which other modules may share (tied embeddings).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply … × I to … × O."""
        if torch.is_grad_enabled():
            return super().forward(input)
        operators: Any = torch.ops.coprune
        product: Tensor = operators.dense_product.default(input, self.weight, self.bias)
        return product


def kernel_linear(linear: nn.Linear) -> KernelLinear | None:
    """Return the layer multiplied by the kernels, with the same parameters; None if they do not support it."""
    weight, bias = linear.weight, linear.bias
    there = in_host_memory(weight.device) and weight.is_contiguous()
    if not there or load_kernels() is None or not serves(weight.dtype, None if bias is None else bias.dtype):
        return None
    made = KernelLinear(1, 1, bias=False, device="meta")
    made.in_features, made.out_features = linear.in_features, linear.out_features
    made.weight, made.bias = weight, bias
    return made.train(linear.training)


def _with_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    library, (outputs, inputs), dtype = load_kernels(), weight.shape, weight.dtype
    known = x.dtype == dtype and serves(dtype, None if bias is None else bias.dtype)
    plain = weight.is_contiguous() and (bias is None or bias.is_contiguous())
    plain = plain and x.shape[-1] == inputs  # else torch says what is wrong
    if library is None or not known or not plain or (batch := x.numel() // inputs) > IN_KERNEL[dtype]:
        return functional.linear(x, weight, bias)
    _, address = _matrix_at(weight.data_ptr(), None if bias is None else bias.data_ptr(), outputs, inputs)
    return multiply_at(address, x.contiguous(), outputs, batch, dense=True)


@functools.lru_cache(1024)
def _matrix_at(weight: int, bias: int | None, outputs: int, inputs: int) -> tuple[MatrixStruct, int]:
    """Return the kernels' argument and its address, cached by addresses and sizes."""
    struct = MatrixStruct(None, weight, None, bias, outputs, inputs)
    return struct, ctypes.addressof(struct)


def _shape_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1], lambda: f"the input has {x.shape[-1]} columns, not {weight.shape[1]}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_library.impl("dense_product", _with_torch, "CompositeExplicitAutograd")
_library.impl("dense_product", _on_cpu, "CPU")
_library.impl("dense_product", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("coprune::dense_product", _shape_alone, lib=_library)
