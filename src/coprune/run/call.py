"""A call from Python, read: the recipe that it asks for, and what it hands over beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, unknown_name
from coprune.base.words import say
from coprune.data.given import given_samples
from coprune.model.checkpoint.weights import InMemory
from coprune.model.opened import Loaded, refuse_what_loading_decides, require_processor
from coprune.pruning.methods import Method, find_method, is_option, option_names
from coprune.pruning.methods.given import choice_of
from coprune.recipe.choice import Choice
from coprune.recipe.flat import FLAT, PARTS, PRESET, TRAIN, is_setting, layered
from coprune.recipe.presets import preset_settings, usual_preset
from coprune.recipe.recipe import Recipe, make_recipe
from coprune.run.given import Given
from coprune.run.usual import recipe_that_fits

Named = str | Mapping[str, Any] | Choice
"""Something by name, perhaps with options: `owl:spread=0.1`, or `{"name": "owl", "spread": 0.1}`."""
_PROCESSORS = ("tokenizer", "image_processor")
_DEFAULT_METHOD = "wanda"


def read_call(
    model: str | Path | PreTrainedModel,
    method: Named | Method | type[Method] | None,
    preset: str | None,
    processor: Any,
    settings: Mapping[str, Any],
    prunes: bool = False,
) -> tuple[Recipe, Given]:
    """Turn a call's arguments into a recipe; what is said by itself wins over the preset.

    prunes: whether a call that says nothing of how to prune takes the preset that a bare run has.

    Raises:
        BadInput: something is unknown, said twice, or of the wrong kind.
    """
    said = {name: value for name, value in settings.items() if name not in _PROCESSORS}
    for name in _PROCESSORS:
        processor = settings[name] if settings.get(name) is not None else processor
    loaded = None if isinstance(model, str | Path) else _in_memory(model, processor, said)
    named, given = (method, None) if method is None or isinstance(method, str | Mapping | Choice) else choice_of(method)
    usual = {} if preset is None else preset_settings(preset, train=said.get(TRAIN))
    chosen = named if named is not None else usual.get("method", _DEFAULT_METHOD)
    own = None if isinstance(chosen, Choice) and chosen.is_given else options_of(chosen)
    by_call = ({} if named is None else {"method": named}) | sort_options(said, own)
    # Where nothing is saved, the model in memory is what a call is for.
    usual_stream = None if said.get("save_model") is not None else False
    base = {"stream": usual_stream, "model": str(model) if loaded is None else loaded.source, PRESET: preset}
    asked: Mapping[str, Any] = layered(base, given_samples(said.get("dataset")), by_call)
    if not prunes:
        return make_recipe(asked), Given(loaded, given)
    line = None
    if preset is None:
        asked, line = usual_preset({name: value for name, value in asked.items() if name != PRESET})
    # What trains a whole model leaves folders, which a call that names none does not want.
    keeps = loaded is None and any(said.get(name) is not None for name in ("save", "save_model", "output"))
    return recipe_that_fits(asked, in_memory=not keeps), Given(loaded, given, None if line is None else say(line))


def options_of(method: Named) -> set[str]:
    """The names of a method's own options. Raises BadInput for an unknown method."""
    return {field.name for field in dataclasses.fields(find_method(Choice.of(method).name))}


def sort_options(settings: Mapping[str, Any], own: set[str] | None) -> dict[str, Any]:
    """Put a method's options among plain settings under `options`; those of another method are left to it to refuse.

    Args:
        settings: by name.
        own: the names of the method's options; None if it was handed over with all that it has.

    Raises:
        BadInput: a name is neither a setting's nor an option's; with the nearest match.
    """
    for name in settings:
        if not is_setting(name) and (own is None or (name not in own and not is_option(name))):
            raise unknown_name("setting", name, [*FLAT, *PARTS, *(() if own is None else option_names())], field=name)
    # A part of the recipe may be called like an option (selection), but is a mapping, which no option is.
    options = {
        name: value
        for name, value in settings.items()
        if not is_setting(name) or (own is not None and name in own and not isinstance(value, Mapping | BaseModel))
    }
    rest = {name: value for name, value in settings.items() if name not in options}
    return layered({"options": options}, rest) if options else rest


def _in_memory(model: Any, processor: Any, settings: Mapping[str, Any]) -> Loaded:
    _refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise BadInput(
            f"a {type(model).__name__} is no model of transformers",
            field="model",
            fix="give one, which says what its blocks are and how it is saved, or the name of one",
        )
    refuse_what_loading_decides(settings)
    require_processor(processor)
    return Loaded(InMemory(model), processor, model.name_or_path or type(model).__name__, False)


def _refuse_adapters(model: Any) -> None:
    """Raise BadInput if there are adapters of PEFT on a model: their matrices would be pruned as if they were its own."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    # What PEFT puts in a layer's place keeps the layer under this name.
    adapted = [name for name, module in modules if hasattr(module, "base_layer") and hasattr(module, "active_adapters")]
    if adapted:
        raise BadInput(
            f"there are adapters on the model ({len(adapted)} layers, first {adapted[0]}), whose matrices are none of it",
            field="model",
            fix="merge them into it first, with PEFT's merge_and_unload()",
        )
