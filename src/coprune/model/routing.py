"""Routing in a mixture of experts: exclude experts, and repeat choices in a smaller model.

A removed expert is never chosen, and the gates of the others are as if it did not exist. In memory this is done by setting the
router's logits of removed experts to minus infinity. Where router values are equal up to rounding, `topk` of fewer values may
choose differently; a smaller model that is compared with the whole one follows its choice there, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coprune.model.walk.observe import PRODUCTS


class OtherLogits(TorchFunctionMode):
    """While active, changes the results of products with one value per expert: a router's logits."""

    def __init__(self, experts: int, change: Callable[[Tensor], Tensor]) -> None:
        """Wrap a router. change: replaces T × E logits."""
        super().__init__()
        self._experts, self._change = experts, change

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and isinstance(result, Tensor) and result.ndim > 0 and result.shape[-1] == self._experts:
            return self._change(result)
        return result


class NeverChosen:
    """A router's forward in which some experts cannot be chosen."""

    def __init__(self, router: nn.Module, keep: Tensor, vectors: Sequence[tuple[nn.Module, str]]) -> None:
        """Exclude experts. keep: E bool; vectors: modules and names of tensors added to the experts' logits or scores."""
        before = router.forward
        self._forward: Callable[..., Any] = before._forward if isinstance(before, NeverChosen) else before
        self._keep, self._vectors = keep, vectors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for owner, name in self._vectors:
            values: Tensor = getattr(owner, name).data
            values.masked_fill_(~self._keep.to(values.device), -torch.inf)
        with OtherLogits(len(self._keep), self._masked):
            return self._forward(*args, **kwargs)

    def _masked(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self._keep.to(logits.device), -torch.inf)


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward in the body."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward")
        else:
            vars(module)["forward"] = before


_ROUNDING, _ROUNDING_OF_HALVES = 3e-4, 2e-2
"""Tolerance relative to a token's largest value."""
_Seen = Callable[[str, Tensor, Any], Any]
"""Takes the block, the values to choose from and the result of `topk`; returns the result to use instead."""


class Ties:
    """The experts that the whole model chose, block by block, for the smaller one to follow.

    kept: numbers of the kept experts, by the block's name in the whole model; dtype: of both models.
    """

    def __init__(self, kept: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self._kept = kept
        self._rounding = _ROUNDING if dtype.itemsize >= 4 else _ROUNDING_OF_HALVES
        self._chosen: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in kept}

    @contextmanager
    def noted(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Record the choices of the whole model's blocks in the body. blocks: by name."""
        with _seeing({name: module for name, module in blocks.items() if name in self._kept}, self._note):
            yield

    @contextmanager
    def followed(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Make the smaller model's blocks repeat the choices where scores are tied, in the body. blocks: as in `noted`."""
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
    """While active, changes the result of `topk` along the last dimension."""

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
    """Observe the choices of blocks by `topk` in the body."""

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
