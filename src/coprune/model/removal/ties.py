"""Experts between which a router does not decide: a smaller model takes those that the whole one took.

Among router values that are equal, or equal but for rounding, `topk` of fewer values takes others, and tokens go to other
experts though every weight is right. Who compares a smaller model with the whole one lets it follow there, nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coprune.model.removal.routing import forward_as

_ROUNDING, _ROUNDING_OF_HALVES = 3e-4, 2e-2
"""Of the largest value of a token."""
_Seen = Callable[[str, Tensor, Any], Any]
"""Given the block, the values that are chosen from, and what `topk` returned, gives what it returns instead."""


class Ties:
    """What the whole model chose, block by block, for the smaller one to follow.

    kept: numbers of the experts that are left, by the block's name in the whole model; dtype: of both models.
    """

    def __init__(self, kept: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self._kept = kept
        self._rounding = _ROUNDING if dtype.itemsize >= 4 else _ROUNDING_OF_HALVES
        self._chosen: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in kept}

    @contextmanager
    def noted(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """For a while, note what the whole model's blocks choose. blocks: by name."""
        with _seeing({name: module for name, module in blocks.items() if name in self._kept}, self._note):
            yield

    @contextmanager
    def followed(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """For a while, let the smaller model's blocks choose the same where that is as good. blocks: as in `noted`."""
        with _seeing({name: module for name, module in blocks.items() if name in self._kept}, self._follow):
            yield

    def _note(self, block: str, values: Tensor, found: Any) -> Any:
        self._chosen[block].append((values.shape[-1], found.indices))
        return found

    def _follow(self, block: str, values: Tensor, found: Any) -> Any:
        if not self._chosen[block]:
            return found
        width, index = self._chosen[block].pop(0)
        kept = self._kept[block]
        if values.shape[-1] != width and values.shape[-1] == len(kept):
            number = torch.full((width,), -1, device=index.device)
            number[list(kept)] = torch.arange(len(kept), device=index.device)
            index = number[index]
        index = index.to(values.device)
        if index.shape != found.indices.shape or int(index.max()) >= values.shape[-1]:
            return found
        other = values.gather(-1, index.clamp_min(0))
        scale = values.masked_fill(~values.isfinite(), 0).abs().amax(dim=-1, keepdim=True)
        apart = (other.sort(dim=-1).values - found.values.sort(dim=-1).values).abs()
        tied = ((index >= 0) & (apart <= self._rounding * scale)).all(dim=-1, keepdim=True)
        return type(found)((torch.where(tied, other, found.values), torch.where(tied, index, found.indices)))


class _Choosing(TorchFunctionMode):
    """While active, the largest values along the last dimension may be others."""

    def __init__(self, change: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func not in (torch.topk, Tensor.topk):
            return result
        values: Tensor = args[0] if args else given["input"]
        dim = given.get("dim", args[2] if len(args) > 2 else -1)
        largest = given.get("largest", args[3] if len(args) > 3 else True)
        return self._change(values, result) if largest and dim in (-1, values.ndim - 1) else result


@contextmanager
def _seeing(blocks: Mapping[str, nn.Module], see: _Seen) -> Iterator[None]:
    """For a while, show what blocks choose with `topk`."""

    def shown(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Choosing(lambda values, found: see(name, values, found)):
                return own(*args, **kwargs)

        return forward

    with ExitStack() as ended:
        for name, module in blocks.items():
            ended.enter_context(forward_as(module, shown(name, module.forward)))
        yield
