"""The fields of a checkpoint's `quantization_config` that decoding needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from coprune.base.errors import BadInput
from coprune.base.validation import explain

Count = Annotated[StrictInt, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Weights(_Part):
    """Storage of the weights of a group of layers (compressed-tensors, ModelOpt)."""

    num_bits: Count | None = None
    group_size: StrictInt | None = None
    block_structure: tuple[Count, Count] | None = None


class Group(_Part):
    """Layers that are stored alike."""

    weights: Weights | None = None


class Quantization(_Part):
    """What a configuration says about the storage of weights; other keys are ignored."""

    quant_method: StrictStr | None = None
    quant_algo: StrictStr | None = None
    weight_block_size: tuple[Count, Count] | None = None
    config_groups: dict[str, Group] | None = None
    bits: Count | None = None
    w_bit: Count | None = None
    version: StrictStr | None = None
    checkpoint_format: StrictStr | None = None

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Quantization:
        """Validate a `quantization_config`. Raises BadInput, naming the key, for a value of the wrong kind."""
        try:
            return cls.model_validate(dict(said))
        except ValidationError as error:
            found = explain(error).within("quantization_config of config.json")
            raise BadInput(found.cause, fix="fetch or save the checkpoint again") from error

    @property
    def weights(self) -> list[Weights]:
        """The storage of each group's weights."""
        return [group.weights for group in (self.config_groups or {}).values() if group.weights is not None]

    @property
    def block(self) -> tuple[int, int]:
        """Rows × columns that share one scale, used where the shape of the scales is ambiguous."""
        if self.weight_block_size is not None:
            return self.weight_block_size
        for weights in self.weights:
            if weights.block_structure is not None:
                return weights.block_structure
            if weights.group_size is not None and weights.group_size > 0:
                return 1, weights.group_size
        return 128, 128
