"""Models without weights: their parameters are on the meta device, and their buffers are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.big_modeling import init_empty_weights
from torch.overrides import TorchFunctionMode

_DRAWN = {"normal_", "uniform_", "kaiming_uniform_"}
"""Names of functions of torch and of `torch.nn.init` that fill a tensor with random values."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Build models without weights in the body, without drawing random values first."""
    with init_empty_weights(include_buffers=False), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Skips random initialisation of meta tensors, for which torch would still slowly derive shapes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in _DRAWN:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
