"""Undocumented internals of transformers that coprune uses, which may change in any version.

All are wrapped here, and one test checks each of them; it also covers the Trainer's saving, which fine-tuning overrides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, modeling_gguf_pytorch_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    read_field,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.models.auto.auto_factory import _get_model_class
from transformers.processing_utils import ProcessorMixin
from transformers.pytorch_utils import Conv1D
from transformers.utils import quantization_config
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.loading_report import LoadStateDictInfo

__all__ = ["Conv1D"]

# Without tensor parallelism; versions of transformers differ in the arguments that they require.
_TENSOR_PARALLEL: dict[str, Any] = (
    {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
)
_SKIPPED: dict[str, Any] = (
    {"skipped_pp_keys": set()} if "skipped_pp_keys" in signature(LoadStateDictInfo).parameters else {}
)

Processor = PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin
"""A tokenizer, an image processor, or a processor of speech and text."""
NAME_IN_CONFIG = "_name_or_path"
"""Configuration key of the model's origin."""
OWN_LAYERS: dict[str, Any] = {"use_kernels": False}
"""Options of `from_pretrained` for the model's own layers: from 5.25 on, its default is compiled ones from the Hub."""
in_natural_order = dot_natural_key
"""A sort key for tensor names that puts the tenth expert after the ninth."""


def installed_trackers() -> list[str]:
    """Return the names of installed experiment trackers, as the Trainer calls them."""
    from transformers.integrations import integration_utils  # slow to import and rarely needed

    return list(integration_utils.get_available_reporting_integrations())


def rendered_chat(
    template: str, messages: Iterable[Mapping[str, str]], special: Mapping[str, str], begins_answer: bool
) -> str:
    """Render a chat template as a tokenizer does, without a tokenizer.

    Args:
        template: in Jinja.
        messages: the conversation, with `role` and `content`.
        special: texts of special tokens by name, such as `bos_token`.
        begins_answer: whether to append the beginning of an answer (`add_generation_prompt`).
    """
    conversations: list[Any] = [list(messages)]
    rendered: Any = render_jinja_template(
        conversations, chat_template=template, add_generation_prompt=begins_answer, **dict[str, Any](special)
    )
    (text,), _ = rendered
    return str(text)


class Renaming:
    """Mapping of a checkpoint's tensor names to a model's parameter names."""

    def __init__(self, model: PreTrainedModel, conversions: Iterable[Any], known: dict[str, Any]) -> None:
        """Collect a model's renamings and converters. known: the model's tensors by name."""
        conversions = list(conversions)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix, self._known = model.base_model_prefix, known

    def of(self, name: str) -> tuple[str, bool]:
        """Return the model's name for a tensor of the checkpoint, and whether it is converted."""
        key, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)
        return key, pattern is not None


def conversions_of(model: PreTrainedModel) -> list[Any]:
    """Return the renamings and conversions between a model's parameters and its family's checkpoints."""
    found: list[Any] = get_model_conversion_mapping(model)
    return found


def used_among(conversions: Iterable[Any]) -> list[Any]:
    """Return the conversions used so far."""
    return [conversion for conversion in conversions if conversion.was_used()]


def splits(conversion: Any) -> bool:
    """Return whether a conversion produces several parameters."""
    return len(conversion.target_patterns) > 1


def convert_into(
    model: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype, device: Any, conversions: Iterable[Any]
) -> LoadStateDictInfo:
    """Convert tensors of a checkpoint (or lazy slices) and load them into a model; return transformers' report."""
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=list(conversions),
    )
    info: LoadStateDictInfo
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config, **_TENSOR_PARALLEL)
    return info


def revert_conversion(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors under the checkpoint's names and in its layout."""
    reverted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return reverted


def conversions_to_revert(model: nn.Module) -> list[Any] | None:
    """Return the conversions that saving reverts; None if transformers derives them."""
    found: list[Any] | None = model.__dict__.get("_weight_conversions")
    return found


def set_conversions_to_revert(model: nn.Module, conversions: list[Any] | None) -> None:
    """Set the conversions that saving reverts; None lets transformers derive them."""
    model.__dict__.pop("_weight_conversions", None)
    if conversions is not None:
        model.__dict__["_weight_conversions"] = conversions


def without_known_exceptions(
    model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[set[str], set[str]]:
    """Return the missing and unexpected names that the model's class does not declare as ignorable."""
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        **_SKIPPED,
    )
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of all parameters that are tied to another, on both sides."""
    return {name for pair in tied_pairs(model) for name in pair}


def tied_pairs(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return the names of tied parameters, in pairs."""
    return list(model.all_tied_weights_keys.items())


def tie_read_weights(model: PreTrainedModel, missing: set[str]) -> None:
    """Tie missing parameters to their counterparts."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def computed_parameters(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those of the names that a checkpoint may lack because the model computes them (position tables)."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def unsaved_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters that a model excludes from saving, since it computes or ties them, by name."""
    names = set(model._keys_to_ignore_on_save or ())
    return {name: own for name, own in model.named_parameters(remove_duplicate=False) if name in names}


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that save_pretrained would save: one of each tied group, without those that the model excludes."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    # Tensors of a subclass (deferred ones) do not share memory with others.
    deferred = {name for name, tensor in state.items() if type(tensor) not in (Tensor, nn.Parameter)}
    held = {name: tensor for name, tensor in state.items() if name not in deferred}
    kept: dict[str, Tensor] = remove_tied_weights_from_state_dict(held, model)
    return {name: tensor for name, tensor in state.items() if name in deferred or name in kept}


def initialize_again(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    """Reinitialise some modules of a model."""
    for module in modules:
        module.__dict__["_is_hf_initialized"] = False
    model.initialize_weights()


def input_first(module: nn.Module) -> bool | None:
    """Return whether a fused mixture stores its experts as in × out; None if it is not declared."""
    said: bool | None = getattr(module, "is_transposed", None)
    return said


def experts_of(module: nn.Module) -> int | None:
    """Return the number of experts whose rows are in a module's tables; None if it is not declared."""
    said: int | None = getattr(module, "moe_num_experts", None)
    return said


def run_experts_as(model: PreTrainedModel, implementation: str) -> None:
    """Set transformers' implementation of a model's mixtures."""
    model.set_experts_implementation(implementation)


def run_experts_singly(model: PreTrainedModel) -> None:
    """Run each expert with its own products instead of one product over all."""
    # The implementation is a private field of the configuration that is never saved.
    if experts_run_as(model) not in (None, "eager"):
        model.set_experts_implementation("eager")


def experts_run_as(model: PreTrainedModel) -> str | None:
    """Return the implementation of a model's experts; None without experts."""
    implementation: str | None = getattr(model.config, "_experts_implementation", None)
    return implementation


def builds(auto_class: Any, config: Any) -> bool:
    """Return whether an Auto class has a model for a configuration."""
    return type(config) in auto_class._model_mapping


def auto_choice(auto_class: Any, config: Any) -> type[PreTrainedModel] | None:
    """Return an Auto class's class for a configuration, or None."""
    return _get_model_class(config, auto_class._model_mapping) if builds(auto_class, config) else None


def config_of(kind: type[PreTrainedConfig], content: dict[str, Any]) -> PreTrainedConfig:
    """Build a configuration from the content of a `config.json`, in which infinities are encoded as objects."""
    return kind.from_dict(kind._decode_special_floats(content))


def own_class(config: Any) -> type[PreTrainedModel] | None:
    """Return the class that a configuration names, if transformers has it for such configurations."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.config_class is type(config):
        return named
    return None


def class_built_by(model_class: Any, config: Any) -> type[PreTrainedModel]:
    """Return the class that an Auto class builds for a configuration; a concrete class itself."""
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    found: Any = model_class._model_mapping[type(config)]
    own: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return own


def build(model_class: Any, config: Any, **options: Any) -> PreTrainedModel:
    """Build a model with random weights from a class of transformers or one of its Auto classes."""
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        model: PreTrainedModel = model_class._from_config(config, **options)
    else:
        model = model_class.from_config(config, trust_remote_code=False, **options)
    return model


def restore_own_layers(model: PreTrainedModel) -> None:
    """Replace the Hub's compiled layers of a loaded model by its own: those multiply without calling their linear layers."""
    if getattr(model, "use_kernels", False):
        model.use_kernels = False


def name_model(model: PreTrainedModel, name: str) -> None:
    """Set a model's origin, as from_pretrained does."""
    model.config._name_or_path = model.name_or_path = name


def unpack_gguf() -> dict[str, Any]:
    """Return the arguments that make from_pretrained dequantise a GGUF file."""
    # Newer versions keep the weights packed by default.
    wanted = getattr(quantization_config, "GgufConfig", None)
    return {} if wanted is None else {"quantization_config": wanted(dequantize=True)}


def reads_gguf(architecture: str) -> bool:
    """Return whether transformers has a class for GGUF files of an architecture."""
    known = {name.replace("_", "") for name in GGUF_CONFIG_MAPPING}
    return re.sub("[-_]", "", architecture) in known


_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
for _family in ("qwen2_moe", "qwen3_moe"):  # else transformers uses default widths, and only files with those load
    _read: Any = GGUF_CONFIG_MAPPING.get(_family, {})
    for _key, _place in _WIDTHS.items():
        _read.setdefault(_key, _place)


@dataclass(frozen=True)
class GgufNames:
    """Mapping of a GGUF file's tensors to a model's parameters, with their conversion."""

    parameters: Mapping[str, str]
    processor: Any

    def parameter(self, tensor: str) -> str | None:
        """Return the parameter that a tensor belongs to; None if there is none."""
        return self.parameters.get(tensor, self.parameters.get(tensor.removesuffix(".weight")))

    def arrange(self, tensor: str, values: Tensor, parsed: dict[str, dict[str, Any]]) -> Tensor:
        """Convert a tensor and return its parameter as assembled so far. parsed: keeps other parts between calls."""
        found = self.processor.process(
            weights=values.numpy(), name=tensor, tensor_key_mapping=self.parameters, parsed_parameters=parsed
        )
        known: dict[Any, Tensor] = parsed["tensors"]
        whole = known.get(self.parameter(tensor)) if found.name is None else torch.from_numpy(found.weights)
        return values if whole is None else whole


def gguf_names(file: Path, model: PreTrainedModel) -> GgufNames:
    """Return the mapping of a GGUF file's tensors to a model's parameters. file: the part with the metadata."""
    import gguf

    architecture = read_field(gguf.GGUFReader(file), "general.architecture")[0]
    said = modeling_gguf_pytorch_utils.load_gguf_checkpoint(str(file))["config"]
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=said)
    return GgufNames(get_gguf_hf_weights_map(model, processor), processor)


@contextmanager
def gguf_metadata_read_once() -> Iterator[None]:
    """Cache a GGUF file's metadata in the body, which transformers would read for each part of a model."""
    module: Any = modeling_gguf_pytorch_utils
    own, known = module.load_gguf_checkpoint, dict[str, Any]()

    def load(path: str, return_tensors: bool = False, **rest: Any) -> Any:
        if return_tensors:
            return own(path, return_tensors=True, **rest)
        said = known[path] if path in known else known.setdefault(path, own(path))
        return said | {"config": deepcopy(said["config"])}

    module.load_gguf_checkpoint = load
    try:
        yield
    finally:
        module.load_gguf_checkpoint = own


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks that would make transformers save dequantised weights as quantised ones."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    set_conversions_to_revert(model, None)
