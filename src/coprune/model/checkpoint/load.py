"""Load a model and its tokenizer into memory, as plain weights that can be saved.

transformers dequantises a GGUF file, and all traces of the quantisation are removed. Experts run one after another
("eager") instead of in one product, so that the walk sees each expert's inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput, CopruneError, panics_caught
from coprune.base.words import Set
from coprune.model.checkpoint.conversion import require_floats
from coprune.model.checkpoint.empty import without_weights
from coprune.model.checkpoint.foreign_tokenizer import check_tokenizer
from coprune.model.checkpoint.gguf_header import gguf_parts
from coprune.model.checkpoint.gguf_reader import reading_once
from coprune.model.checkpoint.locate import GgufFile, Location
from coprune.model.checkpoint.shards import TensorEntry, read_tensor
from coprune.model.checkpoint.source_encoding import SourceEncoding, checkpoint_entries, source_encoding
from coprune.model.transformers_private import (
    OWN_LAYERS,
    auto_choice,
    build,
    builds,
    class_built_by,
    experts_run_as,
    forget_quantization,
    name_model,
    own_class,
    run_experts_as,
    run_experts_singly,
    unpack_gguf,
)
from coprune.recipe.parts import DtypeName

TaskName = Literal["text", "masked", "labels", "embeddings", "images", "pairs", "speech"]
"""The task of a model: to generate text, to fill in masked tokens, to classify texts, to embed them, to classify images,
to map text to text, to transcribe speech."""

HEADS: dict[TaskName, tuple[Any, ...]] = {
    "text": (AutoModelForCausalLM, AutoModelForImageTextToText),
    "masked": (AutoModelForMaskedLM,),
    "labels": (AutoModelForSequenceClassification, AutoModelForTokenClassification),
    "images": (AutoModelForImageClassification,),
    "pairs": (AutoModelForSeq2SeqLM,),
    "speech": (AutoModelForSpeechSeq2Seq,),
    "embeddings": (AutoModel,),
}
"""Auto classes for each task; the first that knows the model is used. timm's models are wrapped image classifiers."""

PAIRED: tuple[TaskName, ...] = ("pairs", "speech")
"""Tasks of encoder-decoder models."""

WHAT: dict[TaskName, str] = {
    "text": "writes text",
    "masked": "fills in masked tokens",
    "labels": "classifies texts",
    "embeddings": "embeds texts",
    "images": "classifies images",
    "pairs": "maps text to text",
    "speech": "transcribes speech",
}
"""What a model of each task does, as a verb phrase for messages."""
READ_TEXT: tuple[TaskName, ...] = ("text", "masked", "embeddings")
"""Tasks that are measured on plain text."""


def task_of(config: Any, model_class: type[PreTrainedModel] | None = None) -> TaskName:
    """Return the task of a configuration: by the model's class, the class that it names, or the heads of its type."""
    names = (getattr(config, "architectures", None) or ()) if model_class is None else (model_class.__name__,)
    both = getattr(config, "is_encoder_decoder", False)
    # A decoder-only model may also take speech, and BART may also fill in masked tokens.
    for task in (*PAIRED, *HEADS) if both else [one for one in HEADS if one not in PAIRED]:
        autos = HEADS[task]
        if any(choice is not None and choice.__name__ in names for choice in (auto_choice(a, config) for a in autos)):
            return task
    if both and not names:
        return next((task for task in PAIRED if builds(HEADS[task][0], config)), "text")
    lists = [task for task in ("text", "images") if builds(HEADS[task][0], config)]
    return "images" if lists == ["images"] else "text"


def class_for(config: Any) -> Any:
    """Return the class that loads a configuration's model: the one that it names, so that no part is left out.

    An Auto class is returned if it chooses the same class, or if transformers does not have the named one.

    Raises:
        BadInput: that class is neither for text nor for image classification.
    """
    task, named = task_of(config), own_class(config)
    if getattr(config, "is_encoder_decoder", False) and task not in ("text", *PAIRED):
        raise _not_for(config, named, "is an encoder-decoder model that does not generate text")
    for auto in HEADS[task]:
        if _is_named(auto, config):
            if task == "embeddings" and class_built_by(auto, config).main_input_name != "input_ids":
                raise _not_for(config, named, "is not an image classifier and does not read text")
            return auto
    if named is None:
        return HEADS[task][0]
    if task == "images":
        raise _not_for(config, named, "is not an image classifier")
    with without_weights():
        head = build(named, config).get_output_embeddings()
    if head is None:
        raise _not_for(config, named, "has no head that predicts tokens, so its quality could not be measured")
    return named


def _is_named(auto: Any, config: Any) -> bool:
    """Return whether a configuration's `architectures` names the class that an Auto class chooses for it."""
    choice = auto_choice(auto, config)
    return choice is not None and choice.__name__ in (getattr(config, "architectures", None) or ())


def _not_for(config: Any, named: type | None, why: str) -> BadInput:
    name = config.model_type if named is None else named.__name__
    return BadInput(
        f"{name}, the model that config.json names, {why}",
        field="model",
        fix="choose a text model or an image classifier",
    )


def loaded_by_auto(model: PreTrainedModel) -> bool:
    """Return whether the task's Auto class would load this configuration as the model's class."""
    return auto_choice(HEADS[task_of(model.config, type(model))][0], model.config) is type(model)


def read_config(folder: Path) -> Any:
    """Read a folder's configuration, converting timm's to transformers' wrapper."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _forget_codes(config)
    if getattr(config, "model_args", None):
        config.model_args = undoubled(config.model_args)
    return config


def _forget_codes(config: Any) -> None:
    """Remove the quantisation from a configuration, since coprune, not transformers, decodes the weights."""
    for own in (one for one in (config, getattr(config, "text_config", None)) if one is not None):
        if isinstance(getattr(own, "quantization_config", None), dict):
            del own.quantization_config
        if getattr(getattr(own, "dtype", None), "itemsize", 2) == 1:
            own.dtype = torch.bfloat16


def task_at(location: Location) -> TaskName:
    """Return the task of a located model, by its configuration. Raises BadInput if that cannot be read."""
    if isinstance(location, GgufFile):
        return "text"
    with quiet_transformers(), explained(location):
        return task_of(read_config(location.path))


def undoubled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return timm's model arguments without the number of classes.

    timm writes it twice, and transformers' wrapper would pass on both.
    """
    return {key: value for key, value in arguments.items() if key != "num_classes"}


@reading_once
def load_model(
    location: Location,
    dtype: DtypeName = "auto",
    device: torch.device | str = "cpu",
    processed: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer or image processor: in evaluation mode, without gradients, on one device.

    dtype: "auto" is the checkpoint's own (float32 for GGUF). processed: whether to load the tokenizer or processor; else it
    is None. Raises BadInput if the files cannot be loaded, or lack weights of the model.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    folder, file = _arguments(location)
    options |= file | OWN_LAYERS
    if isinstance(location, GgufFile):
        require_one_part(location)
        options["dtype"] = "float32" if dtype == "auto" else dtype
        options |= unpack_gguf()
    task: TaskName = "text"
    with quiet_transformers(), explained(location):
        if not isinstance(location, GgufFile):
            options["config"] = read_config(folder)
            task = task_of(options["config"])
            if not in_host_memory(torch.device(device)):
                options["device_map"] = {"": device}  # tensor by tensor, so that they never all occupy host memory
            source = source_encoding(folder, None if dtype == "auto" else getattr(torch, dtype))
            if source is not None:
                options |= {"state_dict": _decoded(source), "dtype": source.dtype}
        loader = class_for(options["config"]) if "config" in options else HEADS[task][0]
        if "state_dict" in options:
            loaded: Any = class_built_by(loader, options["config"]).from_pretrained(None, **options)
        else:
            loaded = loader.from_pretrained(folder, **options)
    model: PreTrainedModel = loaded[0]
    if "state_dict" in options and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    info: dict[str, Any] = loaded[1]
    require_all_weights(location.name, info["missing_keys"])
    if isinstance(location, GgufFile):
        forget_quantization(model)
    else:
        require_floats(model, checkpoint_entries(location.path))
    name_model(model, location.name)
    torch.nn.Module.to(model, device)  # transformers' own `to` has other types
    return prepare(model), load_processor(location, task) if processed else None


@dataclass(frozen=True)
class _Decoded:
    """A tensor that is read and decoded when transformers slices it."""

    entry: TensorEntry

    def __getitem__(self, everything: object) -> torch.Tensor:
        return read_tensor(self.entry)


def _decoded(source: SourceEncoding) -> dict[str, Any]:
    """Return the tensors of a quantised checkpoint as a state dict for transformers."""
    return {name: _Decoded(entry) for name, entry in source.entries.items()}


def load_processor(location: Location, task: TaskName) -> Any:
    """Load a model's tokenizer, image processor or speech processor. Raises BadInput if it is missing."""
    if task not in ("images", "speech"):
        return load_tokenizer(location)
    loader: Any = AutoImageProcessor if task == "images" else AutoProcessor
    folder, file = _arguments(location)
    if not file:
        check_tokenizer(folder / "tokenizer.json")
    with quiet_transformers(), explained(location):
        return loader.from_pretrained(folder, trust_remote_code=False)


@reading_once
def load_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the weights. Raises BadInput if there is none."""
    folder, file = _arguments(location)
    if not file:
        check_tokenizer(folder / "tokenizer.json")
    beside = None if file else "Are the files of its tokenizer, such as tokenizer.json, beside the weights?"
    with quiet_transformers(), explained(location, beside):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **file)
    return tokenizer


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a model for the walk: evaluation mode, no gradients, experts one by one."""
    model.eval()
    model.requires_grad_(False)
    run_experts_singly(model)
    return model


@contextmanager
def prepared(model: PreTrainedModel | None) -> Iterator[None]:
    """Prepare the caller's model in the body; restore everything but its weights afterwards."""
    if model is None:
        yield
        return
    gradients = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    experts = experts_run_as(model)
    try:
        with evaluating(model):
            prepare(model)
            yield
    finally:
        for name in gradients:
            model.get_parameter(name).requires_grad_(True)
        if experts is not None and experts != experts_run_as(model):
            run_experts_as(model, experts)


def require_one_part(location: GgufFile) -> None:
    """Raise BadInput for a GGUF file that is split into parts."""
    if len(gguf_parts(location.path)) > 1:
        raise BadInput(
            f"{location.name} is one of several parts, which can only be converted to another GGUF file",
            field="model",
            value=location.name,
            fix=("remove experts or blocks with ", Set("save_model", "OUT.gguf"), ", or join the parts first"),
        )


def require_all_weights(name: str, missing: set[str]) -> None:
    """Raise BadInput if the checkpoint lacks weights, which transformers would initialise randomly."""
    if missing:
        raise BadInput(
            f"the checkpoint of {name} lacks {len(missing)} weights of the model, first {min(missing)}",
            field="model",
            value=name,
            fix="is it complete?",
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and log lines in the body."""
    root, bars = transformers_logging.get_logger("transformers"), transformers_logging.is_progress_bar_enabled()
    levels, propagates = [(handler, handler.level) for handler in root.handlers], root.propagate
    # Changing a logger's level clears the level cache of every logger, twice per block; handlers have no such cache.
    for handler, level in levels:
        handler.setLevel(max(level, logging.ERROR))
    root.propagate = False
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader's progress bar cannot be disabled.
        with redirect_stderr(StringIO()):
            yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)
        root.propagate = propagates
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def explained(location: Location, fix: str | None = None) -> Iterator[None]:
    """Convert transformers' errors about unusable files to a one-line BadInput. fix: a possible fix."""
    try:
        with panics_caught():
            yield
    except ImportError as error:
        extra = "gguf" if isinstance(location, GgufFile) else "images"
        known = extra == "gguf" or any(package in str(error) for package in ("timm", "torchvision", "PIL"))
        install = f"install it with `pip install 'coprune[{extra}]'`" if known else "install it"
        missing = f"{location.name} needs a package that is missing ({_first_line(error)})"
        raise BadInput(missing, field="model", value=location.name, fix=install) from error
    except (CopruneError, MemoryError):
        raise
    except Exception as error:  # damaged files can raise anything: struct.error, IndexError, SafetensorError …
        raise BadInput(
            f"{location.name} cannot be loaded by transformers: {_first_line(error)}",
            field="model",
            value=location.name,
            fix=fix,
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error, or all lines if the first only introduces the rest."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return " ".join([first, *more]) if first.endswith(":") else first


def _arguments(location: Location) -> tuple[Path, dict[str, str]]:
    """Return transformers' arguments for a folder and a file in it."""
    if isinstance(location, GgufFile):
        return location.path.parent, {"gguf_file": gguf_parts(location.path)[0].name}
    return location.path, {}


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """Return the name of a dtype that weights may have."""
    names: dict[torch.dtype, DtypeName] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[dtype]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode in the body; restore each module's mode afterwards."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
