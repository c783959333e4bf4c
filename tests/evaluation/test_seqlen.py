"""The default length of samples: the model's positions, up to 2048."""

from __future__ import annotations

from typing import Any

import pytest

from coprune.base.errors import BadInput
from coprune.evaluation.tasks.text_task import choose_seqlen
from support.pico import pico_model


def model_of(limit: int) -> Any:
    model = pico_model("llama")
    model.config.max_position_embeddings = limit
    return model


@pytest.mark.parametrize(("limit", "chosen"), [(128, 128), (4096, 2048), (-1, 2048)])
def test_the_default_length_is_the_models_limit_up_to_2048(limit: int, chosen: int) -> None:
    assert choose_seqlen(model_of(limit), None) == chosen
    assert choose_seqlen(model_of(limit), 32) == 32


def test_a_length_above_the_models_limit_is_refused() -> None:
    with pytest.raises(BadInput, match="seqlen 129 is above this model's limit of 128 positions"):
        choose_seqlen(model_of(128), 129)
