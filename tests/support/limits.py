"""The lowest memory limit under which a process still starts."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

IMPORTED = (
    "import torch, transformers.models.llama.modeling_llama; from pathlib import Path;"
    "from coprune.base.memory import _numbers; print(_numbers(Path('/proc/self/status'))['VmData'])"
)


@cache
def data_of_imports() -> int:
    """Return the bytes of data of Python with its libraries: 0.4 GB, or 0.9 if torch was built for GPUs."""
    return int(subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True).stdout)
