"""Decoding with a compiled step: one graph for a token per sequence, on a cache whose size is fixed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput


def compile_decoding(model: nn.Module) -> Callable[[], None]:
    """Compile the step that makes one token per sequence; prompts are read as ever.

    The model's own `generate` uses it, since its cache is of fixed size from now on (transformers' StaticCache). The first
    token waits for the compiler, once for each batch size and length of the cache. Packed weights stay packed: their product
    is one operator in the graph.

    Args:
        model: a language model of transformers, for inference; changed in place. What is compiled is not saved with it.

    Returns:
        A function that undoes it.

    Raises:
        BadInput: it is no model of transformers that writes text.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise BadInput(
            f"{type(model).__name__} does not write text by transformers' generate",
            fix="without it, torch.compile(model) takes packed layers as they are",
        )
    own, eager = vars(model).get("forward"), cast(Any, model.forward)
    compiled: Any = torch.compile(eager, fullgraph=True, dynamic=False)

    attention = model.config._attn_implementation
    # One query against a short cache: on a CPU the compiler's own sums take a third of what a call of torch's attention does.
    # Prompts keep theirs, whose memory does not grow with the square of their length.
    of_the_step = "eager" if attention == "sdpa" and in_host_memory(model.device) else attention

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        step = _is_step(args, kwargs)
        wanted = of_the_step if step else attention
        if model.config._attn_implementation != wanted:
            model.set_attn_implementation(wanted)
        return (compiled if step else eager)(*args, **kwargs)

    settings = model.generation_config
    assert settings is not None
    before = settings.cache_implementation, settings.disable_compile
    # On a GPU transformers would compile once more around what is compiled here.
    settings.cache_implementation, settings.disable_compile = "static", True
    model.forward = forward

    def undo() -> None:
        settings.cache_implementation, settings.disable_compile = before
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        del model.forward  # the class's own is behind it
        if own is not None:
            model.forward = own

    return undo


def _is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether one token per sequence is read, with a cache of fixed size."""
    ids = args[0] if args else kwargs.get("input_ids")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    return isinstance(ids, Tensor) and ids.shape[-1] == 1 and isinstance(cache, StaticCache)
