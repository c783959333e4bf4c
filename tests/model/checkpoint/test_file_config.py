"""Changes of a configuration, applied to its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Mamba2Config

from coprune.model.checkpoint.file_config import changes_in_file
from coprune.model.transformers_private import config_of


def test_a_file_with_infinities_is_read(tmp_path: Path) -> None:
    """transformers writes infinities as JSON objects, for example in the time steps of state-space models."""
    config = Mamba2Config(num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["time_step_limit"] != list(config.time_step_limit)

    def read(changed: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = config_of(Mamba2Config, changed).to_dict()
        return found

    assert changes_in_file(content, config, {"num_hidden_layers": 2}, read) == {"num_hidden_layers": 2}
