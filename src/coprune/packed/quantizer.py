"""Loading packed folders with transformers' from_pretrained.

A packed tensor has the dense one's name, so transformers' renamings and fusions (experts, qkv) apply once it is unpacked:
unpacking is the first step of every conversion, and the only one for other tensors. To keep a linear layer packed, it is
replaced by a PackedSlot, whose `weight` buffer has the length of the packed tensor; transformers fills it as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.pages import page_out
from coprune.base.words import Command
from coprune.model.checkpoint.names import QUANT_METHOD, kinds_of
from coprune.model.transformers_private import (
    Converter,
    HfQuantizer,
    Operation,
    QuantizationConfig,
    Renaming,
    begin_with,
    conversions_of,
    convert_every_tensor,
    set_conversions_to_revert,
    tied_names,
)
from coprune.packed.encoding import check_shard
from coprune.packed.folder import CONFIG, is_packed_folder
from coprune.packed.format import expand_checked
from coprune.packed.header import VERSION, Header, is_packed, read_header
from coprune.packed.linear import PackedLinear, PackedSlot
from coprune.packed.registration import register_with_transformers


class _Asked(Enum):
    """The mode that load_packed requests; no file can hold it, and transformers wants plain settings."""

    PACKED = "packed"


class CopruneConfig(QuantizationConfig):
    """`quantization_config` of a packed folder."""

    def __init__(self, version: int = VERSION, keep_packed: bool = False, **other: Any) -> None:
        """Create a configuration. version: of the format; keep_packed: whether linear layers stay packed in memory.

        A folder's own configuration cannot set keep_packed (see `from_dict`).
        """
        if version != VERSION:
            raise BadInput(
                f"the packed format has version {version}, and this coprune reads version {VERSION}",
                fix="update coprune",
            )
        self.quant_method: Any = QUANT_METHOD  # transformers' own ones are an enum
        self.version = version
        self.keep_packed = keep_packed

    @property
    def dequantize(self) -> bool:
        """Whether the loaded model is an ordinary dense one; read by transformers."""
        return not self.keep_packed

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **other: Any) -> Any:
        """Read what a folder says of itself: the version. How a model is held is for those to say who load it."""
        config = cls(config_dict.get("version", VERSION), config_dict.get("keep_packed") is _Asked.PACKED)
        return (config, other) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the saved settings; how a model was held in memory is not a property of its folder."""
        return {"quant_method": QUANT_METHOD, "version": self.version}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the settings of a config given to from_pretrained that override the folder's."""
        return {"keep_packed": self.keep_packed}


class Unpack(Operation):
    """The load operation: packed tensors become dense ones, all others pass."""

    def __init__(self, quantizer: CopruneQuantizer, alone: bool) -> None:
        """Create the operation. alone: whether it is the only one, and so has to name its result."""
        self.slots = quantizer.slots
        self.alone = alone

    def convert(self, input_dict: dict[str, Any], *_: Any, **context: Any) -> dict[str, Any]:
        """Unpack what is packed, into the dtype of the parameter it is for."""
        name, model = context["full_layer_name"], context["model"]
        if self.alone:
            (tensors,) = input_dict.values()
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            return {name: tensor if name in self.slots else _unpack(tensor, _dtype_of(model, name))}
        dtype = _dtype_of(model, name)
        return {
            key: [_unpack(tensor, dtype) for tensor in tensors]
            if isinstance(tensors, list)
            else _unpack(tensors, dtype)
            for key, tensors in input_dict.items()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        return self  # transformers copies a converter for every tensor


class CopruneQuantizer(HfQuantizer):
    """transformers' hooks around the loading of a packed folder."""

    quantization_config: CopruneConfig

    def __init__(self, quantization_config: CopruneConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.slots: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to pack on the fly: packing follows pruning."""
        if not self.pre_quantized:
            first = ("pack it first with ", Command("pack", "FOLDER", "TARGET"), ", or load it without a config")
            raise BadInput("this folder is not packed", fix=first)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check every checksum before anything is loaded, and replace the layers that stay packed."""
        headers: dict[str, Header | None] = {}
        for path in kwargs.get("checkpoint_files") or []:
            found = check_shard(Path(path))
            if twice := headers.keys() & found.keys():
                raise BadInput(f"{path}: another file holds {min(twice)} too", fix="copy or pack the model again")
            headers.update(found)
        keys = keys_in_model(model, headers)
        if self.quantization_config.keep_packed:
            self.slots = insert_slots(model, {key: header for key, header in headers.items() if header}, keys)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Unpack first in every conversion of the model, and on its own for all other tensors."""
        updated = [
            begin_with(Unpack(self, alone=False), conversion) if isinstance(conversion, Converter) else conversion
            for conversion in weight_conversions
        ]
        return [*updated, convert_every_tensor(Unpack(self, alone=True))]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in list(model.modules()):
            if isinstance(module, PackedSlot):
                module.fill()
        set_conversions_to_revert(model, None)  # ours do not reverse; saving looks the model's own up again
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return packed tensors under the weights' names, for save_pretrained of a packed model.

        File metadata is left out: tensors are renamed and distributed over files afterwards.
        """
        layers = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        state: dict[str, Tensor] = {}
        for key, tensor in model.state_dict().items():
            layer, _, last = key.rpartition(".")
            state[f"{layer}.weight" if last == "packed" and layer in layers else key] = tensor
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.to_linear())
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved configuration holds its name
        return model if wanted is None else model.to(wanted)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def load_packed(folder: Path | str, keep_packed: bool = True, **options: Any) -> Any:
    """Load a causal language model from a packed folder, with its linear layers kept packed in memory.

    Args:
        folder: as `coprune.pack` writes it.
        keep_packed: False unpacks on load, as from_pretrained does.
        options: those of from_pretrained.

    Returns:
        The model, as from_pretrained gives it.

    Raises:
        BadInput: the folder is not packed, or is damaged.
    """
    folder = expand_home(folder)
    if not is_packed_folder(folder):
        raise BadInput(f"{folder} is not a packed folder: its {CONFIG} does not name {QUANT_METHOD!r}")
    for shard in sorted(folder.glob("*.safetensors")):
        check_shard(shard)  # before transformers opens the files, whose own errors name neither cause nor fix
    register_with_transformers()
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["keep_packed"] = _Asked.PACKED if keep_packed else None
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **options)


def _unpack(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not is_packed(tensor):
        return tensor
    # Checked already; the header is read again, since it travels with the tensor through renamings.
    blob = tensor.cpu()
    dense = expand_checked(blob, read_header(blob)).to(tensor.device)
    page_out(blob)
    return dense if dtype is None else dense.to(dtype)


def _dtype_of(model: nn.Module, name: str) -> torch.dtype | None:
    owner, _, last = name.rpartition(".")
    wanted = getattr(model.get_submodule(owner), last, None)
    return wanted.dtype if isinstance(wanted, Tensor) and wanted.is_floating_point() else None


logger = logging.getLogger(__name__)


def keys_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return the model's name for every tensor of the files, and whether it is converted.

    Raises BadInput where two tensors would become one parameter: one would be checked and the other computed with.
    """
    known = dict(model.state_dict())
    renaming = Renaming(model, conversions_of(model), known)
    found: dict[str, tuple[str, bool]] = {}
    sources: dict[str, str] = {}
    for key in keys:
        name, changes = found[key] = renaming.of(key)
        if changes or name not in known:
            continue
        if name in sources:
            raise BadInput(f"{sources[name]} and {key} are both {name}", fix="copy or pack the model again")
        sources[name] = key
    return found


def insert_slots(model: PreTrainedModel, headers: dict[str, Header], keys: dict[str, tuple[str, bool]]) -> set[str]:
    """Replace the linear layers whose packed weight arrives whole. Returns the weights' names in the model."""
    tied, parameters = tied_names(model), dict(model.state_dict())
    slots: set[str] = set()
    left: list[str] = []
    for key, header in headers.items():
        name, changes = keys[key]
        if name in tied:
            continue  # the embedding, of which single rows are read
        module = model.get_submodule(name.rpartition(".")[0]) if name in parameters and not changes else None
        if type(module) is not nn.Linear or tuple(module.weight.shape) != header.shape:
            left.append(key)
            continue
        if module.weight.dtype != header.dtype:
            logger.warning(
                "%s is stored as %s and wanted as %s, so it is unpacked", name, header.dtype, module.weight.dtype
            )
            continue
        model.set_submodule(name.removesuffix(".weight"), PackedSlot(header, module))
        slots.add(name)
    if left:
        logger.warning(
            "dense in memory, since only linear layers multiply from packed weights: %s", ", ".join(kinds_of(left))
        )
    return slots
