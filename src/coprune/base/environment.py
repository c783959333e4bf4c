"""The only module that reads or sets environment variables."""

from __future__ import annotations

import functools
import gc
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coprune.base.errors import BadInput


def require_posix() -> None:
    """Raise BadInput on Windows, which lacks the file locks that protect a run's folders."""
    if sys.platform == "win32":
        raise BadInput("coprune runs on Linux and macOS", fix="on Windows, install it in WSL, the Linux of Windows")


@contextmanager
def importing() -> Iterator[None]:
    """Disable garbage collection while libraries are imported in the body, which saves a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def rank() -> int:
    """Return this process's rank under torchrun or accelerate (RANK); 0 without them."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of processes that torchrun or accelerate started (WORLD_SIZE); 1 without them."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return this process's rank on its machine (LOCAL_RANK), the index of its GPU."""
    return _number("LOCAL_RANK", 0)


def asks_for_fsdp() -> bool:
    """Return whether accelerate was asked to shard parameters over the processes (ACCELERATE_USE_FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def whole_environment() -> dict[str, str]:
    """Return the variables of this process, for a program that it starts."""
    return dict(os.environ)


def user_cache() -> Path:
    """Return the folder for cached files: `coprune` in XDG_CACHE_HOME or ~/.cache.

    Without a writable home, as in some containers, it is a temporary folder.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "coprune"
    try:
        found = Path.home() / ".cache" / "coprune"
        above = next(folder for folder in (found, *found.parents) if folder.exists())
    except (RuntimeError, OSError):
        return _temporary_cache()
    return found if above.is_dir() and os.access(above, os.W_OK | os.X_OK) else _temporary_cache()


def kernel_cache() -> Path:
    """Return the folder of compiled kernels (COPRUNE_CACHE), by default the user's cache."""
    named = os.environ.get("COPRUNE_CACHE")
    return Path(named) if named else user_cache()


def wants_native_kernels() -> bool:
    """Return whether compiled kernels may be used; COPRUNE_KERNELS=0 disables them."""
    return os.environ.get("COPRUNE_KERNELS") != "0"


def named_compiler() -> str | None:
    """Return the C++ compiler from CXX."""
    return os.environ.get("CXX") or None


def datasets_cache() -> str | None:
    """Return the user's folder for the Hub's datasets, or None."""
    return os.environ.get("HF_DATASETS_CACHE")


def llama_cpp_place() -> str | None:
    """Return the user's location of llama.cpp (LLAMA_CPP), or None."""
    return os.environ.get("LLAMA_CPP")


def program_folders() -> list[Path]:
    """Return the folders on the search path of programs."""
    return [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]


def wandb_project() -> str:
    """Return the Weights & Biases project from WANDB_PROJECT."""
    return os.environ.get("WANDB_PROJECT", "coprune")


def visible_gpus() -> list[str]:
    """Return the visible GPUs by number or name (CUDA_VISIBLE_DEVICES); empty if unset."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def see_only(gpu: str) -> None:
    """Make only one GPU visible to this process; call it before any is used."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def quieten_libraries() -> None:
    """Silence warnings, transformers' notes and, unless the user set TOKENIZERS_PARALLELISM, that of forked tokenizers."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def keep_ray_private() -> None:
    """Disable Ray's usage statistics (RAY_USAGE_STATS_ENABLED), unless the user set it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def keep_ray_at_our_priority() -> None:
    """Run Ray's workers at normal priority (RAY_worker_niceness), unless the user set it."""
    os.environ.setdefault("RAY_worker_niceness", "0")


@contextmanager
def accelerate_told(device: str) -> Iterator[None]:
    """Make accelerate, which moves models for the Trainer, use this device if it is set up in the body."""
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        yield
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def expand_home(name: str | Path) -> Path:
    """Return a path with `~` expanded, or unchanged if there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def usable_cores() -> int:
    """Return the cores that this process may use, which a batch system may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    import importlib.metadata  # slow, and not needed by `import coprune`

    try:
        return _version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # only installed packages; others may still be fetched
def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def typed_command() -> str | None:
    """Return the command line of this process, or None if coprune was called from Python."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    ours = program.name == "coprune" or (program.name == "__main__.py" and program.parent.name == "coprune")
    return shlex.join(["coprune", *sys.argv[1:]]) if ours else None


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise BadInput(f"the environment variable {name} is {value!r}", fix="it should be a number") from None


@functools.cache
def _temporary_cache() -> Path:
    """Return a folder that only this user can write to, since compiled code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"coprune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid == os.getuid() and found.st_mode & 0o022 == 0 and not folder.is_symlink():
        return folder
    return Path(tempfile.mkdtemp(prefix="coprune-"))
