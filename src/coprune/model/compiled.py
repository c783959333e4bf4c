"""Decode with a compiled step: one graph that computes a token per sequence, with a cache of fixed size."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StaticCache

from coprune.base.devices import in_host_memory
from coprune.base.errors import BadInput

logger = logging.getLogger(__name__)


def compile_decoding(model: nn.Module) -> Callable[[], None]:
    """Compile the step that decodes one token per sequence; prompts run as before.

    The model's own `generate` uses it, since its cache then has a fixed size (transformers' StaticCache). The first token waits
    for the compiler, once for each batch size and cache length, up to torch's limit (eight); steps for further combinations
    are not compiled.

    Args:
        model: a transformers language model, for inference; changed in place. The compiled code is not saved with it.

    Returns:
        A function that undoes the change.

    Raises:
        BadInput: it is not a transformers model that generates text.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise BadInput(f"{type(model).__name__} does not generate text with transformers' generate")
    own, attention, settings = vars(model).copy(), model.config._attn_implementation, model.generation_config
    assert settings is not None
    before = settings.cache_implementation, settings.disable_compile
    # Else transformers would compile around this again on a GPU.
    settings.cache_implementation, settings.disable_compile = "static", True
    changed: dict[str, Callable[..., Any]] = {
        "forward": _stepping(model, attention),
        "save_pretrained": _saving(model, settings, before),
    }
    vars(model).update(changed)

    def undo() -> None:
        settings.cache_implementation, settings.disable_compile = before
        _attend(model, attention)
        for name in changed:
            if name in own:
                vars(model)[name] = own[name]
            else:
                del vars(model)[name]  # uncovers the class's own

    return undo


def _saving(model: PreTrainedModel, settings: GenerationConfig, before: tuple[Any, Any]) -> Callable[..., Any]:
    """Return a save_pretrained that saves the original settings, since the saved model is not compiled."""
    own = cast(Any, model.save_pretrained)

    @functools.wraps(own)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        now = settings.cache_implementation, settings.disable_compile
        settings.cache_implementation, settings.disable_compile = before
        try:
            return own(*args, **kwargs)
        finally:
            settings.cache_implementation, settings.disable_compile = now

    return save_pretrained


def _stepping(model: PreTrainedModel, attention: str) -> Callable[..., Any]:
    """Return the model's forward with compiled steps. attention: the implementation for prompts."""
    eager = cast(Any, model.forward)
    compiled = _while_torch_compiles(torch.compile(eager, fullgraph=True, dynamic=False))
    # For one query and a short cache on a CPU, compiled eager attention takes a third of the time of torch's attention. Prompts
    # keep theirs, whose memory does not grow with the square of the length.
    of_the_step = "eager" if attention == "sdpa" and in_host_memory(model.device) else attention

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _is_step(args, kwargs):
            _attend(model, of_the_step)
            return compiled(*args, **kwargs)
        _attend(model, attention)
        found = eager(*args, **kwargs)
        if isinstance(_cache(kwargs), StaticCache):
            _attend(model, of_the_step)  # generate makes the next mask before calling, for this implementation
        return found

    return forward


def _while_torch_compiles(compiled: Any) -> Callable[..., Any]:
    """Wrap a compiled function to run eagerly beyond torch's recompilation limit, where torch would raise."""
    is_full = False

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_full
        if not is_full:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # before anything was computed
                is_full = True
                logger.warning(
                    "torch compiles steps for a limited number of batch sizes and cache lengths; others are slower"
                )
        with torch.compiler.set_stance("eager_on_recompile"):
            return compiled(*args, **kwargs)

    return step


def _attend(model: PreTrainedModel, implementation: str) -> None:
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _cache(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call computes one token per sequence, with a static cache and a mask that suits any attention."""
    ids = args[0] if args else kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    masks = mask.values() if isinstance(mask, dict) else [mask]
    # A 4-D bool mask only suits torch's attention; others would add it to the scores.
    if any(isinstance(one, Tensor) and one.ndim == 4 and one.dtype == torch.bool for one in masks):
        return False
    return isinstance(ids, Tensor) and ids.shape[-1] == 1 and isinstance(_cache(kwargs), StaticCache)
