"""What PEFT calls things, and the folder of a model's that an adapter lies in."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
"""The folder in a model's that holds what is added to its layers, in PEFT's own format."""
ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT calls the configuration of an adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""What it calls the file with its tensors."""


@cache
def tell_of_adapter(folder: Path) -> None:
    """Say once that a folder's weights are read without what is added to them, which they may count on."""
    if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
        logger.warning("%s is left out: %s is read without it", folder / ADAPTER_FOLDER, folder)
