"""A linear layer that keeps its weight packed in memory and multiplies from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from coprune.base.errors import BadInput
from coprune.base.native.product import NativeMatrix
from coprune.packed.format import check_packed
from coprune.packed.header import Header, read_header
from coprune.packed.operator import (
    Weight,
    dense_matrix,
    for_kernels,
    native_matrix,
    pack_matrix,
    packed_linear,
    row_starts,
)
from coprune.packed.two_of_four import stores_two_of_four


class PackedLinear(nn.Module):
    """`nn.Linear` whose weight is one buffer, `packed` (uint8); `weight` unpacks a fresh dense copy on every access.

    Products on the CPU in float32 and bfloat16 use the native kernels; on CUDA, where that is faster, few inputs use Triton and
    many with a 2:4 weight torch's semi-structured product. All others multiply by a temporary unpacked copy. torch.compile,
    torch.export and autograd see one operator (packed/operator).
    """

    packed: Tensor
    starts: Tensor
    """Number of values before each row."""
    bias: Tensor | None

    def __init__(self, packed: Tensor, bias: Tensor | None = None) -> None:
        """Wrap a packed two-dimensional weight, in either layout. Raises BadInput on damage. bias: O, on its device, or None."""
        super().__init__()
        check_packed(packed.cpu())
        self._finish(packed, bias)

    def _finish(self, packed: Tensor, bias: Tensor | None) -> None:
        in_host_memory = for_kernels(packed.cpu())  # where its bytes can be read one by one
        self.header = read_header(in_host_memory)
        self.two_of_four = stores_two_of_four(in_host_memory, self.header)
        self.out_features, self.in_features = self.header.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise BadInput(f"a bias of the shape {tuple(bias.shape)} does not fit {self.out_features} outputs")
        self.register_buffer("packed", in_host_memory.to(packed.device))
        self.register_buffer("starts", row_starts(in_host_memory, self.header).to(packed.device), persistent=False)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self._native: NativeMatrix | None = None
        self._prepared = False

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self | None:
        """Pack a linear layer (its weight is copied); None where packing would not make it smaller."""
        packed = pack_matrix(linear.weight)
        if packed is None:
            return None
        made = cls(packed, linear.bias)
        made.packed = made.packed.to(linear.weight.device)
        made.starts = made.starts.to(linear.weight.device)
        return made

    def to_linear(self) -> nn.Linear:
        """Return an ordinary layer with the same weight, bit for bit."""
        weight = self.weight
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = _frozen(weight)
        linear.register_parameter("bias", None if self.bias is None else _frozen(self.bias))
        return linear.train(self.training)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are not stored."""
        return 1 - self.header.kept / self.header.numel

    def forward(self, x: Tensor) -> Tensor:
        """Multiply … × I to … × O, in x's dtype."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return packed_linear(x, self._weight())
        # torch's operator dispatch costs some microseconds, a good part of a small product.
        native = self._native if self._prepared else self._prepare()
        if native is None or x.dtype != native.dtype or x.device != native.blob.device:
            return packed_linear(x, self._weight())
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"the input's last dimension is {x.shape[-1]}; this layer takes {self.in_features}.")
        return native.product(x)

    def _weight(self) -> Weight:
        header = self.header
        return Weight(self.packed, self.starts, self.bias, header.shape[1], header.dtype, self.two_of_four)

    def _prepare(self) -> NativeMatrix | None:
        self._native = native_matrix(self.packed, self.starts, self.header, self.bias)
        if self._native is not None:
            self._buffers["packed"] = self._native.blob
        self._prepared = True
        return self._native

    def __getattr__(self, name: str) -> Any:
        # A property would keep transformers from loading a buffer of this name (see PackedSlot). Called only where
        # nn.Module finds nothing else.
        if name == "weight" and "packed" in self.__dict__.get("_buffers", {}):
            return dense_matrix(self.packed, self.header)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepared, self._native = False, None  # its pointers are those of the old place
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Another pattern has another length, which nn.Module would refuse to copy.
        loaded = state_dict.get(prefix + "packed")
        if loaded is not None:
            header = check_packed(loaded.cpu())
            if header.shape != (self.out_features, self.in_features):
                raise BadInput(f"a packed weight of {header.shape} does not fit this layer")
            loaded = for_kernels(loaded.cpu())
            self.header = read_header(loaded)
            self.two_of_four = stores_two_of_four(loaded, self.header)
            self._buffers["packed"] = loaded.to(self.packed.device, copy=True)
            self._buffers["starts"] = row_starts(loaded, self.header).to(self.packed.device)
            state_dict = {**state_dict, prefix + "packed": loaded}
        self._prepared, self._native = False, None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # Pointers must not be copied or pickled.
        return {**self.__dict__, "_prepared": False, "_native": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.header.dtype}, sparsity={self.sparsity:.2f}"
        )


class PackedSlot(PackedLinear):
    """A PackedLinear before its weight is there: a `weight` buffer on the meta device for transformers to fill."""

    def __init__(self, header: Header, linear: nn.Linear) -> None:
        """Reserve a place for a packed weight of the layer's shape. header: of the packed weight."""
        nn.Module.__init__(self)
        self.expected = header
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.empty(header.total_bytes, dtype=torch.uint8, device="meta"))
        self.register_parameter("bias", linear.bias)

    def fill(self) -> None:
        """Become a PackedLinear, once the weight is loaded; it was checked in the file.

        Raises BadInput if the weight's header is not the expected one, the only one compared with the layer.
        """
        packed = self._buffers.pop("weight")
        assert packed is not None
        if read_header(packed.cpu()) != self.expected:
            raise BadInput(f"the loaded packed tensor is not the expected one of shape {self.expected.shape}")
        del self.expected
        self.__class__ = PackedLinear  # type: ignore[assignment]  # in place: hooks and references stay
        self._finish(packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, not loaded"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def pack_linears(model: nn.Module, select: Callable[[str, nn.Linear], bool] | None = None) -> list[str]:
    """Replace, in place, the linear layers that packing makes smaller.

    select: which of them (name, layer) to consider; all if None. Layers whose weight another module shares (tied
    embeddings) stay as they are. Returns the names of the replaced layers.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    replaced = []
    for name, module in list(model.named_modules()):
        # Subclasses of nn.Linear may compute something else.
        if type(module) is not nn.Linear or owners[id(module.weight)] > 1 or (select and not select(name, module)):
            continue
        packed = PackedLinear.from_linear(module)
        if packed is not None:
            model.set_submodule(name, packed.train(module.training))
            replaced.append(name)
    return replaced
