"""llama.cpp's converter for model folders, if installed: it creates the template of an export.

The converter is a script in llama.cpp's repository, not part of the gguf package. It runs in a separate process without
network access and reads only the folder's data, never its code.
"""

from __future__ import annotations

import importlib.util
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from coprune.base.environment import expand_home, llama_cpp_place, program_folders, whole_environment
from coprune.base.errors import BadInput
from coprune.base.progress import Reporter
from coprune.base.words import Setting, Words
from coprune.model.checkpoint.digest import bytes_of_weights
from coprune.model.checkpoint.locate import ModelFolder

SCRIPT = "convert_hf_to_gguf.py"
_MODULE = "convert_hf_to_gguf"
_PROGRAMS = ("llama-quantize", "llama-cli", "llama-server")
_ABOVE = 4
"""Number of parent folders of llama.cpp's programs that are searched for its checkout, as in llama.cpp/build/bin/Release."""
_LEFT_OUT = (".py", ".pyc", ".gguf", ".bin", ".pt", ".pth")
_SECONDS, _BYTES_A_SECOND = 600, 10_000_000
_SHOWN = 3000
"""Number of characters of the converter's output to show if it fails."""
_MISSING = re.compile(r"No module named '([\w.]+)'")


def find_converter(named: str | Path | None = None) -> Path | None:
    """Find the script: where named, in `$LLAMA_CPP`, on the PATH, in a package, or above llama.cpp's programs.

    Args:
        named: the script or its folder.

    Raises:
        BadInput: it is not in the named place.
    """
    said = named or llama_cpp_place()
    if said:
        path = expand_home(said)
        script = path / SCRIPT if path.is_dir() else path
        if not script.is_file():
            where = Setting("converter") if named else "LLAMA_CPP"
            fix = ("give the path of llama.cpp's ", SCRIPT, ", or of the folder that holds it, with ", where)
            raise BadInput(f"there is no {script}", field="converter", value=str(said), fix=fix)
        return script
    places = [folder / SCRIPT for folder in program_folders()]
    if (module := importlib.util.find_spec(_MODULE)) is not None and module.origin is not None:
        places.append(Path(module.origin))
    for program in filter(None, map(shutil.which, _PROGRAMS)):
        places += [folder / SCRIPT for folder in Path(program).resolve().parents[:_ABOVE]]
    return next((place for place in places if place.is_file()), None)


def no_template(folder: Path, name: str) -> BadInput:
    """Return the error for a model folder with neither a named GGUF file nor a converter."""
    base = _base_model(folder)
    of = f" of its base model: https://huggingface.co/models?other=base_model:quantized:{base}" if base else ""
    fix: Words = (
        "name any GGUF file of the same source model, in any type, with ",
        Setting("like"),
        f" (the Hub lists those{of or ' of most models, in repositories whose names end with -GGUF'}), or with ",
        Setting("converter"),
        f" the path of llama.cpp's {SCRIPT}",
    )
    cause = f"it is unknown which GGUF file {name} was made from, and one is needed for its metadata and tokenizer"
    return BadInput(cause, field="like", fix=fix)


def _base_model(folder: Path) -> str | None:
    """Return the model that a folder's card names as its base."""
    try:
        named: Any = (metadata_load(folder / "README.md") or {}).get("base_model")
    except (OSError, ValueError, AttributeError):  # no card, or not a valid one
        return None
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first.count("/") == 1 and not Path(first).exists() else None


def convert(converter: Path, folder: ModelFolder, target: Path, reporter: Reporter) -> None:
    """Convert a folder to a 16-bit GGUF file.

    Args:
        converter: llama.cpp's script.
        folder: the model.
        target: the file to write.
        reporter: shows the converter's output if it fails.

    Raises:
        BadInput: the converter rejects this model; its last line is in the message.
    """
    size = bytes_of_weights(folder.path)
    with tempfile.TemporaryDirectory(prefix="coprune-convert-") as temporary:
        seen = Path(temporary, Path(folder.name).name or "model")
        seen.mkdir()
        for file in folder.path.iterdir():
            if file.is_file() and file.suffix.lower() not in _LEFT_OUT:
                (seen / file.name).symlink_to(file.resolve())
        command = [sys.executable, str(converter), str(seen), "--outfile", str(target), "--outtype", "auto"]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(Path(temporary, "hub"))}
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_SECONDS + size / _BYTES_A_SECOND,
                env=whole_environment() | offline,
                preexec_fn=partial(_limit, 3 * size + (1 << 30)),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _failed(converter, folder, f"it took more than {error.timeout:.0f} seconds") from error
    if done.returncode != 0 or not target.is_file():
        said = done.stdout.replace(str(seen), str(folder.path))
        reporter.say(said[-_SHOWN:].strip())
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), None)
        raise _failed(converter, folder, last or f"exit code {done.returncode}")


def _limit(nbytes: int) -> None:
    """Limit the size of the converter's output; runs in its process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _failed(converter: Path, folder: ModelFolder, why: str) -> BadInput:
    cause = f"{converter} cannot convert {folder.name}: {why}"
    missing = _MISSING.search(why)
    like: Words = ("name a GGUF file of the same source model with ", Setting("like"))
    fix = like if missing is None else f"pip install {missing[1]}"
    return BadInput(cause, field="converter", value=str(converter), fix=fix)
