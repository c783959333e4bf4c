"""A model's origin (base model and licence) according to its card, configuration or GGUF metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from coprune.base.data_packages import carried_file
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.model.checkpoint.companions import CARD_FILE
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.checkpoint.glance import PACKAGED
from coprune.model.transformers_private import NAME_IN_CONFIG

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = "https://huggingface.co/"


def _one(value: Any) -> Any:
    """Return the first of several values: a card may name one base model or a list."""
    return value[0] if isinstance(value, list) and value else value


Said = Annotated[Annotated[str, Field(max_length=200)] | None, BeforeValidator(_one)]


class Origin(BaseModel):
    """Where a model comes from, as far as its files say."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    base_model: Said = None
    license: Said = None
    license_name: Said = None
    license_link: Said = None

    def licence(self) -> dict[str, str]:
        """Return the fields of a card that name the licence."""
        said = self.model_dump(include={"license", "license_name", "license_link"}, exclude_none=True)
        return said if self.license is not None else {}


def origin_of(model: str, cache_dir: Path | None = None) -> Origin:
    """Read a model's origin from its files; empty if they are damaged or not on this machine.

    model, cache_dir: as in `locate`.
    """
    path, packaged = expand_home(model), PACKAGED.get(model)
    if packaged is not None and not path.exists():
        carried = carried_file(packaged.package, packaged.file)
        path, model = carried or path, packaged.hub_id
    if path.is_file():
        return _of_gguf(path)
    card = path / CARD_FILE if path.is_dir() else _cached(model, CARD_FILE, cache_dir)
    config = path / "config.json" if path.is_dir() else None
    said = _front(card)
    base = _name_in(config) or said.get("base_model")
    return _read({**said, "base_model": base})


def _of_gguf(path: Path) -> Origin:
    try:
        fields = gguf_reader(path, "model").fields
    except BadInput:
        return Origin()
    names = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    found = {ours: fields[f"general.{own}"].contents() for ours, own in names.items() if f"general.{own}" in fields}
    if (address := fields.get("general.base_model.0.repo_url")) is not None:
        found["base_model"] = str(address.contents()).removeprefix(_ADDRESS)
    return _read(found)


def _front(card: Path | None) -> dict[str, Any]:
    """Return the metadata at the top of a card."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card) if card is not None and card.is_file() else None
    except Exception:  # a foreign file can make the YAML reader raise anything
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def _name_in(config: Path | None) -> str | None:
    """Return the Hub id in a configuration, or None."""
    try:
        name = None if config is None else json.loads(config.read_bytes()).get(NAME_IN_CONFIG)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _cached(name: str, file: str, cache_dir: Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, cache_dir)
    except ValueError:  # not a valid Hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _read(said: Mapping[str, Any]) -> Origin:
    """Validate the fields, dropping invalid ones."""
    found: dict[str, Any] = {}
    for name in Origin.model_fields:
        try:
            found[name] = getattr(Origin.model_validate({name: said.get(name)}), name)
        except ValidationError:
            continue
    return Origin(**found)
