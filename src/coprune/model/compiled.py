"""Decoding with a compiled step: one graph for a token per sequence, on a cache whose size is fixed."""

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
    """Compile the step that makes one token per sequence; prompts are read as ever.

    The model's own `generate` uses it, since its cache is of fixed size from now on (transformers' StaticCache). The first
    token waits for the compiler, once for each batch size and length of the cache, until torch compiles no more of them (eight);
    steps of further ones are computed as ever.

    Args:
        model: a language model of transformers, for inference; changed in place. What is compiled is not saved with it.

    Returns:
        A function that undoes it.

    Raises:
        BadInput: it is no model of transformers that writes text.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise BadInput(f"{type(model).__name__} does not write text by transformers' generate")
    own, attention, settings = vars(model).copy(), model.config._attn_implementation, model.generation_config
    assert settings is not None
    before = settings.cache_implementation, settings.disable_compile
    # On a GPU transformers would compile again around this.
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
                del vars(model)[name]  # the class's own is behind it

    return undo


def _saving(model: PreTrainedModel, settings: GenerationConfig, before: tuple[Any, Any]) -> Callable[..., Any]:
    """Return the model's save_pretrained with the original settings, since nothing is compiled elsewhere."""
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
    """Return the model's forward, with a compiled one for steps. attention: the implementation for prompts."""
    eager = cast(Any, model.forward)
    compiled = _while_torch_compiles(torch.compile(eager, fullgraph=True, dynamic=False))
    # One query against a short cache: on a CPU the compiler's own sums take a third of what a call of torch's attention does.
    # Prompts keep theirs, whose memory does not grow with the square of their length.
    of_the_step = "eager" if attention == "sdpa" and in_host_memory(model.device) else attention

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if _is_step(args, kwargs):
            _attend(model, of_the_step)
            return compiled(*args, **kwargs)
        _attend(model, attention)
        found = eager(*args, **kwargs)
        if isinstance(_cache(kwargs), StaticCache):
            _attend(model, of_the_step)  # generate makes the next step's mask before it calls, and masks differ
        return found

    return forward


def _while_torch_compiles(compiled: Any) -> Callable[..., Any]:
    """Wrap a compiled function so that it runs eagerly after torch's recompilation limit, at which torch would raise."""
    is_full = False

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_full
        if not is_full:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # before anything was computed
                is_full = True
                logger.warning(
                    "torch compiles a step for so many batch sizes and lengths of the cache, and not for more: others are slower"
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
    """Return whether a call reads one token per sequence with a static cache and a mask for any attention."""
    ids = args[0] if args else kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    masks = mask.values() if isinstance(mask, dict) else [mask]
    # A 4-D bool mask is for torch's attention; others would add it to their scores.
    if any(isinstance(one, Tensor) and one.ndim == 4 and one.dtype == torch.bool for one in masks):
        return False
    return isinstance(ids, Tensor) and ids.shape[-1] == 1 and isinstance(_cache(kwargs), StaticCache)
