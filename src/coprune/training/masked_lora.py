"""LoRA whose update is masked: W + s·(B A) ⊙ keep, so that merging it keeps every zero.

Where LoRA adds a product of its own beside the layer's, a masked update has to be formed before the product: the layer
multiplies once with W + s·(B A) ⊙ keep, which rank r makes cheap to form. Its gradient needs (∂L/∂W) ⊙ keep, which is
computed some rows at a time and folded into those of A and B at once, so that nothing of the size of W is kept between
layers, let alone in the optimiser. The mask is where W is not zero, which stays as it is while W is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from coprune.model.transformers_private import Conv1D

_ROW_VALUES = 2**22  # of the dense gradient at a time: 16 MiB in float32


@dataclass
class MaskedLoraConfig(LoraConfig):
    """PEFT's configuration of LoRA, with the masks that the update goes with.

    Saved in the same file; PEFT alone warns of the unknown field and would add the update without its mask.
    """

    coprune_masks: str | None = field(default=None, metadata={"help": "Fingerprint of the masks of the base model."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})


class MaskedLinear(LoraLinear):
    """PEFT's LoRA layer with a masked update; one adapter at a time."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update as it is merged, in the layout of the weight and, as it is formed in a forward, in its own dtype."""
        delta: Tensor = super().get_delta_weight(adapter)
        base: Any = self.get_base_layer()
        return delta.masked_fill_(base.weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer with its update (B × S × in → B × S × out)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if len(active) > 1 or kwargs.get("adapter_names") is not None:
            raise ValueError("masked adapters work one at a time; set_adapter one of them.")
        base: Any = self.get_base_layer()
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        a, b = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        product: Tensor = MaskedProduct.apply(  # type: ignore[no-untyped-call, unused-ignore]
            x.to(dtype), weight, a, b, self.scaling[active[0]]
        )
        return product if base.bias is None else product + base.bias.to(dtype)


class MaskedProduct(torch.autograd.Function):
    """x ↦ x (W + s·(B A) ⊙ keep)ᵀ with gradients for x, A and B; W (out × in) is frozen, keep is where it is not 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        with torch.autocast(x.device.type, enabled=False):
            return x @ masked_weight(weight, a, b, scaling).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        gradient = gradients[0]
        # Formed once more rather than kept, which would take a second copy of the model.
        needed = ctx.needs_input_grad[0]
        x_gradient = gradient @ masked_weight(weight, a, b, ctx.scaling).to(x.dtype) if needed else None
        outputs, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        a_gradient, b_gradient = torch.zeros_like(a), torch.empty_like(b)
        step = max(1, _ROW_VALUES // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            dense = (outputs[:, rows].T @ inputs).to(a.dtype).mul_(weight[rows] != 0)
            torch.mm(dense, a.T, out=b_gradient[rows])
            a_gradient.addmm_(b[rows].T, dense)
        return x_gradient, None, a_gradient.mul_(ctx.scaling), b_gradient.mul_(ctx.scaling), None


def masked_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + s·(B A) ⊙ keep, out × in. weight: out × in; a: rank × in; b: out × rank."""
    # Multiplying by the mask is vectorised, which filling by it is not: seven times as fast on a CPU.
    update = torch.mm(b, a).mul_(weight != 0)
    return torch.add(weight, update, alpha=scaling)
