"""A device other than the CPU for tests: `xpu:0`, whose tensors are computed in host memory.

As strict as CUDA here: the host cannot read its bytes, and an operation takes tensors of a single device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

OTHER = torch.device("xpu", 0)
_ON_THE_HOST = ("numpy", "data_ptr", "__array__")


class OtherTensor(Tensor):
    """A tensor of the device."""


class OtherDevice(TorchFunctionMode):
    """While active, `OTHER` can be used as a device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, OtherTensor) for tensor in tensors)
        with torch._C.DisableTorchFunctionSubclass():
            if there and name in _ON_THE_HOST:
                raise TypeError(f"can't convert {OTHER} device type tensor to numpy. Use Tensor.cpu() first")
            if there and function == Tensor.device.__get__:
                return OTHER
            if name in ("to", "cpu", "copy_"):
                return self._moved(function, tensors[0], args[1:], kwargs)
            if there and any(not isinstance(tensor, OtherTensor) and tensor.ndim for tensor in tensors):
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
            found = function(*tree_map(_named_cpu, args), **tree_map(_named_cpu, kwargs))
            there = there or OTHER in [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
            return tree_map(_placed, found) if there else found

    def _moved(self, function: Any, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        named = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device | str)]
        here = not named and function.__name__ != "cpu" and isinstance(tensor, OtherTensor)
        moved: Tensor = function(tensor, *tree_map(_named_cpu, args), **tree_map(_named_cpu, kwargs))
        like = any(isinstance(leaf, OtherTensor) for leaf in tree_leaves((args, kwargs))) and function.__name__ == "to"
        if here or like or any(torch.device(name) == OTHER for name in named):
            return moved.as_subclass(OtherTensor)
        return moved.as_subclass(Tensor)


def _named_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value == OTHER else value


def _placed(value: Any) -> Any:
    return value.as_subclass(OtherTensor) if isinstance(value, Tensor) else value
