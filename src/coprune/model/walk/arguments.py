"""Recorded arguments as values: copy their containers, compare them, and keep equal tensors only once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def snapshot(value: Any) -> Any:
    """Copy the containers of a value (not its tensors), so that what a model does to them later is not seen."""
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(snapshot(item) for item in value)
    # Not only dict: transformers passes keys and values that layers share in a mapping of its own.
    return _mapped(value, snapshot) if isinstance(value, MutableMapping) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _mapped(value: MutableMapping[Any, Any], change: Callable[[Any], Any]) -> MutableMapping[Any, Any]:
    """A copy of a mapping of any kind with its items changed."""
    changed = copy.copy(value)
    for key, item in value.items():
        changed[key] = change(item)
    return changed


def in_float32(value: Any) -> Any:
    """Copy a value with its half-precision tensors in float32; containers of other kinds are copied as they are."""
    if isinstance(value, Tensor):
        return value.to(torch.float32) if value.dtype in (torch.float16, torch.bfloat16) else value
    if type(value) in (tuple, list):
        return type(value)(in_float32(item) for item in value)
    return _mapped(value, in_float32) if isinstance(value, MutableMapping) else value


def same_value(a: Any, b: Any, ignored: Container[int] = ()) -> bool:
    """Whether two recorded arguments are the same: equal tensors, equal containers of such, or equal plain values.

    Objects of other kinds (a configuration, a function) count as the same if they are of one type.

    Args:
        a: what was recorded.
        b: likewise.
        ignored: ids of tensors in `a` that may be missing or others in `b`.
    """
    ours = list(tensors_in(a)) if ignored else []
    if ours and all(id(tensor) in ignored for tensor in ours):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [key for key in a if key in b or not same_value(a[key], None, ignored)]
        return b.keys() <= a.keys() and all(key in b and same_value(a[key], b[key], ignored) for key in keys)
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(same_value(*pair, ignored) for pair in zip(a, b, strict=True))
    if type(a) is not type(b):
        return False
    return a == b if isinstance(a, bool | int | float | str | type(None)) else True


class TensorPool:
    """Keeps one copy of equal tensors, since most batches get the same masks and position tables.

    Only tensors that were seen at the same place of an earlier call are compared, so this costs little.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}
        self._known: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by identity; holds the tensor, so that its id stays its own

    def forget_batch(self) -> None:
        """Let go of the identities of one batch's tensors."""
        self._known.clear()

    def share(self, value: Any) -> Any:
        """Return the value with every tensor replaced by the kept equal one."""
        if isinstance(value, Tensor):
            return self._share_tensor(value)
        if isinstance(value, dict):
            return {key: self.share(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        return value

    def _share_tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        key = (tensor.shape, tensor.dtype, tensor.device)
        candidates = self._kept.setdefault(key, [])
        kept = next((other for other in candidates if torch.equal(other, tensor)), None)
        if kept is None:
            kept = tensor
            candidates.append(tensor)
        self._known[id(tensor)] = (tensor, kept)
        return kept
