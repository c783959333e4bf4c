"""Add the keys that `config.json` had before transformers 5, for readers that know only those.

mlx-lm, for example, silently uses a default if `rope_theta` is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE, _THETA, _LOCAL = "rope_parameters", "rope_theta", "rope_local_base_freq"
_PARTIAL = "partial_rotary_factor"
_WIDE, _NARROW = "full_attention", "sliding_attention"


def add_older_keys(config: dict[str, Any]) -> None:
    """Add older key names to the content of `config.json`, in place; existing keys stay."""
    for part in (config, *(value for key, value in config.items() if key.endswith("_config"))):
        if isinstance(part, dict):
            _add(part)
    if isinstance(config.get("dtype"), str):
        config.setdefault("torch_dtype", config["dtype"])


def _add(config: dict[str, Any]) -> None:
    rope = config.get(_ROPE)
    if not isinstance(rope, Mapping):
        return
    by_kind = {kind: own for kind, own in rope.items() if isinstance(own, Mapping) and _THETA in own}
    if set(by_kind) == {_WIDE, _NARROW}:
        config.setdefault(_LOCAL, by_kind[_NARROW][_THETA])
        rope = by_kind[_WIDE]
    if _THETA not in rope:
        return
    config.setdefault(_THETA, rope[_THETA])
    if _PARTIAL in rope:
        config.setdefault(_PARTIAL, rope[_PARTIAL])
