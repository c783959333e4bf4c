"""Compile the simulated device, once per version of its sources, of PyTorch and of the compiler."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from coprune.base import environment
from coprune.base.native.cache import library_in

SOURCES = Path(__file__).parent
# Not optimised, since it only passes tensors to PyTorch's operators.
FLAGS = ("-std=c++20", "-O0", "-w", "-fPIC", "-shared")
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")


def missing() -> str | None:
    """Return why the device cannot be simulated here, or None."""
    if sys.platform != "linux":
        return "the simulated device needs Linux"
    if compiler() is None:
        return "the simulated device needs a C++ compiler (g++, clang++ or CXX)"
    if not (_python_headers() / "Python.h").exists():
        return "the simulated device needs Python's headers"
    return None


def compiler() -> str | None:
    """Return the C++ compiler: CXX, or the first that is installed."""
    return next((c for c in (environment.named_compiler(), "c++", "g++", "clang++") if c and shutil.which(c)), None)


def load_library() -> ctypes.CDLL:
    """Load the compiled device, which registers its backend with PyTorch."""
    found = compiler()
    assert found is not None, missing()
    digest = hashlib.sha256(repr((found, version("torch"), sys.version_info[:2], FLAGS)).encode())
    for path in (*sorted(SOURCES.glob("*.h")), SOURCES / "device.cpp"):
        digest.update(path.read_bytes())
    folder = environment.kernel_cache() / "simulated-device" / digest.hexdigest()[:16]
    with library_in(folder, lambda path: _compile(found, path)) as library:
        return ctypes.CDLL(str(library))


def _compile(compiler: str, library: Path) -> None:
    torch = find_spec("torch")
    assert torch is not None
    assert torch.submodule_search_locations
    home = Path(torch.submodule_search_locations[0])
    folders = (home / "include", home / "include/torch/csrc/api/include", _python_headers())
    include = [f"-I{folder}" for folder in folders]
    source = str(SOURCES / "device.cpp")
    command = [compiler, *FLAGS, *include, source, "-o", str(library), f"-L{home / 'lib'}", *LIBRARIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{compiler} could not compile the simulated device: {done.stderr.strip()[-2000:]}")


def _python_headers() -> Path:
    return Path(sysconfig.get_paths()["include"])
