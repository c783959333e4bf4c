"""Compilation of the CPU kernels on first use, into the user's cache.

The sources have a plain C interface and include nothing of PyTorch or Python: they compile in about three seconds and do
not depend on the ABI of a PyTorch version. Without a compiler, torch alone is used. Environment: COPRUNE_KERNELS=0
disables them, COPRUNE_CACHE sets the folder, CXX names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from coprune.base import environment
from coprune.base.native.cache import library_in

SOURCES = Path(__file__).parent
# The kernels are vectors already; packing their scalar pointers into vectors as well costs a third of the speed.
BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-tree-slp-vectorize")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mbmi2", "-mpopcnt")
AVX512_FLAGS = (*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# One object per instruction set, so that none of its instructions can reach a processor that lacks them.
PORTABLE_UNITS: dict[str, tuple[str, ...]] = {"dispatch": (), "portable": ()}
X86_UNITS: dict[str, tuple[str, ...]] = {
    "dispatch": ("-DCOPRUNE_X86",),
    "portable": (),
    "avx2": ("-DCOPRUNE_X86", *AVX2_FLAGS),
    "avx512": ("-DCOPRUNE_X86", *AVX512_FLAGS),
    "avx512_bf16": ("-DCOPRUNE_X86", *AVX512_FLAGS, "-mavx512bf16"),
}
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")

logger = logging.getLogger(__name__)


class CompilationFailed(Exception):
    """No usable compiler was found; the message says why."""


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None (with one log message) if disabled or not compilable."""
    if not environment.wants_native_kernels():
        return None
    try:
        compiler, units = _compiler()
        folder = environment.kernel_cache() / "kernels" / _digest(compiler, units)
        with library_in(folder, functools.partial(_run_compiler, compiler, units)) as path:
            return _declared(ctypes.CDLL(str(path)))
    except (CompilationFailed, OSError, AttributeError) as error:
        logger.warning("native kernels are not available, so this will be slower: %s", error)
        return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the functions' argument types. Raises AttributeError if one is missing."""
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.coprune_update_columns.argtypes = [pointer, integer]
    library.coprune_update_columns.restype = integer
    library.coprune_gram_scratch.argtypes = [wide, wide]
    library.coprune_gram_scratch.restype = wide
    library.coprune_gram.argtypes = [pointer, integer]
    library.coprune_gram.restype = None
    library.coprune_set_parallel.argtypes = [pointer]
    library.coprune_set_parallel.restype = None
    library.coprune_set_parallel(_openmp_parallel())
    return library


def instruction_set() -> str:
    """Return the name of the kernels in use: portable, avx2, avx512, avx512_bf16, or none."""
    library = load_kernels()
    return "none" if library is None else LEVELS[library.coprune_level()]


def _openmp_parallel() -> int | None:
    """Return the address of GOMP_parallel in PyTorch's OpenMP runtime; None (one thread) without one."""
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("lib*omp*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


def _compiler() -> tuple[str, dict[str, tuple[str, ...]]]:
    """Return the compiler and its flags for this processor. Raises CompilationFailed without one."""
    compiler = next((c for c in (environment.named_compiler(), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        raise CompilationFailed("no C++ compiler was found; install g++ or clang++, or set CXX")
    return compiler, X86_UNITS if platform.machine().lower() in ("x86_64", "amd64") else PORTABLE_UNITS


def _digest(compiler: str, units: dict[str, tuple[str, ...]]) -> str:
    """Hash everything that the compiled library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((compiler, version, BASE_FLAGS, units, platform.machine())).encode())
    for path in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run_compiler(compiler: str, units: dict[str, tuple[str, ...]], library: Path) -> None:
    folder, running = library.parent, []
    for name, flags in units.items():
        source, target = str(SOURCES / f"{name}.cpp"), str(folder / f"{name}.o")
        command = [compiler, *BASE_FLAGS, *flags, "-c", source, "-o", target]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode != 0:
            raise CompilationFailed(f"{compiler} failed: {error.strip()[:500]}")
    objects = [str(folder / f"{name}.o") for name in units]
    command = [compiler, "-shared", *objects, "-o", str(library)]
    link = subprocess.run(command, capture_output=True, text=True, check=False)
    if link.returncode != 0:
        raise CompilationFailed(f"{compiler} could not link: {link.stderr.strip()[:500]}")
