"""Adapters for a pruned model: add them, save and load them in PEFT's format, merge them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput
from coprune.base.files import whole_folder, write_text
from coprune.base.words import Set
from coprune.model.checkpoint.companions import CARD_FILE
from coprune.model.checkpoint.load import task_of
from coprune.model.checkpoint.shards import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DTYPES,
    TensorEntry,
    read_entries,
    read_json,
)
from coprune.model.checkpoint.writer import refuse_occupied
from coprune.model.transformers_private import Conv1D
from coprune.training.masks import Masks, plain_parameters
from coprune.training.saving import require_finite


def choose_targets(masks: Masks, patterns: Sequence[str], rank: int, alone: Container[int] = ()) -> list[str]:
    """Return the names of the pruned linear layers that get an adapter.

    Fused experts, convolutions and output matrices tied to the embedding get none.

    Args:
        masks: of the model.
        patterns: shell-like patterns of layer names; empty for all layers.
        rank: of the adapters.
        alone: ids of parameters that get no adapter.

    Raises:
        BadInput: a pattern matches no layer, or the rank exceeds the width of one.
    """
    every = [*(entry.matrix for entry in masks.matrices if not entry.tied), *masks.whole]
    matrices = [matrix for matrix in every if isinstance(matrix.owner, nn.Linear | Conv1D)]
    matrices = [matrix for matrix in matrices if id(matrix.owner.get_parameter(matrix.attribute)) not in alone]
    names = [matrix.name for matrix in matrices]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(
                f"the pattern {pattern!r} matches none of the {len(names)} pruned linear layers",
                field="train",
                value=pattern,
            )
    chosen = [m for m in matrices if not patterns or any(fnmatchcase(m.name, p) for p in patterns)]
    if not chosen:
        raise BadInput(
            "only fused experts or convolutions are pruned, and these cannot have adapters",
            field="mode",
            value="lora",
            fix=("use ", Set("mode", "dense")),
        )
    for matrix in chosen:
        if rank > min(matrix.shape):
            raise BadInput(
                f"rank {rank} is above the width of {matrix.name} ({matrix.shape[0]} × {matrix.shape[1]})",
                field="rank",
                value=rank,
                fix=f"use at most {min(matrix.shape)}",
            )
    return [matrix.name for matrix in chosen]


def add_adapter(
    model: PreTrainedModel, masks: Masks, targets: list[str], rank: int, alpha: float, masked: bool
) -> PeftModel:
    """Add trainable adapters to the target layers of a model, masked ones or PEFT's plain ones. alpha: as in PEFT."""
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        "task_type": "CAUSAL_LM" if task_of(model.config) == "text" else None,
    }
    config = MaskedLoraConfig(**settings, coprune_masks=masks.fingerprint()) if masked else LoraConfig(**settings)
    with _without_deprecations():
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


def save_adapter(adapted: PeftModel, folder: Path, card: str) -> None:
    """Save adapters in PEFT's format with a model card, atomically.

    Raises BadInput if the folder is not empty, NumericalError if an adapter is not finite, CopruneError on a full disk.
    """
    refuse_occupied(folder)
    require_finite((name, tensor) for name, tensor in adapted.named_parameters() if ".lora_" in name)
    with whole_folder(folder) as out:
        adapted.save_pretrained(str(out), save_embedding_layers=False)
        write_text(out / CARD_FILE, card)


def load_adapter(model: PreTrainedModel, masks: Masks, folder: Path) -> PeftModel:
    """Load adapters, masked or plain, onto the pruned model that they were trained on.

    Raises BadInput if the folder has no adapters, or those of another model or with other masks.
    """
    config = read_adapter_config(folder)
    settings = adapter_settings(folder, config, model)
    made_for = config.get("coprune_masks")
    if made_for is not None and made_for != masks.fingerprint():
        raise BadInput(
            f"the adapter in {folder} was trained on other masks than those of this model",
            field="adapter",
            value=folder,
            fix=_ITS_MODEL,
        )
    known = LoraConfig(**settings) if made_for is None else MaskedLoraConfig(**settings, coprune_masks=made_for)
    with _without_deprecations():
        adapted: PeftModel = PeftModel.from_pretrained(model, str(folder), config=known)
    return adapted


def merge_adapter(model: PreTrainedModel, masks: Masks, folder: Path) -> PreTrainedModel:
    """Merge saved masked adapters into the pruned model that they were trained on.

    Raises BadInput for plain adapters, which would fill the zeros, and wherever `load_adapter` does; BrokenMask.
    """
    config = read_adapter_config(folder)
    if config.get("coprune_masks") is None:
        raise BadInput(
            f"the adapter in {folder} is a plain one", field="adapter", value=folder, fix=plain_warning(masks)
        )
    adapted = load_adapter(model, masks, folder)
    adapted.merge_adapter()
    return without_adapters(adapted, masks)


def without_adapters(adapted: PeftModel, masks: Masks) -> PreTrainedModel:
    """Return a model whose masked adapters were merged, without them. Raises BrokenMask if a zero is lost."""
    merged: PreTrainedModel = adapted.unload()
    masks.verify(plain_parameters(merged))
    return merged


def plain_warning(masks: Masks) -> str:
    """Return the warning about merging an adapter without masks."""
    zeros = sum(entry.zeros for entry in masks.matrices)
    return (
        f"Merging it would make nearly all of the {zeros:,} zeros in the adapted layers nonzero, and the model dense "
        "again. Use it unmerged (PeftModel.from_pretrained), or train a masked adapter, which merges and keeps every zero."
    )


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Silence warnings about deprecated names of transformers that PEFT uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


_ROW_VALUES = 2**22  # values of the dense gradient computed at once: 16 MiB in float32


@dataclass
class MaskedLoraConfig(LoraConfig):
    """PEFT's LoRA configuration with the fingerprint of the masks that the update needs.

    It is saved in the same file. PEFT without coprune warns about the unknown field and would apply the update unmasked.
    """

    coprune_masks: str | None = field(default=None, metadata={"help": "Fingerprint of the masks of the base model."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})


class MaskedLinear(LoraLinear):
    """PEFT's LoRA layer with a masked update; one adapter at a time."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update to merge, in the weight's layout and, as in a forward, in its dtype."""
        delta: Tensor = super().get_delta_weight(adapter)
        base: Any = self.get_base_layer()
        return delta.masked_fill_(base.weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its update (B × S × in → B × S × out)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if len(active) > 1 or kwargs.get("adapter_names") is not None:
            raise ValueError("only one masked adapter can be active at a time; select it with set_adapter.")
        base: Any = self.get_base_layer()
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        a, b = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        product: Tensor = MaskedProduct.apply(  # type: ignore[no-untyped-call, unused-ignore]
            x.to(dtype), weight, a, b, self.scaling[active[0]]
        )
        return product if base.bias is None else product + base.bias.to(dtype)


class MaskedProduct(torch.autograd.Function):
    """x ↦ x (W + s·(B A) ⊙ keep)ᵀ with gradients for x, A and B; W (out × in) is frozen, keep is where it is not 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        with torch.autocast(x.device.type, enabled=False):
            return x @ masked_weight(weight, a, b, scaling).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        gradient = gradients[0]
        # Recomputed, since storing it would take a second copy of the model.
        needed = ctx.needs_input_grad[0]
        x_gradient = gradient @ masked_weight(weight, a, b, ctx.scaling).to(x.dtype) if needed else None
        outputs, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        a_gradient, b_gradient = torch.zeros_like(a), torch.empty_like(b)
        step = max(1, _ROW_VALUES // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            dense = (outputs[:, rows].T @ inputs).to(a.dtype).mul_(weight[rows] != 0)
            torch.mm(dense, a.T, out=b_gradient[rows])
            a_gradient.addmm_(b[rows].T, dense)
        return x_gradient, None, a_gradient.mul_(ctx.scaling), b_gradient.mul_(ctx.scaling), None


def masked_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return W + s·(B A) ⊙ keep, out × in. weight: out × in; a: rank × in; b: out × rank."""
    # mul_ is vectorised and masked_fill_ is not: seven times as fast on a CPU.
    update = torch.mm(b, a).mul_(weight != 0)
    return torch.add(weight, update, alpha=scaling)


# Refused: they would change the base model, or are patterns from an untrusted file.
_REFUSED = (
    *("layer_replication", "modules_to_save", "rank_pattern", "alpha_pattern", "use_dora", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_qalora", "lora_bias"),
)
_ITS_MODEL = "give the pruned model that it was trained on"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises BadInput if it is missing, damaged, or not LoRA's."""
    if not (folder / ADAPTER_CONFIG).is_file():
        fix = "name the folder of an adapter, such as adapter/ in the folder of a training"
        raise BadInput(f"{folder} holds no adapter: there is no {ADAPTER_CONFIG}", fix=fix)
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{folder} holds an adapter that is not LoRA", fix="merge it with PEFT's merge_and_unload()")
    return config


def adapter_settings(folder: Path, config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return PEFT's LoRA settings of a saved adapter, with every layer by its full name.

    Args:
        folder: of the adapter.
        config: the result of `read_adapter_config`.
        model: the model to apply it to.

    Raises:
        BadInput: the configuration and tensors are not an adapter of this model.
    """
    asked = [name for name in _REFUSED if config.get(name)]
    if asked or config.get("bias", "none") != "none":
        raise BadInput(f"the adapter in {folder} has {', '.join(asked) or 'biases'}, which coprune does not merge")
    rank, alpha, dropout = (config.get(name) for name in ("r", "lora_alpha", "lora_dropout"))
    if type(rank) is not int or rank < 1:
        raise BadInput(f"the adapter in {folder} has the rank {rank!r}")
    if not _is_number(alpha) or not _is_number(dropout) or not 0 <= float(dropout or 0) < 1:
        raise BadInput(f"the adapter in {folder} has the strength {alpha!r} and the dropout {dropout!r}")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise BadInput(f"the adapter in {folder} is for {task!r}")
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "use_rslora": bool(config.get("use_rslora")),
        "task_type": task,
        "inference_mode": bool(config.get("inference_mode")),
        "target_modules": _layers(folder, rank, bool(config.get("fan_in_fan_out")), model),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layers(folder: Path, rank: int, transposed: bool, model: nn.Module) -> list[str]:
    """Check every tensor of an adapter against the layer that it names, and return the layers' names."""
    try:
        entries = read_entries(folder / ADAPTER_WEIGHTS)
    except BadInput as error:
        raise BadInput(f"{folder / ADAPTER_WEIGHTS} is missing or damaged", fix="fetch or save it again") from error
    modules = dict(model.named_modules())
    layers: dict[str, set[str]] = {}
    for name, entry in entries.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise BadInput(f"the adapter in {folder} holds {name!r}, which is not a LoRA factor")
        _check_factor(folder, entry, found, rank, transposed, modules)
        layers.setdefault(found[1], set()).add(found[2])
    single = next((layer for layer, factors in layers.items() if len(factors) < 2), None)
    if single is not None or not layers:
        what = f"one factor of {single} only" if single is not None else "no tensors"
        raise BadInput(f"the adapter in {folder} holds {what}", fix="fetch or save it again")
    return list(layers)


def _check_factor(
    folder: Path, entry: TensorEntry, name: re.Match[str], rank: int, transposed: bool, modules: dict[str, nn.Module]
) -> None:
    """Raise BadInput if a factor does not fit its layer: A is rank × inputs, B is outputs × rank."""
    layer, factor = name[1], name[2]
    module = modules.get(layer)
    if not isinstance(module, nn.Linear | Conv1D):
        cause = f"the adapter in {folder} is of another model: this one has no layer {layer!r}"
        raise BadInput(cause, fix=_ITS_MODEL)
    outputs, inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    if entry.dtype not in DTYPES or not DTYPES[entry.dtype].is_floating_point:
        raise BadInput(f"the adapter in {folder} holds {name[0]} in {entry.dtype}, which is not a floating-point dtype")
    wanted = (rank, inputs) if factor == "A" else (outputs, rank)
    if entry.shape != wanted:
        raise BadInput(
            f"the adapter in {folder} is of another model: its tensor of "
            f"{' × '.join(map(str, entry.shape)) or 'one number'} does not fit {layer}, which is {outputs} × {inputs} here",
            fix=_ITS_MODEL,
        )
