"""A tiny random model of any class of transformers' Auto mappings."""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from families.shrink import tiny_config

Kind = Literal["text", "images", "masked", "labels", "embeddings", "seq2seq", "speech", "seeing"]
AUTO: dict[Kind, Any] = {
    "text": AutoModelForCausalLM,
    "images": AutoModelForImageClassification,
    "masked": AutoModelForMaskedLM,
    "labels": AutoModelForSequenceClassification,
    "embeddings": AutoModel,
    "seq2seq": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
    "seeing": AutoModelForImageTextToText,
}
_NAMES: dict[Kind, Any] = {
    "text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "images": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "labels": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "seeing": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
DEFAULT_IMAGE_SIZE = 64
CLASSES = 10


def all_types(kind: Kind) -> dict[str, str]:
    """Return every model type of an Auto class with the name of its class (the first of several)."""
    if kind == "embeddings":  # of text, including those with a head
        heads = [*_NAMES["masked"], *_NAMES["labels"], *_NAMES["text"]]
        names = {name: MODEL_MAPPING_NAMES[name] for name in dict.fromkeys(heads) if name in MODEL_MAPPING_NAMES}
    else:
        names = _NAMES[kind]
    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in names.items()}


def image_size(config: Any) -> int:
    """Return the height and width of a tiny classifier's images."""
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    return size if isinstance(size, int) else DEFAULT_IMAGE_SIZE


_PUBLISHED = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


def published_class(model_type: str, kind: Kind) -> str:
    """Return the class name of a type's published checkpoints: the whole model, whose text model may be one half."""
    names = [] if kind != "text" else [names[model_type] for names in _PUBLISHED if model_type in names]
    found = [name if isinstance(name, str) else name[0] for name in names]
    return found[0] if found else all_types(kind)[model_type]


def published_model(model_type: str, kind: Kind, config: Any = None) -> PreTrainedModel:
    """Build a tiny model of that class with random weights. config: its configuration, by default `tiny_config`."""
    named: Any = getattr(transformers, published_class(model_type, kind))
    config = config or tiny_config(model_type)
    if kind != "text" or named.config_class is not type(config):
        return tiny_model(model_type, kind)
    torch.manual_seed(0)
    model: PreTrainedModel = named._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0.0, 0.1)
    return model.eval().requires_grad_(False)


def tiny_model(model_type: str, kind: Kind, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model, in evaluation mode, with random weights large enough that every block matters."""
    config = tiny_config(model_type)
    config.architectures = [all_types(kind)[model_type]]  # selects the class if a type has several
    if kind == "labels" and getattr(text := config.get_text_config(), "pad_token_id", 0) is None:
        text.pad_token_id = 0  # otherwise texts cannot be classified in batches
    if kind == "images":
        config.id2label = {number: str(number) for number in range(CLASSES)}
        config.label2id = {str(number): number for number in range(CLASSES)}
    torch.manual_seed(seed)
    model: PreTrainedModel = AUTO[kind].from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in (model._keys_to_ignore_on_save or ()):
                continue  # a table that the model computes
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0.0, 0.1)
            elif "gamma" in name or "scale" in name or "lambda" in name:
                parameter.fill_(1.0)  # some start at zero or a millionth, which would hide every block
            elif kind == "images" and name.endswith("bias"):
                parameter.normal_(0.0, 0.1).abs_()  # otherwise channels are zero for every image, and scores are equal
    return model.eval().requires_grad_(False)
