"""Views of prunable weights as out × in matrices; only this module knows how layers store them.

`nn.Linear` stores out × in, `Conv1D` in × out, a convolution out × channels × kernel height × kernel width, and a mixture of
experts a 3-D parameter with one matrix per expert, out × in or in × out, or a table of all experts' rows. Whether a 3-D
parameter is a mixture is known when its products are observed (`coprune.model.matrix_choice`). A convolution is a matrix if its
positions do not overlap: 1 × 1, or patches (stride equals kernel). Its inputs are then a patch's values, channel by channel.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from coprune.base.devices import in_host_memory
from coprune.model.transformers_private import Conv1D, experts_of, input_first

LEAST_SPARSITY = 0.05
"""Minimum share of zeros for a matrix to count as pruned."""


@dataclass(frozen=True)
class Matrix:
    """A prunable weight: its owner and its storage. Parameters are looked up on use, since a streamed block gets new ones each
    time it is loaded.
    """

    name: str
    """Path of the parameter without `.weight`; an expert's number in brackets: `…mlp.experts.down_proj[3]`."""
    owner: nn.Module
    attribute: str
    input_dim: int
    """Dimension of the stored 2-D weight that runs over the inputs: 1 for out × in, 0 for in × out."""
    expert: int | None = None
    experts: int | None = None
    """Number of experts whose matrices are rows of one table; None if the parameter has a dimension for them."""

    def stored(self) -> Tensor:
        """Return the 2-D weight as stored, a view of the parameter."""
        return self.part_of(getattr(self.owner, self.attribute).detach())

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this matrix's part of a tensor shaped like its parameter: 2-D, a view."""
        if self.expert is None:
            return whole.view(whole.shape[0], -1) if whole.ndim > 2 else whole
        return self.stack_of(whole)[self.expert]

    def stack_of(self, whole: Tensor) -> Tensor:
        """View a tensor shaped like the experts' parameter with the experts as its first dimension."""
        return whole if self.experts is None else whole.unflatten(0, (self.experts, -1))

    @property
    def stacked(self) -> int:
        """For an expert, the number of experts in its parameter."""
        return len(self.stack_of(getattr(self.owner, self.attribute)))

    @property
    def parameter(self) -> str:
        """Path of its parameter; for an expert, the parameter of all experts."""
        of_a_layer = self.expert is None and not self.is_of_heads
        return f"{self.name}.{self.attribute}" if of_a_layer else self.name.partition("[")[0]

    @property
    def is_of_heads(self) -> bool:
        """Whether it is a parameter of three dimensions: inputs × heads × width of a head."""
        return self.expert is None and self.attribute != "weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        stored = self.stored()
        return stored.shape[1 - self.input_dim], stored.shape[self.input_dim]

    def view(self) -> Tensor:
        """Return the weight as out × in, a view of the parameter."""
        return self._out_by_in(self.stored())

    def gradient(self) -> Tensor:
        """Return the parameter's gradient as out × in, a view."""
        return self._out_by_in(self.part_of(getattr(self.owner, self.attribute).grad))

    def _out_by_in(self, stored: Tensor) -> Tensor:
        return stored if self.input_dim == 1 else stored.T

    def read(self) -> Tensor:
        """Return the weight as out × in float32, a copy."""
        return self.view().to(torch.float32, copy=True).contiguous()

    def write(self, weight: Tensor) -> None:
        """Store an out × in weight in place, rounded to the model's dtype; zeros stay zeros."""
        stored = self.stored()
        with torch.no_grad():
            stored.copy_(weight if self.input_dim == 1 else weight.T)

    def zeros(self) -> int:
        """Return the number of entries that are exactly zero."""
        stored = self.stored()
        return stored.numel() - int(torch.count_nonzero(stored))

    def mask_checksum(self) -> str:
        """Return `mask_checksum` of the stored weight."""
        return mask_checksum(self.stored())


def mask_checksum(stored: Tensor) -> str:
    """Return the CRC-32 of a weight's zero mask, 8 hex digits."""
    return checksum_of(mask_bits(stored).cpu())


def mask_bits(stored: Tensor) -> Tensor:
    """Return one bit per entry, 1 if nonzero, highest bit first (uint8, on the weight's device)."""
    kept = stored != 0
    if in_host_memory(kept.device):
        return torch.from_numpy(np.packbits(kept.numpy()))
    padded = torch.nn.functional.pad(kept.reshape(-1), (0, -kept.numel() % 8))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=kept.device)
    return (padded.view(-1, 8).to(torch.uint8) << places).sum(dim=1, dtype=torch.uint8)


def checksum_of(bits: Tensor) -> str:
    """Return the checksum of `mask_bits` in host memory."""
    return f"{zlib.crc32(bits.numpy().tobytes()):08x}"


def find_matrices(root: nn.Module, prefix: str = "") -> Iterator[Matrix]:
    """Yield every weight below `root` that can be viewed as out × in matrices, in module order.

    This includes slices of 3-D parameters, whether or not they turn out to be experts.
    """
    for path, module in root.named_modules():
        name = ".".join(part for part in (prefix, path) if part)
        if isinstance(module, nn.Linear):
            yield Matrix(name, module, "weight", input_dim=1)
        elif isinstance(module, Conv1D):
            yield Matrix(name, module, "weight", input_dim=0)
        elif isinstance(module, _ConvNd):
            if why_no_matrix(module) is None:
                yield Matrix(name, module, "weight", input_dim=1)
        else:
            yield from _find_experts(module, name)


def why_no_matrix(convolution: _ConvNd) -> str | None:
    """Return why a convolution is not a matrix, or None if it is."""
    kernel, stride = tuple(convolution.kernel_size), tuple(convolution.stride)
    if convolution.groups > 1:
        return "depth-wise" if convolution.groups == convolution.in_channels else "a grouped convolution"
    if not isinstance(convolution, nn.Conv2d):
        return f"a convolution in {len(kernel)} dimension{'s' if len(kernel) > 1 else ''}"
    if convolution.padding not in ("valid", (0, 0)) and kernel != (1, 1):
        return "a convolution with padding"
    if kernel not in ((1, 1), stride) or tuple(convolution.dilation) != (1, 1):
        return "a convolution whose positions overlap"
    return None


def _find_experts(module: nn.Module, name: str) -> Iterator[Matrix]:
    """Yield the slices of a module's 3-D parameters, if they are more than vectors.

    A parameter that maps the model's width to heads of the same total width (XLNet's) is yielded as one matrix.
    """
    stacks = {
        attribute: parameter
        for attribute, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point() and min(parameter.shape[1:]) > 1
    }
    of_heads = [a for a, stack in stacks.items() if len(stack) == stack[0].numel() and a != "weight"]
    for attribute in of_heads:
        del stacks[attribute]
        yield Matrix(_below(name, attribute), module, attribute, input_dim=0)
    input_dim = 0 if _are_transposed(module, list(stacks.values())) else 1
    for attribute, parameter in stacks.items():
        for expert in range(parameter.shape[0]):
            yield Matrix(f"{_below(name, attribute)}[{expert}]", module, attribute, input_dim, expert)
    yield from _find_rows_of_experts(module, name)


def _below(name: str, attribute: str) -> str:
    """Return the path of a module's parameter. name: the module's path, which may be empty."""
    return f"{name}.{attribute}" if name else attribute


def _find_rows_of_experts(module: nn.Module, name: str) -> Iterator[Matrix]:
    """Yield the experts of tables with all experts' rows: one row per intermediate channel, which the last table maps back.

    A wrong guess is detected when the products are observed.
    """
    experts = experts_of(module)
    tables = {attribute: table for attribute, table in module.named_parameters(recurse=False) if table.ndim == 2}
    shapes = {table.shape for table in tables.values()}
    if (
        experts is None
        or len(tables) < 2
        or len(shapes) > 1
        or any(rows % experts or rows == experts for rows, _ in shapes)
    ):
        return
    *_, back = tables
    for attribute in tables:
        input_dim = 0 if attribute == back else 1
        for expert in range(experts):
            yield Matrix(f"{_below(name, attribute)}[{expert}]", module, attribute, input_dim, expert, experts)


def _are_transposed(module: nn.Module, stacks: Sequence[Tensor]) -> bool:
    """Return whether a module's experts are stored in × out, which transformers declares for most mixtures.

    Otherwise the first of two products (hidden to intermediate) must fit the second. A wrong guess is detected when the
    products are observed.
    """
    said = input_first(module)
    if said is not None or len(stacks) != 2:
        return bool(said)
    (_, a, b), (_, c, d) = stacks[0].shape, stacks[1].shape
    return a == d and b != c


def embeddings_and_head(model: PreTrainedModel) -> list[nn.Module]:
    """Return a model's input embeddings and its head, as far as it has them."""
    found = list[nn.Module | None]()
    for module_of in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # raised by models without tokens
            found.append(module_of())
    return [module for module in found if module is not None]
